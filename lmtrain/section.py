"""What the main thread of this process is doing: the name of the section, and how many were entered.

Ranks enter the same sections in the same order. So when ranks wait for one another, the one that entered the fewest is
the one that the others wait for.
"""

from __future__ import annotations

import time
from typing import NamedTuple


class Section(NamedTuple):
    """`entered` sections so far; the last one is `name`, since the monotonic time `since` in seconds."""

    entered: int
    name: str
    since: float


_now = Section(0, "start", time.monotonic())


def enter(name: str) -> None:
    """The main thread begins something that every rank does."""
    global _now
    _now = Section(_now.entered + 1, name, time.monotonic())


def current() -> Section:
    """What the main thread is doing; any thread may ask."""
    return _now
