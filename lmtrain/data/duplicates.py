"""Exact duplicates, and 13-gram overlap between training text and held-out text.

A word is a maximal run of bytes other than the six ASCII white-space bytes: the pieces of `raw.split()`. Nothing is
normalised but the white space between words (any run of it counts as one separator): no folding of case, no stripping
of punctuation, no Unicode normalisation. So a match is a verbatim one, and the counts are a floor under what a laxer
comparison finds. Text that is written without spaces (Chinese, DNA) has few words and this comparison is blind there.

N-grams never cross a document's end. Each is known by a 64-bit hash of its words, so that memory is 8 bytes a distinct
held-out n-gram: among 1e7 of those and 1e10 n-grams of training text one false match is expected with chance 0.005.

Shapes: D documents, W words, N n-grams, K distinct held-out n-grams (sorted).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

NGRAM = 13
_CHUNK = 1 << 18  # bytes hashed at a time: the eight-fold intermediates stay in the second-level cache
_SLICE = 1 << 20  # n-grams given at a time
_MASK = (1 << 64) - 1
_BYTE_POWER = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_BYTE_POWER_INVERSE = pow(_BYTE_POWER, -1, 1 << 64)
_WORD_POWER = np.uint64(0xD1342543DE82EF95)
SPACES = b" \t\n\r\x0b\x0c"

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]


def _mix(x: U64) -> U64:
    """The 64-bit finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit moves every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _powers(base: int, count: int) -> U64:
    out = np.full(count, base, dtype=np.uint64)
    out[0] = 1
    return np.multiply.accumulate(out)


_SPACE = np.zeros(256, dtype=bool)
_SPACE[list(SPACES)] = True
# A random value for each byte; white space is worth 0, so that it may lie inside the sum of the word before it.
_VALUE: U64 = np.where(_SPACE, np.uint64(0), _mix(np.arange(1, 257, dtype=np.uint64) * np.uint64(_BYTE_POWER)))
_UP = _powers(_BYTE_POWER, _CHUNK)
_DOWN = _powers(_BYTE_POWER_INVERSE, _CHUNK)


@dataclass(frozen=True, slots=True)
class Words:
    """The words of D documents: `hash_W` one hash a word, `start_D1` where each document's words begin (D + 1 ends)."""

    hash_W: U64
    start_D1: I64

    @property
    def count_D(self) -> I64:
        """Words of each document, as `len(raw.split())`."""
        return np.diff(self.start_D1)


def words(documents: Sequence[bytes]) -> Words:
    """Every word of the documents, hashed: sum over its bytes of value(byte) * power^(index in the word), finalised."""
    text = b"\n".join(documents)
    size = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
    document_start_D = np.cumsum(size + 1) - size - 1
    parts: list[U64] = []
    starts: list[I64] = []
    inside, last = False, 0  # does a word reach over the chunk's border, and where did it begin
    for at in range(0, len(text), _CHUNK):
        raw = np.frombuffer(text, dtype=np.uint8, count=min(_CHUNK, len(text) - at), offset=at)
        filled = ~_SPACE[raw]
        begins = filled.copy()
        begins[1:] &= ~filled[:-1]
        if inside:
            begins[0] = False
        start = np.flatnonzero(begins)
        value = _VALUE[raw]
        value *= _UP[: raw.size]
        if inside:
            head = int(value[: start[0] if start.size else raw.size].sum(dtype=np.uint64))
            parts[-1][-1] = (int(parts[-1][-1]) + head * pow(_BYTE_POWER, at - last, 1 << 64)) & _MASK
        if start.size:
            part = np.add.reduceat(value, start)
            part *= _DOWN[start]
            parts.append(part)
            starts.append(start + at)
            last = int(start[-1]) + at
        inside = bool(filled[-1])
    hash_W = _mix(np.concatenate(parts)) if parts else np.empty(0, dtype=np.uint64)
    start_W = np.concatenate(starts) if starts else np.empty(0, dtype=np.int64)
    bounds = np.append(np.searchsorted(start_W, document_start_D), start_W.size).astype(np.int64)
    return Words(hash_W, bounds)


