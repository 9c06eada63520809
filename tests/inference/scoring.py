"""Texts, and one call that scores them: what the tests of scores share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lmtrain.config import build
from lmtrain.data.memory import MemoryCorpus, MemorySplit
from lmtrain.inference.result import Result
from lmtrain.inference.score import EvalConfig, evaluate
from lmtrain.protocol import Model
from tests.inference.hand_models import Bytes
from tests.inference.ranks import Add, as_ranks

TEXTS = [
    b"the cat sat on the mat\nand the dog ate it\n",
    "caf\u00e9 \u00e9t\u00e9 \u2581 abcdefabcdef".encode(),
    b"",
    b"one line without an end",
    b"\n\n\nblank lines\n\n",
    b"\xff\xfe not UTF-8 \x00",
    b"the the the the the the the the the the the the the the the",
]


def corpus_of(texts: list[bytes] | None = None, tokenizer: Any = None) -> tuple[MemoryCorpus, MemorySplit]:
    corpus = MemoryCorpus(tokenizer or Bytes(), TEXTS if texts is None else texts)
    return corpus, corpus.split("data")


def score(
    model: Model, corpus: MemoryCorpus, *, context: int = 8, masking: bool = False, world: int = 1, **config: Any
) -> Result:
    """One result; with several ranks each of them must have found the very same."""

    def run(rank: int, size: int, add: Add) -> Result:
        return evaluate(
            model,
            corpus.split("data"),
            corpus,
            config=build(EvalConfig, config, where="eval"),
            context=context,
            masking=masking,
            rank=rank,
            world=size,
            add=add,
        )

    results = as_ranks(world, run)
    assert all(result == results[0] for result in results)
    return results[0]


def close(a: float, b: float, rel: float = 1e-6) -> bool:
    return math.isclose(a, b, rel_tol=rel)


MODES = [
    {"mode": "window"},
    {"mode": "sliding", "stride": 3},
    {"mode": "carried"},
    {"mode": "window", "max_symbols": 60},
    {"mode": "sliding", "stride": 3, "max_symbols": 60},
    {"mode": "carried", "max_symbols": 60},
]


def long_corpus() -> MemoryCorpus:
    rng = np.random.default_rng(1)
    return MemoryCorpus(
        Bytes(), [rng.integers(97, 110, rng.integers(1, 400)).astype(np.uint8).tobytes() for _ in range(60)]
    )
