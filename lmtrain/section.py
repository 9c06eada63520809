"""What the main thread of this process is doing: the name of its section, and whether it waits for other ranks.

Every rank makes the same collective calls in the same order, so the number of waits that a rank has begun and ended
says how far it is; sections enter it too, and they also have names. When ranks wait for one another, the one with the
smallest number is the one that the others wait for.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Section(NamedTuple):
    """`moves`: sections entered, waits begun and waits ended so far. `since`: monotonic time of the last, in seconds.

    waits: in a call that returns when other ranks have come. torn: the last such call failed,
    as it does when another rank has ended.
    begun: the first optimizer step is done, so what follows takes about as long as it did before.
    """

    moves: int
    name: str
    since: float
    waits: bool = False
    torn: bool = False
    begun: bool = False


_now = Section(0, "start", time.monotonic())


def enter(name: str) -> None:
    """The main thread begins something that every rank does."""
    _move(name=name, torn=False)


def begin() -> None:
    """The first optimizer step is done."""
    _move(begun=True)


@contextmanager
def waiting() -> Iterator[None]:
    """What happens inside returns when the other ranks come, or fails because they do not. May be nested."""
    if _now.waits:
        yield
        return
    _move(waits=True, torn=False)
    try:
        yield
    except BaseException as error:
        # What a collective raises is a RuntimeError; anything else came from this rank itself, a signal's handler say.
        _move(waits=False, torn=isinstance(error, RuntimeError))
        raise
    _move(waits=False)


def current() -> Section:
    """What the main thread is doing; any thread may ask."""
    return _now


def _move(**changes: object) -> None:
    global _now
    _now = _now._replace(moves=_now.moves + 1, since=time.monotonic(), **changes)  # type: ignore[arg-type]
