"""Saving while training goes on: what is saved is what was copied, the others agree, failures are told and no more."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lmtrain.checkpoint import CheckpointConfig, Checkpoints, scribe, verify
from lmtrain.checkpoint import background as backgrounds
from lmtrain.errors import CheckpointError
from lmtrain.journal import METRICS, read
from tests import spawn as spawning
from tests.fake_ranks import FakeEngine, engines, on_all, same
from tests.house import config, lmtrain


def store(folder: Path, told: list[Any] | None = None, **settings: Any) -> Checkpoints:
    """With `told` it is watched."""
    watch = None if told is None else told.append
    config = CheckpointConfig(background=True, **settings)
    return Checkpoints(folder, config, note=lambda text: pytest.fail(text), watch=watch)


def wait_until(true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end, what
        time.sleep(0.005)


def process_of(checkpoints: Checkpoints) -> int:
    process = checkpoints._background._process
    assert process is not None
    return process.pid


def gone(pid: int) -> bool:
    """Whether no such process is left (one that nobody has waited for yet does not count)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("world", [1, 3])
def test_what_was_copied_is_saved_and_training_goes_on(tmp_path: Path, world: int) -> None:
    """The tensors change at once after the copy; the files are those that a synchronous save makes, bit for bit."""
    ranks = engines(world, steps=2)
    wanted = ranks[0].everything()
    told: list[Any] = []

    def run(engine: FakeEngine) -> None:
        Checkpoints(tmp_path / "waited", CheckpointConfig()).save(engine, step=3, state={"at": 3})
        checkpoints = store(tmp_path / "saved", told if engine.rank == 0 else [])
        checkpoints.prepare(engine)
        assert checkpoints.save(engine, step=3, state={"at": 3}, best=True, wait=False) is None
        for step in range(3, 6):
            engine.advance(step)
            assert checkpoints.list() == [], "a name before all ranks agreed"
        checkpoints.attend(engine, wait=True)
        assert [saved.step for saved in checkpoints.list()] == [3]
        checkpoints.close()

    assert on_all(ranks, run) == [None] * world
    fresh = engines(world, seed=9)
    assert on_all(fresh, lambda e: store(tmp_path / "saved").restore(e, "best")) == [(3, {"at": 3})] * world
    assert same(fresh[0].everything(), wanted)
    assert not same(ranks[0].everything(), wanted)
    one, other = tmp_path / "saved" / "step-00000003", tmp_path / "waited" / "step-00000003"
    files = {p.name: p.read_bytes() for p in one.glob("*.safetensors")}
    assert files == {p.name: p.read_bytes() for p in other.glob("*.safetensors")}
    (save,) = told
    assert (save["step"], save["best"], save["background"], save["failed"]) == (3, True, True, None)
    assert save["bytes"] == sum(map(len, files.values()))
    assert 0 < save["blocked"] <= save["seconds"]
    assert 0 < save["writing"] <= save["seconds"]


def test_large_fragments_are_cut_in_the_background_too(tmp_path: Path) -> None:
    (engine,) = engines(1, steps=2)
    config = CheckpointConfig(background=True).model_copy(update={"file_mib": 60 / 2**20})
    checkpoints = Checkpoints(tmp_path, config)
    checkpoints.save(engine, step=1, state={}, wait=False)
    checkpoints.attend(engine, wait=True)
    checkpoints.close()
    assert len(list((tmp_path / "step-00000001").glob("*.safetensors"))) > 8
    verify(tmp_path / "step-00000001")
    (fresh,) = engines(1, seed=4)
    Checkpoints(tmp_path, config).restore(fresh)
    assert same(fresh.everything(), engine.everything())


def hold(monkeypatch: pytest.MonkeyPatch, ranks: set[int]) -> Callable[[], None]:
    """The writing of these ranks does not end until the function that this returns is called."""
    held = set(ranks)
    running = backgrounds.Background.running

    def slow(self: backgrounds.Background) -> bool:
        rank = int(self._plan["list"][1:6]) if self._plan else -1
        return (self._busy and rank in held) or running(self)

    monkeypatch.setattr(backgrounds.Background, "running", slow)
    return held.clear


