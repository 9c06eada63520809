"""benchmarks/reproduce.py: its configs are lmtrain's, `valid` alone chooses, nothing that is finished runs again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import reproduce
from lmtrain.config import build
from lmtrain.schema import RunConfig

TASKS = [*reproduce._tables(), *reproduce._others()]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_candidate_is_a_config_of_lmtrain(task: reproduce.Task, tmp_path: Path) -> None:
    bench = reproduce.Bench(tmp_path, tmp_path / "work", 1.0, commands=None)  # type: ignore[arg-type]
    fold = 1 if task.folds else None
    for label, candidate in task.grid.items():
        tree = bench.config(task, candidate, corpus="c", fold=fold, name=label)
        config = build(RunConfig, json.loads(json.dumps(tree)), where=task.name)
        assert config.train is not None
        assert config.prepare is not None
        assert config.model is not None
        assert config.eval.sets["valid"].split == "valid"
        assert config.folder == tmp_path / "work" / "runs" / label


def test_no_two_candidates_share_a_folder() -> None:
    runs = [f"{task.name}-{label}" for task in TASKS for label in task.grid]
    assert len(set(runs)) == len(runs)


@pytest.mark.slow
def test_valid_chooses_the_test_is_scored_once_and_nothing_runs_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits of known chances: the model that learns is chosen over one that cannot, and comes near the true entropy."""
    chance_D = np.array([0.9, 0.2, 0.5, 0.7])
    draws = np.random.default_rng(0)
    arrays = {split: draws.random((n, 4)) < chance_D for split, n in (("train", 600), ("valid", 200), ("test", 400))}
    np.savez(tmp_path / "bits.npz", **{name: np.packbits(bits, axis=1) for name, bits in arrays.items()})
    monkeypatch.setitem(reproduce.SOURCES, "bits", {"file": "bits.npz", "arrays": {s: s for s in arrays}, "packed": 4})
    shared = {**reproduce._stopped(150, 50, 2), "data.global_batch": 100, "model.kind": "fvsbn"}
    grid = {
        name: {"optimizer.lr": lr, "optimizer.weight_decay": 0.0} for name, lr in (("still", 0.0001), ("fast", 0.05))
    }
    task = reproduce.Task("tiny", "bits", shared, grid, paper=2.0, limit=2.5)
    bench = reproduce.Bench(tmp_path, tmp_path / "work", 1.0, reproduce.Commands())
    row = bench.task(task)
    assert row is not None
    assert [test["chosen"] for test in row["tests"]] == ["tiny-fast"]
    truth_D = np.where(arrays["test"], -np.log(chance_D), -np.log(1 - chance_D))
    assert abs(row["ours"] - truth_D.sum(axis=1).mean()) < 0.05
    assert row["holds"] is True
    assert row["cpu_seconds"] > 0

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was run again")

    monkeypatch.setattr(bench.commands, "run", refuse)
    assert bench.task(task) == json.loads(json.dumps(row))
    changed = reproduce.Task("tiny", "bits", {**shared, "data.global_batch": 50}, grid, paper=2.0, limit=2.5)
    with pytest.raises(AssertionError, match="run again"):
        bench.task(changed)
