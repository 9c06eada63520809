"""Small sources, and what was prepared of them read back."""

from __future__ import annotations

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from lmtrain.config import build
from lmtrain.data.prepare import PrepareConfig
from lmtrain.data.shards import open_corpus
from tests.data.test_duplicates import ngrams_of, talk

BYTES = {"kind": "bytes"}


def config(tree: dict[str, Any]) -> PrepareConfig:
    return build(PrepareConfig, tree, where="test")


def jsonl(path: Path, documents: list[bytes]) -> dict[str, Any]:
    path.write_text("".join(json.dumps({"text": raw.decode()}) + "\n" for raw in documents))
    return {"kind": "files", "paths": [str(path)]}


def texts(folder: Path, name: str) -> list[bytes]:
    """The raw documents of a split, read back through the reader and the tokenizer."""
    corpus = open_corpus(folder)
    split = corpus.split(name)
    starts = [0, *split.document_ends().tolist()]
    return [corpus.decode(split.read(a, b)) for a, b in pairwise(starts)]


def bucket(raw: bytes) -> int:
    return int.from_bytes(hashlib.sha256(raw).digest()[:8], "little") % 1000


def files(folder: Path) -> dict[str, str]:
    """sha256 of every file of a corpus; prepare.json, which may hold paths, left out."""
    found = {str(p.relative_to(folder)): p for p in folder.rglob("*") if p.is_file() and p.name != "prepare.json"}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in found.items()}


def prose(seed: int, documents: int) -> list[bytes]:
    """Distinct documents that a small SentencePiece model can be trained on."""
    return [b"%d: " % i + raw + b"." for i, raw in enumerate(talk(seed, documents, sentences=40))]


def brute_leakage(train: list[bytes], held: list[bytes]) -> tuple[int, int, int]:
    """(documents of `held` with an n-gram of train, n-grams of `held`, those that train has)."""
    known = {gram for raw in train for gram in ngrams_of(raw, 13)}
    grams = [[gram in known for gram in ngrams_of(raw, 13)] for raw in held]
    return sum(map(any, grams)), sum(map(len, grams)), sum(map(sum, grams))
