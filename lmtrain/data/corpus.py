"""Reads a prepared corpus: nothing is trusted before its checksum was seen, nothing is read before it is wanted.

Opening reads the manifest and the sizes of the files. The index is read row by row, symbols MiB by MiB, each verified
by CRC32C when it is first touched; documents, checksums and the small files by sha256 when they are first read.
Symbols are read with `pread`, not through a memory map: a file that shrinks under a map kills the process, here it is
an error.

Shapes: B rows, T symbols of a row, V symbols of the alphabet, D documents, E extents (contiguous runs of one token
file), K blocks, R runs of columns. Positions, offsets and lengths are int64 counts of symbols.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lmtrain.data.layout import (
    BUCKETS,
    DOCUMENT,
    DROPPED,
    DROPPED_FILE,
    DTYPES,
    FIELDS,
    GROUPS,
    INDEX,
    INDEX_CHECKS,
    MANIFEST,
    MIB,
    SYMBOL_BYTES,
    VERSION,
    canonical,
    checks_name,
    columns,
    crc32c,
    documents_name,
    file_sha256,
    fingerprint,
    runs,
    tokens_name,
)
from lmtrain.errors import CorpusError, TokenizerError
from lmtrain.protocol import Batch, Cond

if TYPE_CHECKING:
    from lmtrain.data.tokenizer import Tokenizer

OPEN_FILES = 128
"""Token files and document tables kept open at once, each."""

MEND = "restore the file from a copy or prepare the corpus again"


class CheckedFile:
    """A file of known size, read by position, whose every MiB is verified when it is first touched."""

    def __init__(self, path: Path, *, size: int, checks: Callable[[], np.ndarray], touched: np.ndarray) -> None:
        self.path = path
        self.size = size
        self.fd = -1
        self._checks = checks
        self._touched = touched
        try:
            self.fd = os.open(path, os.O_RDONLY)
            found = os.fstat(self.fd).st_size
        except OSError as error:
            raise CorpusError(f"{path} cannot be read: {error.strerror}") from None
        if found != size:
            raise CorpusError(f"{path} has {found} bytes, the manifest says {size}; {MEND}")

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def into(self, view: memoryview, at: int) -> None:
        """Fill `view` with the bytes from `at` on, unverified: `check` comes first."""
        try:
            got = os.preadv(self.fd, [view], at)
        except OSError as error:
            raise CorpusError(f"{self.path} cannot be read: {error.strerror}") from None
        while got < len(view):  # a signal, a network file system, or the file became shorter
            more = os.preadv(self.fd, [view[got:]], at + got)
            if not more:
                raise CorpusError(f"{self.path} became shorter while it was read; {MEND}")
            got += more

    def check(self, start: int, stop: int) -> None:
        """Verify those MiB of the bytes [start, stop) that nobody has touched yet."""
        for mib in range(start // MIB, (stop - 1) // MIB + 1):
            if self._touched[mib]:
                continue
            data = os.pread(self.fd, MIB, mib * MIB)
            if len(data) != min(MIB, self.size - mib * MIB) or crc32c(data) != self._checks()[mib]:
                raise CorpusError(f"{self.path} is damaged in its MiB {mib} (CRC32C differs); {MEND}")
            self._touched[mib] = True

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), verified."""
        out = bytearray(stop - start)
        if out:
            self.check(start, stop)
            self.into(memoryview(out), start)
        return bytes(out)


