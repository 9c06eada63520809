"""One attempt: the `deepspeed` command as a child, its output without secrets, and its end on request."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import IO

from lmtrain.follower import scrub
from lmtrain.launch.command import Command
from lmtrain.stopping import die_with_parent


class Job:
    """A running command, in a session of its own.

    The launcher never gets a signal of ours: at SIGINT or SIGTERM it would run `pkill -f` on every host, against all
    DeepSpeed jobs of this user. It is killed instead, and what it started is ended by what the launch drew. When this
    process is killed, the kernel kills the launcher as well; its ranks see that, save and stop. The kernel goes by the
    thread that started the launcher: make a Job in the main thread.
    """

    def __init__(self, command: Command, *, secrets: frozenset[str]) -> None:
        self._process = subprocess.Popen(
            command.words,
            env=command.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=partial(die_with_parent, parent=os.getpid()),
        )
        pairs = ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr))
        self._relays = [
            threading.Thread(target=_relay, args=(source, _writer(target), secrets), daemon=True)
            for source, target in pairs
        ]
        for relay in self._relays:
            relay.start()

    def wait(self, *, seconds: float) -> int | None:
        """The exit code (128 + n for a signal n), or None when it still runs after `seconds`."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        return code if code >= 0 else 128 - code

    def kill(self) -> None:
        """End the launcher and what it runs on this machine, at once."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self._process.wait()

    def drain(self, *, seconds: float) -> None:
        """Wait until the last words are out; a process that holds the pipe is not waited for."""
        for relay in self._relays:
            relay.join(seconds)


def _writer(target: IO[str]) -> Callable[[str], None]:
    def write(text: str) -> None:
        try:
            target.write(text)
            target.flush()
        except (OSError, ValueError):  # nobody reads any more; the job goes on
            return

    return write


def _relay(source: IO[bytes] | None, write: Callable[[str], None], secrets: frozenset[str]) -> None:
    assert source is not None
    with source:
        for line in source:
            write(scrub(line.decode("utf-8", "replace"), secrets))
