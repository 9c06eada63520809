"""metrics.jsonl: one JSON object a line, appended and flushed. It is the truth of a run; everything else follows it.

Every row has `step` (optimizer steps done), `kind` (start, train, eval, samples, picture, alert, preempting,
finish) and `time` (Unix seconds). A number that is not finite is written as null: the file is strict JSON.

A run that resumes at step s does the steps after s again. Their rows of the first attempt are moved to
`metrics.abandoned.jsonl`, so that no step stands twice in metrics.jsonl and nothing that was measured is lost. A line
cut short by a kill is dropped with them.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
ABANDONED = "metrics.abandoned.jsonl"


class Journal:
    """The open metrics.jsonl of a run folder.

    folder: the run folder. resume: the step that the run goes on from; 0 keeps no earlier row.
    """

    def __init__(self, folder: Path, *, resume: int) -> None:
        self.path = folder / METRICS
        folder.mkdir(parents=True, exist_ok=True)
        rewind(self.path, step=resume)
        self._file = self.path.open("ab")

    def append(self, row: Mapping[str, Any], *, durable: bool = False) -> None:
        """One row, on its way to the disk when this returns (a killed process loses none), on it when `durable`."""
        stamped = {**row, "time": round(time.time(), 3)}
        self._file.write(json.dumps(strict(stamped), ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()
        if durable:
            os.fsync(self._file.fileno())

    @property
    def size(self) -> int:
        """Bytes written so far."""
        return self._file.tell()

    def close(self) -> None:
        """Everything on the disk."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()


class Tail:
    """Reads rows as they are appended; a line is given once it is whole."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._rest = b""
        self.offset = 0

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """(byte offset of the row's first byte, row) for every whole line not given before."""
        while chunk := self._file.read(1 << 20):
            lines = (self._rest + chunk).split(b"\n")
            self._rest = lines.pop()
            for line in lines:
                at = self.offset
                self.offset += len(line) + 1
                row = _parse(line)
                if row is not None:
                    yield at, row

    def close(self) -> None:
        """Release the file."""
        self._file.close()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a journal, a damaged line left out; nothing when there is no such file."""
    if path.exists():
        tail = Tail(path)
        try:
            yield from (row for _, row in tail.rows())
        finally:
            tail.close()


def rewind(path: Path, *, step: int) -> int:
    """Move the rows after `step` (all rows when it is 0) out of the journal; returns how many there were.

    The new file replaces the old one in one rename: a kill leaves the one or the other.
    """
    if not path.exists():
        return 0
    kept, moved = path.with_name(path.name + ".tmp"), 0
    with path.open("rb") as old, kept.open("wb") as new, (path.parent / ABANDONED).open("ab") as abandoned:
        for line in old:
            row = _parse(line) if line.endswith(b"\n") else None
            if row is not None and 0 < step >= row["step"]:
                new.write(line)
                continue
            moved += 1
            if row is not None:
                abandoned.write(json.dumps({**row, "abandoned_at": step}, ensure_ascii=False).encode() + b"\n")
        for file in (new, abandoned):
            file.flush()
            os.fsync(file.fileno())
        empty = abandoned.tell() == 0
    if empty:
        (path.parent / ABANDONED).unlink()
    if moved:
        kept.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    else:
        kept.unlink()
    return moved


def strict(value: Any) -> Any:
    """The value as strict JSON allows it: non-finite numbers become None, paths text, tuples lists."""
    if isinstance(value, Mapping):
        return {str(k): strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [strict(v) for v in value]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "item"):  # numpy and torch scalars
        return strict(value.item())
    return str(value)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # also UnicodeDecodeError: a torn or damaged line
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
