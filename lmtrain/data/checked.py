"""Files that are not believed: a size that is compared when a file is opened, a CRC32C a MiB when it is first touched.

Bytes are read with `pread`: a file that becomes shorter under a memory map kills the process, here it is an error with
a name. Rows of a batch alone go through a map (`mapped`), which is twice as fast; `check_size`, called every second,
finds a file that was cut before it is read there, but for the one that is cut in that very second.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lmtrain.data.layout import MIB, crc32c
from lmtrain.errors import CorpusError

MEND = "restore the file from a copy or prepare the corpus again"


class CheckedFile:
    """A file of known size, read by position, whose every MiB is verified when it is first touched.

    touched: one byte a MiB, 1 = verified; it outlives this object, which is closed and opened again at will.
    """

    def __init__(self, path: Path, *, size: int, checks: Callable[[], np.ndarray], touched: bytearray) -> None:
        self.path = path
        self.size = size
        self.whole = all(touched)
        """Every MiB was verified."""
        self._fd = -1
        self._checks = checks
        self._touched = touched
        self._map: np.ndarray | None = None
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            found = os.fstat(self._fd).st_size
        except OSError as error:
            raise CorpusError(f"{path} cannot be read: {error.strerror}") from None
        if found != size:
            raise CorpusError(f"{path} has {found} bytes, the manifest says {size}; {MEND}")

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def fill(self, view: memoryview, at: int) -> None:
        """Fill `view` with the bytes from `at` on, verified."""
        last = at + len(view) - 1
        touched = self._touched
        if len(view) > MIB or not (touched[at >> 20] and touched[last >> 20]):
            self.verify(at, last)
        try:
            got = os.preadv(self._fd, [view], at)
            while got < len(view):  # a signal, a network file system, or the file became shorter
                more = os.preadv(self._fd, [view[got:]], at + got)
                if not more:
                    raise self._shorter()
                got += more
        except OSError as error:
            raise CorpusError(f"{self.path} cannot be read: {error.strerror}") from None

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), verified."""
        out = bytearray(stop - start)
        if out:
            self.fill(memoryview(out), start)
        return bytes(out)

    def mapped(self, dtype: np.dtype[Any]) -> np.ndarray:
        """The file as a read-only memory map of `dtype`, one for all calls. `verify` what is read of it."""
        if self._map is None:
            self.check_size()
            try:
                buffer = mmap.mmap(self._fd, self.size, prot=mmap.PROT_READ) if self.size else b""
            except OSError as error:
                raise CorpusError(f"{self.path} cannot be mapped: {error.strerror}") from None
            self._map = np.frombuffer(buffer, dtype)
        return self._map

    def check_size(self) -> None:
        """CorpusError when the file became shorter."""
        if os.fstat(self._fd).st_size < self.size:
            raise self._shorter()

    def verify(self, first: int, last: int) -> None:
        """Verify the MiBs from the one with byte `first` to the one with byte `last`, if they are not yet."""
        for mib in range(first >> 20, (last >> 20) + 1):
            if self._touched[mib]:
                continue
            try:
                data = os.pread(self._fd, MIB, mib * MIB)
            except OSError as error:
                raise CorpusError(f"{self.path} cannot be read: {error.strerror}") from None
            if len(data) != min(MIB, self.size - mib * MIB) or crc32c(data) != self._checks()[mib]:
                raise CorpusError(f"{self.path} is damaged in its MiB {mib} (CRC32C differs); {MEND}")
            self._touched[mib] = 1
            self.whole = all(self._touched)

    def _shorter(self) -> CorpusError:
        return CorpusError(f"{self.path} became shorter while it was read; {MEND}")
