"""Scores against sums worked out from the definitions, one symbol at a time, in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lmtrain.data.memory import MemoryCorpus, MemorySplit
from lmtrain.errors import CorpusError
from lmtrain.inference.cut import Windows
from lmtrain.inference.score import EvalConfig, evaluate
from tests.inference.hand_models import Bigram, Bytes, Fading, NoCarry, Pieces, fading_nats
from tests.inference.scoring import MODES, TEXTS, close, corpus_of, score


def window(context: int, text: list[int], bos: int) -> Callable[[int], list[int]]:
    """What symbol t sees in window mode: the symbol before its row, then the row up to t."""
    line = [bos, *text]
    return lambda t: line[t // context * context : t + 1]


def sliding(context: int, stride: int, text: list[int], bos: int) -> Callable[[int], list[int]]:
    """What symbol t sees in the first row (of rows begun every `stride` symbols) that reaches it."""
    line = [bos, *text]

    def visible(t: int) -> list[int]:
        row = next(j for j in range(len(text)) if t < j * stride + context)
        return line[row * stride : t + 1]

    return visible


# -- the sums --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("context", [1, 7, 64, 1000])
def test_window_is_cross_entropy_over_rows(context: int, batch: int) -> None:
    """torch's own cross-entropy, row after row, of logits that never saw our cutting."""
    corpus, split = corpus_of()
    model = Bigram(257, seed=0)
    text = torch.from_numpy(split.read(0, split.symbols))
    start, nats = split.start_symbol(0), 0.0
    for at in range(0, len(text), context):
        row = text[at : at + context]
        inputs = torch.cat([torch.tensor([start]), row[:-1]])
        nats += F.cross_entropy(model.logp_VV.detach().double()[inputs], row, reduction="sum").item()
        start = int(row[-1])
    result = score(model, corpus, context=context, batch=batch)
    assert close(result.score.nats, nats)
    assert result.score.symbols == split.symbols == sum(map(len, TEXTS)) + len(TEXTS)


@pytest.mark.parametrize("context", [5, 16])
def test_window_sees_its_row_and_the_symbol_before(context: int) -> None:
    corpus, split = corpus_of()
    model = Fading(257, seed=1, bos=256, context=context)
    text = split.read(0, split.symbols).tolist()
    nats = fading_nats(model, text, visible=window(context, text, 256)).sum()
    assert close(score(model, corpus, context=context, batch=3).score.nats, nats)
    # the test can fail: one symbol more of context is another number
    wider = fading_nats(model, text, visible=window(context + 1, text, 256)).sum()
    assert not close(nats, wider, rel=1e-4)


@pytest.mark.parametrize("stride", [1, 3, 8, 15, 16])
def test_sliding_against_its_definition(stride: int) -> None:
    corpus, split = corpus_of()
    model = Fading(257, seed=2, bos=256, context=16)
    text = split.read(0, split.symbols).tolist()
    nats = fading_nats(model, text, visible=sliding(16, stride, text, 256)).sum()
    result = score(model, corpus, context=16, mode="sliding", stride=stride, batch=3)
    assert close(result.score.nats, nats)
    assert result.score.symbols == split.symbols
    if stride == 16:
        assert close(result.score.nats, score(model, corpus, context=16, batch=3).score.nats, rel=1e-12)


def test_sliding_gives_more_context_and_a_better_score() -> None:
    """On text that a model with a memory can predict: the order window > sliding > carried must come out."""
    rng = np.random.default_rng(0)
    texts = [bytes([b]) * 150 for b in rng.integers(0, 4, 12)]
    corpus, _ = corpus_of(texts)
    model = Fading(257, seed=0, bos=256, fade=0.95)
    with torch.no_grad():
        model.W_VD.copy_(model.E_VD)  # what was read often is likely
    found = [
        score(model, corpus, context=16, mode="window"),
        score(model, corpus, context=16, mode="sliding", stride=4),
        score(model, corpus, context=16, mode="carried"),
    ]
    window_nats, sliding_nats, carried_nats = (result.score.nats for result in found)
    assert window_nats > sliding_nats * 1.02
    assert sliding_nats > carried_nats * 1.02


@pytest.mark.parametrize("context", [3, 7, 64])
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_carried_is_each_document_by_itself_from_a_zero_state(context: int, batch: int) -> None:
    corpus, split = corpus_of()
    model = Fading(257, seed=3, bos=256)
    nats = 0.0
    for text in TEXTS:
        symbols = [*text, 256]
        nats += fading_nats(model, symbols, visible=lambda t, line=(256, *symbols): line[: t + 1]).sum()
    result = score(model, corpus, context=context, batch=batch, mode="carried")
    assert close(result.score.nats, nats)
    assert result.score.symbols == split.symbols
    assert result.context is None
    assert "context from each document's start" in result.describe()


