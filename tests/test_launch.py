"""Ranks started the ways users start them, killed and stopped for real; their numbers against the plain engine."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.house import config, lmtrain
from tests.spawn import free_port

pytestmark = pytest.mark.slow

STEPS = 12
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def place(trained, tmp_path_factory):
    """A config on the tiny corpus with every kind of noise on, and the plain engine's losses."""
    folder = tmp_path_factory.mktemp("launch")
    train = {"steps": STEPS, "eval_every": 6, "save_every": 3}
    model = {"dropout": 0.1}
    data = {"corpus": str(trained / "corpus"), "micro_batch": 2}
    path = config(folder, train=train, model=model, data=data)
    ran = lmtrain("train", path, "run.name=plain")
    assert ran.code == 0, ran.err
    return folder


def environment(**more):
    """This process's variables with nothing of a launcher in them."""
    mine = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "OMPI_", "WANDB_"))}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        mine.pop(name, None)
    path = f"{BIN}{os.pathsep}{mine.get('PATH', '')}"
    return {**mine, "PATH": path, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **more}


def call(command, **more):
    """Run a launcher's command to its end."""
    done = subprocess.run(
        list(map(str, command)), env=environment(**more), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
    return done


def rows(folder, kind="train"):
    """Rows of metrics.jsonl by step."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row for row in lines if row["kind"] == kind}


def assert_same_curve(folder, name):
    plain, other = rows(folder / "runs" / "plain"), rows(folder / "runs" / name)
    assert list(plain) == list(other)
    for step, row in plain.items():
        assert other[step]["train/loss"] == pytest.approx(row["train/loss"], rel=1e-5), step
    plain, other = rows(folder / "runs" / "plain", "eval"), rows(folder / "runs" / name, "eval")
    for step, row in plain.items():
        assert other[step]["eval/valid/perplexity"] == pytest.approx(row["eval/valid/perplexity"], rel=1e-5)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.exhaustive), 3])
def test_the_deepspeed_launcher(place, stage):
    name = f"deepspeed{stage}"
    launcher = [BIN / "deepspeed", "--num_gpus", 2, "--master_port", free_port(), "--module", "lmtrain"]
    call(
        [*launcher, "train", place / "tiny.yaml", "engine.kind=zero", f"engine.zero_stage={stage}", f"run.name={name}"]
    )
    assert_same_curve(place, name)


def test_torchrun_and_an_evaluation_by_two_ranks(place):
    launcher = [BIN / "torchrun", "--nproc-per-node", 2, "--master-port", free_port(), "-m", "lmtrain"]
    call([*launcher, "train", place / "tiny.yaml", "engine.kind=zero", "engine.zero_stage=2", "run.name=torchrun"])
    assert_same_curve(place, "torchrun")
    folder = place / "runs" / "torchrun"
    two = json.loads(call([*launcher, "eval", folder, "--json"]).stdout)["valid"]
    one = json.loads(lmtrain("eval", folder, "--json").out)["valid"]
    assert two["perplexity"] == pytest.approx(one["perplexity"], rel=1e-6)
    assert two["symbols"] == one["symbols"]


@pytest.mark.parametrize("same", [True, False])
def test_a_rank_with_another_config_is_refused_by_its_hosts_name(place, same):
    """What each host may have for itself, the folder of a cache, is no offence."""
    port, name = free_port(), f"alike-{same}"
    command = [sys.executable, "-m", "lmtrain", "train", place / "tiny.yaml", "engine.kind=zero", "train.steps=2"]
    own = [f"data.remote.cache={place / 'own'}", "optimizer.lr=" + ("1e-3" if same else "2e-3")]
    ranks = []
    for rank, more in enumerate([["optimizer.lr=1e-3"], own]):
        where = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        variables = environment(**{key: str(value) for key, value in where.items()})
        ordered = list(map(str, [*command, f"run.name={name}", *more]))
        ranks.append(subprocess.Popen(ordered, env=variables, stderr=subprocess.PIPE, text=True))
    try:
        errors = [one.communicate(timeout=200)[1] for one in ranks]
    finally:
        for one in ranks:
            one.kill()
    assert [one.returncode for one in ranks] == ([0, 0] if same else [2, 2]), errors
    host = socket.gethostname()
    words = f"the ranks were not given the same: {host} has another optimizer than rank 0 on {host}; give every host"
    lines = [line for line in errors[0].splitlines() if words in line]
    assert len(lines) == int(not same), errors
    assert logged(place / "runs" / name) == (2 if same else 0)


def start(place, name, *more):
    """`lmtrain train` with ZeRO in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "lmtrain",
        "train",
        place / "tiny.yaml",
        f"run.name={name}",
        "engine.kind=zero",
        *more,
    ]
    return subprocess.Popen(list(map(str, command)), env=environment(), stderr=subprocess.PIPE, text=True)


def logged(folder):
    """The last step in metrics.jsonl; 0 when there is none."""
    try:
        return max(rows(folder), default=0)
    except (FileNotFoundError, ValueError):  # not there yet, or a row half written
        return 0


def wait_for(child, folder, step):
    until = time.monotonic() + 120
    while child.poll() is None and logged(folder) < step:
        assert time.monotonic() < until, f"step {step} did not come"
        time.sleep(0.01)


def tensors(folder, step=STEPS):
    """Every tensor of the checkpoint of `step`, the last one, as bytes."""
    found = {}
    for path in sorted((folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118
    return found


def test_killed_at_random_instants_it_ends_in_the_same_bits(place):
    """kill -9 again and again: each start goes on, and the end is that of the run that nobody touched."""
    whole = start(place, "whole")
    assert whole.wait(120) == 0, whole.stderr.read()
    chance = random.Random(7)
    folder = place / "runs" / "killed"
    for kill_at in (2, 5, 8, 10):
        child = start(place, "killed")
        wait_for(child, folder, kill_at)
        time.sleep(chance.random() * 0.05)
        child.kill()
        child.wait()
        child.stderr.close()
    last = start(place, "killed")
    assert last.wait(120) == 0, last.stderr.read()
    for kind in ("train", "eval"):
        before, after = rows(place / "runs" / "whole", kind), rows(folder, kind)
        keys = ("batch", "train/loss", "train/grad_norm", "eval/valid/loss")
        assert {s: [row.get(k) for k in keys] for s, row in after.items()} == {
            s: [row.get(k) for k in keys] for s, row in before.items()
        }
    assert tensors(folder) == tensors(place / "runs" / "whole")
    assert len(tensors(folder)) > 10


@pytest.mark.parametrize("how", ["SIGTERM", "SIGUSR1", "STOP"])
def test_asked_to_stop_it_saves_and_says_75(place, how):
    folder = place / "runs" / how
    child = start(place, how, "train.save_every=0", "train.steps=100000")
    wait_for(child, folder, 2)
    if how == "STOP":
        (folder / "STOP").touch()
    else:
        child.send_signal(getattr(signal, how))
    assert child.wait(120) == 75, child.stderr.read()
    (saved,) = [path for path in (folder / "checkpoints").iterdir() if path.name.startswith("step-")]
    assert int(saved.name.split("-")[1]) == logged(folder)
    assert not (folder / "STOP").exists()


def test_two_jobs_in_one_run_folder_are_one_too_many(place):
    first = start(place, "shared", "train.steps=100000")
    wait_for(first, place / "runs" / "shared", 1)
    second = start(place, "shared", "train.steps=100000")
    try:
        assert second.wait(120) == 2
        assert "another job is at work" in second.stderr.read()
    finally:
        first.kill()
        first.wait()
