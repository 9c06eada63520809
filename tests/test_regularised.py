"""Whole runs with an average of the weights and with patience, through the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lmtrain.checkpoint import CheckpointConfig, Checkpoints, Reader
from lmtrain.config import build
from lmtrain.errors import ConfigError
from lmtrain.journal import read
from lmtrain.schema import RunConfig
from tests.house import TINY, config, lmtrain
from tests.spawn import ROOT

WILD = {
    "train": {"steps": 60, "eval_every": 1, "save_every": 1, "patience": 3, "seed": 3, "samples": 0},
    "optimizer": {"lr": 0.3},
    "schedule": {"kind": "constant", "warmup": 0},
}
"""A rate so high that held-out data soon suffers."""


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The journal's rows of a kind."""
    return [row for row in read(folder / "metrics.jsonl") if row["kind"] == kind]


@pytest.fixture(scope="module")
def averaged(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with an average, which its evaluations use."""
    folder = tmp_path_factory.mktemp("averaged")
    settings = {"optimizer": {"ema": 0.5}, "eval": {"weights": "ema"}, "data": {"corpus": str(trained / "corpus")}}
    ran = lmtrain("train", config(folder, **settings), "train.samples=0")
    assert ran.code == 0, ran.err
    return folder / "runs" / "tiny"


def test_evaluations_use_the_average_when_asked(averaged: Path) -> None:
    inside = rows(averaged, "eval")[-1]
    assert inside["weights"] == "ema"
    found = json.loads(lmtrain("eval", averaged, "--json").out)["valid"]
    raw = json.loads(lmtrain("eval", averaged, "--json", "--set", "eval.weights=raw").out)["valid"]
    assert (found["weights"], raw["weights"]) == ("ema", "raw")
    assert found["nats_per_symbol"] == pytest.approx(inside["eval/valid/loss"], rel=1e-6)
    assert abs(raw["nats_per_symbol"] - found["nats_per_symbol"]) > 1e-4
    assert "averaged weights" in lmtrain("eval", averaged).out
    assert "averaged" not in lmtrain("eval", averaged, "--set", "eval.weights=raw").out


def test_samples_and_exports_of_both(averaged: Path, tmp_path: Path, trained: Path) -> None:
    def log_prob(*more: str) -> float:
        ran = lmtrain("sample", averaged, "--json", "--prompt", "a", "--max-symbols", 20, *more)
        assert ran.code == 0, ran.err
        return float(json.loads(ran.out)[0]["log_prob"])

    assert log_prob() == log_prob("--weights", "ema") != log_prob("--weights", "raw")
    for name, more in (("raw", ()), ("ema", ("--weights", "ema"))):
        assert lmtrain("checkpoint", "export", averaged, "--out", tmp_path / name, *more).code == 0
    raw, ema = (load_file(tmp_path / name / "model.safetensors") for name in ("raw", "ema"))
    reader = Reader(Checkpoints(averaged / "checkpoints", CheckpointConfig()).find().path)
    assert raw.keys() == ema.keys()
    for name, tensor in ema.items():
        assert torch.equal(tensor.flatten(), reader.read(name, "ema", 0, tensor.numel()))
        assert not torch.equal(tensor, raw[name])
    ran = lmtrain("checkpoint", "export", averaged, "--out", tmp_path / "x", "--weights", "mean")
    assert (ran.code, "neither raw nor ema" in ran.err) == (7, True)
    plain = trained / "runs" / "tiny"
    ran = lmtrain("checkpoint", "export", plain, "--out", tmp_path / "x", "--weights", "ema")
    assert (ran.code, "has no averaged weights" in ran.err) == (4, True)
    ran = lmtrain("sample", plain, "--weights", "ema")
    assert (ran.code, "optimizer.ema is null" in ran.err) == (2, True)


def test_an_average_may_begin_later(trained: Path, tmp_path: Path) -> None:
    settings = {"data": {"corpus": str(trained / "corpus")}, "schedule": {"kind": "constant"}}
    path = config(tmp_path, **settings)
    assert lmtrain("train", path, "train.steps=3", "train.samples=0").code == 0
    folder = tmp_path / "runs" / "tiny"
    later = lmtrain("eval", folder, "--set", "optimizer.ema=0.5", "--set", "eval.weights=ema")
    assert (later.code, "has no averaged weights" in later.err) == (4, True)
    ran = lmtrain("train", path, "train.samples=0", "optimizer.ema=0.5")
    assert ran.code == 0, ran.err
    assert "optimizer.ema begins at the weights of this checkpoint" in ran.err
    assert Checkpoints(folder / "checkpoints", CheckpointConfig()).find().manifest().scalars["ema_steps"] == 3
    assert "begins at" not in lmtrain("train", path, "train.samples=0", "optimizer.ema=0.5", "train.steps=7").err


AFAR = {"data": {"corpus": "https://host/corpus"}}
MIXED = {"corpus": [{"path": "corpus"}, {"path": "s3://bucket/corpus"}]}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"eval": {"weights": "ema"}}, "optimizer.ema is null"),
        ({"train": {"steps": 3, "eval_every": 1, "patience": 2}, "eval": {"sets": {}}}, "which is empty"),
        (AFAR | {"engine": {"timeout": 60}}, "data.remote.patience = 540 is not below engine.timeout = 60: "),
        ({"data": MIXED | {"remote": {"patience": 600}}}, "patience = 600 is not below engine.timeout = 600: "),
    ],
)
def test_sections_that_do_not_agree(sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        build(RunConfig, TINY | sections, where="test")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "sections",
    [
        AFAR,
        {"data": MIXED | {"remote": {"patience": 30}}, "engine": {"timeout": 60}},
        {"data": {"corpus": "corpus", "remote": {"patience": 600}}, "engine": {"timeout": 60}},  # nothing is asked for
    ],
)
def test_a_store_is_waited_for_less_long_than_a_rank(sections: dict[str, Any]) -> None:
    build(RunConfig, TINY | sections, where="test")


@pytest.mark.slow
def test_a_run_stops_early_and_keeps_its_best(trained: Path, tmp_path: Path) -> None:
    """Interrupted and resumed it stops at the same step; the best one outlives the rotation of two checkpoints."""
    corpus = {"data": {"corpus": str(trained / "corpus")}}
    path = config(tmp_path, **WILD, **corpus)
    folder = tmp_path / "runs" / "tiny"
    ran = lmtrain("train", path, "train.log_every=50")
    assert ran.code == 0, ran.err
    (finish,) = rows(folder, "finish")
    best, end = finish["summary"]["best_step"], finish["step"]
    assert end == best + 3 < 60, "three evaluations in a row, one a step"
    text = (
        f"early at step {end}: valid not better in 3 evaluations (best {finish['summary']['best']:.4f} at step {best})"
    )
    assert finish["summary"]["ended"] == text
    assert (finish["exit_code"], finish["stopped"]) == (0, None)
    assert f"ended {text}" in ran.err
    assert rows(folder, "train")[-1]["step"] == end, "the steps since the last row are not lost"
    store = Checkpoints(folder / "checkpoints", CheckpointConfig())
    assert [saved.step for saved in store.list()] == [best, end - 1, end]
    assert store.find("best").step == best
    found = json.loads(lmtrain("eval", folder, "--checkpoint", "best", "--json").out)["valid"]
    assert found["nats_per_symbol"] == pytest.approx(finish["summary"]["best"], rel=1e-6)
    again = lmtrain("train", path, "train.log_every=50")
    assert (again.code, f"ended {text}" in again.err) == (0, True)
    assert rows(folder, "train")[-1]["step"] == end, "it is over, and stays so"

    for stop in (best, end - 1):  # as the count begins, and before its last one
        assert lmtrain("train", path, f"run.name=cut{stop}", f"train.steps={stop}").code == 0
        assert lmtrain("train", path, f"run.name=cut{stop}").code == 0
        cut = tmp_path / "runs" / f"cut{stop}"
        assert rows(cut, "finish")[-1]["summary"] == finish["summary"]
        evaluated = [[row["eval/valid/loss"] for row in rows(run, "eval")] for run in (folder, cut)]
        assert evaluated[0] == evaluated[1]


@pytest.mark.slow
def test_killed_while_it_counts_it_stops_at_the_same_step(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 as soon as there is a checkpoint whose count has begun."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # in this process as in the one to be killed
    settings = WILD | {"optimizer": {"lr": 0.3, "ema": 0.5}, "data": {"corpus": str(trained / "corpus")}}
    path = config(tmp_path, **settings)
    assert lmtrain("train", path).code == 0
    (finish,) = rows(tmp_path / "runs" / "tiny", "finish")
    command = [sys.executable, "-m", "lmtrain", "train", str(path), "run.name=killed"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True)
    checkpoints = tmp_path / "runs" / "killed" / "checkpoints"
    store, end = Checkpoints(checkpoints, CheckpointConfig()), time.monotonic() + 240
    try:
        while process.poll() is None and all(saved.step <= finish["summary"]["best_step"] for saved in store.list()):
            assert time.monotonic() < end, "no such checkpoint in four minutes"
            time.sleep(0.002)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    begun = store.find().step
    assert begun > finish["summary"]["best_step"]
    assert lmtrain("train", path, "run.name=killed").code == 0
    assert rows(tmp_path / "runs" / "killed", "finish")[-1]["summary"] == finish["summary"]
    states = []
    for name in ("tiny", "killed"):
        reader = Reader(Checkpoints(tmp_path / "runs" / name / "checkpoints", CheckpointConfig()).find().path)
        states.append({(n, k): reader.read(n, k, 0, 8) for k in reader.kinds() for n in reader.names(k)[:1]})
    assert {kind for _, kind in states[0]} >= {"weight", "ema", "exp_avg"}
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
