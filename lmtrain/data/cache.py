"""A bounded folder of verified pieces of remote files, shared by the processes of a node; the last one removes it.

A piece is one file, put there by renaming, so it is whole or absent; whoever reads it has it open, so it may be removed
at any time. What was not used for longest goes first. Under one lock (`flock`): counting, evicting, putting. The count
is never too low: it is raised before a piece appears, and set right when the folder is looked through.

Each process holds the file `users` shared; the one that gets it alone when it closes removes the folder. What a process
that was killed left behind is used, and removed, by the next ones.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lmtrain.errors import CorpusError

_LOCK, _USERS, _BUSY = "lock", "users", "busy"
_OWN = 64
"""Bytes of the cache's own files."""
_ROOM = 0.9
"""Share of the bound that eviction leaves, so that it need not be done for every piece."""


def default_folder() -> Path:
    """In the system's folder for temporary files, one a user."""
    return Path(tempfile.gettempdir()) / f"lmtrain-cache-{os.getuid()}"


class Cache:
    """The pieces in `folder`; `bound`: bytes that they may take. CorpusError when the folder cannot be used."""

    def __init__(self, folder: Path, *, bound: int) -> None:
        self.folder, self.bound = folder, bound - _OWN
        try:
            self._enter()
        except OSError as error:
            raise self._unusable(error) from None

    def _enter(self) -> None:
        while True:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self.folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                raise CorpusError(f"{self.folder} is not a folder of yours; give another one as data.remote.cache")
            try:
                users = os.open(self.folder / _USERS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                continue  # removed by its last user between the lines above
            fcntl.flock(users, fcntl.LOCK_SH)
            if self._is_there(users):
                break
            os.close(users)
        self._users = users
        self._lock = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._busy = os.open(self.folder / _BUSY, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with self._locked():
            self._evict(0)

    def _is_there(self, users: int) -> bool:
        try:
            return os.stat(self.folder / _USERS).st_ino == os.fstat(users).st_ino
        except FileNotFoundError:
            return False

    def _unusable(self, error: OSError) -> CorpusError:
        return CorpusError(
            f"the cache {self.folder} cannot be used: {error.strerror or error}; give another folder as "
            "data.remote.cache, or a smaller data.remote.cache_bytes"
        )

    def path(self, key: str) -> Path:
        """Where a piece is, if it is there."""
        return self.folder / (hashlib.sha256(key.encode()).hexdigest()[:40] + ".piece")

    def get(self, key: str) -> bytes | None:
        """A whole piece."""
        return self.read(key, 0, -1)

    def read(self, key: str, start: int, size: int) -> bytes | None:
        """`size` bytes (-1: all) of a piece from `start` on; None when it is not there."""
        try:
            handle = os.open(self.path(key), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._unusable(error) from None
        try:
            os.utime(handle)
            wanted = os.fstat(handle).st_size - start if size < 0 else size
            data = os.pread(handle, wanted, start)
            return data if len(data) == wanted else None
        except OSError as error:
            raise self._unusable(error) from None
        finally:
            os.close(handle)

    def has(self, key: str) -> bool:
        """Whether a piece is there."""
        return self.path(key).exists()

    def drop(self, key: str) -> None:
        """Remove a piece that turned out damaged. The count stays too high until it is set right."""
        self.path(key).unlink(missing_ok=True)

    def put(self, key: str, data: bytes) -> None:
        """Keep a piece, removing older ones; one that is larger than a quarter of the bound is not kept."""
        if 4 * len(data) > self.bound:
            return
        path = self.path(key)
        try:
            with self._locked():
                if path.exists():
                    return
                used = self._count()
                if used + len(data) > self.bound:
                    used = self._evict(len(data))
                self._set(used + len(data))
                aside = path.with_suffix(".part")
                aside.write_bytes(data)
                aside.replace(path)
        except OSError as error:
            raise self._unusable(error) from None

    @contextmanager
    def busy(self, key: str) -> Iterator[None]:
        """Held by one process at a time, for one piece: so that two do not fetch the same."""
        at = int.from_bytes(hashlib.sha256(key.encode()).digest()[:6], "little")
        fcntl.lockf(self._busy, fcntl.LOCK_EX, 1, at)
        try:
            yield
        finally:
            fcntl.lockf(self._busy, fcntl.LOCK_UN, 1, at)

    def close(self) -> None:
        """Leave; the last one out removes the folder. To be called once, when no thread uses the cache any more."""
        for handle in (self._lock, self._busy):
            os.close(handle)
        try:
            fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pass  # others are there
        else:
            if self._is_there(self._users):
                for path in self.folder.iterdir():
                    if path.suffix in {".piece", ".part"} or path.name in {_LOCK, _BUSY}:
                        path.unlink(missing_ok=True)
                (self.folder / _USERS).unlink(missing_ok=True)
                with suppress(OSError):  # something of somebody else's is in it, or a new user has come
                    self.folder.rmdir()
        finally:
            os.close(self._users)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        # A descriptor of its own: the lock of one that threads share would let both in.
        handle = os.open(self.folder / _LOCK, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _count(self) -> int:
        text = os.pread(self._lock, 20, 0)
        return int(text) if text.isdigit() else self._evict(0)

    def _set(self, used: int) -> None:
        os.pwrite(self._lock, b"%020d" % used, 0)

    def _evict(self, size: int) -> int:
        """Look through the folder, set the count right, and make room for `size` bytes; the bytes that are there."""
        pieces: list[tuple[int, int, str]] = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(".part"):  # its writer was killed: writers hold the lock
                    os.unlink(entry.path)
                elif entry.name.endswith(".piece"):
                    try:
                        found = entry.stat(follow_symlinks=False)
                    except FileNotFoundError:
                        continue  # dropped meanwhile
                    pieces.append((found.st_mtime_ns, found.st_size, entry.path))
        used = sum(piece[1] for piece in pieces)
        if used + size > self.bound:
            wanted = min(int(_ROOM * self.bound), self.bound - size)
            for _, its, path in sorted(pieces):
                if used <= wanted:
                    break
                Path(path).unlink(missing_ok=True)
                used -= its
        self._set(used)
        return used
