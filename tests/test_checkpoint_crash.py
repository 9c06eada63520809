"""The process dies before any one of a save's operations on the disk: what is on disk afterwards is whole."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lmtrain.checkpoint import CheckpointConfig, Checkpoints, faults
from tests.fake_ranks import FakeEngine, engines, on_all, same

_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir"}
_watchers: list[Callable[[str, str], None]] = []


class Killed(BaseException):
    """No handler of ordinary errors sees it, as none sees a kill -9."""


def _hook(event: str, args: tuple[Any, ...]) -> None:
    """Python tells of every operation before it is done; a hook cannot be taken off again, so there is one."""
    if not _watchers:
        return
    if event == "open" and isinstance(args[0], str | os.PathLike) and args[1] and set(args[1]) & set("wxa+"):
        _watchers[0]("create", str(args[0]))
    elif event in _CHANGES:
        _watchers[0](event, str(args[0]))


sys.addaudithook(_hook)


@contextmanager
def watching(folder: Path, see: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`see(operation, path)` before every operation that changes something below `folder`."""
    fsync = os.fsync

    def seen(operation: str, path: str) -> None:
        # shutil.rmtree works with names relative to a descriptor
        if path.startswith(str(folder)) or not os.path.isabs(path):
            see(operation, path)

    def spy(descriptor: int) -> None:
        see("fsync", os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", spy)
        _watchers.append(seen)
        try:
            yield
        finally:
            _watchers.clear()


def prepare(folder: Path, world: int) -> tuple[list[FakeEngine], dict[int, dict[str, Any]]]:
    """Steps 1 to 3 saved, 2 the best, a leftover of a killed save; the ranks stand at step 4."""
    ranks = engines(world)
    trajectory = {}
    for step in range(1, 5):
        for engine in ranks:
            engine.advance(step)
        trajectory[step] = ranks[0].everything()
        if step < 4:
            save(folder, ranks, step, best=step == 1)
    shutil.copytree(folder / "step-00000003", folder / "step-00000004.0123456789ab.writing")
    return ranks, trajectory


def save(folder: Path, ranks: list[FakeEngine], step: int, *, best: bool = False) -> list[Any]:
    def act(engine: FakeEngine) -> Path:
        checkpoints = Checkpoints(folder, CheckpointConfig(), note=lambda text: None)
        return checkpoints.save(engine, step=step, state={"at": step}, best=best)

    return on_all(ranks, act)


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("again", [False, True])
def test_a_kill_before_any_operation_leaves_whole_checkpoints(
    tmp_path: Path, world: int, again: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """again: step 3 is saved a second time instead of a fourth step."""
    target = 3 if again else 4
    operations = []
    for at in itertools.count():
        folder = tmp_path / str(at)
        folder.mkdir()
        ranks, trajectory = prepare(folder, world)
        trajectory[target] = ranks[0].everything()
        old = engines(1)[0]
        Checkpoints(folder, CheckpointConfig(), note=lambda text: None).restore(old)
        happened: list[str] = []

        def see(operation: str, path: str, at: int = at, happened: list[str] = happened) -> None:
            if len(happened) >= at:
                happened.append("killed")
                if operation == "fsync" and Path(path).is_file():
                    os.truncate(path, os.stat(path).st_size // 2)  # what was not synced may be lost
                raise Killed
            happened.append(operation)

        with watching(folder, see, monkeypatch):
            results = save(folder, ranks, target)
        if "killed" not in happened:
            assert not [r for r in results if isinstance(r, BaseException)]
            break
        operations.append(happened[at - 1] if at else "")
        assert any(isinstance(r, BaseException) for r in results)
        renamed = any(p.name == "step-00000003.2" or p.name == "step-00000004" for p in folder.iterdir())

        checkpoints = Checkpoints(folder, CheckpointConfig(), note=lambda text: pytest.fail(text))
        newest = checkpoints.newest()
        assert newest is not None
        assert all(not faults(saved.path) for saved in checkpoints.list()), "a half checkpoint has a whole one's name"
        assert len({saved.step for saved in checkpoints.list()} | {1}) >= 3
        fresh = engines(1, seed=8)[0]
        step, state = Checkpoints(folder, CheckpointConfig(), note=lambda text: None).restore(fresh)
        assert (step, state) == ((target, {"at": target}) if renamed else (3, {"at": 3}))
        assert same(fresh.everything(), trajectory[target] if renamed else old.everything()), f"after {at} operations"
        assert checkpoints.find("best").step == 1

        again_ranks = engines(world)
        on_all(again_ranks, lambda e, f=folder: Checkpoints(f, CheckpointConfig()).restore(e))
        assert not [r for r in save(folder, again_ranks, 5) if isinstance(r, BaseException)]
        assert [saved.step for saved in checkpoints.list()] == [1, 4 if renamed and not again else 3, 5]
        assert not [p for p in folder.iterdir() if p.name.endswith((".writing", ".removing"))]
        shutil.rmtree(folder)
    assert set(operations) >= {"create", "fsync", *_CHANGES}
    assert len(operations) >= 15


def test_everything_is_on_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, _ = prepare(tmp_path, 2)
    events: list[tuple[str, str]] = []
    with watching(tmp_path, lambda operation, path: events.append((operation, path)), monkeypatch):
        made = save(tmp_path, ranks, 4)[0]
    named = next(i for i, (operation, path) in enumerate(events) if operation == "os.rename" and "writing" in path)
    aside = events[named][1]
    synced = {path for operation, path in events[:named] if operation == "fsync"}
    assert synced == {f"{aside}/{p.name}" for p in made.iterdir()} | {aside}
    manifest = events.index(("fsync", f"{aside}/manifest.json"))
    fragments = [i for i, (operation, path) in enumerate(events) if operation == "fsync" and "safetensors" in path]
    assert len(fragments) == 2
    assert max(fragments) < manifest < events.index(("fsync", aside)) < named
    assert events[named + 1] == ("fsync", str(tmp_path)), "the name must be on disk before anything older is removed"
    removals = [i for i, (operation, path) in enumerate(events) if operation == "os.rename" and i != named]
    assert len(removals) == 1
    assert removals[0] > named + 1
    assert events[removals[0] + 1] == ("fsync", str(tmp_path)), "nor may a half removed one come back by its name"
