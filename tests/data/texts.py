"""Made-up text and small tokenizers trained on it, for tests."""

from __future__ import annotations

import functools
import random

import numpy as np

from lmtrain.data.tokenizer import Tokenizer, TokenizerConfig, train

KINDS = ("sentencepiece-unigram", "sentencepiece-bpe", "bytes", "characters")
VOCAB = {"sentencepiece-unigram": 340, "sentencepiece-bpe": 400}
WORDS = ("the", "of", "and", "to", "in", "that", "which", "for", "by", "have", "been", "nation", "session", "treaty")
ENDINGS = ("", "", "", "ing", "ed", "é", ",")


def prose(seed: int, lines: int) -> bytes:
    """English-looking lines with some accents, indentation and carriage returns, from a seed."""
    draw = random.Random(seed)
    out = []
    for _ in range(lines):
        words = [draw.choice(WORDS) + draw.choice(ENDINGS) for _ in range(draw.randint(3, 14))]
        out.append(draw.choice(["", "", "    ", "\t"]) + " ".join(words) + draw.choice([".", ";", " 1942", "\r"]))
    return "\n".join(out).encode()


TEXT = [prose(seed, 60) for seed in range(12)]


@functools.cache
def trained() -> dict[str, Tokenizer]:
    """One tokenizer of each kind, trained on TEXT."""
    return {
        kind: train(TokenizerConfig(kind=kind, vocab=VOCAB.get(kind)), TEXT, recipe={"source": "test"})
        for kind in KINDS
    }


def check_lossless(tokenizer: Tokenizer, raw: bytes) -> None:
    """decode(encode(raw)) == raw, bytes are counted, the end symbol is not produced."""
    ids = tokenizer.encode(raw)
    assert ids.dtype == np.int64
    assert ids.ndim == 1
    assert tokenizer.decode(ids) == raw
    assert tokenizer.symbol_bytes()[ids].sum() == len(raw)
    assert not (ids == tokenizer.end).any()
    assert tokenizer.decode([*ids.tolist(), tokenizer.end]) == raw
    if ids.size:
        assert ids.min() >= 0
        assert ids.max() < tokenizer.vocab
