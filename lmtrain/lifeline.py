"""What ties a rank to the others: it shows signs of life, and ends when another one failed, was killed or hangs.

A collective that a rank misses fails in all the others, late and without a name. Here the guilty one is named, with
its host, process, section and stack, within the run's time-out, and every rank leaves. It needs no launcher's help.
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
from types import TracebackType
from typing import Any

from lmtrain import keeper, section
from lmtrain.errors import EngineError, LmtrainError
from lmtrain.hub import LONGEST, Hub

PART = 0.8
"""Of the collectives' time-out: the guilty rank has to be named before they fail."""
GRACE = 1.0
"""Seconds that the main thread has to leave by itself, and that an error waits for a verdict about another rank."""
KEEP = 1.25
"""Times the limit: a rank that is silent for so long is killed, once the others have named it."""
_FRAMES = 12


class Lifeline:
    """A context manager around all that a rank does with the others. Rank 0 gives a `listener`; see hub.py.

    `timeout` is the collectives', in seconds; `each_beat` is called at every sign of life.
    Raises EngineError when rank 0 cannot be reached.
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
        self.rank, self.world, self._where = rank, world, where
        self._limit = PART * timeout
        self._beat = min(5.0, self._limit / 10)
        self._each_beat = each_beat
        self._main = threading.main_thread().ident
        self._left = threading.Event()
        self._judged = threading.Event()
        self._verdict: dict[str, Any] | None = None
        self._hub = None if listener is None else Hub(listener, world, token, self._limit, self._beat)
        self._lock = threading.Lock()
        try:
            if self._hub is not None:
                self._hub.start()
            self._line = socket.create_connection(where, timeout=self._limit)
        except OSError as error:
            raise EngineError(f"rank {rank} cannot reach rank 0 at {where[0]}:{where[1]}: {error}") from None
        self._line.settimeout(self._beat)
        self._line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._send({"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "token": token})

    def __enter__(self) -> Lifeline:
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", keeper.__file__, str(KEEP * self._limit)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        assert self._keeper.stdin is not None
        self._pulse = self._keeper.stdin.fileno()
        for work in (self._show, self._listen):
            threading.Thread(target=work, name=f"lmtrain{work.__name__}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say bye; or, when something failed, print it and tell it, unless another rank failed first."""
        if error is None:
            self._left.set()
            self._send({"kind": "bye"})
            if self._hub is not None:
                self._hub.finished.wait(self._limit)
            self._dismiss()
            return
        if isinstance(error, RuntimeError):  # so do collectives fail: perhaps another rank's end is the cause
            self._judged.wait(GRACE)
        verdict = self._verdict
        self._left.set()
        if verdict is not None and verdict["rank"] != self.rank:
            self._report(verdict)
            os._exit(verdict["code"])
        code = error.exit_code if isinstance(error, LmtrainError) else 1
        text = " ".join(f"{type(error).__name__}: {error}".split())[:2000]
        if isinstance(error, SystemExit):
            text = f"it left early, with exit code {error.code}"
        elif not isinstance(error, LmtrainError):
            traceback.print_exception(error)  # before anybody can know, so it comes first
            sys.stderr.flush()
        self._send({"kind": "failed", "text": text, "code": code})
        if self._hub is not None:
            self._hub.finished.wait(GRACE)
        self._dismiss()
        if not isinstance(error, LmtrainError):
            os._exit(code)

    def _dismiss(self) -> None:
        """End the keeper: what comes after the lifeline may take its time."""
        self._keeper.kill()
        self._keeper.wait()

    # ---- threads -----------------------------------------------------------------------------------------------------

    def _show(self) -> None:
        """Signs of life."""
        while not self._left.is_set():
            now, stack = section.current(), self._stack()
            self._send(
                {
                    "kind": "beat",
                    "count": now.entered,
                    "section": now.name,
                    "seconds": time.monotonic() - now.since,
                    "waits": "torch/distributed/" in stack,
                    "stack": stack,
                }
            )
            self._each_beat()
            with contextlib.suppress(OSError):  # the keeper was dismissed meanwhile
                os.write(self._pulse, b".")
            self._left.wait(self._beat)

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._main or 0)
        return "".join(traceback.format_stack(frame)[-_FRAMES:])[-LONGEST // 4 :] if frame is not None else ""

    def _listen(self) -> None:
        """Wait for a verdict, or for rank 0 to fall silent."""
        waiting, heard = b"", time.monotonic()
        while not self._left.is_set():
            try:
                read = self._line.recv(LONGEST)
            except TimeoutError:
                silent = time.monotonic() - heard
                if silent > self._limit:
                    what = f"has given no sign of life for {silent:.1f} s: stopped, or its host or the link is down"
                    return self._end(self._about_first(what))
                continue
            except OSError:
                read = b""
            if not read:
                return self._end(self._about_first("ended without a word: it was killed, or left early"))
            heard = time.monotonic()
            *lines, waiting = (waiting + read).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if message["kind"] == "verdict":
                    return self._end(message)
        return None

    def _about_first(self, what: str) -> dict[str, Any]:
        """A verdict about rank 0, which cannot give one any more."""
        return {"rank": 0, "text": f"rank 0 of {self.world} at {self._where[0]} {what}", "code": 5, "own": True}

    def _end(self, verdict: dict[str, Any]) -> None:
        """Leave, if the main thread does not: it may wait in a collective, or for a disk that is gone."""
        self._verdict = verdict
        self._judged.set()
        if self._left.wait(GRACE):
            return
        self._report(verdict)
        os._exit(verdict["code"])

    # ---- words -------------------------------------------------------------------------------------------------------

    def _report(self, verdict: dict[str, Any]) -> None:
        """Rank 0 speaks for all; the others do when it cannot, or when it is they who are meant."""
        if self.rank == 0 or verdict.get("own") or verdict["rank"] in {0, self.rank}:
            prefix = f"lmtrain [rank {self.rank}]" if self.rank else "lmtrain"
            with contextlib.suppress(OSError):
                print(f"{prefix}: {verdict['text']}", file=sys.stderr, flush=True)

    def _send(self, message: dict[str, Any]) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._line.sendall(json.dumps(message).encode() + b"\n")
