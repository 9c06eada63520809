"""Where the files of a prepared corpus stand: a local folder, or a URL whose pieces come through the node's cache."""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from pydantic import Field

from lmtrain.config import Config
from lmtrain.data.cache import Cache, default_folder
from lmtrain.data.checked import MEND, CheckedFile
from lmtrain.data.layout import file_sha256
from lmtrain.data.pieces import Piece, Pieces, RemoteFile
from lmtrain.data.remote import Remote
from lmtrain.errors import CorpusError

_RANGE = 8 << 20
"""Bytes asked for at a time when a whole file is hashed."""


class RemoteConfig(Config):
    """How corpora that are URLs are read. Nothing of it changes a batch."""

    cache: str | None = Field(
        None, min_length=1, description="folder of the cache, shared by a node's ranks; null = below the temporary one"
    )
    cache_bytes: int = Field(8 << 30, ge=16 << 20, description="most bytes that the cache takes")
    patience: float = Field(540.0, gt=0, description="seconds to go on asking; below engine.timeout")
    ahead: int = Field(16, ge=0, description="steps whose MiBs are fetched beforehand")
    connections: int = Field(4, ge=1, le=64, description="fetches at a time, beforehand, of each rank")


class LocalShelf:
    """A folder of this machine."""

    ahead = 0

    def __init__(self, folder: Path) -> None:
        self.path: PurePath = folder
        self._folder = folder

    def read(self, name: str, sha256: str) -> bytes:
        """A whole file; the caller compares its sha256."""
        try:
            return (self._folder / name).read_bytes()
        except OSError as error:
            raise CorpusError(f"{self.path / name} cannot be read: {error.strerror}") from None

    def sha256(self, name: str, size: int) -> str:
        """Of the file as it is now."""
        return file_sha256(self._folder / name)

    def check_size(self, name: str, wanted: int) -> None:
        """CorpusError when the file is missing or has another size."""
        path = self._folder / name
        try:
            found = path.stat().st_size
        except OSError as error:
            raise CorpusError(f"{path} is missing or cannot be read ({error.strerror}); {MEND}") from None
        if found != wanted:
            raise CorpusError(f"{path} has {found} bytes, the manifest says {wanted}; {MEND}")

    def open(self, name: str, *, size: int, checks: Callable[[], np.ndarray], touched: bytearray) -> CheckedFile:
        """A large file, read by position."""
        return CheckedFile(self._folder / name, size=size, checks=checks, touched=touched)

    def table(self, name: str, dtype: np.dtype[Any]) -> np.ndarray:
        """A file that was verified, as a memory map."""
        try:
            return np.memmap(self._folder / name, dtype, mode="r").view(np.ndarray)
        except OSError as error:
            raise CorpusError(f"{self.path / name} cannot be read: {error.strerror}") from None

    @contextmanager
    def folder(self, files: Mapping[str, bytes]) -> Iterator[Path]:
        """A folder in which these files are."""
        yield self._folder

    def close(self) -> None:
        """Nothing to do."""


class RemoteShelf:
    """Files below a URL. The cache is left when the shelf is closed, forgotten, or when the process ends."""

    def __init__(self, remote: Remote, config: RemoteConfig, *, of: str) -> None:
        self.path: PurePath = remote.path
        self.ahead = config.ahead
        cache = Cache(Path(config.cache) if config.cache else default_folder(), bound=config.cache_bytes)
        self.pieces = Pieces(remote, cache, of=of, connections=config.connections)
        self._closed = weakref.finalize(self, self.pieces.close)

    def read(self, name: str, sha256: str) -> bytes:
        """A whole file, verified."""

        def check(data: bytes) -> str | None:
            return None if hashlib.sha256(data).hexdigest() == sha256 else "arrived damaged (sha256 differs)"

        return self.pieces.get(Piece(name, None, None, check))

    def sha256(self, name: str, size: int) -> str:
        """Of the file as it is now, past the cache."""
        found = hashlib.sha256()
        for start in range(0, size, _RANGE):
            stop = min(start + _RANGE, size)

            def check(data: bytes, wanted: int = stop - start) -> str | None:
                return None if len(data) == wanted else f"gave {len(data)} of {wanted} bytes"

            found.update(self.pieces.remote.read(name, start, stop, check=check))
        return found.hexdigest()

    def check_size(self, name: str, wanted: int) -> None:
        """Every piece is checked when it comes."""

    def open(self, name: str, *, size: int, checks: Callable[[], np.ndarray], touched: bytearray) -> RemoteFile:
        """A large file, read by position."""
        return RemoteFile(self.pieces, name, size=size, checks=checks, touched=touched)

    @contextmanager
    def folder(self, files: Mapping[str, bytes]) -> Iterator[Path]:
        """A folder in which these files are, for as long as the context lasts."""
        with tempfile.TemporaryDirectory(prefix="lmtrain-") as made:
            for name, data in files.items():
                path = Path(made) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            yield Path(made)

    def close(self) -> None:
        """End what runs, and leave the cache."""
        self._closed()
