"""How a split is cut into model calls so that every symbol is scored exactly once: windows, sliding rows, documents.

Shapes in names: B rows of a call, T symbols of a row, N rows or documents, D documents of the split.

Every rank makes the same number of calls of the same shape (a rank without work is given rows of weight 0): under
ZeRO-3 every call of the model is a collective, and ranks that disagree about their number abort or hang.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from lmtrain.data.memory import begins
from lmtrain.inference.reopen import Plan
from lmtrain.protocol import Batch, Cond, Split

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the model. fresh: the rows begin anew; otherwise they go on where the call before stopped."""

    batch: Batch
    fresh: bool = True


class Cut(Protocol):
    """A choice of symbols and the calls that score them."""

    symbols: int
    """Scored symbols over all ranks."""

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """int64 [N] each: the scored positions [from, to), disjoint."""
        ...

    def count(self, world: int) -> int:
        """How many calls each rank makes."""
        ...

    def calls(self, rank: int, world: int) -> Iterator[Call]:
        """This rank's calls."""
        ...


def mix(n_N: np.ndarray) -> np.ndarray:
    """uint64: a fixed scrambling of whole numbers (the finaliser of splitmix64; Steele, Lea & Flood, OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        z = (np.asarray(n_N).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


def smallest(total: int, keep: int) -> np.ndarray:
    """int64: the `keep` numbers below `total` that scramble to the least, least first; in bounded memory."""
    best = np.zeros(0, dtype=np.int64)
    for low in range(0, total, _CHUNK):
        best = np.concatenate([best, np.arange(low, min(low + _CHUNK, total), dtype=np.int64)])
        key = mix(best)
        if len(best) > keep:
            best = best[np.argpartition(key, keep)[:keep]]
    return best[np.argsort(mix(best), kind="stable")][:keep]


def _capped(order_N: np.ndarray, symbols_N: np.ndarray, cap: int) -> np.ndarray:
    """The leading entries whose symbols together stay within `cap` (at least one entry), ascending."""
    fits = int(np.searchsorted(np.cumsum(symbols_N), cap, side="right"))
    return np.sort(order_N[: max(fits, 1)])


def _deal(rows_N: np.ndarray, *, batch: int, rank: int, world: int) -> Iterator[np.ndarray]:
    """int64 [batch] for each call of this rank: its rows, and -1 where there are none left."""
    for at in range(rank * batch, _calls(len(rows_N), batch=batch, world=world) * batch * world, batch * world):
        index_B = np.full(batch, -1, dtype=np.int64)
        mine = rows_N[at : at + batch]
        index_B[: len(mine)] = mine
        yield index_B


def _calls(rows: int, *, batch: int, world: int) -> int:
    return -(-rows // (batch * world))


def _lanes(rows: int, *, batch: int, world: int) -> int:
    """Rows a call: no more than there is work for."""
    return max(1, min(batch, -(-rows // world)))


class Windows:
    """Rows of `context` symbols that do not overlap, as `Split.fetch` cuts them; of any kind of corpus."""

    def __init__(
        self,
        split: Split,
        *,
        context: int,
        batch: int,
        max_symbols: int | None = None,
        masking: bool = False,
        rows_N: np.ndarray | None = None,
    ) -> None:
        """rows_N: only these rows, ascending."""
        self._split, self._context, self._batch, self._masking = split, context, batch, masking
        total = split.rows(context)
        self._rows_N = np.arange(total, dtype=np.int64) if rows_N is None else np.asarray(rows_N, np.int64)
        if max_symbols is not None and max_symbols < split.symbols:
            full = int(split.row_symbols(np.zeros(1, np.int64), context)[0])
            order_N = smallest(total, max_symbols // full + 2)
            self._rows_N = _capped(order_N, split.row_symbols(order_N, context), max_symbols)
        self._count_N = split.row_symbols(self._rows_N, context)
        self.symbols = int(self._count_N.sum())

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """Row i begins where i full rows end (only the last row of a split is shorter)."""
        full = int(self._split.row_symbols(np.zeros(1, np.int64), self._context)[0])
        start_N = self._rows_N * full
        return start_N, start_N + self._count_N

    def count(self, world: int) -> int:
        """Calls of each rank."""
        return _calls(len(self._rows_N), batch=_lanes(len(self._rows_N), batch=self._batch, world=world), world=world)

    def calls(self, rank: int, world: int) -> Iterator[Call]:
        """This rank's calls."""
        lanes = _lanes(len(self._rows_N), batch=self._batch, world=world)
        for index_B in _deal(self._rows_N, batch=lanes, rank=rank, world=world):
            yield Call(self._split.fetch(index_B, self._context, masking=self._masking))


