"""A small process beside a rank, which kills it when it shows no more signs of life: `python keeper.py SECONDS`.

A rank that was stopped (SIGSTOP, a frozen device) cannot end itself, and its launcher waits for it for ever. Signs of
life are bytes on stdin; when stdin closes the rank has ended by itself, and so does the keeper.
"""

from __future__ import annotations

import os
import select
import signal
import sys


def keep(seconds: float) -> None:
    """Kill the parent when stdin brings nothing for that long; return when stdin is closed."""
    parent = os.getppid()
    while True:
        ready, _, _ = select.select([0], [], [], seconds)
        if not ready:
            if os.getppid() == parent:
                os.kill(parent, signal.SIGKILL)
            return
        if not os.read(0, 4096):
            return


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they are for the rank, which may want to save
    keep(float(sys.argv[1]))