def test_a_checkpoint_gets_its_name_when_the_last_rank_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = hold(monkeypatch, {1})
    seen: list[list[int]] = []

    def run(engine: FakeEngine) -> None:
        checkpoints = store(tmp_path, [])
        checkpoints.save(engine, step=1, state={}, wait=False)
        while checkpoints._background.running() and engine.rank != 1:  # the others have
            time.sleep(0.005)
        for _ in range(3):
            checkpoints.attend(engine)
            if engine.rank == 0:
                seen.append([saved.step for saved in checkpoints.list()])
        engine.agree(0)
        release()
        checkpoints.attend(engine, wait=True)
        assert [saved.step for saved in checkpoints.list()] == [1]
        checkpoints.close()

    assert on_all(engines(2, steps=1), run) == [None, None]
    assert seen == [[], [], []]


def test_one_is_on_its_way_at_a_time_and_the_last_one_is_waited_for(tmp_path: Path) -> None:
    (engine,) = engines(1)
    told: list[Any] = []
    checkpoints = store(tmp_path, told, keep=2)
    trajectory = {}
    for step in range(1, 6):
        engine.advance(step)
        trajectory[step] = engine.everything()
        made = checkpoints.save(engine, step=step, state={}, best=step == 1, wait=step == 5)
        assert [save["step"] for save in told] == list(range(1, step if step < 5 else 6))
        assert len([p for p in tmp_path.iterdir() if p.name.endswith(".writing")]) == (step < 5)
    assert made == tmp_path / "step-00000005"
    assert [save["background"] for save in told] == [True] * 4 + [False]
    checkpoints.close()
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{s:08d}" for s in (1, 4, 5)], "keep, best, no leavings"
    for step in (1, 4, 5):
        (fresh,) = engines(1, seed=9)
        store(tmp_path).restore(fresh, step)
        assert same(fresh.everything(), trajectory[step])


def spoil_disk(folder: Path, checkpoints: Checkpoints, engine: FakeEngine) -> str:
    """The files' names are taken when the process comes to write them."""
    begin = checkpoints._background.begin

    def taken(aside: Path) -> None:
        (aside / f"r{engine.rank:05d}-000.safetensors").write_text("taken")
        begin(aside)

    checkpoints._background.begin = taken  # type: ignore[method-assign]
    return "File exists"


def kill_process(folder: Path, checkpoints: Checkpoints, engine: FakeEngine) -> str:
    """The process is killed as soon as it has its order: it is stopped before, so that it cannot be done already."""
    begin = checkpoints._background.begin

    def killed(aside: Path) -> None:
        os.kill(process_of(checkpoints), signal.SIGSTOP)
        begin(aside)
        os.kill(process_of(checkpoints), signal.SIGKILL)

    checkpoints._background.begin = killed  # type: ignore[method-assign]
    return "the writing process ended by itself (signal 9)"


def kill_idle_process(folder: Path, checkpoints: Checkpoints, engine: FakeEngine) -> str:
    """It was dead when it got its order."""
    process = checkpoints._background._process
    assert process is not None
    process.kill()
    process.wait()
    return "the writing process ended by itself (signal 9)"


def refuse_folder(folder: Path, checkpoints: Checkpoints, engine: FakeEngine) -> str:
    """Rank 0 cannot even begin."""

    def refuse() -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "there")

    checkpoints._sweep = refuse  # type: ignore[method-assign]
    return "Read-only file system"


@pytest.mark.parametrize(
    ("spoil", "victim"),
    [
        *((spoil, rank) for spoil in (spoil_disk, kill_process, kill_idle_process) for rank in (0, 1)),
        (refuse_folder, 0),
    ],
)
def test_a_failure_on_one_rank_is_told_and_the_next_save_succeeds(tmp_path: Path, spoil: Any, victim: int) -> None:
    told: list[list[Any]] = [[], []]

    def run(engine: FakeEngine) -> str:
        before = store(tmp_path, [])
        before.save(engine, step=1, state={})
        before.close()
        checkpoints = store(tmp_path, told[engine.rank])
        checkpoints.prepare(engine)
        message = spoil(tmp_path, checkpoints, engine) if engine.rank == victim else ""
        checkpoints.save(engine, step=2, state={}, wait=False)
        checkpoints.attend(engine, wait=True)
        engine.agree(0)  # rank 0 has removed what failed
        assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001"]
        engine.agree(0)
        for name in ("begin", "abandon"):
            checkpoints._background.__dict__.pop(name, None)
        checkpoints.__dict__.pop("_sweep", None)
        checkpoints.save(engine, step=3, state={}, wait=False)
        checkpoints.attend(engine, wait=True)
        checkpoints.close()
        return str(message)

    messages = on_all(engines(2, steps=1), run)
    assert all(isinstance(m, str) for m in messages), messages
    for rank in (0, 1):
        assert [(save["step"], save["failed"] is None) for save in told[rank]] == [(2, False), (3, True)]
        failed = told[rank][0]["failed"]
        assert failed.startswith("checkpoint of step 2 was not saved, older ones are intact: ")
        assert f"rank {victim}: {messages[victim]}" in failed
    assert [saved.step for saved in store(tmp_path).list()] == [1, 3]
    verify(tmp_path / "step-00000003")


