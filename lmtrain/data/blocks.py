"""Blocks of raw documents: cut the same way however many processes prepare, kept compressed until their tokens are.

The source is read once, by one process. Each block of `block_bytes` raw bytes, cut at a document's end, goes to
raw-NNNNN.zst (zstandard, level 1) with a marker raw-NNNNN.json beside it; every later stage asks worker processes for
functions of a block's number. The marker has the sha256 of the raw bytes, so that a preparation which was killed reads
its source again and keeps what is finished if, and only if, the source still gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import reduction
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
import zstandard
from numpy.typing import NDArray

from lmtrain.data.layout import write_file
from lmtrain.data.splits import group_of
from lmtrain.errors import ConfigError, CorpusError

Progress = Callable[[str, int, int | None], None]
"""Called as progress(stage, raw bytes done, raw bytes in all, or None while that is not known)."""


def silent(stage: str, done: int, total: int | None) -> None:
    """A progress that shows nothing."""


MOST_DOCUMENTS = 1 << 20
"""A block ends here too, so that a million tiny documents do not cost more memory than their bytes."""


class RawDocument(Protocol):
    """What a source gives: raw bytes, and the split that the source puts them into, if it does."""

    @property
    def raw(self) -> bytes:
        """The document's bytes."""
        ...

    @property
    def split(self) -> str | None:
        """train, valid, test or None."""
        ...


@dataclass(frozen=True, slots=True)
class RawBlock:
    """What is known of a block of raw documents.

    start: raw bytes of the corpus before it. groups: how many documents the source puts in each group (text keys: it
    lives in JSON). sha256: of sizes, groups and bytes.
    """

    number: int
    start: int
    documents: int
    bytes: int
    groups: dict[str, int]
    sha256: str


def cut(
    documents: Iterable[RawDocument], block_bytes: int, *, read: Callable[[int], None]
) -> Iterator[tuple[list[bytes], NDArray[np.uint8]]]:
    """(raw documents, their source groups) block by block; `read` hears of every document's size.

    A block ends with the document that brings it to `block_bytes` (or to MOST_DOCUMENTS); the last one may be smaller.
    Documents without a byte are left out.
    """
    raw: list[bytes] = []
    groups: list[int] = []
    size = 0
    for document in documents:
        read(len(document.raw))
        if not document.raw:
            continue
        raw.append(document.raw)
        groups.append(group_of(document.split))
        size += len(document.raw)
        if size >= block_bytes or len(raw) >= MOST_DOCUMENTS:
            yield raw, np.array(groups, dtype=np.uint8)
            raw, groups, size = [], [], 0
    if raw:
        yield raw, np.array(groups, dtype=np.uint8)


def raw_path(folder: Path, number: int) -> Path:
    """Where a block's compressed raw documents are."""
    return folder / f"raw-{number:05d}.zst"


def _marker(folder: Path, number: int) -> Path:
    return folder / f"raw-{number:05d}.json"


def describe(number: int, start: int, raw: Sequence[bytes], groups: NDArray[np.uint8]) -> RawBlock:
    """What its marker will say."""
    digest = hashlib.sha256(np.array([len(one) for one in raw], dtype="<i8").tobytes() + groups.tobytes())
    for one in raw:
        digest.update(one)
    count = {str(group): int(number) for group, number in zip(*np.unique(groups, return_counts=True), strict=True)}
    return RawBlock(number, start, len(raw), sum(map(len, raw)), count, digest.hexdigest())


def keep(folder: Path, block: RawBlock, raw: Sequence[bytes], groups: NDArray[np.uint8]) -> None:
    """Write a block of raw documents, then its marker."""
    sizes = np.array([len(one) for one in raw], dtype="<i8")
    head = np.array([len(raw)], dtype="<i8")
    data = b"".join([head.tobytes(), sizes.tobytes(), groups.tobytes(), *raw])
    write_file(raw_path(folder, block.number), zstandard.ZstdCompressor(level=1, write_checksum=True).compress(data))
    write_file(_marker(folder, block.number), json.dumps(asdict(block), sort_keys=True).encode())


def kept(folder: Path, number: int) -> RawBlock | None:
    """What the marker of a block says; None when there is none."""
    try:
        return RawBlock(**json.loads(_marker(folder, number).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def load(folder: Path, number: int) -> tuple[list[bytes], NDArray[np.uint8]]:
    """The raw documents of a block and their source groups; CorpusError when the file is missing or damaged."""
    path = raw_path(folder, number)
    try:
        data = zstandard.ZstdDecompressor().decompress(path.read_bytes())
        count = int(np.frombuffer(data, "<i8", 1)[0])
        sizes = np.frombuffer(data, "<i8", count, 8)
        groups = np.frombuffer(data, np.uint8, count, 8 + 8 * count)
        ends = 8 + 9 * count + np.cumsum(sizes)
        if len(data) != (int(ends[-1]) if count else 8):
            raise ValueError("wrong length")
    except (OSError, ValueError, zstandard.ZstdError) as error:
        raise CorpusError(f"{path} cannot be read ({error}); remove {folder} and prepare again") from None
    return [data[end - size : end] for end, size in zip(ends.tolist(), sizes.tolist(), strict=True)], groups


T = TypeVar("T")


def _begin(lock: Any) -> None:
    """In each worker: hold the preparation's lock as long as this process lives, and end with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears of it and stops the pool
    if lock is not None:
        lock.detach()
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def worker_count(processes: int) -> int:
    """How many worker processes are meant: 0 is one a core. Raises ConfigError below that."""
    if processes < 0:
        raise ConfigError(f"processes = {processes}; wanted 1 or more, or 0 for one a core")
    return processes or len(os.sched_getaffinity(0))


class Workers:
    """Runs functions of a block in `processes` spawned processes; in this one when one is enough.

    lock: file descriptor whose flock the workers share, so that nobody else writes while one of them still does.
    """

    def __init__(self, processes: int, *, lock: int | None = None, progress: Progress = silent) -> None:
        self.processes = processes
        self.progress = progress
        self._lock = lock
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(
        self,
        stage: str,
        function: Callable[..., T],
        tasks: Sequence[tuple[Any, ...]],
        found: Sequence[RawBlock],
    ) -> Iterator[tuple[int, T]]:
        """(index, function(*task)) for the task of each block, as they come; few results wait at any time."""
        done, total = 0, sum(block.bytes for block in found)
        self.progress(stage, 0, total)
        for index, result in self._map(function, tasks):
            yield index, result
            done += found[index].bytes
            self.progress(stage, done, total)

    def _map(self, function: Callable[..., T], tasks: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, T]]:
        if self.processes <= 1 or len(tasks) <= 1:
            for index, task in enumerate(tasks):
                yield index, function(*task)
            return
        if self._pool is None:
            lock = None if self._lock is None else _Lock(self._lock)
            self._pool = ProcessPoolExecutor(
                min(self.processes, len(tasks)),
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_begin,
                initargs=(lock,),
            )
        todo = enumerate(tasks)
        running: dict[Future[T], int] = {}
        try:
            while True:
                for index, task in todo:
                    running[self._pool.submit(function, *task)] = index
                    if len(running) > self.processes:
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise CorpusError(
                f"a worker process of {self.processes} died (often: out of memory); start again, finished blocks are "
                "kept; fewer processes or a smaller block_bytes need less memory"
            ) from None


class _Lock:
    """A descriptor that spawned workers get a copy of."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return _same, (reduction.DupFd(self.descriptor),)  # type: ignore[attr-defined,unused-ignore]

    def detach(self) -> None:
        """Nothing to take over in the process that has it already."""


def _same(value: Any) -> Any:
    return value
