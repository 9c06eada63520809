"""Subsets, intervals, what is printed, and what is refused."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import numpy as np
import pytest
import torch

from lmtrain.config import build
from lmtrain.errors import ConfigError
from lmtrain.inference.cut import Windows, smallest
from lmtrain.inference.interval import bootstrap
from lmtrain.inference.score import EvalConfig
from lmtrain.protocol import LN2
from tests.inference.hand_models import Bigram, Fading, NoCarry, Pieces
from tests.inference.scoring import MODES, TEXTS, close, corpus_of, long_corpus, score

# -- subsets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [{"mode": "window"}, {"mode": "sliding", "stride": 5}, {"mode": "carried"}], ids=str)
def test_a_subset_is_fixed_capped_and_said(mode: dict[str, Any]) -> None:
    corpus = long_corpus()
    model = Bigram(257, seed=12)
    mode = {**mode, "batch": 64}
    whole = score(model, corpus, context=16, **mode)
    assert whole.complete
    assert whole.score.words
    for cap in (100, 1000, 5000):
        part = score(model, corpus, context=16, max_symbols=cap, **mode)
        assert cap - 16 <= part.score.symbols <= cap
        assert not part.complete
        assert close(part.share, part.score.symbols / whole.score.symbols)
        assert part.score.word_perplexity is None
        assert part.word_perplexity_eos is None
        assert "A SUBSET" in part.describe()
        assert part.to_json()["complete"] is False
        assert part.to_json()["words"] is None
        # a fair part of the whole: near its value, and spread over it
        assert abs(part.score.nats_per_symbol / whole.score.nats_per_symbol - 1) < 3 / math.sqrt(cap)
    everything = score(model, corpus, context=16, max_symbols=10**9, **mode)
    assert everything.complete
    assert everything.score == whole.score


def test_subsets_are_nested_and_scattered() -> None:
    split = long_corpus().split("data")
    rows = {}
    for cap in (500, 2000, 6000):
        rows[cap] = set(Windows(split, context=16, batch=1, max_symbols=cap).spans()[0].tolist())
    assert rows[500] < rows[2000] < rows[6000]
    starts = np.array(sorted(rows[2000])) / split.symbols
    assert starts[0] < 0.05
    assert starts[-1] > 0.95
    assert np.histogram(starts, bins=4, range=(0, 1))[0].min() > 15


def test_the_least_hashes_are_found_in_pieces() -> None:
    """More numbers than one chunk holds: the same as hashing them all."""
    total = (1 << 20) + 12345
    few = smallest(total, 1000)
    assert len(set(few.tolist())) == 1000
    assert set(smallest(total, 100).tolist()) == set(few[:100].tolist())
    assert np.histogram(few, bins=4, range=(0, total))[0].min() > 180


# -- what is printed -------------------------------------------------------------------------------------------------


def test_units_documents_blocks_or_none() -> None:
    rng = np.random.default_rng(2)

    def texts(documents: int, size: int) -> list[bytes]:
        return [rng.integers(97, 110, size).astype(np.uint8).tobytes() for _ in range(documents)]

    model = Bigram(257, seed=13)
    many = score(model, corpus_of(texts(31, 50))[0], context=64)
    assert (many.unit, many.units) == ("document", 31)
    assert "95%, bootstrap over 31 documents; test-set sampling only, one seed" in many.describe()
    few = score(model, corpus_of(texts(29, 1000))[0], context=64)
    assert (few.unit, few.units) == ("block of 2,048 symbols", math.ceil(29 * 1001 / 2048))
    assert "15 blocks of 2,048 symbols" in few.describe()
    none = score(model, corpus_of(texts(5, 1000))[0], context=64)
    assert none.interval is None
    assert "none: 3 blocks of 2,048 symbols, fewer than 10" in none.describe()
    assert none.to_json()["interval"] is None
    low, high = many.bounds("bits_per_byte")
    assert low < many.score.bits_per_byte < high
    low, high = many.bounds("perplexity")
    assert low < many.score.perplexity < high
    assert close(math.log(low), many.bounds("nats_per_symbol")[0])


def test_units_hold_their_own_sums() -> None:
    """The interval of hand-made sums for each document is the one that is printed."""
    corpus = long_corpus()
    split = corpus.split("data")
    model = Bigram(257, seed=14)
    line = [256, *split.read(0, split.symbols).tolist()]
    each = np.array([-model.logp_VV[a, b].item() for a, b in itertools.pairwise(line)])
    ends = split.document_ends().tolist()
    begins = [0, *ends[:-1]]
    nats = np.array([each[a:b].sum() for a, b in zip(begins, ends, strict=True)])
    below = np.array([[b - a, b - a - 1] for a, b in zip(begins, ends, strict=True)], dtype=np.float64)
    want = bootstrap(nats, below_UK=below, unit="document")
    got = score(model, corpus, context=16, batch=3, world=2).interval
    assert got is not None
    assert want is not None
    np.testing.assert_allclose(got.low_K, want.low_K, rtol=1e-6)
    np.testing.assert_allclose(got.high_K, want.high_K, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES[:3], ids=str)
def test_nothing_is_printed_without_mode_context_stride(mode: dict[str, Any]) -> None:
    corpus, _ = corpus_of(None, Pieces())
    result = score(Fading(Pieces.vocab, seed=15, bos=Pieces.end, context=8), corpus, **mode)
    said = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert said["mode"] == mode["mode"]
    assert said["context"] == (None if mode["mode"] == "carried" else 8)
    assert said["stride"] == mode.get("stride")
    assert said["perplexity"] == pytest.approx(math.exp(said["nats"] / said["symbols"]))
    assert said["bits_per_byte"] == pytest.approx(said["nats"] / (LN2 * sum(map(len, TEXTS))))
    assert said["bits_per_byte_is"].startswith("canonical segmentation: an upper bound")
    assert said["tokenizer"] == "sentencepiece-bpe"
    assert set(said["definitions"]) >= {"symbols", "perplexity", "bits_per_byte", "word_perplexity", "interval"}
    first = result.describe().splitlines()[0]
    assert f"mode {mode['mode']}" in first
    assert ("context 8" in first) == (mode["mode"] != "carried")
    assert ("stride 3" in first) == (mode["mode"] == "sliding")


def test_a_broken_model_does_not_break_the_report() -> None:
    corpus = long_corpus()
    model = Bigram(257, seed=16)
    with torch.no_grad():
        model.logp_VV[100, 101] = -torch.inf
    result = score(model, corpus)
    assert result.score.perplexity == math.inf
    said = json.dumps(result.to_json(), allow_nan=False)
    assert json.loads(said)["perplexity"] is None
    assert "inf" in result.describe()
    assert "none: the sums are not finite" in result.describe()


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    corpus, _ = corpus_of()
    seen = []

    class Watching(NoCarry):
        def forward(self, x_BT: torch.Tensor, *, cond: Any) -> torch.Tensor:
            seen.append((self.training, torch.is_grad_enabled()))
            return super().forward(x_BT, cond=cond)

    model = Watching(257)
    model.train()
    score(model, corpus)
    assert set(seen) == {(False, False)}
    assert model.training


# -- refusals --------------------------------------------------------------------------------------------------------


def test_modes_that_a_model_cannot_do() -> None:
    corpus, _ = corpus_of()
    with pytest.raises(ConfigError, match="carries a state, NoCarry does not"):
        score(NoCarry(257), corpus, mode="carried")
    with pytest.raises(ConfigError, match="rows of 9 symbols are longer than the model's context of 8"):
        score(NoCarry(257), corpus, context=9)
    with pytest.raises(ConfigError, match="stride 9 does not fit the context 8"):
        score(NoCarry(257), corpus, context=8, mode="sliding", stride=9)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"mode": "strided"}, "mode = 'strided'"),
        ({"stride": 4}, "eval.stride = 4 is for eval.mode = sliding"),
        ({"mode": "sliding", "stride": 0}, "stride = 0"),
        ({"max_symbols": 0}, "max_symbols = 0"),
        ({"batch": 0}, "batch = 0"),
        ({"strid": 4}, "did you mean 'stride'"),
        ({"sets": {"x": {"split": "test"}}}, "would be read during training"),
        ({"sets": ["valid", "fold:1/10:test"]}, "letters, digits"),
        ({"sets": {"a/b": {"split": "valid"}}}, "set name 'a/b'"),
        ({"sets": {"a": {"splt": "valid"}}}, "did you mean 'split'"),
    ],
)
def test_configs_that_are_refused(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        build(EvalConfig, config, where="eval")
    assert "\n" not in str(caught.value)


def test_sets_by_name() -> None:
    config = build(EvalConfig, {"sets": ["valid", "train"]}, where="eval")
    assert {name: one.split for name, one in config.sets.items()} == {"valid": "valid", "train": "train"}
    assert list(EvalConfig().sets) == ["valid"]
    assert EvalConfig().plan(10).stride == 10
    assert build(EvalConfig, {"mode": "sliding"}, where="eval").plan(10).stride == 5
