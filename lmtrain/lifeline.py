"""What ties a rank to the others: it shows signs of life, and ends when another one failed, was killed or hangs.

A collective that a rank misses fails in all the others, late and without a name. Here the guilty one is named, with
its host, process, section and stack, within the run's time-out, and every rank leaves. It needs no launcher's help.

Beside each rank runs keeper.py, and beside rank 0 hub.py, which judges. This module is their end in the rank itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from lmtrain import hub, keeper, section
from lmtrain.errors import LmtrainError

PATIENCE = 60.0
"""Seconds that ranks may wait for one another, if it is more than the time-out, until the first step is done:
the first collectives come after imports, a corpus that is opened and kernels that are built."""
NET = 1.25
"""Times what the lifeline allows is what the collectives are given: they fail by themselves where it cannot help."""
TORN = 5.0
"""Seconds that a rank whose collective failed waits to hear who is to blame: seldom is it the rank itself."""
_FRAMES = 12


def collectives_timeout(timeout: float) -> float:
    """What process groups are given, in seconds, where ranks are tied together with `timeout`."""
    return NET * max(timeout, PATIENCE)


class Lifeline:
    """A context manager around all that a rank does with the others. Rank 0 gives a `listener`; see hub.py.

    `timeout`: how long, in seconds, a rank may keep another one waiting in a collective. `each_beat` is called at every
    sign of life.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        *,
        where: tuple[str, int],
        token: str,
        listener: socket.socket | None,
        timeout: float,
        each_beat: Callable[[], None] = lambda: None,
    ) -> None:
        self.rank, self.world = rank, world
        self._beat = min(5.0, timeout / 10)
        self._allowed = max(timeout, PATIENCE)
        self._each_beat = each_beat
        self._main = threading.main_thread().ident
        self._left = threading.Event()
        self._leaving = False
        self._judged = threading.Event()
        self._verdict: dict[str, Any] | None = None
        self._lock = threading.Lock()
        limits = {"limit": timeout, "patience": PATIENCE, "beat": self._beat}
        self._hub = None
        if listener is not None:
            self._hub = _script(hub.__file__, subprocess.PIPE, pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL)
            assert self._hub.stdin is not None
            orders = {"listener": listener.fileno(), "world": world, "token": token, **limits}
            self._hub.stdin.write(json.dumps(orders).encode() + b"\n")
            self._hub.stdin.close()
            listener.close()
        self._line, theirs = socket.socketpair()
        with theirs:
            self._keeper = _script(keeper.__file__, theirs.fileno())
        hello = {"rank": rank, "world": world, "host": socket.gethostname(), "pid": os.getpid(), "token": token}
        self._send({"where": where, "hello": hello, **limits})

    def __enter__(self) -> Lifeline:
        for work in (self._show, self._listen):
            threading.Thread(target=work, name=f"lmtrain{work.__name__}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say bye; or, when something failed, print it and tell it, unless another rank failed first."""
        self._leaving = True
        if error is None:
            self._last_word({"kind": "bye"})
            if self._hub is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._hub.wait(self._allowed)  # until all have said it: some hosts clean up behind rank 0
            return
        if section.current().torn:  # so does the end of another rank look from here
            self._judged.wait(TORN)
        verdict = self._verdict
        if verdict is not None and verdict["rank"] != self.rank:
            self._left.set()
            self._report(verdict)
            os._exit(verdict["code"])
        code = error.exit_code if isinstance(error, LmtrainError) else 1
        text = " ".join(f"{type(error).__name__}: {error}".split())[:2000]
        if isinstance(error, SystemExit):
            text = f"it left early, with exit code {error.code}"
        elif not isinstance(error, LmtrainError):
            traceback.print_exception(error)  # before anybody can know, so it comes first
            sys.stderr.flush()
        self._last_word({"kind": "failed", "text": text, "code": code})
        if not isinstance(error, LmtrainError):
            os._exit(code)

    def _last_word(self, message: dict[str, Any]) -> None:
        """Nothing is shown after it, and the keeper ends: what comes next may take its time."""
        self._left.set()
        self._send(message)
        with contextlib.suppress(OSError):
            self._line.shutdown(socket.SHUT_WR)
        self._keeper.wait()

    # ---- threads -----------------------------------------------------------------------------------------------------

    def _show(self) -> None:
        """Signs of life."""
        while not self._left.is_set():
            now, frame = section.current(), sys._current_frames().get(self._main or 0)
            self._send(
                {
                    "kind": "beat",
                    "moves": now.moves,
                    "section": now.name,
                    "seconds": time.monotonic() - now.since,
                    "waits": now.waits and _in_a_call(frame),
                    "begun": now.begun,
                    "stack": _stack(frame),
                }
            )
            self._each_beat()
            self._left.wait(self._beat)

    def _listen(self) -> None:
        """Wait for a verdict."""
        with contextlib.suppress(OSError), self._line.makefile("rb") as lines:
            for line in lines:
                return self._end(json.loads(line))
        text = f"the keeper of rank {self.rank} was killed"
        return self._end({"rank": self.rank, "text": text, "code": 5, "own": True})

    def _end(self, verdict: dict[str, Any]) -> None:
        """Leave, unless the main thread is about to: it may wait in a collective, or for a disk that is gone."""
        self._verdict = verdict
        self._judged.set()
        if self._leaving:
            return
        self._report(verdict)
        os._exit(verdict["code"])

    # ---- words -------------------------------------------------------------------------------------------------------

    def _report(self, verdict: dict[str, Any]) -> None:
        """Rank 0 speaks for all, and rank 1 about rank 0; others when they know it by themselves, or are meant."""
        speaker = 1 if verdict["rank"] == 0 else 0
        if self.rank in {speaker, verdict["rank"]} or verdict.get("own"):
            prefix = f"lmtrain [rank {self.rank}]" if self.rank else "lmtrain"
            with contextlib.suppress(OSError):
                print(f"{prefix}: {verdict['text']}", file=sys.stderr, flush=True)

    def _send(self, message: dict[str, Any]) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._line.sendall(json.dumps(message).encode() + b"\n")


def _script(path: str, stdin: int, **more: Any) -> subprocess.Popen[bytes]:
    """A process that needs Python's own library alone, so that it is there at once and stays small."""
    return subprocess.Popen([sys.executable, "-I", "-S", path], stdin=stdin, stdout=subprocess.DEVNULL, **more)


def _stack(frame: FrameType | None) -> str:
    return "".join(traceback.format_stack(frame)[-_FRAMES:])[-hub.LONGEST // 16 :] if frame is not None else ""


def _in_a_call(frame: FrameType | None) -> bool:
    """Whether the frame is of those who call collectives: a signal's handler may run on top of one, and stay there."""
    package = str(frame.f_globals.get("__name__", "")).split(".")[0] if frame is not None else ""
    return package in {"torch", "deepspeed", "lmtrain", "__main__"}