class PreparedCorpus:
    """A prepared corpus of text; implements `protocol.Corpus`. Open one with `open_corpus`."""

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.kind: str = manifest["kind"]
        self.alphabet: int = manifest["alphabet"]
        self.bos: int = manifest["bos"]
        grid = manifest.get("grid")
        self.grid: tuple[int, int, int] | None = None if grid is None else (grid[0], grid[1], grid[2])
        self.labels: int = manifest.get("labels", 0)
        self.blocks: int = manifest["blocks"]
        self.dtype = DTYPES[manifest["dtype"]]
        self._files: Mapping[str, Mapping[str, Any]] = manifest["files"]
        sizes = [self._files[tokens_name(block)]["size"] for block in range(self.blocks)]
        self.size_K = np.array(sizes, np.int64)
        mibs_K = -(-self.size_K // MIB)
        self.first_mib_K = np.cumsum(mibs_K) - mibs_K
        self.touched = np.zeros(int(mibs_K.sum()), np.bool_)  # by MiB over all token files
        self._verified: set[str] = set()
        self._open: dict[int, CheckedFile] = {}
        self._tables: dict[int, np.ndarray] = {}
        self._index: CheckedFile | None = None
        self._dropped: np.ndarray | None = None
        self._symbol_bytes_V: np.ndarray | None = None
        self._tokenizer: Tokenizer | None = None
        self._splits: dict[str, PreparedSplit] = {}

    def __repr__(self) -> str:
        return f"PreparedCorpus({str(self.path)!r}, {self.fingerprint[:12]})"

    # -- what the protocol wants -------------------------------------------------------------------------------------

    @property
    def symbol_dims(self) -> int:
        """0: the symbols of a text stand for bytes, not for dimensions."""
        return 0

    @property
    def symbol_bytes_V(self) -> np.ndarray:
        """int64 [V]: raw bytes that each symbol stands for (0 for the end symbol)."""
        if self._symbol_bytes_V is None:
            if SYMBOL_BYTES not in self._files:
                raise CorpusError(f"{self.path} has no {SYMBOL_BYTES}: it was prepared without byte counts a symbol")
            self._symbol_bytes_V = np.frombuffer(self._small(SYMBOL_BYTES), "<i8").astype(np.int64)
        return self._symbol_bytes_V

    def split(self, name: str) -> PreparedSplit:
        """A split by its name in the manifest; CorpusError names the splits there are, or the counts if it is empty."""
        if name not in self._splits:
            splits = self.manifest["split"]["splits"]
            if name not in splits:
                raise CorpusError(f"{self.path} has no split {name!r}; it has {', '.join(sorted(splits))}")
            cells = splits[name]
            self._splits[name] = self.select(name, cells["groups"], [(lo, hi) for lo, hi in cells["buckets"]])
        return self._splits[name]

    def select(self, name: str, groups: Iterable[int], buckets: Iterable[tuple[int, int]]) -> PreparedSplit:
        """A split made of any cells: groups x half-open bucket ranges (a fold, say). CorpusError when it is empty."""
        split = PreparedSplit(self, name, columns(groups, buckets))
        if not split.documents:
            counts = self.manifest["counts"]
            known = ", ".join(f"{other} {count['documents']}" for other, count in sorted(counts.items()))
            raise CorpusError(f"split {name!r} of {self.path} is empty; documents of the others: {known}")
        return split

    def encode(self, raw: bytes) -> np.ndarray:
        """int64 symbols of raw bytes, without an end symbol."""
        return self.tokenizer.encode(raw)

    def decode(self, symbols: Sequence[int]) -> bytes:
        """The raw bytes of a run of symbols."""
        return self.tokenizer.decode(symbols)

    # -- files -------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """The corpus folder's own copy; TokenizerError when it is not the one that the corpus was prepared with."""
        if self._tokenizer is None:
            from lmtrain.data.tokenizer import load  # a corpus can be read where no tokenizer can be loaded

            wanted = self.manifest["tokenizer"]
            file = wanted["file"]
            for name in self._files:
                if name == file or name.startswith(f"{file}/"):
                    self._small(name)
            tokenizer = load(self.path / file)
            given = {"sha256": tokenizer.sha256, "alphabet": tokenizer.vocab, "end symbol": tokenizer.end}
            want = {"sha256": wanted["sha256"], "alphabet": self.alphabet, "end symbol": self.bos}
            for key, value in want.items():
                if given[key] != value:
                    raise TokenizerError(
                        f"{self.path / file} is not the tokenizer of this corpus: its {key} is {given[key]}, "
                        f"the manifest says {value}; {MEND}"
                    )
            self._tokenizer = tokenizer
        return self._tokenizer

    def _small(self, name: str) -> bytes:
        """A whole file, verified by sha256."""
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            raise CorpusError(f"{self.path / name} cannot be read: {error.strerror}") from None
        self._compare_sha256(name, data)
        return data

    def _compare_sha256(self, name: str, data: bytes | None = None) -> None:

        found = file_sha256(self.path / name) if data is None else hashlib.sha256(data).hexdigest()
        if found != self._files[name]["sha256"]:
            raise CorpusError(f"{self.path / name} is damaged (sha256 differs from the manifest's); {MEND}")
        self._verified.add(name)

    def checks(self, block: int) -> np.ndarray:
        """uint32: CRC32C of every MiB of a token file."""
        return np.frombuffer(self._small(checks_name(block)), "<u4")

    def tokens(self, block: int) -> CheckedFile:
        """The token file of a block, open."""
        file = self._open.get(block)
        if file is None:
            size = int(self.size_K[block])
            first = int(self.first_mib_K[block])
            touched = self.touched[first : first + -(-size // MIB)]
            path = self.path / tokens_name(block)
            file = CheckedFile(path, size=size, checks=_once(lambda: self.checks(block)), touched=touched)
            _keep(self._open, block, file)
        return file

    def documents(self, block: int) -> np.ndarray:
        """The DOCUMENT rows of a block, memory-mapped, verified as a whole when they are first read."""
        table = self._tables.get(block)
        if table is None:
            name = documents_name(block)
            size = self._files[name]["size"]
            try:
                found = (self.path / name).stat().st_size
                if found != size:
                    raise CorpusError(f"{self.path / name} has {found} bytes, the manifest says {size}; {MEND}")
                if name not in self._verified:
                    self._compare_sha256(name)
                table = np.memmap(self.path / name, DOCUMENT, mode="r") if size else np.zeros(0, DOCUMENT)
            except OSError as error:
                raise CorpusError(f"{self.path / name} cannot be read: {error.strerror}") from None
            _keep(self._tables, block, table)
        return table

    def dropped(self) -> np.ndarray:
        """The DROPPED rows, sorted by block and row."""
        if self._dropped is None:
            data = self._small(DROPPED_FILE) if DROPPED_FILE in self._files else b""
            self._dropped = np.frombuffer(data, DROPPED)
        return self._dropped

    def index(self, field: int, column: int) -> np.ndarray:
        """int64 [blocks]: in each block, the sum of a field over the documents before this column."""
        if self._index is None:
            size = len(FIELDS) * (GROUPS * BUCKETS + 1) * self.blocks * 8
            self._index = CheckedFile(
                self.path / INDEX,
                size=size,
                checks=_once(lambda: np.frombuffer(self._small(INDEX_CHECKS), "<u4")),
                touched=np.zeros(-(-size // MIB), np.bool_),
            )
        at = (field * (GROUPS * BUCKETS + 1) + column) * self.blocks * 8
        return np.frombuffer(self._index.read(at, at + self.blocks * 8), "<i8")

    # -- checking all of it --------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Read everything: sha256 of every file, CRC32C of every MiB, and that documents and symbols fit together."""
        for name in sorted(self._files):
            self._compare_sha256(name)
        for block in range(self.blocks):
            self._verify_block(block)

    def _verify_block(self, block: int) -> None:
        path = self.path / tokens_name(block)
        rows = self.documents(block)
        data = self.tokens(block).read(0, int(self.size_K[block]))
        symbols = np.frombuffer(data, self.dtype)
        ends = (rows["offset"] + rows["symbols"]).astype(np.int64)
        column = rows["group"].astype(np.int64) * BUCKETS + rows["bucket"]
        if (np.diff(column) < 0).any() or (rows["offset"].astype(np.int64) != np.concatenate([[0], ends[:-1]])).any():
            raise CorpusError(f"{self.path / documents_name(block)}: documents are not in order; {MEND}")
        if len(symbols) != (ends[-1] if len(ends) else 0):
            raise CorpusError(f"{path} has {len(symbols)} symbols, its documents have {ends[-1:].sum()}; {MEND}")
        if (symbols >= self.alphabet).any():
            raise CorpusError(f"{path} holds a symbol outside the alphabet of {self.alphabet}; {MEND}")
        if (symbols[ends - 1] != self.bos).any():
            raise CorpusError(f"{path}: a document does not end with the end symbol {self.bos}; {MEND}")
        if SYMBOL_BYTES in self._files and len(rows):
            counted = np.add.reduceat(self.symbol_bytes_V[symbols], rows["offset"].astype(np.int64))
            if (counted != rows["bytes"].astype(np.int64)).any():
                raise CorpusError(f"{path}: symbols and raw bytes of a document differ; the wrong tokenizer?")


def _once(load: Callable[[], np.ndarray]) -> Callable[[], np.ndarray]:
    """Load when first asked, then remember."""
    kept: list[np.ndarray] = []

    def get() -> np.ndarray:
        if not kept:
            kept.append(load())
        return kept[0]

    return get


def _keep(cache: dict[int, Any], key: int, value: Any) -> None:
    """Put into a bounded cache; what falls out is closed when its last reader lets go of it."""
    while len(cache) >= OPEN_FILES:
        cache.pop(next(iter(cache)), None)
    cache[key] = value


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
        self._block_E = block[some]
        self._offset_E = begin[some]
        length_E = (end - begin)[some]
        self._start_E = np.concatenate([np.zeros(1, np.int64), np.cumsum(length_E)])  # [E + 1]
        assert self._start_E[-1] == self.symbols

    def __repr__(self) -> str:
        return f"PreparedSplit({self.name!r}, symbols={self.symbols}, documents={self.documents})"

    def rows(self, context: int) -> int:
        """How many rows of `context` symbols the split has; the last one may be padded."""
        return -(-self.symbols // context)

    def row_symbols(self, index_N: np.ndarray, context: int) -> np.ndarray:
        """int64 [N]: how many symbols of each row are scored, without reading one; 0 for a padding row (-1)."""
        index_N = np.asarray(index_N, np.int64)
        out: np.ndarray = np.clip(self.symbols - index_N * context, 0, context)
        out[index_N < 0] = 0
        return out

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64 symbols of [start, stop) of the concatenation; IndexError outside of it."""
        if not 0 <= start <= stop <= self.symbols:
            raise IndexError(f"[{start}, {stop}) is not inside the {self.symbols} symbols of split {self.name!r}")
        out = np.empty(stop - start, self.corpus.dtype)
        self._copy(start, out)
        return out.astype(np.int64)

    def start_symbol(self, position: int) -> int:
        """The symbol before `position`; the end symbol (= BOS) before position 0."""
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
        """The rows `index_B` (int64; -1 = a padding row of weight 0) as a Batch of int64 [B, context].

        Raises CorpusError when a symbol lies in a damaged file, IndexError for a row that the split does not have.
        """
        index_B = np.asarray(index_B, np.int64)
        position_B = index_B * context
        position_B[index_B < 0] = -1
        count_B = self.row_symbols(index_B, context)
        if ((count_B == 0) & (index_B >= 0)).any() or (index_B < -1).any():
            raise IndexError(f"rows {index_B.min()} .. {index_B.max()} of {self.rows(context)} of split {self.name!r}")
        symbols = np.zeros((len(index_B), context + 1), self.corpus.dtype)  # column 0: the symbol before the row
        symbols[:, 0] = self.corpus.bos
        for row, position, count in zip(symbols, position_B.tolist(), count_B.tolist(), strict=True):
            if position > 0:
                self._copy(position - 1, row[: count + 1])
            elif position == 0:
                self._copy(0, row[1 : count + 1])
        weight_BT = torch.ones(len(index_B), context)
        for at in np.flatnonzero(count_B < context).tolist():
            weight_BT[at, int(count_B[at]) :] = 0.0
        first_BT = self._first(position_B, count_B, context) if masking else None
        return Batch(
            x_BT=torch.from_numpy(symbols[:, 1:].astype(np.int64)),
            weight_BT=weight_BT,
            cond=Cond(torch.from_numpy(symbols[:, 0].astype(np.int64)), first_BT),
            position_B=torch.from_numpy(position_B),
        )

    def _copy(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (one-dimensional, of the corpus's type) with the symbols from `start` on."""
        size = self.corpus.dtype.itemsize
        view = out.data.cast("B")
        for block, offset, done, count in self._pieces(start, len(out)):
            file = self.corpus.tokens(block)
            file.check(offset * size, (offset + count) * size)
            file.into(view[done * size : (done + count) * size], offset * size)

    def _pieces(self, start: int, count: int) -> list[tuple[int, int, int, int]]:
        """[start, start + count) as (block, offset in its file, symbols before it, symbols)."""
        out = []
        done = 0
        extent = int(np.searchsorted(self._start_E, start, side="right")) - 1
        while done < count:
            inside = start + done - int(self._start_E[extent])
            some = min(count - done, int(self._start_E[extent + 1]) - start - done)
            out.append((int(self._block_E[extent]), int(self._offset_E[extent]) + inside, done, some))
            done += some
            extent += 1
        return out

    def _first(self, position_B: np.ndarray, count_B: np.ndarray, context: int) -> torch.Tensor:
        """bool [B, T]: symbol t begins a document."""
        first_BT = np.zeros((len(position_B), context), np.bool_)
        for row, position, count in zip(first_BT, position_B.tolist(), count_B.tolist(), strict=True):
            for block, offset, done, some in self._pieces(max(position, 0), count):
                begins = self.corpus.documents(block)["offset"]
                at = bisect_left(begins, offset)
                while at < len(begins) and begins[at] < offset + some:
                    row[done + int(begins[at]) - offset] = True
                    at += 1
        return torch.from_numpy(first_BT)


def open_corpus(path: Path | str) -> PreparedCorpus:
    """Open a prepared corpus: the manifest's own hash and every file's size are checked here, contents when touched.

    Raises CorpusError naming the file that is missing, damaged, or of another version.
    """
    folder = Path(path)
    file = folder / MANIFEST
    try:
        data = file.read_bytes()
    except OSError:
        raise CorpusError(
            f"no prepared corpus in {folder}: {file} cannot be read; make one with `lmtrain prepare`"
        ) from None
    try:
        manifest = json.loads(data)
        version, found = manifest["version"], manifest["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise CorpusError(f"{file} is damaged (not a manifest); {MEND}") from None
    if data != canonical(manifest) or found != fingerprint(manifest):
        raise CorpusError(f"{file} is damaged or was edited (its own hash differs); {MEND}")
    if version != VERSION or manifest["kind"] != "text":
        what = f"format version {version}, kind {manifest['kind']!r}"
        raise CorpusError(f"{file} has {what}; this lmtrain reads version {VERSION}, kind 'text'")
    for name, entry in manifest["files"].items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            raise CorpusError(f"{folder / name} is missing or cannot be read ({error.strerror}); {MEND}") from None
        if size != entry["size"]:
            raise CorpusError(f"{folder / name} has {size} bytes, the manifest says {entry['size']}; {MEND}")
    return PreparedCorpus(folder, manifest)
