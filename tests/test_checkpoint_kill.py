"""Real processes that save after every step are killed with -9 again and again; the run that comes out of it is
bit-equal to one that nobody touched. And the disk is full, really.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lmtrain.checkpoint import CheckpointConfig, Checkpoints
from tests import spawn as spawning
from tests.data.small import one_split, random_documents

JOB = "tests.checkpoint_jobs:train_on"
FOREVER = 10**6


@contextmanager
def started(folder: Path, world: int, **arguments: object) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The ranks of a job; none is left at the end."""
    port = spawning.free_port()
    ranks = [spawning._start(JOB, folder, rank, world, port, 1, arguments) for rank in range(world)]
    try:
        yield ranks
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()


def resumed(folder: Path, rank: int) -> tuple[int, str] | None:
    """(step, digest) that a rank began with, once it has said so."""
    try:
        step, digest = json.loads((folder / f"began{rank}.json").read_text())
    except FileNotFoundError:
        return None
    return int(step), str(digest)


def killed_run(
    tmp_path: Path, *, stage: int | None, world: int, kills: int, seed: int, background: bool = False
) -> int:
    """Kill and resume; check after every kill. Returns how many kills fell into a save."""
    rng = random.Random(seed)
    one_split(tmp_path / "corpus", random_documents(60, seed=4, longest=60))
    out = tmp_path / "saved"
    common = {"corpus": str(tmp_path / "corpus"), "stage": stage, "background": background}
    begun: list[tuple[int, list[str]]] = []
    in_a_save = 0
    newest = 0
    for kill in range(kills):
        folder = tmp_path / f"life{kill}"
        folder.mkdir()
        with started(folder, world, **common, out=str(out), until=FOREVER, marks=[]) as ranks:
            end = time.monotonic() + 120
            while any(resumed(folder, r) is None for r in range(world)) or not _saved_since(out, newest):
                dead = [rank for rank, process in enumerate(ranks) if process.poll() is not None]
                assert not dead, (folder / f"rank{dead[0]}.log").read_text()[-4000:]
                assert time.monotonic() < end, "no step was saved in two minutes"
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.3))
            if kill % 2:  # aim at a save
                while not any(p.name.endswith(".writing") for p in out.iterdir()):
                    pass
                time.sleep(rng.uniform(0, 0.01))
            victim = rng.randrange(world)
            os.killpg(ranks[victim].pid, signal.SIGKILL)
            time.sleep(rng.uniform(0, 0.1))  # the others go on alone for a while
        in_a_save += any(p.name.endswith(".writing") for p in out.iterdir())
        begun.append((resumed(folder, 0)[0], [resumed(folder, r)[1] for r in range(world)]))  # type: ignore[index]
        assert begun[-1][0] == newest, "it did not begin with the newest checkpoint"
        notes: list[str] = []
        found = Checkpoints(out, CheckpointConfig(), note=notes.append).find()
        assert notes == [], "a checkpoint of the right name was not whole"
        assert found.step > newest
        newest = found.step
    until = newest + 5
    steps = [step for step, _ in begun] + [newest]
    last = spawning.spawn(JOB, world=world, **common, out=str(out), until=until, marks=[newest])
    untouched = spawning.spawn(JOB, world=world, **common, out=None, until=until, marks=steps)
    for step, digests in begun:
        assert digests == [rank[str(step)] for rank in untouched], f"resumed at step {step}"
    assert [rank[str(newest)] for rank in last] == [rank[str(newest)] for rank in untouched]
    assert [rank[str(until)] for rank in last] == [rank[str(until)] for rank in untouched]
    return in_a_save


def _saved_since(out: Path, step: int) -> bool:
    return out.exists() and any(saved.step > step for saved in Checkpoints(out, CheckpointConfig()).list())


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "world", "kills"), [(None, 1, 3), (2, 2, 2)])
def test_a_run_that_is_killed_and_resumed_is_bit_equal(
    tmp_path: Path, stage: int | None, world: int, kills: int
) -> None:
    killed_run(tmp_path, stage=stage, world=world, kills=kills, seed=kills)


@pytest.mark.slow
def test_a_run_that_saves_in_the_background_is_bit_equal_too(tmp_path: Path) -> None:
    killed_run(tmp_path, stage=1, world=2, kills=1, seed=5, background=True)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("stage", "world", "kills"), [(None, 1, 10), (2, 2, 5), (3, 2, 5)])
def test_twenty_kills_of_runs_that_save_in_the_background(
    tmp_path: Path, stage: int | None, world: int, kills: int
) -> None:
    assert killed_run(tmp_path, stage=stage, world=world, kills=kills, seed=kills, background=True) > 0


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("stage", "world", "kills"), [(None, 1, 20), (1, 2, 10), (3, 2, 10), (0, 4, 5), (2, 4, 5)])
def test_fifty_kills(tmp_path: Path, stage: int | None, world: int, kills: int) -> None:
    assert killed_run(tmp_path, stage=stage, world=world, kills=kills, seed=100 + kills) > 0


FULL = """
    import resource, sys
    from pathlib import Path
    import torch
    from torch import nn
    from lmtrain.checkpoint import CheckpointConfig, Checkpoints, faults
    from lmtrain.errors import CheckpointError
    from tests.fake_ranks import FakeEngine

    folder, limit = Path(sys.argv[1]), int(sys.argv[2])
    def engine_of(numel):
        model = nn.Module()
        model.weight = nn.Parameter(torch.randn(numel, generator=torch.Generator().manual_seed(numel)))
        return FakeEngine(model)

    small, large = engine_of(20_000), engine_of(120_000)  # 240 kB and 1.4 MB with their moments
    store = Checkpoints(folder, CheckpointConfig())
    for step in (1, 2):
        store.save(small, step=step, state={})
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        store.save(large, step=3, state={})
    except CheckpointError as error:
        print(error)
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000001", "step-00000002"]
    assert not any(faults(saved.path) for saved in store.list())
    store.save(small, step=4, state={})
    assert store.find().step == 4
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["disk", "file"])
def test_a_disk_that_is_full_costs_the_new_checkpoint_alone(tmp_path: Path, kind: str) -> None:
    """disk: a file system of 1 MB. file: the largest size of a file is 1 MB. Both refuse in the middle of a write."""
    folder = tmp_path / "small"
    folder.mkdir()
    python = [sys.executable, "-c", textwrap.dedent(FULL), str(folder), "0" if kind == "disk" else "1000000"]
    if kind == "disk":
        mount = f"mount -t tmpfs -o size=1m none {folder}"
        if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode:
            pytest.skip("this machine lets nobody make a file system of 1 MB")
        python = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$@"', "sh", *python]
    done = subprocess.run(python, capture_output=True, text=True, cwd=spawning.ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    problem = "No space left on device" if kind == "disk" else "File too large"
    assert done.stdout == f"checkpoint of step 3 was not saved, older ones are intact: {problem}\n"
