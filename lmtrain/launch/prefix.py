"""`[rank 3] ` before every line that a rank writes, its libraries' and its last words included.

A child process, forked before anything is imported, stands between the rank and the terminal: what a rank wrote before
it was killed is in the pipe and still comes out. The child ends when nobody holds the other end of the pipe.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "LMTRAIN_PREFIX"
_LONGEST = 4000
"""Bytes of a line that are written at once: below what a pipe takes without mixing writers."""


def begin(rank: str) -> None:
    """From here on stdout and stderr of this process, and of all it starts, carry the rank before each line."""
    for number in (1, 2):
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.close(writer)
            _relay(reader, number, f"[rank {rank}] ".encode("ascii", "replace"))
        os.close(reader)
        os.dup2(writer, number)
        os.close(writer)


def _relay(reader: int, out: int, mark: bytes) -> None:
    """Copy lines until the end; never returns. A line too long is cut, a line without an end gets one."""
    try:
        os.setsid()
        for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(name, signal.SIG_IGN)
        os.closerange(3, reader)
        os.closerange(reader + 1, 256)
        os.close(3 - out)  # the other of the two, so that its relay sees an end
        left = b""
        while chunk := os.read(reader, 65536):
            *lines, left = (left + chunk).split(b"\n")
            while len(left) > _LONGEST:
                lines.append(left[:_LONGEST])
                left = left[_LONGEST:]
            for line in lines:
                _write(out, mark, line)
        if left:
            _write(out, mark, left)
    except BaseException:  # whatever it is, this is not the rank: it must not go on as one
        os._exit(1)
    os._exit(0)


def _write(out: int, mark: bytes, line: bytes) -> None:
    for start in range(0, max(1, len(line)), _LONGEST):
        data = mark + line[start : start + _LONGEST] + b"\n"
        while data:
            data = data[os.write(out, data) :]
