"""How long a rank is held up by collectives, DeepSpeed's included: what is left of a step is the rank's own work.

On a CPU a collective blocks its caller, so the caller's clock is read around the call, and around the `wait` of a call
that does not block. On a GPU calls only queue work, so an event is put into the current stream before and after: the
time between the two is what that stream stood still for, the waiting for slower ranks included. Communication that
overlaps with computation in another stream counts in full.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from lmtrain import section

COLLECTIVES = (
    "all_gather",
    "all_gather_base",
    "all_gather_coalesced",
    "all_gather_into_tensor",
    "all_reduce",
    "all_reduce_coalesced",
    "all_to_all_single",
    "barrier",
    "broadcast",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
)
"""Methods of a backend that hold a rank up until the others come."""


class Clock:
    """Adds up the seconds spent in collectives by this process."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._spans: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self.streams = False

    @contextmanager
    def blocking(self) -> Iterator[None]:
        """What happens inside counts, by the clock on the wall."""
        began = time.perf_counter()
        try:
            with section.waiting():
                yield
        finally:
            self._seconds += time.perf_counter() - began

    @contextmanager
    def queued(self) -> Iterator[None]:
        """What is queued inside counts, by the clock of the GPU."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        try:
            yield
        finally:
            end.record()
            self._spans.append((begin, end))

    def running(self) -> AbstractContextManager[None]:
        """The one of the two that fits the collectives of this process's devices."""
        return self.queued() if self.streams else self.blocking()

    @property
    def seconds(self) -> float:
        """Since the process began; on a GPU without what its streams have not reached yet."""
        while self._spans and self._spans[0][1].query():  # type: ignore[no-untyped-call]
            begin, end = self._spans.popleft()
            self._seconds += begin.elapsed_time(end) / 1000.0
        return self._seconds


CLOCK = Clock()
"""The one of this process: process groups are the process's too."""


class _Timed:
    """The handle of a collective that does not block; the wait for it counts."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, *args: Any, **kwargs: Any) -> Any:
        with CLOCK.running():
            return self._work.wait(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def time_collectives(backend: type, *, streams: bool) -> None:
    """Let the collectives of a class of backends be timed; doing it again changes nothing. streams: on a GPU."""
    CLOCK.streams = streams
    for name in COLLECTIVES:
        call = getattr(backend, name, None)
        if call is not None and not hasattr(call, "lmtrain_untimed"):
            setattr(backend, name, _timed(call))


def _timed(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a compiled graph has no place for a clock
            return call(self, *args, **kwargs)
        with CLOCK.running():
            work = call(self, *args, **kwargs)
        return _Timed(work) if hasattr(work, "wait") else work

    timed.lmtrain_untimed = call  # type: ignore[attr-defined]
    return timed
