"""Whole runs on records: a GPT that reads pixels through the same verbs; what fixes the data cannot change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from lmtrain import corpora, run, runfolder, schema, use
from lmtrain import engine as engines
from lmtrain.checkpoint import Checkpoints
from lmtrain.config import build
from lmtrain.data.corpus import open_corpus
from lmtrain.data.prepare import PrepareConfig, prepare
from lmtrain.errors import ConfigError, InputError
from lmtrain.journal import METRICS, read
from lmtrain.protocol import Place
from tests.spawn import spawn

ALONE = Place()
QUIET = {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}


def written(folder: Path, **sections: Any) -> Path:
    tree = {
        "run": {"dir": str(folder / "runs")},
        "train": {"steps": 4, "log_every": 1, "save_every": 2},
        "prepare": {"source": {"kind": "digits"}},
        "data": {"corpus": str(folder / "digits"), "global_batch": 8},
        "model": {"kind": "gpt", "layers": 1, "width": 16, "heads": 2},
        "engine": {"kind": "plain"},
        "eval": {"max_symbols": 640},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**tree, **sections}))
    return path


def train(config: Path, *overrides: str) -> int:
    return run.train_run(schema.load(config, overrides), ALONE, environment=QUIET)


def rank(place: Place, folder: Path, *, config: str, overrides: list[str]) -> int:
    """The job of one rank (tests/spawn.py)."""
    return run.train_run(schema.load(Path(config), overrides), place, environment=QUIET)


def evaluate(folder: Path, *data: str, overrides: tuple[str, ...] = ()) -> Any:
    found = use.evaluate_run(
        folder, data=data, split="valid", checkpoint="last", overrides=overrides, place=ALONE, environment={}
    )
    return next(iter(found.values()))


def test_a_gpt_reads_pixels_from_preparation_to_evaluation(tmp_path: Path) -> None:
    config = written(tmp_path)
    assert train(config) == 0
    folder = tmp_path / "runs" / "tiny"
    assert schema.load(folder / "config.yaml").data.context == 64
    rows = list(read(folder / METRICS))
    steps = [row for row in rows if row["kind"] == "train"]
    assert steps[0]["train/bits_per_dim"] == pytest.approx(steps[0]["train/loss"] / np.log(2))
    assert "train/bits_per_byte" not in steps[0]
    (held,) = [row for row in rows if row["kind"] == "eval"]
    assert held["eval/valid/bits_per_dim"] == pytest.approx(held["eval/valid/loss"] / np.log(2))
    results = [evaluate(folder, overrides=(f"eval.batch={size}",)) for size in (1, 3, 7)]
    assert {result.records for result in results} == {results[0].documents}
    for result in results:
        assert result.score.nats == pytest.approx(results[0].score.nats, rel=1e-7)
    json.dumps(results[0].to_json(), allow_nan=False)
    with pytest.raises(InputError, match="give the folder of a prepared corpus"):
        evaluate(folder, str(config))
    with pytest.raises(ConfigError, match=r"data.view was None when this run began and is"):
        train(config, "data.view.flip=true", "train.steps=6")
    with pytest.raises(ConfigError, match=r"a record of .*digits has 64 symbols"):
        train(config, "data.context=32", "run.name=other")


@pytest.mark.slow
def test_a_run_goes_on_through_its_view_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    view = {"binarise": "draw", "flip": True}
    config = written(tmp_path, data={"corpus": str(tmp_path / "digits"), "global_batch": 8, "view": view})
    assert train(config, "run.name=whole") == 0
    assert train(config, "run.name=parts", "train.steps=2", "schedule.kind=constant") == 0
    assert train(config, "run.name=again", "schedule.kind=constant") == 0
    assert train(config, "run.name=parts", "schedule.kind=constant") == 0
    digests = [
        {row["step"]: row["batch"] for row in read(tmp_path / "runs" / name / METRICS) if row["kind"] == "train"}
        for name in ("whole", "parts", "again")
    ]
    assert digests[0] == digests[1] == digests[2]
    assert len(set(digests[0].values())) == 4
    scores = [evaluate(tmp_path / "runs" / name).score for name in ("parts", "again")]
    assert scores[0] == scores[1]
    result = evaluate(tmp_path / "runs" / "whole")
    assert result.measure.view == "binarised by draw with seed 0"
    assert result.score.perplexity < 4


def test_models_of_symbols_refuse_real_numbers(tmp_path: Path) -> None:
    for model in ({"kind": "gpt"}, {"kind": "rnn"}):
        config = written(tmp_path, prepare={"source": {"kind": "wine"}}, data={"corpus": "wine"}, model=model)
        with pytest.raises(ConfigError, match=f"model.kind = {model['kind']} reads symbols, and the corpus gives real"):
            train(config, f"data.corpus={tmp_path}/wine")


@pytest.mark.slow
def test_two_ranks_train_on_records_as_one_does(tmp_path: Path) -> None:
    config = written(tmp_path, optimizer={"kind": "adamw", "lr": 0.01})
    view = ["data.view.binarise=draw", "data.view.flip=true", "data.micro_batch=4"]
    assert train(config, *view, "run.name=plain") == 0
    given = [*view, "run.name=two", "engine.kind=zero", "engine.zero_stage=2", "engine.device=cpu"]
    assert spawn("tests.test_record_runs:rank", world=2, config=str(config), overrides=given) == [0, 0]
    losses = []
    for name in ("plain", "two"):
        rows = list(read(tmp_path / "runs" / name / METRICS))
        losses.append(
            [row.get("train/loss", row.get("eval/valid/loss")) for row in rows if row["kind"] in ("train", "eval")]
        )
    assert len(losses[0]) >= 3
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    scores = [evaluate(tmp_path / "runs" / name) for name in ("plain", "two")]
    assert scores[0].score.nats == pytest.approx(scores[1].score.nats, rel=1e-5)
    assert scores[0].score.row()[1:] == scores[1].score.row()[1:]


def test_what_a_run_fitted_is_taken_from_its_checkpoint(tmp_path: Path) -> None:
    prepare(build(PrepareConfig, {"source": {"kind": "wine"}}, where="prepare"), tmp_path / "wine")
    data = {"corpus": str(tmp_path / "wine"), "view": {"standardise": True}}
    config = schema.load(written(tmp_path, prepare=None, data=data))
    assert runfolder.stored_fit(config) is None, "a new run"
    resolved, (view,) = corpora.seen(config, [open_corpus(tmp_path / "wine")])
    assert resolved.data.context == 13
    fitted = corpora.fit_of(view)
    assert fitted is not None
    assert len(fitted["mean"]) == 13

    changed = {"mean": [0.0] * 13, "std": [2.0] * 13}
    parameters = torch.nn.Linear(1, 1)
    store = Checkpoints(config.folder / runfolder.CHECKPOINTS, config.checkpoint, note=print)
    engine = engines.make(
        config.engine, parameters, optimizer=config.optimizer, place=ALONE, micro_batch=1, accumulation=1, seed=0
    )
    store.prepare(engine)
    store.save(engine, step=1, state={"fit": changed})
    store.close()
    stored = runfolder.stored_fit(config)
    assert stored == changed
    _, (again,) = corpora.seen(config, [open_corpus(tmp_path / "wine")], stored=stored)
    x = again.split("valid").fetch(np.arange(4), 13).x_BT.numpy()
    plain = open_corpus(tmp_path / "wine").split("valid").fetch(np.arange(4), 13).x_BT.numpy()
    np.testing.assert_array_equal(x, plain / 2)
    assert corpora.alike(open_corpus(tmp_path / "wine"), again).measure == again.measure
