"""Reads a prepared corpus: nothing is trusted before its checksum was seen, nothing is read before it is wanted.

Opening reads the manifest and the sizes of the files. The index is read row by row, symbols MiB by MiB, each verified
by CRC32C when it is first touched (checked.py); documents, checksums and the small files by sha256 when they are first
read. What is read of a split, and how it is cut into rows, is in rows.py.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from lmtrain.data.checked import MEND, CheckedFile
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
    KINDS,
    MANIFEST,
    MIB,
    SYMBOL_BYTES,
    VERSION,
    canonical,
    checks_name,
    columns,
    documents_name,
    fingerprint,
    tokens_name,
)
from lmtrain.data.pieces import RemoteFile
from lmtrain.data.remote import Remote, is_url, local
from lmtrain.data.rows import PreparedSplit
from lmtrain.data.shelf import LocalShelf, RemoteConfig, RemoteShelf
from lmtrain.errors import CorpusError, TokenizerError
from lmtrain.meaning import Known, Measure

if TYPE_CHECKING:
    from lmtrain.data.tokenizer import Tokenizer

OPEN_FILES = 128
"""Token files and document tables kept open at once, each."""

CHECK_OPEN = 1.0
"""Seconds after which the sizes of the open token files are compared again."""

EMPTY = np.zeros(0, DOCUMENT)


class PreparedCorpus:
    """A prepared corpus; implements `protocol.Corpus`. Open one with `open_corpus`."""

    def __init__(self, shelf: LocalShelf | RemoteShelf, manifest: Mapping[str, Any]) -> None:
        self.path: PurePath = shelf.path
        self.shelf = shelf
        self.is_local = isinstance(shelf, LocalShelf)
        self.manifest = manifest
        self.fingerprint: str = manifest["fingerprint"]
        self.kind: str = manifest["kind"]
        self.alphabet: int = manifest["alphabet"]
        self.bos: int = manifest["bos"]
        grid = manifest.get("grid")
        self.grid: tuple[int, int, int] | None = None if grid is None else (grid[0], grid[1], grid[2])
        self.labels: int = manifest.get("labels", 0)
        self.record: int | None = manifest.get("record")
        self.unit = "document" if self.record is None else "record"
        self.blocks: int = manifest["blocks"]
        self.dtype = DTYPES[manifest["dtype"]]
        self._files: Mapping[str, Mapping[str, Any]] = manifest["files"]
        self._verified: set[str] = set()
        self._lock = threading.Lock()  # the prefetch thread reads too; held only where a cache changes
        self._open: dict[int, CheckedFile | RemoteFile] = {}
        self._check_due = 0.0
        self.verified: dict[int, np.ndarray] = {}
        """By block, what `symbols` gives, of the token files that are open and verified in whole."""
        self._touched: dict[int, bytearray] = {}
        self._tables: dict[int, np.ndarray] = {}
        self._index: CheckedFile | RemoteFile | None = None
        self._dropped: np.ndarray | None = None
        self._symbol_bytes_V: np.ndarray | None = None
        self._tokenizer: Tokenizer | None = None
        self._splits: dict[str, PreparedSplit] = {}

    def __repr__(self) -> str:
        return f"PreparedCorpus({str(self.path)!r}, {self.fingerprint[:12]})"

    # -- what the protocol wants -------------------------------------------------------------------------------------

    @property
    def meaning(self) -> str:
        """The tokenizer's sha256; of records their kind, shape and alphabet."""
        if self.record is None:
            return f"tokenizer {self.manifest['tokenizer']['sha256']}"
        shape = "x".join(map(str, self.grid or (self.record,)))
        return f"{self.kind} {shape} of {f'{self.alphabet} levels' if self.alphabet else 'real numbers'}"

    @property
    def measure(self) -> Measure:
        """Probabilities of symbols, or a density of real numbers in their own units."""
        return Measure("exact" if self.alphabet else "density")

    @property
    def symbol_dims(self) -> int:
        """1 for symbols of records; the symbols of a text stand for bytes, and of reals there are no bits."""
        return int(self.record is not None and self.alphabet > 0)

    @cached_property
    def known(self) -> Known | None:
        """The source that the records were drawn from, if it is in the manifest."""
        from lmtrain.data.known import from_manifest  # which imports sources, and with them much else

        return from_manifest(self.manifest)

    def pieces(self) -> list[bytes]:
        """What each symbol of a text decodes to."""
        return [self.decode([v]) for v in range(self.alphabet)] if self.record is None else []

    @property
    def symbol_bytes_V(self) -> np.ndarray:
        """int64 [V]: raw bytes that each symbol stands for (0 for the end symbol)."""
        if self.record is not None:
            return np.zeros(self.alphabet, np.int64)
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
        symbols: np.ndarray = self.tokenizer.encode(raw)
        return symbols

    def decode(self, symbols: Sequence[int]) -> bytes:
        """The raw bytes of a run of symbols."""
        raw: bytes = self.tokenizer.decode(symbols)
        return raw

    # -- files -------------------------------------------------------------------------------------------------------

    @property
    def tokenizer(self) -> Tokenizer:
        """The corpus folder's own copy; TokenizerError when it is not the one that the corpus was prepared with."""
        if self._tokenizer is None:
            if self.record is not None:
                raise CorpusError(f"{self.path} holds {self.unit}s, not text: it has no tokenizer")
            from lmtrain.data.tokenizer import load  # a corpus can be read where no tokenizer can be loaded

            wanted = self.manifest["tokenizer"]
            file = wanted["file"]
            names = [name for name in self._files if name == file or name.startswith(f"{file}/")]
            with self.shelf.folder({name: self._small(name) for name in names}) as folder:
                tokenizer = load(folder / file)
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
        data = self.shelf.read(name, self._files[name]["sha256"])
        self._compare_sha256(name, data)
        return data

    def _compare_sha256(self, name: str, data: bytes | None = None) -> None:
        if data is None:
            found = self.shelf.sha256(name, self._files[name]["size"])
        else:
            found = hashlib.sha256(data).hexdigest()
        if found != self._files[name]["sha256"]:
            raise CorpusError(f"{self.path / name} is damaged (sha256 differs from the manifest's); {MEND}")
        self._verified.add(name)

    def tokens(self, block: int) -> CheckedFile | RemoteFile:
        """The token file of a block, open."""
        file = self._open.get(block)
        if file is None:
            name = tokens_name(block)
            size = self._files[name]["size"]
            touched = self._touched.setdefault(block, bytearray(-(-size // MIB)))
            checks = _once(lambda: np.frombuffer(self._small(checks_name(block)), "<u4"))
            file = self.shelf.open(name, size=size, checks=checks, touched=touched)
            self._keep(self._open, block, file)
        return file

    def symbols(self, block: int, start: int, stop: int) -> np.ndarray:
        """A memory map of a block's whole token file, in which [start, stop) is verified."""
        file, size = self.tokens(block), self.dtype.itemsize
        file.verify(start * size, stop * size - 1)
        symbols = file.mapped(self.dtype)
        if file.whole:
            with self._lock:
                if self._open.get(block) is file:
                    self.verified[block] = symbols
        return symbols

    def check_open(self) -> None:
        """Every CHECK_OPEN seconds: that no open token file became shorter; CorpusError names the one that did."""
        now = time.monotonic()
        if now >= self._check_due:
            self._check_due = now + CHECK_OPEN
            with self._lock:
                files = list(self._open.values())
            for file in files:
                file.check_size()

    def documents(self, block: int) -> np.ndarray:
        """The DOCUMENT rows of a block, memory-mapped, verified as a whole when they are first read."""
        table = self._tables.get(block)
        if table is None:
            name = documents_name(block)
            if isinstance(self.shelf, LocalShelf):
                self._check_size(name)
                if name not in self._verified:
                    self._compare_sha256(name)
                table = self.shelf.table(name, DOCUMENT) if self._files[name]["size"] else EMPTY
            else:
                table = np.frombuffer(self._small(name), DOCUMENT)
            self._keep(self._tables, block, table)
        return table

    def _keep(self, cache: dict[int, Any], key: int, value: Any) -> None:
        """Put into a bounded cache; what falls out is closed when its last reader lets go of it."""
        with self._lock:
            while len(cache) >= OPEN_FILES:
                oldest = next(iter(cache))
                cache.pop(oldest)
                if cache is self._open:
                    self.verified.pop(oldest, None)
            cache[key] = value

    def _check_size(self, name: str) -> None:
        self.shelf.check_size(name, self._files[name]["size"])

    def want(self, block: int, mibs: Iterable[int]) -> bool:
        """Have MiBs of a token file fetched beforehand; False when no more can be. Nothing to do where it is local."""
        file = self.tokens(block)
        return isinstance(file, CheckedFile) or file.want(mibs)

    def close(self) -> None:
        """Leave the cache of a remote corpus; it cannot be read any more."""
        self.shelf.close()

    def check_sizes(self) -> None:
        """That every file is there with its size; CorpusError names the one that is not."""
        for name in self._files:
            self._check_size(name)

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
            self._index = self.shelf.open(
                INDEX,
                size=size,
                checks=_once(lambda: np.frombuffer(self._small(INDEX_CHECKS), "<u4")),
                touched=bytearray(-(-size // MIB)),
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
        data = self.tokens(block).read(0, self._files[tokens_name(block)]["size"])
        symbols = np.frombuffer(data, self.dtype)
        ends = (rows["offset"] + rows["symbols"]).astype(np.int64)
        column = rows["group"].astype(np.int64) * BUCKETS + rows["bucket"]
        if (np.diff(column) < 0).any() or (rows["offset"].astype(np.int64) != np.concatenate([[0], ends[:-1]])).any():
            raise CorpusError(f"{self.path / documents_name(block)}: documents are not in order; {MEND}")
        if len(symbols) != (ends[-1] if len(ends) else 0):
            raise CorpusError(f"{path} has {len(symbols)} symbols, its documents have {ends[-1:].sum()}; {MEND}")
        if self.alphabet and (symbols >= self.alphabet).any():
            raise CorpusError(f"{path} holds a symbol outside the alphabet of {self.alphabet}; {MEND}")
        if self.record is not None:
            if (rows["symbols"] != self.record).any() or (rows["label"] >= max(self.labels, 1)).any():
                raise CorpusError(f"{self.path / documents_name(block)}: a record of wrong length or class; {MEND}")
            return
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


def open_corpus(
    path: Path | str, *, remote: RemoteConfig | None = None, note: Callable[[str], None] | None = None
) -> PreparedCorpus:
    """Open a prepared corpus: the manifest's own hash and every file's size are checked here, contents when touched.

    path: a folder, or a URL, whose files are read piece by piece as `remote` says and checked as they come. note: hears
    of waiting for a server. Raises CorpusError naming the file that is missing, damaged, or of another version, and
    ConfigError for a URL that cannot be used.
    """
    if is_url(path) and local(str(path)) == str(path):
        config = remote or RemoteConfig()
        afar = Remote(str(path), patience=config.patience, note=note or (lambda text: None))
        manifest = _manifest(afar.path / MANIFEST, afar.read(MANIFEST, check=lambda data: None))
        return PreparedCorpus(RemoteShelf(afar, config, of=manifest["fingerprint"]), manifest)
    folder = Path(local(str(path)))
    file = folder / MANIFEST
    try:
        data = file.read_bytes()
    except OSError:
        raise CorpusError(
            f"no prepared corpus in {folder}: {file} cannot be read; make one with `lmtrain prepare`"
        ) from None
    corpus = PreparedCorpus(LocalShelf(folder), _manifest(file, data))
    corpus.check_sizes()
    return corpus


def _manifest(file: PurePath, data: bytes) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(data)
        version, found = manifest["version"], manifest["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise CorpusError(f"{file} is damaged (not a manifest); {MEND}") from None
    if data != canonical(manifest) or found != fingerprint(manifest):
        raise CorpusError(f"{file} is damaged or was edited (its own hash differs); {MEND}")
    if version != VERSION or manifest["kind"] not in KINDS:
        what = f"format version {version}, kind {manifest['kind']!r}"
        raise CorpusError(f"{file} has {what}; this lmtrain reads version {VERSION}, kinds {', '.join(KINDS)}")
    return manifest
