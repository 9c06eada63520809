"""The configs of a cross-validation: grids, folds, names that change with what is trained; and learning curves."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from lmtrain import schema
from lmtrain.errors import ConfigError, InputError
from lmtrain.likelihood import candidates as grid
from lmtrain.likelihood.candidates import Axis
from lmtrain.likelihood.learning import Curve, curve_of, mean_curve
from tests.house import config

WIDTHS, DECAYS = "model.width=32,16", "optimizer.weight_decay=0,1e-1,0.3"


def test_a_grid_is_every_pair_from_complex_to_simple() -> None:
    points = grid.candidates([Axis.parse(WIDTHS), Axis.parse(DECAYS)])
    assert [point.label for point in points][:3] == [
        "width=32 weight_decay=0",
        "width=32 weight_decay=0.1",
        "width=32 weight_decay=0.3",
    ]
    assert [point.simplicity for point in points] == [0, 1, 2, 1, 2, 3]
    assert dict(points[4].values) == {"model.width": 16, "optimizer.weight_decay": 0.1}
    (alone,) = grid.candidates([])
    assert (alone.label, dict(alone.values)) == ("as given", {})


@pytest.mark.parametrize("text", ["model.width", "model.width=", "=1,2", "a=1,1"])
def test_what_is_no_axis_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--grid"):
        Axis.parse(text)


def test_three_axes_or_one_twice_are_refused() -> None:
    for axes in ([WIDTHS, WIDTHS], [WIDTHS, DECAYS, "model.layers=1,2"]):
        with pytest.raises(InputError, match="one key or two different ones"):
            grid.candidates([Axis.parse(text) for text in axes])


def test_how_folds_come_about(tmp_path: Path) -> None:
    bytes_config = schema.load(config(tmp_path))
    assert grid.way_of(bytes_config, published=False) == "buckets"
    assert grid.way_of(bytes_config, published=True) == "published"
    assert grid.fold_keys(bytes_config, "buckets", fold=2, folds=5) == {"data.folds": 5, "data.fold": 2}
    pieces = schema.load(config(tmp_path), ["prepare.tokenizer.kind=characters"])
    assert grid.way_of(pieces, published=False) == "tokenizer"
    one = grid.with_keys(pieces, grid.fold_keys(pieces, "tokenizer", fold=2, folds=5), where="fold")
    assert one.prepare is not None
    assert (one.prepare.split.folds, one.prepare.split.fold, one.prepare.split.valid) == (5, 2, None)
    assert one.data.corpus == f"{pieces.data.corpus}-fold2of5"
    ready = schema.load(config(tmp_path), ["prepare.tokenizer.path=tokenizers/x", "prepare.tokenizer.kind=null"])
    assert grid.way_of(ready, published=False) == "buckets", "a tokenizer that is there is not trained again"
    wine = schema.load(Path(__file__).parents[2] / "configs" / "rnade-small-redwine.yaml")
    assert grid.way_of(wine, published=False) == "own"
    three = grid.with_keys(wine, grid.fold_keys(wine, "own", fold=3, folds=10), where="fold")
    assert three.prepare is not None
    assert three.prepare.split.fold == 3
    with pytest.raises(ConfigError, match="what crossval decides"):
        grid.way_of(grid.with_keys(bytes_config, {"data.folds": 3, "data.fold": 1}, where="x"), published=False)


def test_a_name_changes_with_what_is_trained_and_with_nothing_else(tmp_path: Path) -> None:
    base = schema.load(config(tmp_path))

    def name(keys: dict[str, object], *, fingerprint: str = "a") -> str:
        return grid.job_name(grid.with_keys(base, keys, where="x"), label="l", fold=1, fingerprint=fingerprint)

    assert name({"run.name": "other", "run.dir": "elsewhere", "wandb.mode": "offline"}) == name({})
    others = [name({"train.seed": 4}), name({"model.width": 32}), name({"data.folds": 3, "data.fold": 1})]
    assert len({name({}), *others, name({}, fingerprint="b")}) == 5
    assert name({}).startswith("l-fold1-")


def test_training_rows_are_evaluated_beside_the_held_out_ones(tmp_path: Path) -> None:
    base = schema.load(config(tmp_path))
    beside = grid.beside_train(base, most=77)
    assert list(beside.eval.sets) == ["valid", "train"]
    assert (beside.eval.sets["train"].split, beside.eval.sets["train"].max_symbols) == ("train", 77)
    assert grid.beside_train(beside, most=5) is beside
    assert grid.held_out_set(beside) == ("valid", "valid")
    other = grid.with_keys(base, {"eval.sets": {"far": {"corpus": "x", "split": "valid"}}}, where="x")
    with pytest.raises(ConfigError, match="run's own corpus"):
        grid.held_out_set(other)


def _rows(held: list[float], train: list[float]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = [{"kind": "train", "step": 1, "train/loss": 3.0}]
    for number, pair in enumerate(zip(held, train, strict=True), start=1):
        for name, value in zip(("valid", "train"), pair, strict=True):
            score = {"nats": 7 * value}
            at = {"kind": "eval", "step": 10 * number, "set": name, "score": score, "records": 7}
            rows.append({**at, f"eval/{name}/bits_per_byte": value})
    return rows


def test_a_learning_curve_and_where_overfitting_starts() -> None:
    rows = _rows([2.0, 1.5, 1.5, 1.8], [1.9, 1.2, 1.0, 0.5])
    for unit in ("bits_per_byte", "nats_per_record"):
        curve = curve_of(rows, held="valid", train="train", unit=unit)
        assert curve.steps == (10, 20, 30, 40)
        assert curve.held == (2.0, 1.5, 1.5, 1.8)
        assert (curve.best_step, curve.overfits) == (20, True)
        assert curve.gap == pytest.approx(0.3)
    assert Curve.from_json(json.loads(json.dumps(curve.to_json()))) == curve
    falling = curve_of(_rows([2.0, 1.5], [1.0, 1.0]), held="valid", train="train", unit="bits_per_byte")
    assert (falling.best_step, falling.overfits) == (20, False)
    alone = curve_of(rows, held="valid", train="absent", unit="bits_per_byte")
    assert alone.train is None
    assert math.isnan(alone.gap)


def test_the_mean_curve_is_over_the_steps_that_all_folds_have() -> None:
    short = Curve((10, 20), (2.0, 1.0), (1.0, 0.5))
    long = Curve((10, 20, 30), (4.0, 2.0, 9.0), (2.0, 1.5, 0.1))
    mean = mean_curve([short, long])
    assert mean == Curve((10, 20), (3.0, 1.5), (1.5, 1.0))
    assert mean_curve([short, Curve((5,), (1.0,), None)]) == Curve((), (), None)
