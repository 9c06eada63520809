"""What worker processes do with one block each: survey it, look for held-out text, write its tokens.

Every function here is a pure function of the block's raw bytes and its arguments, so the result does not depend on
which process ran it, or when. Rows are documents in the order of the block's documents file: by group, bucket, arrival.

Shapes: D documents (rows) of a block, N n-grams, K distinct held-out n-grams of the corpus.
"""

from __future__ import annotations

import hashlib
import io
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmtrain.data import duplicates
from lmtrain.data.blocks import RawBlock, load, raw_path
from lmtrain.data.layout import BUCKETS, canonical, document_hash, smallest_dtype, write_file
from lmtrain.data.splits import Division
from lmtrain.data.tokenizer import Tokenizer
from lmtrain.data.tokenizer import load as load_tokenizer
from lmtrain.data.writer import finished_block, write_block

TOKENIZER = "tokenizer"
HELD_OUT, FOUND = "heldout.bin", "found.bin"
_BATCH = 4 << 20  # raw bytes looked at together: numpy's cost a call is spread, and memory stays small


@dataclass(frozen=True, slots=True)
class Rows:
    """The documents of a block in the order of its rows; `split_D` counts in `division.names`."""

    raw: list[bytes]
    hash_D2: NDArray[np.uint64]
    group_D: NDArray[np.uint8]
    split_D: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Survey:
    """What is known of a block's documents without their text. held_K: its distinct held-out n-grams, sorted."""

    hash_D2: NDArray[np.uint64]
    split_D: NDArray[np.uint8]
    bytes_D: NDArray[np.int64]
    words_D: NDArray[np.int64]
    lines_D: NDArray[np.int64]
    held_K: duplicates.U64


@dataclass(frozen=True, slots=True)
class Leaks:
    """Held-out n-grams in a block's training documents: where they stand in the held-out set, and in which rows.

    row_R, shared_R, total_R: rows with any, how many of their n-grams are held out, and how many they have.
    """

    position: duplicates.I64
    row_R: duplicates.I64
    shared_R: duplicates.I64
    total_R: duplicates.I64


def rows(folder: Path, block: RawBlock, division: Division) -> Rows:
    """Read a block's raw documents, cut and sort them."""
    pieces = division.pieces(*load(folder, block.number), block.start)
    hashes = [document_hash(raw) for raw, _ in pieces]
    group_D = np.array([group for _, group in pieces], dtype=np.uint8)
    bucket_D = np.array([bucket for *_, bucket in hashes], dtype=np.int64)
    order_D = np.argsort(group_D.astype(np.int64) * BUCKETS + bucket_D, kind="stable")
    hash_D2 = np.array([(first, second) for first, second, _ in hashes], dtype=np.uint64).reshape(-1, 2)
    split_D = division.table()[group_D, bucket_D]
    return Rows([pieces[i][0] for i in order_D.tolist()], hash_D2[order_D], group_D[order_D], split_D[order_D])


def survey(folder: Path, block: RawBlock, division: Division, held_out: bool) -> Survey:
    """Hash and count the documents; with `held_out` also gather the n-grams of those that are held out.

    What a part of a preparation has kept of the same survey is read instead.
    """
    before = kept_survey(folder, block, division, held_out)
    if before is not None:
        return before
    found = rows(folder, block, division)
    held: list[duplicates.U64] = []
    if held_out:
        for chosen in _batches(found, np.flatnonzero(found.split_D != 0)):
            parts = [hash_N for hash_N, _ in duplicates.ngrams(duplicates.words([found.raw[i] for i in chosen]))]
            held.append(duplicates.merge(parts))
    return Survey(
        hash_D2=found.hash_D2,
        split_D=found.split_D,
        bytes_D=np.array([len(raw) for raw in found.raw], dtype=np.int64),
        words_D=np.array([duplicates.count_words(raw) for raw in found.raw], dtype=np.int64),
        lines_D=np.array([raw.count(b"\n") for raw in found.raw], dtype=np.int64),
        held_K=duplicates.merge(held),
    )


def leaks(folder: Path, block: RawBlock, division: Division, held: str, left_out: Sequence[int]) -> Leaks:
    """Which held-out n-grams (HELD_OUT, of sha256 `held`) the training documents contain; `left_out`: rows to skip."""
    found = rows(folder, block, division)
    held_out = _held_out(folder / HELD_OUT, held)
    wanted = found.split_D == 0
    wanted[list(left_out)] = False
    total_D = np.zeros(len(found.raw), dtype=np.int64)
    shared_D = np.zeros(len(found.raw), dtype=np.int64)
    positions = [np.empty(0, dtype=np.int64)]
    for chosen in _batches(found, np.flatnonzero(wanted)):
        for hash_N, document_N in duplicates.ngrams(duplicates.words([found.raw[i] for i in chosen])):
            which, position = held_out.find(hash_N)
            total_D[chosen] += np.bincount(document_N, minlength=len(chosen))
            shared_D[chosen] += np.bincount(document_N[which], minlength=len(chosen))
            positions.append(np.unique(position))
    row_R = np.flatnonzero(shared_D)
    return Leaks(np.unique(np.concatenate(positions)), row_R, shared_D[row_R], total_D[row_R])