class Sliding:
    """Overlapping rows of a plan (reopen.py): what a row reads again for its context has weight 0."""

    def __init__(
        self, split: Split, *, plan: Plan, batch: int, max_symbols: int | None = None, masking: bool = False
    ) -> None:
        self._split, self._plan, self._batch = split, plan, batch
        self._end_D = split.document_ends() if masking else None
        total = plan.rows(split.symbols)
        self._rows_N = np.arange(total, dtype=np.int64)
        if max_symbols is not None and max_symbols < split.symbols:
            order_N = smallest(total, max_symbols // plan.stride + 2)
            from_N, to_N = plan.spans(order_N, split.symbols)
            self._rows_N = _capped(order_N, to_N - from_N, max_symbols)
        from_N, to_N = self.spans()
        self.symbols = int((to_N - from_N).sum())

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """What each row answers for."""
        return self._plan.spans(self._rows_N, self._split.symbols)

    def count(self, world: int) -> int:
        """Calls of each rank."""
        return _calls(len(self._rows_N), batch=_lanes(len(self._rows_N), batch=self._batch, world=world), world=world)

    def calls(self, rank: int, world: int) -> Iterator[Call]:
        """This rank's calls."""
        lanes = _lanes(len(self._rows_N), batch=self._batch, world=world)
        for index_B in _deal(self._rows_N, batch=lanes, rank=rank, world=world):
            start_B = np.where(index_B < 0, -1, index_B * self._plan.stride)
            from_B, to_B = self._plan.spans(index_B, self._split.symbols)
            batch = _rows(self._split, start_B, self._plan.context, from_B=from_B, to_B=to_B, end_D=self._end_D)
            yield Call(batch)


class Alone:
    """Documents one by one, each from its own beginning in rows of a plan: none is told what stands before it."""

    def __init__(self, split: Split, *, plan: Plan, batch: int, documents_N: np.ndarray | None = None) -> None:
        """documents_N: only these, ascending."""
        self._split, self._plan, self._batch = split, plan, batch
        end_D = split.document_ends().astype(np.int64)
        start_D = np.concatenate([[0], end_D[:-1]])
        if documents_N is not None:
            start_D, end_D = start_D[documents_N], end_D[documents_N]
        begin: list[np.ndarray] = []
        spans: list[tuple[np.ndarray, np.ndarray]] = []
        for start, end in zip(start_D.tolist(), end_D.tolist(), strict=True):
            row_N = np.arange(plan.rows(end - start), dtype=np.int64)
            from_N, to_N = plan.spans(row_N, end - start)
            begin.append(start + row_N * plan.stride)
            spans.append((start + from_N, start + to_N))
        self._start_N = np.concatenate(begin)
        self._from_N, self._to_N = (np.concatenate(part) for part in zip(*spans, strict=True))
        self.symbols = int((self._to_N - self._from_N).sum())

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """What each row answers for."""
        return self._from_N, self._to_N

    def count(self, world: int) -> int:
        """Calls of each rank."""
        rows = len(self._start_N)
        return _calls(rows, batch=_lanes(rows, batch=self._batch, world=world), world=world)

    def calls(self, rank: int, world: int) -> Iterator[Call]:
        """This rank's calls."""
        rows = len(self._start_N)
        lanes = _lanes(rows, batch=self._batch, world=world)
        for index_B in _deal(np.arange(rows), batch=lanes, rank=rank, world=world):
            real_B = index_B >= 0
            start_B, from_B, to_B = (
                np.where(real_B, whole_N[index_B], -1) for whole_N in (self._start_N, self._from_N, self._to_N)
            )
            yield Call(_rows(self._split, start_B, self._plan.context, from_B=from_B, to_B=to_B))


class Documents:
    """Every document from its first symbol to its last, `context` symbols a call, for models that carry their state.

    Documents of like length go through together, the longest first; which ones never changes a document's own numbers.
    """

    def __init__(self, split: Split, *, context: int, batch: int, max_symbols: int | None = None) -> None:
        self._split, self._context, self._batch = split, context, batch
        end_D = split.document_ends()
        start_N = np.concatenate([[0], end_D[:-1]]).astype(np.int64)
        stop_N = end_D.astype(np.int64)
        if max_symbols is not None and max_symbols < split.symbols:
            order_N = smallest(len(end_D), len(end_D))
            before_N = np.cumsum((stop_N - start_N)[order_N]) - (stop_N - start_N)[order_N]
            order_N = order_N[before_N < max_symbols]
            last = order_N[-1]  # the chain rule lets a document be cut: its beginning has a probability of its own
            stop_N[last] = min(stop_N[last], start_N[last] + max_symbols - before_N[len(order_N) - 1])
            start_N, stop_N = start_N[order_N], stop_N[order_N]
        longest_first = np.argsort(start_N - stop_N, kind="stable")
        self._start_N, self._stop_N = start_N[longest_first], stop_N[longest_first]
        self.symbols = int((self._stop_N - self._start_N).sum())

    def spans(self) -> tuple[np.ndarray, np.ndarray]:
        """The documents."""
        return self._start_N, self._stop_N

    def _rounds(self, world: int) -> Iterator[tuple[int, int, int, int]]:
        """(first document, documents a rank, symbols a call, calls) of each round of all ranks."""
        lanes = _lanes(len(self._start_N), batch=self._batch, world=world)
        for at in range(0, len(self._start_N), lanes * world):
            longest = int(self._stop_N[at] - self._start_N[at])
            width = min(self._context, longest)
            yield at, lanes, width, -(-longest // width)

    def count(self, world: int) -> int:
        """Calls of each rank."""
        return sum(calls for *_, calls in self._rounds(world))

    def calls(self, rank: int, world: int) -> Iterator[Call]:
        """This rank's calls."""
        for first, lanes, width, calls in self._rounds(world):
            mine = slice(first + rank * lanes, first + (rank + 1) * lanes)
            begin_B, stop_B = np.full(lanes, -1, np.int64), np.full(lanes, -1, np.int64)
            have = len(self._start_N[mine])
            begin_B[:have], stop_B[:have] = self._start_N[mine], self._stop_N[mine]
            for call in range(calls):
                at_B = begin_B + call * width
                start_B = np.where(at_B < stop_B, at_B, -1)
                batch = _rows(self._split, start_B, width, from_B=at_B, to_B=np.minimum(at_B + width, stop_B))
                yield Call(batch, fresh=call == 0)


def _rows(
    split: Split,
    start_B: np.ndarray,
    width: int,
    *,
    from_B: np.ndarray,
    to_B: np.ndarray,
    end_D: np.ndarray | None = None,
) -> Batch:
    """Rows of `width` symbols from the positions `start_B` (-1: padding) on, weight 1 for the positions [from, to)."""
    x_BT = np.zeros((len(start_B), width), dtype=np.int64)
    weight_BT = np.zeros((len(start_B), width), dtype=np.float32)
    first_BT = np.zeros((len(start_B), width), dtype=bool)
    before_B = np.zeros(len(start_B), dtype=np.int64)
    for b, (start, low, high) in enumerate(zip(start_B.tolist(), from_B.tolist(), to_B.tolist(), strict=True)):
        if start < 0:
            continue
        symbols = split.read(start, min(start + width, split.symbols))
        x_BT[b, : len(symbols)] = symbols
        weight_BT[b, low - start : high - start] = 1
        before_B[b] = split.start_symbol(start)
        if end_D is not None:
            first_BT[b, : len(symbols)] = begins(end_D, position=start, count=len(symbols))
    cond = Cond(torch.from_numpy(before_B), None if end_D is None else torch.from_numpy(first_BT))
    return Batch(torch.from_numpy(x_BT), torch.from_numpy(weight_BT), cond, position_B=torch.from_numpy(start_B))