def test_document_masking_cuts_at_documents() -> None:
    corpus, split = corpus_of()
    model = Fading(257, seed=4, bos=256, context=16)
    text = split.read(0, split.symbols).tolist()
    ends = split.document_ends().tolist()
    begin = [max([0, *(e for e in ends if e <= t)]) for t in range(len(text))]

    def visible(t: int) -> list[int]:
        row = t // 16 * 16
        return [256, *text[begin[t] : t]] if begin[t] >= row else [text[row - 1], *text[row:t]]

    nats = fading_nats(model, text, visible=visible).sum()
    assert close(score(model, corpus, context=16, masking=True, batch=3).score.nats, nats)
    full = score(model, corpus, context=16, masking=True, mode="sliding", stride=16)
    assert close(full.score.nats, nats)
    assert not close(nats, score(model, corpus, context=16).score.nats, rel=1e-4)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_batch_and_world_size_finds_the_same(mode: dict[str, Any], world: int) -> None:
    corpus, _ = corpus_of()
    model = Fading(257, seed=5, bos=256, context=8)
    want = score(model, corpus, batch=4, **mode)
    for batch in (1, 3, 8):
        model.shapes.clear()
        found = score(model, corpus, batch=batch, world=world, **mode)
        assert close(found.score.nats, want.score.nats)
        assert found.score.row()[1:] == want.score.row()[1:]
        assert found.share == want.share
        if want.interval is not None:
            assert found.interval is not None
            np.testing.assert_allclose(found.interval.low_K, want.interval.low_K, rtol=1e-6)
        # every rank called the model as often as the others, with rows of the same shape, both times it was asked
        per_rank = np.array_split(np.array(model.shapes), 2 * world if world > 1 else 1)
        assert len({len(shapes) for shapes in per_rank}) == 1
        assert all((shapes == per_rank[0]).all() for shapes in per_rank)


def test_padding_is_not_looked_at() -> None:
    """Padding answered with NaN; a sum that multiplied by weight 0 would be NaN."""
    corpus, _ = corpus_of([b"abcdefghijk"])
    model = Fading(257, seed=6, bos=256, context=8)
    want = score(model, corpus, batch=1)
    model.poison = True
    for mode in ({}, {"mode": "sliding", "stride": 5}):
        for batch in (1, 8):
            found = score(model, corpus, batch=batch, world=3, **mode)
            assert math.isfinite(found.score.nats)
    assert close(score(model, corpus, batch=8, world=3).score.nats, want.score.nats)


def test_sums_are_float64() -> None:
    """A million equal log-probabilities: a float32 sum is wrong in the fourth digit."""
    model = NoCarry(3)
    model.context = 1 << 20
    split = MemorySplit("data", [np.zeros(1 << 20, dtype=np.int64)], bos=2, alphabet=3)
    corpus = MemoryCorpus(Bytes(), [b"x"])
    result = evaluate(model, split, corpus, config=EvalConfig(), context=1 << 16)
    exact = float(np.float32(math.log(3))) * (1 << 20)
    assert close(result.score.nats, exact, rel=1e-13)
    naive = np.cumsum(np.full(1 << 20, math.log(3), dtype=np.float32))[-1]
    assert not close(float(naive), exact, rel=1e-6)


# -- what the field gets wrong ---------------------------------------------------------------------------------------


def test_mean_of_batch_means_is_another_number() -> None:
    corpus, split = corpus_of()
    model = Bigram(257, seed=7)
    ours = {batch: score(model, corpus, batch=batch).score.nats_per_symbol for batch in (1, 3, 8)}
    assert all(close(value, ours[1]) for value in ours.values())
    wrong = {}
    for batch in ours:
        means = []
        for call in Windows(split, context=8, batch=batch).calls(0, 1):
            logp_BT = model(call.batch.x_BT, cond=call.batch.cond) * call.batch.weight_BT
            means.append(-(logp_BT.sum() / call.batch.weight_BT.sum()).item())
        wrong[batch] = float(np.mean(means))
    assert len({round(value, 5) for value in wrong.values()}) == 3
    assert all(not close(value, ours[1], rel=1e-5) for value in wrong.values())


