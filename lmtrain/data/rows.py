"""A split of a prepared corpus read as one sequence of symbols and cut into rows.

Shapes: B rows, T symbols of a row, D documents, E extents (contiguous runs of one token file), K blocks, R runs of
columns. Positions, offsets and lengths are int64 counts of symbols.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lmtrain.data.layout import FIELDS, runs
from lmtrain.errors import ConfigError
from lmtrain.protocol import Batch, Cond

if TYPE_CHECKING:
    from lmtrain.data.corpus import PreparedCorpus


@dataclass(frozen=True, slots=True)
class Rows:
    """Where N rows lie: position in the split; block and offset of symbol 0 in its file, block -1 = look again."""

    position_N: np.ndarray
    block_N: list[int]
    offset_N: list[int]


class PreparedSplit:
    """An ordered set of cells read as one sequence of symbols; implements `protocol.Split`.

    symbols, documents, words, bytes: counts without the dropped documents. The sequence goes through the blocks in
    order and in each block through the columns in order.
    """

    def __init__(self, corpus: PreparedCorpus, name: str, columns_K: np.ndarray) -> None:
        self.name = name
        self.corpus = corpus
        self._runs = runs(columns_K)
        dropped = corpus.dropped()
        self._dropped = dropped[np.isin(dropped["column"].astype(np.int64), columns_K)]
        low = [[corpus.index(field, lo) for lo, _ in self._runs] for field in range(len(FIELDS))]
        high = [[corpus.index(field, hi) for _, hi in self._runs] for field in range(len(FIELDS))]
        low_FRK = np.array(low, np.int64).reshape(len(FIELDS), len(self._runs), corpus.blocks)
        high_FRK = np.array(high, np.int64).reshape(low_FRK.shape)
        count = (high_FRK - low_FRK).sum(axis=(1, 2))
        self.symbols = int(count[0]) - int(self._dropped["symbols"].sum())
        self.documents = int(count[1]) - len(self._dropped)
        self.bytes = int(count[2]) - int(self._dropped["bytes"].sum())
        self.words = int(count[3]) - int(self._dropped["words"].sum())
        self._rows_RK = (low_FRK[1], high_FRK[1])
        self.record = corpus.record
        self._dtype = np.int64 if corpus.alphabet else np.float32
        self._weights: tuple[tuple[int, int], torch.Tensor] | None = None
        self._cut(low_FRK[0].T, high_FRK[0].T)

    def _cut(self, low_KR: np.ndarray, high_KR: np.ndarray) -> None:
        """Lay out the extents: runs of the token files, broken at dropped documents.

        Beginnings are those of runs and the ends of holes; ends are those of runs and the beginnings of holes. Extents
        are disjoint, so the sorted beginnings pair with the sorted ends.
        """
        blocks, runs_a_block = low_KR.shape
        block = np.repeat(np.arange(blocks, dtype=np.int64), runs_a_block)
        hole_block = self._dropped["block"].astype(np.int64)
        hole_low = self._dropped["offset"].astype(np.int64)
        hole_high = hole_low + self._dropped["symbols"].astype(np.int64)
        whose = np.concatenate([block, hole_block])
        begin = np.concatenate([low_KR.ravel(), hole_high])
        end = np.concatenate([high_KR.ravel(), hole_low])
        by_begin = np.lexsort((begin, whose))
        block, begin, end = whose[by_begin], begin[by_begin], end[np.lexsort((end, whose))]
        some = end > begin
        start_E = np.concatenate([np.zeros(1, np.int64), np.cumsum((end - begin)[some])])  # [E + 1]
        # Arrays of the standard library: as small as numpy's, and one element of them is ten times faster to reach.
        self._starts = array("q", start_E.tobytes())
        self._shifts = array("q", (begin[some] - start_E[:-1]).tobytes())  # from a position to the offset in its file
        self._blocks = array("q", block[some].tobytes())
        assert self._starts[-1] == self.symbols

    def __repr__(self) -> str:
        return f"PreparedSplit({self.name!r}, symbols={self.symbols}, documents={self.documents})"

    def rows(self, context: int) -> int:
        """How many rows of `context` symbols the split has; the last one may be padded. Rows of records are records.

        ConfigError when records have another length.
        """
        if self.record not in (None, context):
            raise ConfigError(
                f"data.context = {context}, but a record of {self.corpus.path} has {self.record} symbols; leave "
                "data.context out"
            )
        return -(-self.symbols // context)

    def row_symbols(self, index_N: np.ndarray, context: int) -> np.ndarray:
        """int64 [N]: how many symbols of each row are scored, without reading one; 0 for a padding row (-1)."""
        index_N = np.asarray(index_N, np.int64)
        out: np.ndarray = np.clip(self.symbols - index_N * context, 0, context)
        out[index_N < 0] = 0
        return out

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64 symbols (reals: float32) of [start, stop) of the concatenation; IndexError outside of it."""
        if not 0 <= start <= stop <= self.symbols:
            raise IndexError(f"[{start}, {stop}) is not inside the {self.symbols} symbols of split {self.name!r}")
        out = np.empty(stop - start, self.corpus.dtype)
        self._copy(start, out)
        return out.astype(self._dtype)

    def start_symbol(self, position: int) -> int:
        """The symbol before `position`; the end symbol (= BOS) before position 0, and before every record."""
        if self.record is not None and position % self.record == 0:
            return self.corpus.bos
        return int(self.read(position - 1, position)[0]) if position else self.corpus.bos

    def document_ends(self) -> np.ndarray:
        """int64 [D]: end position in the concatenation of each document, ascending. Reads the document tables."""
        lengths = []
        low_RK, high_RK = self._rows_RK
        gone = self._dropped["block"].astype(np.int64)
        for block in range(self.corpus.blocks):
            if not (high_RK[:, block] > low_RK[:, block]).any():
                continue
            table = self.corpus.documents(block)
            keep = np.zeros(len(table), np.bool_)
            for low, high in zip(low_RK[:, block].tolist(), high_RK[:, block].tolist(), strict=True):
                keep[low:high] = True
            keep[self._dropped["row"][gone == block].astype(np.int64)] = False
            lengths.append(table["symbols"][keep].astype(np.int64))
        return np.cumsum(np.concatenate(lengths)) if lengths else np.zeros(0, np.int64)

    def fetch(self, index_B: np.ndarray, context: int, *, masking: bool = False) -> Batch:
        """The rows `index_B` (int64; -1 = a padding row of weight 0) as a Batch of int64 or float32 [B, context].

        Raises CorpusError when a symbol lies in a damaged file, IndexError for a row that the split does not have.
        """
        return self.take(self.find(index_B, context), slice(None), context, masking=masking)

    def find(self, index_N: np.ndarray, context: int) -> Rows:
        """Where rows lie. Done for thousands at once and kept, it costs next to nothing; see `take`."""
        position_N = np.asarray(index_N, np.int64) * context
        start_E, shift_E, block_E = (np.frombuffer(a, np.int64) for a in (self._starts, self._shifts, self._blocks))
        extent_N = np.searchsorted(start_E, position_N, "right") - 1
        inside_N = (extent_N >= 0) & (extent_N < len(block_E))
        extent_N[~inside_N] = 0
        inside_N &= self.corpus.is_local  # the files of others come piece by piece and have no map
        inside_N &= (start_E[extent_N] < position_N) & (position_N + context <= start_E[extent_N + 1])
        block_N = np.where(inside_N, block_E[extent_N], -1)
        return Rows(position_N, block_N.tolist(), (position_N + shift_E[extent_N]).tolist())

    def take(self, rows: Rows, these: slice, context: int, *, masking: bool = False) -> Batch:
        """`fetch` of some of the rows that were found."""
        position_B = rows.position_N[these].copy()
        x_BT = np.empty((len(position_B), context), self._dtype)
        start_B = np.empty(len(position_B), np.int64)
        label_B = np.zeros(len(position_B), np.int64) if self.corpus.labels else None
        self.corpus.check_open()
        verified = self.corpus.verified
        weight_BT = whole_BT = self._ones(len(position_B), context)
        for at, (block, offset) in enumerate(zip(rows.block_N[these], rows.offset_N[these], strict=True)):
            if block >= 0:  # the row and the symbol before it lie in one extent
                symbols = verified.get(block)
                if symbols is None:
                    symbols = self.corpus.symbols(block, offset - 1, offset + context)
                x_BT[at] = symbols[offset : offset + context]
                start_B[at] = symbols.item(offset - 1) if self.record is None else self.corpus.bos
            else:
                start_B[at], count = self._row(x_BT[at], int(position_B[at]))
                if count < context:
                    if weight_BT is whole_BT:
                        weight_BT = torch.ones(len(position_B), context)
                    weight_BT[at, count:] = 0.0
                    if not count:
                        position_B[at] = -1
                        continue
            if label_B is not None:
                label_B[at] = self._label(block, offset, int(position_B[at]))
        return Batch(
            x_BT=torch.from_numpy(x_BT),
            weight_BT=weight_BT,
            cond=Cond(
                torch.from_numpy(start_B),
                self._first(position_B, context) if masking else None,
                None if label_B is None else torch.from_numpy(label_B),
            ),
            position_B=torch.from_numpy(position_B),
        )

    def _label(self, block: int, offset: int, position: int) -> int:
        """The class of the record at `position`. block: -1 where it is to be looked up."""
        assert self.record is not None
        if block < 0:
            block, offset, _, _ = self._pieces(position, 1)[0]
        return int(self.corpus.documents(block)["label"][offset // self.record])

    def want(self, index_N: np.ndarray, context: int) -> bool:
        """Have what these rows lie in fetched beforehand, if it is remote; False when no more can be."""
        size = self.corpus.dtype.itemsize
        for position in (np.asarray(index_N, np.int64) * context).tolist():
            start = max(position - 1, 0)
            for block, offset, _, some in self._pieces(start, min(position + context, self.symbols) - start):
                if not self.corpus.want(block, range(offset * size >> 20, ((offset + some) * size - 1 >> 20) + 1)):
                    return False
        return True

    def _ones(self, rows: int, context: int) -> torch.Tensor:
        """Weights of whole rows: one number, seen [B, T] times, so that nothing can be written into it."""
        if self._weights is None or self._weights[0] != (rows, context):
            self._weights = (rows, context), torch.ones(()).expand(rows, context)
        return self._weights[1]

    def _row(self, row_T: np.ndarray, position: int) -> tuple[int, int]:
        """Fill a row from any position, with zeros behind; returns (start symbol, how many symbols are real)."""
        context = len(row_T)
        if position >= self.symbols or position < -context:
            given = f"row {position // context} of {context} symbols was asked for"
            raise IndexError(f"{given}; split {self.name!r} has {self.rows(context)}")
        count = 0 if position < 0 else min(context, self.symbols - position)
        row_T[count:] = 0
        if not count:
            return self.corpus.bos, 0
        row_T[:count] = self.read(position, position + count)
        return self.start_symbol(position), count

    def _copy(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (one-dimensional, of the corpus's type) with the symbols from `start` on."""
        size = self.corpus.dtype.itemsize
        view = out.data.cast("B")
        for block, offset, done, count in self._pieces(start, len(out)):
            self.corpus.tokens(block).fill(view[done * size : (done + count) * size], offset * size)

    def _pieces(self, start: int, count: int) -> list[tuple[int, int, int, int]]:
        """[start, start + count) as (block, offset in its file, symbols before it, symbols)."""
        out = []
        done = 0
        extent = bisect_right(self._starts, start) - 1
        while done < count:
            position = start + done
            some = min(count - done, self._starts[extent + 1] - position)
            out.append((self._blocks[extent], position + self._shifts[extent], done, some))
            done += some
            extent += 1
        return out

    def _first(self, position_B: np.ndarray, context: int) -> torch.Tensor:
        """bool [B, T]: symbol t begins a document."""
        first_BT = np.zeros((len(position_B), context), np.bool_)
        for row, position in zip(first_BT, position_B.tolist(), strict=True):
            count = 0 if position < 0 else min(context, self.symbols - position)
            for block, offset, done, some in self._pieces(max(position, 0), count):
                begins = self.corpus.documents(block)["offset"]
                at = bisect_left(begins, offset)
                while at < len(begins) and begins[at] < offset + some:
                    row[done + int(begins[at]) - offset] = True
                    at += 1
        return torch.from_numpy(first_BT)