def affected(folder: Path, block: RawBlock, division: Division, held: str, found_sha256: str) -> list[list[int]]:
    """For each split [documents that share an n-gram with train, their n-grams, those that train has]; FOUND says which
    of the held-out n-grams the training documents contain. Zeros for train itself."""
    found = rows(folder, block, division)
    held_out = _held_out(folder / HELD_OUT, held)
    in_train_K = _found(folder / FOUND, found_sha256)
    out = np.zeros((len(division.names), 3), dtype=np.int64)
    shared_D = np.zeros(len(found.raw), dtype=np.int64)
    total_D = np.zeros(len(found.raw), dtype=np.int64)
    for chosen in _batches(found, np.flatnonzero(found.split_D != 0)):
        for hash_N, document_N in duplicates.ngrams(duplicates.words([found.raw[i] for i in chosen])):
            which, position = held_out.find(hash_N)
            total_D[chosen] += np.bincount(document_N, minlength=len(chosen))
            shared_D[chosen] += np.bincount(document_N[which[in_train_K[position]]], minlength=len(chosen))
    for split in range(1, len(division.names)):
        mine = found.split_D == split
        out[split] = (shared_D[mine] > 0).sum(), total_D[mine].sum(), shared_D[mine].sum()
    return [[int(value) for value in line] for line in out]


def survey_name(number: int) -> str:
    """File of a block's survey, for parts of a preparation."""
    return f"survey-{number:05d}.npz"


def keep_survey(folder: Path, block: RawBlock, division: Division, held_out: bool) -> None:
    """Survey a block and keep the result in the folder, unless it is there."""
    if kept_survey(folder, block, division, held_out) is None:
        found = survey(folder, block, division, held_out)
        data = io.BytesIO()
        arrays = {field.name: getattr(found, field.name) for field in fields(Survey)}
        np.savez(data, allow_pickle=False, of=_survey_of(block, division, held_out), **arrays)
        write_file(folder / survey_name(block.number), data.getvalue())


def kept_survey(folder: Path, block: RawBlock, division: Division, held_out: bool) -> Survey | None:
    """The survey of this block, division and kind that was kept; None when there is none."""
    try:
        with np.load(folder / survey_name(block.number), allow_pickle=False) as kept:
            if kept["of"].tobytes() != _survey_of(block, division, held_out).tobytes():
                return None
            return Survey(**{field.name: kept[field.name] for field in fields(Survey)})
    except (OSError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        return None


def _survey_of(block: RawBlock, division: Division, held_out: bool) -> NDArray[np.uint8]:
    of = canonical({"block": block.sha256, "start": block.start, "division": division.json(), "held_out": held_out})
    return np.frombuffer(hashlib.sha256(of).digest(), np.uint8)


def encode(
    folder: Path, block: RawBlock, division: Division, tokenizer_sha256: str, threads: int, keep_raw: bool = False
) -> dict[str, Any]:
    """Write a block's tokens, unless they are there and whole.

    keep_raw: leave its raw documents there; else they are not needed any more.
    """
    info = finished_block(folder, block.number)
    if info is None:
        found = rows(folder, block, division)
        tokenizer = _tokenizer(folder / TOKENIZER, tokenizer_sha256)
        dtype = smallest_dtype(tokenizer.vocab)
        documents: list[tuple[bytes, NDArray[Any], int, int]] = []
        for chosen in _batches(found, np.arange(len(found.raw))):
            raw = [found.raw[i] for i in chosen]
            for row, one, symbols in zip(chosen, raw, tokenizer.encode_many(raw, threads=threads), strict=True):
                ended = np.append(symbols, tokenizer.end).astype(dtype)
                size = int(tokenizer.symbol_bytes()[ended].sum())
                assert size == len(one), f"symbols of a document stand for {size} bytes, it has {len(one)}"
                documents.append((one, ended, int(found.group_D[row]), duplicates.count_words(one)))
        info = write_block(folder, block.number, documents, dtype=dtype)
    if not keep_raw:
        raw_path(folder, block.number).unlink(missing_ok=True)
    return info


def forget() -> None:
    """Drop what this process remembers of a corpus."""
    for remembered in (_held_out, _found, _tokenizer):
        remembered.cache_clear()


def _batches(found: Rows, chosen: NDArray[Any]) -> Iterator[list[int]]:
    """Rows in groups of about _BATCH raw bytes, at least one document each."""
    batch: list[int] = []
    size = 0
    for row in chosen.tolist():
        batch.append(row)
        size += len(found.raw[row])
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# Cached with the file's hash, so that another corpus prepared by the same process under the same name is read anew.
@lru_cache(maxsize=1)
def _held_out(path: Path, sha256: str) -> duplicates.HeldOut:
    return duplicates.HeldOut(np.fromfile(path, dtype=np.uint64))


@lru_cache(maxsize=1)
def _found(path: Path, sha256: str) -> NDArray[np.bool_]:
    return np.fromfile(path, dtype=np.bool_)


@lru_cache(maxsize=1)
def _tokenizer(path: Path, sha256: str) -> Tokenizer:
    return load_tokenizer(path, sha256=sha256)
