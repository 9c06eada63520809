"""Stopping on request: a signal or the file STOP sets a flag, all ranks agree on it at the boundary of a step.

A handler that saved would deadlock: launchers signal the ranks one after the other, up to half a minute apart.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import io
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NoReturn

from lmtrain.errors import EngineError
from lmtrain.protocol import Engine

STOP_FILE = "STOP"
REASONS = {1: f"the file {STOP_FILE}", 2: "SIGUSR1", 3: "SIGTERM"}
"""What `agree` carries; when ranks have different reasons, the largest is the reason."""
_SIGNALS = {signal.SIGUSR1: 2, signal.SIGTERM: 3}
_PR_SET_PDEATHSIG = 1


class Stop:
    """Who may ask the run to stop: SIGTERM, SIGUSR1, or a file STOP in the run's folder. A context manager.

    Inside the context the two signals only set a flag, however often they come, so none can cut a save short; the old
    handlers come back at the end. The file STOP is removed at the end by the rank that saw it, when it was obeyed, so
    that the next start goes on.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / STOP_FILE
        self._flag = 0
        self._saw_file = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is not threading.main_thread():
            raise EngineError("signals are handled in the main thread; train in it")
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()
        if self._saw_file and kind is None:
            self._file.unlink(missing_ok=True)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._flag = max(self._flag, _SIGNALS[signal.Signals(number)])

    def requested(self, engine: Engine) -> str | None:
        """Why the run is to stop, the same on every rank, or None. Collective: call it at every step's boundary."""
        if engine.rank == 0 and self._file.exists():
            self._saw_file = True
            self._flag = max(self._flag, 1)
        agreed = engine.agree(self._flag)
        return REASONS[agreed] if agreed else None


def outlive_readers() -> None:
    """Let stdout and stderr lose their readers: a launcher that ended must not keep a rank from saving."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            setattr(sys, name, _Outliving(stream))


class _Outliving(io.TextIOBase):
    """A text stream that drops what cannot be written any more."""

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(BrokenPipeError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._stream.flush()

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return self._stream.isatty()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._stream.encoding


def leave(code: int) -> NoReturn:
    """End this process now, with what Python does at an exit but for taking itself down.

    gloo's threads may still hold tensors of the last collectives; when one of them lets go of a tensor while Python is
    being taken down, the process aborts ("terminate called without an active exception"), and launchers take a rank
    that was done for one that failed.
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def die_with_parent(number: signal.Signals = signal.SIGKILL, *, parent: int | None = None) -> bool:
    """Ask the kernel to send this process `number` when the one that started it ends: no rank is left behind.

    A launcher that is killed leaves its ranks as orphans, which hold devices and may go on writing into the run's
    folder. Linux only: False elsewhere. (The kernel goes by the thread that started us; launchers do it in their main
    thread.) parent: its pid, where that is known: it may have ended before this was called.
    """
    if sys.platform != "linux":
        return False
    parent = parent or os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number), 0, 0, 0) != 0:
        return False
    if os.getppid() != parent:  # it ended before we asked
        os.kill(os.getpid(), number)
    return True