def ngrams(found: Words, *, n: int = NGRAM) -> Iterator[tuple[U64, I64]]:
    """(hash_N, document_N) in slices: every run of n words inside one document, in order, and its document."""
    hash_W, start_D1 = found.hash_W, found.start_D1
    for start in range(0, hash_W.size - n + 1, _SLICE):
        stop = min(start + _SLICE, hash_W.size - n + 1)
        hash_I = hash_W[start:stop].copy()
        for step in range(1, n):
            hash_I *= _WORD_POWER
            hash_I += hash_W[start + step : stop + step]
        first_I = np.arange(start, stop)
        document_I = np.searchsorted(start_D1, first_I, side="right") - 1
        whole = first_I + n <= start_D1[document_I + 1]
        yield _mix(hash_I[whole]), document_I[whole]


def count_words(raw: bytes) -> int:
    """`len(raw.split())`, in bounded memory for a long document."""
    if len(raw) <= _CHUNK:
        return len(raw.split())
    count, before = 0, True
    for at in range(0, len(raw), _CHUNK):
        space = _SPACE[np.frombuffer(raw, dtype=np.uint8, count=min(_CHUNK, len(raw) - at), offset=at)]
        count += int((space[:-1] & ~space[1:]).sum()) + int(before and not space[0])
        before = bool(space[-1])
    return count


class HeldOut:
    """A sorted set of held-out n-grams, to be asked which of them some training text contains.

    A table over the leading bits answers most questions ("not held out") with one look; the rest search the array.
    """

    def __init__(self, hash_K: U64) -> None:
        assert hash_K.size < 2 or bool((hash_K[1:] > hash_K[:-1]).all()), "held-out n-grams are not sorted and distinct"
        self.hash_K = hash_K

    @cached_property
    def _table(self) -> tuple[np.uint64, NDArray[np.bool_]]:
        bits = min(max(self.hash_K.size.bit_length() + 4, 16), 28)
        shift = np.uint64(64 - bits)
        table = np.zeros(1 << bits, dtype=bool)
        table[self.hash_K >> shift] = True
        return shift, table

    def find(self, hash_N: U64) -> tuple[I64, I64]:
        """(which, position): indices of the n-grams that are held out, and where each is in `hash_K`."""
        if not self.hash_K.size or not hash_N.size:
            return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
        shift, table = self._table
        which = np.flatnonzero(table[hash_N >> shift])
        wanted = hash_N[which]
        position = np.minimum(np.searchsorted(self.hash_K, wanted), self.hash_K.size - 1)
        right = self.hash_K[position] == wanted
        return which[right], position[right].astype(np.int64)


def merge(parts: Sequence[U64]) -> U64:
    """The sorted distinct values of several arrays."""
    return np.unique(np.concatenate(parts)) if parts else np.empty(0, dtype=np.uint64)


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Documents with equal raw bytes (equal leading 128 bits of SHA-256).

    within: for each split, documents beyond the first of their kind. across: for each pair of splits, distinct contents
    that are in both. drop_D: training documents that are not the first of their kind or that are held out as well.
    """

    within: dict[str, int]
    across: dict[str, int]
    drop_D: NDArray[np.bool_]


def duplicates(hash_D2: U64, split_D: NDArray[np.uint8], names: Sequence[str]) -> Duplicates:
    """Find equal documents; `split_D` indexes `names`, of which number 0 is the training split.

    hash_D2: uint64 [D, 2], in the order of the corpus: the first of equals is the one that is kept.
    """
    order = np.lexsort((np.arange(len(hash_D2)), hash_D2[:, 1], hash_D2[:, 0]))  # stable in the order of the corpus
    sorted_D2 = hash_D2[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (sorted_D2[1:] != sorted_D2[:-1]).any(axis=1)
    kind_D = np.empty(len(order), dtype=np.int64)
    kind_D[order] = np.cumsum(new) - 1
    kinds = int(new.sum())
    present = np.zeros((len(names), kinds), dtype=bool)
    present[split_D, kind_D] = True
    within = {name: int((split_D == i).sum() - present[i].sum()) for i, name in enumerate(names)}
    across = {
        f"{a}/{b}": int((present[i] & present[j]).sum())
        for i, a in enumerate(names)
        for j, b in enumerate(names)
        if i < j
    }
    train = np.flatnonzero(split_D == 0)
    first = np.zeros(len(order), dtype=bool)
    first[train[np.unique(kind_D[train], return_index=True)[1]]] = True
    held: NDArray[np.bool_] = np.logical_or.reduce(present[1:], axis=0)[kind_D]
    return Duplicates(within, across, (split_D == 0) & (~first | held))