def test_state_that_cannot_be_saved_is_told_at_once_and_the_last_save_raises(tmp_path: Path) -> None:
    (engine,) = engines(1)
    told: list[Any] = []
    checkpoints = store(tmp_path, told)
    checkpoints.save(engine, step=1, state={"x": float("nan")}, wait=False)
    assert "cannot be saved as JSON" in told[0]["failed"]
    with pytest.raises(CheckpointError, match="cannot be saved as JSON"):
        checkpoints.save(engine, step=2, state={"x": float("nan")})
    checkpoints.close()
    assert list(tmp_path.iterdir()) == []


def test_memory_that_is_not_there_is_an_error_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    found = on_all(engines(2), lambda e: store(tmp_path).prepare(e))
    assert [type(f) for f in found] == [CheckpointError] * 2
    assert "checkpoint.background needs 0 MiB of memory" in str(found[0])
    assert "Cannot allocate memory; use checkpoint.background=false" in str(found[1])


def test_the_process_is_a_fresh_one_with_the_standard_library_alone(tmp_path: Path) -> None:
    """No fork of the trainer, so nothing of a GPU's; it has neither torch nor any file of the trainer's open."""
    code = f"import sys, runpy; runpy.run_path({str(scribe.__file__)!r}, run_name='x'); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    modules = {name.split(".")[0] for name in json.loads(done.stdout.replace("'", '"'))}
    assert modules <= set(sys.stdlib_module_names) | {"__main__"}
    (engine,) = engines(1)
    with (tmp_path / "open").open("w"):
        checkpoints = store(tmp_path / "saved")
        checkpoints.prepare(engine)
        checkpoints.save(engine, step=1, state={}, wait=False)
        checkpoints.attend(engine, wait=True)  # it has started, and has nothing to do: no file of its own comes or goes
        pid = process_of(checkpoints)
        assert b"scribe.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
        opened = [os.readlink(f) for f in Path(f"/proc/{pid}/fd").iterdir()]
        assert len({name for name in opened if "lmtrain-checkpoint" in name}) == 1  # the snapshot (and its mapping)
        assert not any(str(tmp_path) in name for name in opened)
        assert "libtorch" not in Path(f"/proc/{pid}/maps").read_text()
    checkpoints.close()
    assert gone(pid)


def test_signals_to_the_group_do_not_end_it(tmp_path: Path) -> None:
    (engine,) = engines(1)
    told: list[Any] = []
    checkpoints = store(tmp_path, told)
    checkpoints.save(engine, step=1, state={}, wait=False)
    checkpoints.attend(engine, wait=True)  # it is at work: its handlers are in place
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        os.kill(process_of(checkpoints), number)
    checkpoints.save(engine, step=2, state={}, wait=False)
    checkpoints.attend(engine, wait=True)
    checkpoints.close()
    assert [save["failed"] for save in told] == [None, None]


READS = """
    import sys
    from pathlib import Path
    import torch
    from torch import nn
    from lmtrain.checkpoint import CheckpointConfig, Checkpoints
    from lmtrain.engine import EngineConfig, OptimizerConfig, make, pieces
    from lmtrain.protocol import Model, Place

    def memory(name):
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
        return int(line.split()[1]) // 1024

    def start(value):
        model = Model()
        model.weight = nn.Parameter(torch.full((3_000, 3_000), value))
        return make(EngineConfig(kind="plain", device="cpu"), model, optimizer=OptimizerConfig(), place=Place(),
                    micro_batch=1, accumulation=1, seed=0)

    pieces.READ_AT_ONCE = int(sys.argv[2])
    store = Checkpoints(Path(sys.argv[1]), CheckpointConfig(file_mib=5))
    if not store.any():
        store.save(start(3.0), step=1, state={})
    engine = start(4.0)
    own = sum(f.tensor.nbytes for f in engine.fragments()) // 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    store.restore(engine)
    print(own, memory("VmHWM") - before)
    assert float(engine.model.weight.min()) == float(engine.model.weight.max()) == 3.0
"""


