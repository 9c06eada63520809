"""An image model under DeepSpeed's launcher: two ranks, killed with -9, end in the bits of an untouched run."""

import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.house import lmtrain
from tests.spawn import free_port
from tests.test_launch import BIN, environment, logged, rows, tensors

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "gated_pixelcnn-tiny-digits.yaml"
FOREVER = 10**6
SMALL = [
    "model.layers=2",
    "model.width=8",
    "model.head_width=8",
    "model.first_kernel=3",
    "data.global_batch=8",
    "data.micro_batch=2",
    "train.log_every=1",
    "train.save_every=3",
    "train.eval_every=0",
    "schedule.kind=constant",  # the rate of a step does not depend on how many there will be
    "eval.max_symbols=640",
    "wandb.mode=disabled",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the digits prepared."""
    folder = tmp_path_factory.mktemp("images")
    ran = lmtrain("prepare", CONFIG, f"data.corpus={folder / 'digits'}")
    assert ran.code == 0, ran.err
    return folder


def launch(place, name, stage, *, steps):
    """`deepspeed --num_gpus 2 --module lmtrain train CONFIG`, in a session of its own; its words go to a file."""
    command = [BIN / "deepspeed", "--num_gpus", 2, "--master_port", free_port(), "--module", "lmtrain", "train", CONFIG]
    command += [*SMALL, f"data.corpus={place / 'digits'}", f"run.dir={place / 'runs'}", f"run.name={name}"]
    command += [f"engine.zero_stage={stage}", f"train.steps={steps}"]
    with (place / f"{name}.log").open("ab") as log:
        return subprocess.Popen(
            list(map(str, command)), env=environment(), stdout=log, stderr=log, start_new_session=True
        )


def ended(child, place, name):
    """The exit code, waited for at length; the log when it does not come."""
    try:
        return child.wait(900)
    except subprocess.TimeoutExpired:
        pytest.fail((place / f"{name}.log").read_text()[-4000:])


def below(child):
    """The launcher's processes, itself among them."""
    try:
        launcher = psutil.Process(child.pid)
        return [*launcher.children(recursive=True), launcher]
    except psutil.NoSuchProcess:
        return []


def ranks_of(processes):
    """Those that DeepSpeed started as ranks."""
    found = []
    for process in processes:
        with suppress(psutil.Error):
            if any(word.startswith("--local_rank=") for word in process.cmdline()):
                found.append(process)
    return found


def newest(folder):
    """Step of the last checkpoint that is whole; 0 when there is none."""
    return max((int(p.name.removeprefix("step-")) for p in (folder / "checkpoints").glob("step-????????")), default=0)


def killed(place, name, stage, *, victims):
    """Start the run, kill -9 one rank or all processes when it has saved again and gone on; the step last saved."""
    folder = place / "runs" / name
    before = newest(folder)
    child = launch(place, name, stage, steps=FOREVER)
    everyone = []
    try:
        until = time.monotonic() + 900
        while newest(folder) <= before or logged(folder) <= newest(folder):
            assert child.poll() is None, (place / f"{name}.log").read_text()[-4000:]
            assert time.monotonic() < until, (place / f"{name}.log").read_text()[-4000:]
            time.sleep(0.01)
        everyone = below(child)
        ranks = ranks_of(everyone)
        assert len(ranks) == 2
        for process in ranks[-1:] if victims == "a rank" else everyone:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        assert ended(child, place, name) != 0
        _, alive = psutil.wait_procs(everyone, timeout=300)
        assert not alive, "a rank outlived its launcher"
        return newest(folder)
    finally:
        for process in {*everyone, *below(child)}:
            with suppress(psutil.NoSuchProcess):
                process.kill()


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("stage", "kills"), [(1, ["a rank", "everything"]), (2, ["a rank"]), (3, ["everything"])], ids=["1", "2", "3"]
)
def test_killed_and_resumed_it_is_bit_equal(place, stage, kills):
    name, whole = f"killed{stage}", place / "runs" / f"whole{stage}"
    folder = place / "runs" / name
    began = [killed(place, name, stage, victims=victims) for victims in kills]
    assert 0 < began[0] <= began[-1]
    assert len(set(began)) == len(kills)
    last = began[-1] + 4
    for which in (name, whole.name):
        child = launch(place, which, stage, steps=last)
        assert ended(child, place, which) == 0, (place / f"{which}.log").read_text()[-4000:]
    assert list(rows(folder, "load")) == began
    assert list(rows(folder)) == list(range(1, last + 1))
    keys = ("batch", "train/loss", "train/grad_norm", "train/lr")
    curves = [[[row[key] for key in keys] for row in rows(run).values()] for run in (folder, whole)]
    assert curves[0] == curves[1]
    assert rows(folder, "eval")[last]["eval/valid/loss"] == rows(whole, "eval")[last]["eval/valid/loss"]
    assert tensors(folder, last) == tensors(whole, last)
    assert len(tensors(whole, last)) > 10
