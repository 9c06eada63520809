"""The processes that started this rank. When they are gone it is asked to stop: nobody would read what it says.

DeepSpeed's launcher on a host dies with nothing: when the command at the head is killed, or the ssh session that it
was started through, it goes on, and its ranks with it. So a rank looks at them itself. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys

import psutil

_LAUNCHER = "deepspeed.launcher.launch"


class Starters:
    """Remembers who started this process; `look` sends us SIGTERM, once, when one of them has ended."""

    def __init__(self) -> None:
        self._watched: list[psutil.Process] = []
        self._told = False
        with contextlib.suppress(psutil.Error):
            self._watched = starters(psutil.Process())

    def look(self) -> None:
        """Look once; to be called often."""
        if self._told or all(alive(one) for one in self._watched):
            return
        self._told = True
        with contextlib.suppress(OSError):
            print("lmtrain: the launcher has ended; this rank asks all to stop", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)


def alive(process: psutil.Process) -> bool:
    """Whether it runs; a zombie, or another process with its number, does not."""
    try:
        return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def starters(process: psutil.Process) -> list[psutil.Process]:
    """Whose end means that nobody wants this process any more: the launcher's own, never a person's shell.

    - On one host, and without ssh: the `deepspeed` command above the host's launcher.
    - Over ssh: the shell and the session in which the launcher runs. And, where the command was given on this very
      host, the pdsh that serves the same job, and the command above it.
    """
    launcher = process.parent()
    if launcher is None or _LAUNCHER not in launcher.cmdline():
        return []
    found = []
    for one in launcher.parents():
        if one.pid <= 1:
            break
        words = one.cmdline()
        if any(os.path.basename(word) == "deepspeed" for word in words[:2]):
            found.append(one)
            break
        if one.name().startswith("sshd"):
            found.append(one)
            break
        if "-c" not in words[1:2]:
            return []  # a person's shell, or something that we do not know
        found.append(one)
    job = next((word for word in launcher.cmdline() if word.startswith("--world_info=")), None)
    for one in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if job is not None and one.name().startswith("pdsh") and job in one.cmdline():
                above = one.parent()
                found += [one] + ([above] if above is not None and above.pid > 1 else [])
    return found