@pytest.mark.slow
def test_loading_takes_no_more_memory_than_a_part_besides_the_engine(tmp_path: Path) -> None:
    """One tensor of 34 MiB and two moments. Reading it in one part shows that the measurement can tell."""
    grown = []
    for part in (2**16, 10**9):
        command = [sys.executable, "-c", textwrap.dedent(READS), str(tmp_path / "saved"), str(part)]
        variables = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=spawning.ROOT, env=variables, check=False)
        assert done.returncode == 0, done.stderr
        own, more = map(int, done.stdout.split())
        assert own == 102
        grown.append(more)
    assert grown[0] <= 12, grown
    assert grown[1] >= 30, grown


SAVES = """
    import os, sys
    from pathlib import Path
    import torch
    from torch import nn
    from lmtrain.checkpoint import CheckpointConfig, Checkpoints
    from tests.fake_ranks import FakeEngine

    def filled(engine, step):
        tensors = [engine.model.weight.data, *(m["weight"] for m in engine.moments.values())]
        for i, t in enumerate(tensors):
            t.fill_(step + i / 4)

    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(1_000_000))
    engine = FakeEngine(model)
    store = Checkpoints(Path(sys.argv[1]), CheckpointConfig(background=True, file_mib=1))
    store.prepare(engine)
    step = store.restore(engine)[0] if store.any() else 0
    assert engine.model.weight.unique().tolist() == [step]
    while True:
        step += 1
        filled(engine, step)
        store.save(engine, step=step, state={"at": step}, wait=False)
        filled(engine, -1)
        print(step, store._background._process.pid, flush=True)
"""


def kills(tmp_path: Path, count: int, seed: int) -> int:
    """Kill -9 a process with a save on its way, `count` times; returns how many left one half done."""
    chance = random.Random(seed)
    folder, half = tmp_path / "saved", 0
    for _ in range(count):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(SAVES), str(folder)],
            cwd=spawning.ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None
        try:
            for _ in range(chance.randrange(2, 4)):
                line = child.stdout.readline()
                assert line, "it ended by itself"
            step, writer = map(int, line.split())
            time.sleep(chance.uniform(0, 0.1))
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        wait_until(lambda pid=writer: gone(pid), "the writing process outlived its parent")  # type: ignore[misc]
        half += any(p.name.endswith(".writing") for p in folder.iterdir())
        notes: list[str] = []
        found = Checkpoints(folder, CheckpointConfig(), note=notes.append)
        assert found.find().step >= step - 1, "the one before the save on its way"
        for saved in found.list():
            assert verify(saved.path).state == {"at": saved.step}
        assert notes == []
    return half


@pytest.mark.slow
def test_a_kill_during_a_save_leaves_the_one_before(tmp_path: Path) -> None:
    """The next life checks what it resumes: every weight is its step."""
    kills(tmp_path, 5, seed=1)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
def test_a_hundred_kills_during_saves(tmp_path: Path) -> None:
    assert kills(tmp_path, 100, seed=2) > 50


@pytest.mark.slow
def test_a_run_saves_in_the_background_and_ends_with_what_is_on_disk(trained: Path, tmp_path: Path) -> None:
    """Through the command line: the same bits as the run that waits for every save, and its figures in the metrics."""
    path = config(tmp_path, data={"corpus": str(trained / "corpus")})
    ends = {}
    for name, background in (("waited", False), ("behind", True)):
        ran = lmtrain("train", path, f"run.name={name}", f"checkpoint.background={str(background).lower()}")
        assert ran.code == 0, ran.err
        folder = tmp_path / "runs" / name
        saves = [row for row in read(folder / METRICS) if row["kind"] == "save"]
        steps = [row["step"] for row in saves]
        assert steps == sorted(set(steps))
        assert steps[-1] == 6
        assert [row["background"] for row in saves] == [background] * (len(saves) - 1) + [False]
        assert all(row["failed"] is None and row["perf/save_mb_per_s"] > 0 for row in saves)
        assert not [p for p in (folder / "checkpoints").iterdir() if not p.name.startswith("step-") or "." in p.name]
        ends[name] = {p.name: p.read_bytes() for p in (folder / "checkpoints" / "step-00000006").glob("*.safetensors")}
    assert ends["behind"] == ends["waited"]
    more = lmtrain("train", path, "run.name=behind", "checkpoint.background=true", "train.steps=8")
    assert more.code == 0, more.err
    rows = list(read(tmp_path / "runs" / "behind" / METRICS))
    (load,) = [row for row in rows if row["kind"] == "load"]
    assert load["step"] == 6
    assert load["perf/load_mb_per_s"] > 0
    assert [row["step"] for row in rows if row["kind"] == "save"][-1] == 8
