"""How every rank fares: one small table over all ranks every few steps, and who keeps the others waiting.

All ranks of a synchronous step take equally long, since each waits for the slowest. What tells them apart is the part
of the step that a rank did not spend in collectives: its own seconds. A straggler's are well above the median.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import psutil
import torch
from pydantic import Field

from lmtrain.config import Config
from lmtrain.protocol import Engine

MEASURED = (
    "step_seconds",
    "data_wait_seconds",
    "communication_seconds",
    "memory_bytes",
    "cpu_cores",
    "gpu_memory_bytes",
    "gpu_peak_bytes",
    "gpu_utilisation",
)
"""What each rank tells of itself; seconds are means a step."""
COLUMNS = ("rank", "host", "ratio", "own_seconds", *MEASURED)
FLOOR_SECONDS = 0.005
"""A rank this little behind the median is no straggler, whatever the ratio: tiny steps jitter."""
_NAME_BYTES = 64


class WatchConfig(Config):
    """How often all ranks are looked at."""

    every: int = Field(100, ge=0, description="steps between two tables of all ranks; 0 = none")
    straggler: float = Field(
        1.5, gt=1, description="a rank is named when its own seconds a step are this many times the median"
    )


class Listener(Protocol):
    """Who is told; rank 0 writes, the others keep silent."""

    def ranks(self, table: Mapping[str, Any], *, step: int) -> None:
        """`columns`, `rows` (one a rank), `stragglers`, and figures over all ranks by the names of docs/metrics.md."""
        ...

    def alert(self, title: str, text: str) -> None:
        """Something a person should look at."""
        ...


class Fleet:
    """Called after every step on every rank. Collective: every `config.every` steps the ranks put their rows together.

    host: this rank's host by name. The first step of a process is left out: it builds what later ones use.
    """

    def __init__(self, config: WatchConfig, listener: Listener, *, host: str) -> None:
        self._config, self._listener, self._host = config, listener, host
        self._hosts: list[str] = []
        self._late: set[int] = set()
        self._window: list[Mapping[str, Any]] | None = None
        self._process = psutil.Process()
        self._utilisation_known = True
        self._since = (0.0, 0.0)

    def __call__(self, engine: Engine, record: Mapping[str, Any]) -> None:
        """record: step, step_seconds, data_wait and communication of the step that was just made."""
        if not self._config.every:
            return
        if self._window is None:
            self._window, self._since = [], (time.perf_counter(), time.process_time())
            return
        self._window.append(record)
        if record["step"] % self._config.every == 0:
            table = gather(engine, self._row(engine.device))
            self._hosts = self._hosts or hosts(engine, self._host)
            self._window, self._since = [], (time.perf_counter(), time.process_time())
            self._report(table, step=record["step"])

    def _row(self, device: torch.device) -> list[float]:
        window = self._window or []
        means = [sum(r[key] for r in window) / len(window) for key in ("step_seconds", "data_wait", "communication")]
        passed, used = time.perf_counter() - self._since[0], time.process_time() - self._since[1]
        own = [float(self._process.memory_info().rss), used / max(passed, 1e-9)]
        return means + own + self._card(device)

    def _card(self, device: torch.device) -> list[float]:
        """Bytes in use on the card by all, this process's largest use, share of the time that it computed; or nan."""
        if device.type != "cuda":
            return [math.nan] * 3
        free, total = torch.cuda.mem_get_info(device)
        busy = math.nan
        if self._utilisation_known:
            try:
                busy = torch.cuda.utilization(device) / 100.0
            except Exception:  # needs the vendor's management library, which may be missing or forbidden
                self._utilisation_known = False
        return [float(total - free), float(torch.cuda.max_memory_allocated(device)), busy]

    def _report(self, table: np.ndarray, *, step: int) -> None:
        own = own_seconds(table)
        ratio, middle = ratios(own), statistics.median_low(own)
        late = [
            rank
            for rank, times in enumerate(ratio)
            if times >= self._config.straggler and own[rank] - middle >= FLOOR_SECONDS
        ]
        rows = [[rank, self._hosts[rank], ratio[rank], own[rank], *known(row)] for rank, row in enumerate(table)]
        figures = {
            "ranks/ratio": max(ratio),
            "ranks/communication": float((_column(table, "communication_seconds") / step_seconds(table)).mean()),
            "ranks/data_wait": float((_column(table, "data_wait_seconds") / step_seconds(table)).max()),
            "ranks/memory_bytes": float(_column(table, "memory_bytes").max()),
        }
        named = [{"rank": rank, "host": self._hosts[rank], "ratio": ratio[rank]} for rank in late]
        self._listener.ranks({"columns": COLUMNS, "rows": rows, "stragglers": named, **figures}, step=step)
        for rank in late:
            if rank not in self._late:  # once, until it has kept up again
                waited = _column(table, "data_wait_seconds")[rank]
                text = (
                    f"rank {rank} on {self._hosts[rank]} takes {ratio[rank]:.2f} times the median: {own[rank]:.3g} s "
                    f"of its own a step, {waited:.3g} s of them waiting for data (median {middle:.3g} s). "
                    "All ranks wait for it"
                )
                self._listener.alert("straggler", text)
        self._late = set(late)


def gather(engine: Engine, row: Sequence[float]) -> np.ndarray:
    """float64 [world, k]: the rows of all ranks, to the last bit. Collective.

    Each rank adds a table of zeros with its own row in place: a sum of one number and zeros is that number.
    """
    table = np.zeros((engine.world, len(row)))
    table[engine.rank] = row
    return engine.add(table)


def hosts(engine: Engine, name: str) -> list[str]:
    """Every rank's host. Collective. Names longer than 64 bytes are cut."""
    raw = name.encode()[:_NAME_BYTES].ljust(_NAME_BYTES, b"\0")
    return [
        bytes(int(c) for c in row).rstrip(b"\0").decode("utf-8", "replace")
        for row in gather(engine, [float(c) for c in raw])
    ]


def _column(table: np.ndarray, name: str) -> np.ndarray:
    column: np.ndarray = table[:, MEASURED.index(name)]
    return column


def known(row: np.ndarray) -> list[float | None]:
    """The numbers, None for those that this rank cannot know."""
    return [None if math.isnan(value) else value for value in row.tolist()]


def step_seconds(table: np.ndarray) -> np.ndarray:
    """float64 [world], above zero. table [world, MEASURED]."""
    seconds: np.ndarray = np.maximum(_column(table, "step_seconds"), 1e-9)
    return seconds


def own_seconds(table: np.ndarray) -> list[float]:
    """Of each rank: seconds a step outside of collectives, waiting for data included. table [world, MEASURED]."""
    own: list[float] = np.maximum(step_seconds(table) - _column(table, "communication_seconds"), 0.0).tolist()
    return own


def ratios(own: Sequence[float]) -> list[float]:
    """Each rank's own seconds over the median (of an even number of ranks: the lower one), 1 where that is zero."""
    middle = statistics.median_low(own)
    return [seconds / middle if middle > 0 else 1.0 for seconds in own]
