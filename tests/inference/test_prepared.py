"""Prepared corpora on disk, scored: against the same documents in memory and against the size of the files."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece

from lmtrain.data.memory import MemoryCorpus
from lmtrain.data.shards import finish, open_corpus, write_block
from lmtrain.errors import CorpusError
from lmtrain.inference.score import EvalConfig, evaluate
from tests.data.texts import prose, trained
from tests.inference.hand_models import Bigram, Fading

# Some with what SentencePiece alone would get wrong: U+2581, invalid UTF-8, a literal "<0x41>".
TEXTS = [prose(100 + i, 1 + i % 4) for i in range(24)] + [b"", "▁ ▁▁ x".encode(), b"\xff\xfe\x00", b"<0x41><s>\n"]


def prepare(folder: Path, kind: str, *, miscount: int = 0) -> Path:
    """TEXTS in two blocks, buckets 0-499 train and the rest valid."""
    tokenizer = trained()[kind]
    tokenizer.save(folder / "tokenizer")
    ids = [np.append(tokenizer.encode(raw), tokenizer.end) for raw in TEXTS]
    rows = [(raw, symbols, 0, len(raw.split())) for raw, symbols in zip(TEXTS, ids, strict=True)]
    counts_V = tokenizer.symbol_bytes().copy()
    counts_V[tokenizer.encode(b"the")] += miscount
    finish(
        folder,
        header={
            "kind": "text",
            "alphabet": tokenizer.vocab,
            "bos": tokenizer.end,
            "tokenizer": {"kind": kind, "sha256": tokenizer.sha256, "file": "tokenizer"},
            "split": {"kind": "hash", "splits": {"train": {"buckets": [0, 500]}, "valid": {"buckets": [500, 1000]}}},
        },
        blocks=[write_block(folder, n, part, dtype="uint16") for n, part in enumerate((rows[:13], rows[13:]))],
        symbol_bytes_V=counts_V,
    )
    return folder


@pytest.mark.parametrize("kind", ["sentencepiece-unigram", "bytes"])
def test_disk_equals_memory_and_the_files(tmp_path: Path, kind: str) -> None:
    corpus = open_corpus(prepare(tmp_path, kind))
    tokenizer = trained()[kind]
    split = corpus.split("valid")
    ends = split.document_ends().tolist()
    texts = [corpus.decode(split.read(a, b).tolist()) for a, b in itertools.pairwise([0, *ends])]
    assert set(texts) < set(TEXTS)
    held = MemoryCorpus(tokenizer, texts)
    model = Fading(tokenizer.vocab, seed=1, bos=corpus.bos, context=32)
    modes: list[dict[str, Any]] = [{}, {"mode": "sliding", "stride": 20}, {"mode": "carried"}, {"max_symbols": 100}]
    for settings, masking in itertools.product(modes, (False, True)):
        config = EvalConfig.model_validate({**settings, "batch": 5})
        got = evaluate(model, split, corpus, config=config, context=32, masking=masking)
        want = evaluate(model, held.split(), held, config=config, context=32, masking=masking)
        assert got.score == want.score
        assert got.interval == want.interval
        assert got.lines == want.lines
        if got.complete:
            assert got.score.bytes == sum(map(len, texts))
            assert got.score.words == sum(len(raw.split()) for raw in texts)
            bits = got.score.nats / math.log(2) / sum(map(len, texts))
            assert got.score.bits_per_byte == pytest.approx(bits, rel=1e-12)
        assert got.exact == (kind == "bytes")
        assert got.tokenizer == kind


def test_sentencepieces_own_bytes_are_another_number() -> None:
    """Counting the bytes of what SentencePiece decodes, or of its pieces, is not the file's size."""
    tokenizer = trained()["sentencepiece-unigram"]
    corpus = MemoryCorpus(tokenizer, TEXTS)
    result = evaluate(Bigram(tokenizer.vocab, seed=0), corpus.split(), corpus, config=EvalConfig(batch=64), context=64)
    size = sum(map(len, TEXTS))
    assert result.score.bytes == size
    alone = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.content)
    ids = [tokenizer.encode(raw).tolist() for raw in TEXTS]
    decoded = sum(len(alone.decode(one).encode("utf-8", "surrogatepass")) for one in ids)
    pieces = sum(len(alone.id_to_piece(i).encode()) for one in ids for i in one)
    assert decoded != size
    assert pieces > 1.2 * size


def test_a_corpus_that_miscounts_is_refused(tmp_path: Path) -> None:
    corpus = open_corpus(prepare(tmp_path, "sentencepiece-unigram", miscount=1))
    with pytest.raises(CorpusError, match=r"stand for \d+ raw bytes, the manifest says \d+"):
        evaluate(Bigram(corpus.alphabet, seed=0), corpus.split("valid"), corpus, config=EvalConfig(), context=64)
