"""Files that are not believed: a size that is compared when a file is opened, a CRC32C a MiB when it is first touched.

Bytes are read with `pread`, not through a memory map: a file that becomes shorter under a map kills the process, here
it is an error with a name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

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
        self._fd = -1
        self._checks = checks
        self._touched = touched
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
            self._check(at >> 20, last >> 20)
        try:
            got = os.preadv(self._fd, [view], at)
            while got < len(view):  # a signal, a network file system, or the file became shorter
                more = os.preadv(self._fd, [view[got:]], at + got)
                if not more:
                    raise CorpusError(f"{self.path} became shorter while it was read; {MEND}")
                got += more
        except OSError as error:
            raise CorpusError(f"{self.path} cannot be read: {error.strerror}") from None

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), verified."""
        out = bytearray(stop - start)
        if out:
            self.fill(memoryview(out), start)
        return bytes(out)

    def _check(self, first: int, last: int) -> None:
        for mib in range(first, last + 1):
            if self._touched[mib]:
                continue
            try:
                data = os.pread(self._fd, MIB, mib * MIB)
            except OSError as error:
                raise CorpusError(f"{self.path} cannot be read: {error.strerror}") from None
            if len(data) != min(MIB, self.size - mib * MIB) or crc32c(data) != self._checks()[mib]:
                raise CorpusError(f"{self.path} is damaged in its MiB {mib} (CRC32C differs); {MEND}")
            self._touched[mib] = 1