def test_the_tail_is_scored() -> None:
    """The last symbols, fewer than a row, are the surprising ones: dropping them would flatter."""
    corpus, split = corpus_of([b"a" * 40 + b"zq"])
    model = Bigram(257, seed=8)
    with torch.no_grad():
        model.logp_VV[:, ord("a")] = 0
        model.logp_VV.copy_(torch.log_softmax(model.logp_VV + 6 * F.one_hot(torch.tensor(97), 257), dim=-1))
    line = [256, *split.read(0, 43).tolist()]
    each = [-model.logp_VV[a, b].item() for a, b in itertools.pairwise(line)]
    result = score(model, corpus, context=8, batch=2)
    assert close(result.score.nats, sum(each))
    assert sum(each[:40]) < 0.9 * sum(each)
    assert result.score.symbols == 43


def test_padding_is_not_counted() -> None:
    """43 symbols in rows of 8 are 48 places; nothing of the five others counts."""
    corpus, _ = corpus_of([b"a" * 42])
    result = score(NoCarry(257), corpus, context=8, batch=4, world=3)
    assert result.score.row() == (pytest.approx(43 * math.log(257)), 43, 1, 42, 0, 0)
    assert close(result.score.perplexity, 257)


def test_one_rank_alone_is_another_number() -> None:
    corpus, split = corpus_of()
    model = Bigram(257, seed=9)
    together = score(model, corpus, world=3, batch=2).score.nats_per_symbol
    assert close(together, score(model, corpus).score.nats_per_symbol)
    alone = []
    for rank in range(3):
        nats = symbols = 0.0
        for call in Windows(split, context=8, batch=2).calls(rank, 3):
            logp_BT = model(call.batch.x_BT, cond=call.batch.cond)
            nats -= (logp_BT * call.batch.weight_BT).sum().item()
            symbols += call.batch.weight_BT.sum().item()
        alone.append(nats / symbols)
    assert all(not close(value, together, rel=1e-4) for value in alone)


@pytest.mark.parametrize("tokenizer", [Bytes(), Pieces()], ids=lambda t: t.kind)
def test_bits_per_byte_against_the_file(tokenizer: Any, tmp_path: Any) -> None:
    file = tmp_path / "text"
    file.write_bytes(b"".join(TEXTS))
    corpus, _ = corpus_of([file.read_bytes()], tokenizer)
    model = Bigram(tokenizer.vocab, seed=10)
    result = score(model, corpus, batch=5)
    ids = [tokenizer.end, *tokenizer.encode(file.read_bytes()).tolist(), tokenizer.end]
    nats = -sum(model.logp_VV[a, b].item() for a, b in itertools.pairwise(ids))
    assert result.score.bytes == file.stat().st_size
    assert close(result.score.bits_per_byte, nats / math.log(2) / file.stat().st_size)
    assert result.exact == (tokenizer.kind == "bytes")
    if tokenizer.kind != "bytes":
        assert "an upper bound" in result.describe()
        # Counting the text of the pieces instead of their bytes, with "<0x..>" for a byte, is off by a lot.
        miscounted = sum(len(tokenizer.pieces[i]) if i >= 256 else 6 for i in ids[1:-1])
        assert miscounted > 1.5 * result.score.bytes


def test_miscounted_bytes_are_refused() -> None:
    class Miscounts(Pieces):
        def symbol_bytes(self) -> np.ndarray:
            counts = super().symbol_bytes().copy()
            counts[self.end - 1] += 2
            return counts

    corpus, _ = corpus_of(None, Miscounts())
    with pytest.raises(CorpusError, match=r"symbols stand for \d+ raw bytes, the manifest says \d+"):
        score(Bigram(Miscounts.vocab, seed=0), corpus)


def test_words_and_lines() -> None:
    """White-space words, and the PTB / WikiText count of one <eos> a line, by Python's own splitting."""
    for tokenizer in (Bytes(), Pieces()):
        for context in (3, 8, 200):
            for mode in ({}, {"mode": "sliding", "stride": 2}, {"mode": "carried"}):
                corpus, _ = corpus_of(None, tokenizer)
                result = score(Bigram(tokenizer.vocab, seed=11), corpus, context=context, batch=3, **mode)
                words = sum(len(text.split()) for text in TEXTS)
                lines = sum(len(text.removesuffix(b"\n").split(b"\n")) for text in TEXTS if text)
                assert result.score.words == words
                assert result.lines == lines
                nats = result.score.nats
                assert close(result.score.word_perplexity, math.exp(nats / words))
                assert close(result.word_perplexity_eos, math.exp(nats / (words + lines)))
