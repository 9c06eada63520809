"""What a person sees of a run, on stderr: a progress bar on a terminal, one line at a time elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from rich.console import Console as Rich
from rich.progress import BarColumn, Progress, TaskID, TextColumn

QUIET_SECONDS = 5.0
"""Without a terminal, training lines come no closer together than this (the first and the last always come)."""


class Console:
    """Progress and messages. file: where to (stderr when None). clock: seconds, monotonic."""

    def __init__(self, *, file: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._rich = Rich(file=file if file is not None else sys.stderr, highlight=False, soft_wrap=True)
        self._clock = clock
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._steps = 0
        self._printed: float | None = None
        self._meaning = "MFU"

    def start(self, *, step: int, steps: int, meaning: str) -> None:
        """Begin to show `steps` steps, of which `step` are done. meaning: what `perf/mfu` is called."""
        self._steps, self._meaning = steps, meaning
        if self._rich.is_terminal:
            self._progress = Progress(
                TextColumn("{task.completed:.0f}/{task.total:.0f}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                console=self._rich,
                redirect_stdout=False,  # stdout belongs to results
                transient=False,
            )
            self._task = self._progress.add_task("starting", total=steps, completed=step)
            self._progress.start()

    def step(self, row: Mapping[str, Any], *, eta: float) -> None:
        """A row of training metrics (the names of docs/metrics.md). eta: seconds to the end."""
        text = training_line(row, eta=eta, meaning=self._meaning)
        if self._progress is not None:
            self._progress.update(self._task, completed=row["step"], description=text)
            return
        now = self._clock()
        if self._printed is None or now - self._printed >= QUIET_SECONDS or row["step"] >= self._steps:
            self._printed = now
            self.say(f"step {row['step']}/{self._steps}  {text}")

    def eval(self, name: str, row: Mapping[str, Any]) -> None:
        """A held-out result."""
        self.say(f"step {row['step']}/{self._steps}  {evaluation_line(name, row)}")

    def say(self, text: str) -> None:
        """A line of its own, above the bar when there is one."""
        self._rich.print(text, markup=False)

    def warn(self, text: str) -> None:
        """A line that should catch the eye."""
        self._rich.print(f"warning: {text}", markup=False, style="yellow")

    def stop(self) -> None:
        """Leave the terminal as it was found."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def training_line(row: Mapping[str, Any], *, eta: float, meaning: str) -> str:
    """The metrics of a training row in one line."""
    parts = [f"loss {_number(row.get('train/loss'), '.4f')}"]
    for unit in ("byte", "dim"):
        if row.get(f"train/bits_per_{unit}") is not None:
            parts.append(f"{row[f'train/bits_per_{unit}']:.3f} bits/{unit}")
    parts.append(f"{quantity(row['perf/tokens_per_s'])} tok/s")
    if row.get("perf/mfu") is not None:
        name = "MFU" if meaning == "MFU" else "of GEMM peak"
        parts.append(f"{row['perf/mfu']:.1%} {name}")
    parts.append(f"grad {_number(row.get('train/grad_norm'), '.3g')}")
    parts.append(f"lr {row['train/lr']:.2e}")
    if row["train/skipped"]:
        parts.append(f"skipped {row['train/skipped']}")
    parts.append(f"data wait {row['perf/data_wait']:.0%}")
    parts.append(f"ETA {duration(eta)}")
    return "  ".join(parts)


def evaluation_line(name: str, row: Mapping[str, Any]) -> str:
    """A held-out result in one line; what it was measured by stands in brackets."""
    parts = []
    for key, text in (
        ("loss", "loss {:.4f}"),
        ("perplexity", "perplexity {:.2f}"),
        ("bits_per_byte", "{:.4f} bits/byte"),
        ("bits_per_dim", "{:.4f} bits/dim"),
        ("kl", "KL {:.4f}"),
    ):
        value = row.get(f"eval/{name}/{key}")
        if value is not None:
            parts.append(text.format(value))
    how = [str(row["mode"])] if row.get("mode") else []
    how += [f"{key} {row[key]}" for key in ("context", "stride") if row.get(key) is not None]
    how += ["subset"] if row.get("subset") else []
    return f"{name}: " + "  ".join(parts or ["not finite"]) + (f"  ({', '.join(how)})" if how else "")


def quantity(value: float) -> str:
    """1234567 -> 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as 42s, 3m 20s, 5h 07m or 2d 03h."""
    left = round(seconds)
    if left < 60:
        return f"{left}s"
    if left < 3600:
        return f"{left // 60}m {left % 60:02d}s"
    if left < 86400:
        return f"{left // 3600}h {left % 3600 // 60:02d}m"
    return f"{left // 86400}d {left % 86400 // 3600:02d}h"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else format(value, form)
