"""Reading one step ahead of the training."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING

from lmtrain.protocol import Batch

if TYPE_CHECKING:
    from lmtrain.data.loader import Loader


class Prefetch:
    """A loader whose next step is read while this one is computed: a thread that asks for `step + 1`.

    The thread holds no position: any step may be asked for, one that was not expected is read at once. An error of the
    thread is raised by the call that asks for its step. `waited` is the seconds that the last `batch` call took, and
    `waited_in_all` their sum. Use it as a context manager, or `close` it.
    """

    def __init__(self, loader: Loader, *, threads: int = 1) -> None:
        self.loader = loader
        self.waited = 0.0
        self.waited_in_all = 0.0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lmtrain-data") if threads else None
        self._next: tuple[tuple[int, int, int], Future[list[Batch]]] | None = None

    def batch(self, step: int, rank: int, world: int) -> list[Batch]:
        """`Loader.batch`, and step + 1 is begun."""
        began = time.perf_counter()
        asked = (step, rank, world)
        if self._next is not None and self._next[0] == asked:
            batches = self._next[1].result()
        else:
            batches = self.loader.batch(*asked)
        if self._pool is not None:
            following = (step + 1, rank, world)
            self._next = (following, self._pool.submit(self.loader.batch, *following))
            self.loader.announce(step + 2, rank, world)
        self.waited = time.perf_counter() - began
        self.waited_in_all += self.waited
        return batches

    def total_weight(self, step: int) -> float:
        """`Loader.total_weight`."""
        return self.loader.total_weight(step)

    def close(self) -> None:
        """Let the thread finish what it reads, and end it; `batch` works on without it."""
        pool, self._pool, self._next = self._pool, None, None
        if pool is not None:
            pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Prefetch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
