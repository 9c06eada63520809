"""Corpora in memory: rows, start symbols, padding and document marks against plain slicing; the real tokenizers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lmtrain.data.memory import MemoryCorpus, MemorySplit, begins
from lmtrain.data.symbols import Bytes as RealBytes
from lmtrain.data.symbols import Characters
from lmtrain.errors import CorpusError, InputError, TokenizerError
from lmtrain.inference.score import EvalConfig, evaluate, one_segmentation
from lmtrain.protocol import Corpus, Split
from tests.inference.hand_models import Bigram, Bytes, Pieces

TEXTS = [b"one", b"", b"three little\nwords", "é€".encode()]


def test_rows_are_slices() -> None:
    corpus: Corpus = MemoryCorpus(Pieces(), TEXTS)
    split: Split = corpus.split("data")
    line = np.concatenate([np.append(Pieces().encode(text), Pieces.end) for text in TEXTS])
    assert (split.symbols, split.documents, split.bytes, split.words) == (len(line), 4, sum(map(len, TEXTS)), 5)
    np.testing.assert_array_equal(split.read(0, len(line)), line)
    ends = split.document_ends()
    assert (line[ends - 1] == Pieces.end).all()
    starts = {0, *ends[:-1].tolist()}
    for context in (1, 4, 7, len(line), 100):
        rows = split.rows(context)
        assert rows == -(-len(line) // context)
        index_B = np.array([*range(rows), -1])[::-1]
        batch = split.fetch(index_B, context, masking=True)
        assert split.row_symbols(index_B, context).tolist() == batch.weight_BT.sum(1).tolist()
        for b, i in enumerate(index_B.tolist()):
            inside = line[i * context : (i + 1) * context] if i >= 0 else line[:0]
            pad = context - len(inside)
            assert batch.x_BT[b].tolist() == [*inside.tolist(), *[0] * pad]
            assert batch.weight_BT[b].tolist() == [1.0] * len(inside) + [0.0] * pad
            assert batch.cond.start_B[b] == (line[i * context - 1] if i > 0 else corpus.bos)
            assert batch.position_B[b] == (i * context if i >= 0 else -1)
            marks = {i * context + t for t in range(context) if batch.cond.first_BT[b, t]}
            assert marks == {s for s in starts if i >= 0 and i * context <= s < (i + 1) * context}
        assert split.fetch(index_B, context).cond.first_BT is None
    assert begins(ends, position=1, count=2).tolist() == [False, False]


def test_what_cannot_be_read() -> None:
    with pytest.raises(InputError, match="not one byte"):
        MemoryCorpus(Bytes(), [b"", b""])
    with pytest.raises(InputError, match="an empty document or none"):
        MemorySplit("x", [], bos=0, alphabet=2)
    corpus = MemoryCorpus(Bytes(), [b"x"], name="notes.txt")
    with pytest.raises(CorpusError, match=r"notes.txt was not prepared and has no split 'valid'"):
        corpus.split("valid")
    with pytest.raises(InputError):
        corpus.split("data").read(0, 3)
    exact = Characters(code_points=map(ord, "abc"), byte_fallback=False, recipe={})
    with pytest.raises(TokenizerError, match="'d'"):
        MemoryCorpus(exact, [b"abcd"])


def test_a_fingerprint_is_of_text_and_tokenizer() -> None:
    prints = {
        MemoryCorpus(RealBytes(recipe={}), [b"ab"]).fingerprint,
        MemoryCorpus(RealBytes(recipe={}), [b"a", b"b"]).fingerprint,
        MemoryCorpus(Characters(code_points=map(ord, "ab"), byte_fallback=False, recipe={}), [b"ab"]).fingerprint,
    }
    assert len(prints) == 3
    assert MemoryCorpus(RealBytes(recipe={}), [b"ab"]).fingerprint in prints


@pytest.mark.parametrize(
    ("tokenizer", "exact"),
    [
        (RealBytes(recipe={}), True),
        (Characters(code_points=map(ord, "abé€"), byte_fallback=False, recipe={}), True),
        (Characters(code_points=map(ord, "abé€"), byte_fallback=True, recipe={}), False),
    ],
    ids=["bytes", "characters", "characters with fallback"],
)
def test_real_tokenizers(tokenizer: Any, exact: bool) -> None:
    """Bits per byte of the real ones, and which of them have one way only of writing a text."""
    texts = ["aébé€".encode(), b"ab"]
    corpus = MemoryCorpus(tokenizer, texts)
    model = Bigram(tokenizer.vocab, seed=0)
    result = evaluate(model, corpus.split("data"), corpus, config=EvalConfig(batch=2), context=3)
    assert result.score.bytes == sum(map(len, texts)) == 11
    assert result.exact == exact
    assert ("an upper bound" in result.describe()) != exact


def test_one_segmentation_by_trying() -> None:
    """Against trying all ways of writing short texts with random little alphabets."""
    rng = np.random.default_rng(0)

    def ways(text: bytes, pieces: list[bytes]) -> int:
        if not text:
            return 1
        return sum(ways(text[len(piece) :], pieces) for piece in pieces if piece and text.startswith(piece))

    seen = set()
    for _ in range(300):
        pieces = [bytes(rng.integers(97, 100, rng.integers(1, 4)).astype(np.uint8)) for _ in range(rng.integers(1, 5))]
        unique = one_segmentation([*pieces, b""])
        seen.add(unique)
        if unique:
            texts = [b"".join(pieces[i] for i in rng.integers(0, len(pieces), 4)) for _ in range(5)]
            assert all(ways(text, pieces) == 1 for text in texts)
    assert seen == {True, False}
    assert not one_segmentation([b"a", b"ab"])
    assert not one_segmentation([b"a", b"a"])
    assert torch.tensor(one_segmentation([bytes([b]) for b in range(256)]))
