"""Scores of records: sums by hand, bits with their offset, both units of reals, the same for every batch and world."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lmtrain.config import build
from lmtrain.data.prepare import prepare
from lmtrain.data.shards import open_corpus
from lmtrain.data.view import ViewConfig, view_of
from lmtrain.errors import ConfigError
from lmtrain.inference.result import Result
from lmtrain.inference.score import EvalConfig, evaluate
from lmtrain.protocol import Cond, Corpus, Model
from tests.data.making import config
from tests.inference.hand_models import Bigram
from tests.inference.ranks import Add, as_ranks


class Normal(Model):
    """Every number is N(mean, 1), whatever came before: a density of reals."""

    def __init__(self, mean: float = 0.0) -> None:
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(mean))

    def forward(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        assert x_BT.dtype == torch.float32
        return -0.5 * (x_BT - self.mean) ** 2 - 0.5 * math.log(2 * math.pi)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("scores")
    for kind in ("digits", "wine"):
        prepare(config({"source": {"kind": kind}}), place / kind)
    return place


def score(model: Model, corpus: Corpus, *, world: int = 1, split: str = "valid", **keys: Any) -> Result:
    def run(rank: int, size: int, add: Add) -> Result:
        settings = build(EvalConfig, keys, where="eval")
        part = corpus.split(split)
        return evaluate(
            model, part, corpus, config=settings, context=corpus.record or 8, rank=rank, world=size, add=add
        )

    return as_ranks(world, run)[0]


def records(corpus: Corpus, split: str = "valid") -> np.ndarray:
    part = corpus.split(split)
    return part.read(0, part.symbols).reshape(part.documents, -1).astype(np.float64)


def test_bits_of_symbols_are_exact(folder: Path) -> None:
    digits = open_corpus(folder / "digits")
    model = Bigram(18, seed=0)
    result = score(model, digits)
    x = records(digits).astype(int)
    before = np.concatenate([np.full((len(x), 1), 17), x[:, :-1]], axis=1)  # every record begins from the start
    nats = -model.logp_VV.detach().double().numpy()[before, x].sum()
    assert result.score.nats == pytest.approx(nats, rel=1e-6)
    assert (result.records, result.score.dims, result.score.bytes) == (len(x), x.size, 0)
    assert result.nats_per_record == pytest.approx(nats / len(x))
    assert result.score.bits_per_dim == pytest.approx(nats / x.size / math.log(2))
    low, high = result.bounds("bits_per_dim") or (0, 0)
    assert low < result.score.bits_per_dim < high
    assert result.bounds("nats_per_record") == pytest.approx((low * 64 * math.log(2), high * 64 * math.log(2)))
    said, shown = result.to_json(), result.describe()
    assert (said["records"], said["bits_per_dim_is"]) == (len(x), "exact: probabilities of symbols")
    assert (said["bytes"], said["words"], said["log_likelihood"]) == (None, None, None)
    assert result.unit == "record"
    assert "bits per dim" in shown
    assert "nats per record" in shown
    assert "perplexity" not in shown
    assert "end symbol" not in shown


def test_dequantised_densities_are_a_bound_with_their_offset(folder: Path) -> None:
    digits = open_corpus(folder / "digits")
    for keys in ({"dequantise": True}, {"dequantise": True, "standardise": True}):
        (view,) = view_of([digits], build(ViewConfig, keys, where="view"))
        result = score(Normal(0.3), view)
        seen = records(view)
        raw = 0.5 * ((seen - 0.3) ** 2).sum() + 0.5 * math.log(2 * math.pi) * seen.size
        scale = np.ones(64) if len(keys) == 1 else np.array(view.fit.std)  # type: ignore[attr-defined]
        # In units of grey levels a density is smaller by 1 / (17 std) in each dimension.
        bits = (raw + len(seen) * np.log(17 * scale).sum()) / seen.size / math.log(2)
        assert result.score.bits_per_dim == pytest.approx(bits, rel=1e-6)
        low, high = result.bounds("bits_per_dim") or (0, 0)
        assert low < bits < high
        assert "an upper bound" in (result.dims_note or "")
        assert "bound" in result.describe()
        assert result.to_json()["offset_per_record"] == pytest.approx(np.log(17 * scale).sum())


def test_the_bound_holds_against_the_sum_over_symbols(folder: Path) -> None:
    """P(k) = integral of the density over its interval: no less, on average, than what is printed as its bound."""
    digits = open_corpus(folder / "digits")
    (view,) = view_of([digits], build(ViewConfig, {"dequantise": True}, where="view"))
    result = score(Normal(0.3), view)
    edges = (np.arange(18) / 17 - 0.3) / math.sqrt(2)
    mass = np.diff([math.erf(edge) / 2 for edge in edges])
    exact = -np.log2(mass[records(digits).astype(int)]).mean()
    assert result.score.bits_per_dim is not None
    assert exact <= result.score.bits_per_dim + 1e-3
    assert result.score.bits_per_dim == pytest.approx(exact, abs=2e-3), "the density hardly bends inside an interval"


def test_reals_have_a_likelihood_in_both_units_and_no_bits(folder: Path) -> None:
    wine = open_corpus(folder / "wine")
    (view,) = view_of([wine], build(ViewConfig, {"standardise": True}, where="view"))
    result = score(Normal(), view)
    train, x = records(wine, "train"), records(wine)
    z = (x - train.mean(axis=0)) / train.std(axis=0)
    own = (-0.5 * z**2 - 0.5 * math.log(2 * math.pi)).sum() / len(x)
    assert result.log_likelihood == pytest.approx((own, own - np.log(train.std(axis=0)).sum()), rel=1e-5)
    assert result.score.bits_per_dim is None
    said = result.to_json()
    assert said["perplexity"] is None, "a density has none"
    assert "perplexity" not in result.metrics()
    assert said["interval"]["perplexity"] is None
    assert said["log_likelihood"] == pytest.approx(own, rel=1e-5)
    assert said["bits_per_dim"] is None
    assert "a density of real numbers has no bits" in said["bits_per_dim_is"]
    shown = result.describe()
    assert "in the model's units (standardised)" in shown
    assert "in the units of the data" in shown
    assert "bits per dim" in shown
    plain = score(Normal(), wine)
    assert plain.log_likelihood is not None
    assert plain.log_likelihood[0] == plain.log_likelihood[1]


CASES: list[tuple[str, dict[str, Any]]] = [
    ("digits", {}),
    ("digits", {"binarise": "draw"}),
    ("digits", {"dequantise": True, "standardise": True}),
    ("wine", {"standardise": True}),
]


@pytest.mark.parametrize(("name", "keys"), CASES)
def test_the_same_for_every_batch_and_world(name: str, keys: dict[str, Any], folder: Path) -> None:
    (view,) = view_of([open_corpus(folder / name)], build(ViewConfig, keys, where="view"))
    model: Model = Bigram(view.alphabet + 1, seed=0) if view.alphabet else Normal()
    first = score(model, view, batch=1)
    for batch, world in ((3, 1), (7, 1), (3, 2), (7, 3)):
        again = score(model, view, batch=batch, world=world)
        assert again.score.row()[1:] == first.score.row()[1:]
        assert again.score.nats == pytest.approx(first.score.nats, rel=1e-12)
        assert (again.records, again.units) == (first.records, first.units)
    some = score(model, view, batch=3, max_symbols=10 * (view.record or 1))
    assert (some.records, some.score.symbols) == (10, 10 * (view.record or 1))
    assert some.score.offset == pytest.approx(10 * view.measure.offset)


def test_rows_of_records_do_not_overlap(folder: Path) -> None:
    digits = open_corpus(folder / "digits")
    for mode in ("sliding", "carried"):
        with pytest.raises(ConfigError, match=f"eval.mode = {mode} is for streams, and .*digits holds records"):
            score(Bigram(18, seed=0), digits, mode=mode)
