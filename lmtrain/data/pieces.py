"""Pieces of remote files: verified when they arrive, kept in the cache of the node, fetched once by whoever is first.

A piece is a MiB of a file with its CRC32C, or a small file with its sha256. One that another process put into the cache
is verified again when this one first reads it; what is damaged there is fetched anew.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np

from lmtrain.data.cache import Cache
from lmtrain.data.layout import MIB, crc32c
from lmtrain.data.remote import ClosedError, Remote
from lmtrain.errors import CorpusError

JOIN = 5.0
"""Seconds to wait for a fetch that runs when the reader is closed."""


class Piece(NamedTuple):
    """[start, stop) of a file (None: all of it), and what finds a fault in its bytes."""

    name: str
    start: int | None
    stop: int | None
    check: Callable[[bytes], str | None]

    @property
    def key(self) -> str:
        """Its name among the pieces of a corpus."""
        return f"{self.name} {self.start}"


class Pieces:
    """Pieces of the files below a URL. `of`: the corpus's fingerprint. Threads fetch what is wanted until `close`."""

    def __init__(self, remote: Remote, cache: Cache, *, of: str, connections: int) -> None:
        self.remote, self.cache, self._of = remote, cache, of
        self.most_wanted = max(1, cache.bound // (4 * MIB))
        self._lock = threading.Lock()
        self._putting = threading.Lock()
        self._coming: dict[str, threading.Event] = {}
        self._wanted: set[str] = set()
        self._queue: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._work, name="lmtrain-remote", daemon=True) for _ in range(connections)
        ]
        for thread in self._threads:
            thread.start()

    def kept(self, piece: Piece, at: int, size: int) -> bytes | None:
        """`size` bytes from `at` on of a piece that this process has verified before; None when it is not there."""
        return self.cache.read(self._key(piece), at, size)

    def get(self, piece: Piece) -> bytes:
        """A whole piece, verified. Raises CorpusError."""
        key = self._key(piece)
        while True:
            data = self._cached(piece, key)
            if data is not None:
                return data
            with self._lock:
                coming = self._coming.get(key)
                if coming is None:
                    mine = self._coming[key] = threading.Event()
            if coming is not None:
                coming.wait()  # then it is there, or this thread tries for itself and sees why not
                continue
            try:
                with self.cache.busy(key):
                    data = self._cached(piece, key)  # another process was first
                    if data is None:
                        data = self.remote.read(piece.name, piece.start, piece.stop, check=piece.check)
                        with self._putting:
                            if self.remote.closing.is_set():
                                raise ClosedError
                            self.cache.put(key, data)
                return data
            finally:
                with self._lock:
                    del self._coming[key]
                mine.set()

    def _key(self, piece: Piece) -> str:
        return f"{self._of} {piece.key}"

    def _cached(self, piece: Piece, key: str) -> bytes | None:
        data = self.cache.get(key)
        if data is not None and piece.check(data) is not None:
            self.cache.drop(key)
            return None
        return data

    def want(self, pieces: Iterable[Piece]) -> bool:
        """Have pieces fetched by the threads; False when so many are waited for that the cache would overflow."""
        for piece in pieces:
            key = self._key(piece)
            with self._lock:
                if key in self._wanted:
                    continue
                if len(self._wanted) >= self.most_wanted:
                    return False
                if self.cache.has(key):
                    continue
                self._wanted.add(key)
            self._queue.put(piece)
        return True

    def _work(self) -> None:
        while (piece := self._queue.get()) is not None:
            try:
                if not self.remote.closing.is_set() and not self.cache.has(self._key(piece)):
                    self.get(piece)
            except (CorpusError, ClosedError, OSError):
                pass  # whoever needs it will try, and see
            finally:
                with self._lock:
                    self._wanted.discard(self._key(piece))

    def close(self) -> None:
        """End the threads and leave the cache."""
        if self.remote.closing.is_set():
            return
        self.remote.closing.set()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(JOIN)
        with self._putting:
            self.cache.close()


class RemoteFile:
    """A remote file of known size read by position, as `CheckedFile`; nothing of it stays in memory."""

    whole = False

    def __init__(
        self, pieces: Pieces, name: str, *, size: int, checks: Callable[[], np.ndarray], touched: bytearray
    ) -> None:
        self.path: PurePath = pieces.remote.path / name
        self.size = size
        self._pieces, self._name, self._checks, self._touched = pieces, name, checks, touched

    def piece(self, mib: int) -> Piece:
        """One MiB; the last may be shorter."""
        start, stop = mib * MIB, min((mib + 1) * MIB, self.size)

        def check(data: bytes) -> str | None:
            if len(data) != stop - start:
                return f"gave {len(data)} of {stop - start} bytes of its MiB {mib}"
            return None if crc32c(data) == self._checks()[mib] else f"arrived damaged in its MiB {mib} (CRC32C differs)"

        return Piece(self._name, start, stop, check)

    def fill(self, view: memoryview, at: int) -> None:
        """Fill `view` with the bytes from `at` on, verified."""
        done = 0
        while done < len(view):
            mib, inside = divmod(at + done, MIB)
            some = min(len(view) - done, MIB - inside)
            data = self._pieces.kept(self.piece(mib), inside, some) if self._touched[mib] else None
            if data is None:
                data = self._pieces.get(self.piece(mib))[inside : inside + some]
                self._touched[mib] = 1
            view[done : done + some] = data
            done += some

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), verified."""
        out = bytearray(stop - start)
        self.fill(memoryview(out), start)
        return bytes(out)

    def verify(self, first: int, last: int) -> None:
        """Have the MiBs from the one with byte `first` to the one with byte `last`."""
        for mib in range(first >> 20, (last >> 20) + 1):
            self._pieces.get(self.piece(mib))

    def mapped(self, dtype: np.dtype[Any]) -> np.ndarray:
        """Nothing remote can be mapped; rows of it are read by `fill`."""
        raise CorpusError(f"{self.path} is remote and cannot be mapped into memory")

    def want(self, mibs: Iterable[int]) -> bool:
        """Have MiBs fetched beforehand; False when no more can be."""
        return self._pieces.want(self.piece(mib) for mib in mibs)

    def check_size(self) -> None:
        """Every piece is checked when it comes."""
