"""A trace on demand: a file PROFILE in the run folder, and the next steps of every rank are traced into that folder.

The file may hold a number of steps. Rank 0 sees it, all ranks agree at the boundary of a step, so all trace the same
steps. Whatever goes wrong with a trace is told and forgotten: it never ends training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from pydantic import Field
from torch.profiler import ProfilerActivity, profile

from lmtrain.config import Config
from lmtrain.protocol import Engine

PROFILE_FILE = "PROFILE"
FOLDER = "profile"
"""Below the run folder; a folder step-N in it for each trace, a file a rank in that."""
MOST_STEPS = 1000


class ProfileConfig(Config):
    """What a file PROFILE in the run folder asks for."""

    steps: int = Field(3, ge=1, le=MOST_STEPS, description="steps a trace, when the file holds no number")
    ranks: Literal["all", "first"] = Field("all", description="which ranks trace: all, or rank 0")
    every: int = Field(10, ge=1, description="steps between two looks for the file; each look is a word between ranks")


class Profile:
    """Called after every step on every rank; collective at every look. A context manager: a trace ends with it.

    folder: the run folder. note: where a line for the person at the terminal goes.
    """

    def __init__(self, config: ProfileConfig, folder: Path, *, note: Callable[[str], None]) -> None:
        self._config, self._folder, self._note = config, folder, note
        self._file = folder / PROFILE_FILE
        self._refused = False
        self._last: int | None = None
        self._profiler: profile | None = None
        self._out = folder

    def __call__(self, engine: Engine, record: Mapping[str, Any]) -> None:
        """record: `step`, how many steps are done."""
        step = int(record["step"])
        if self._last is not None:
            if step < self._last:
                return
            self._end()
        if step % self._config.every == 0:
            steps = engine.agree(self._asked() if engine.rank == 0 else 0)
            if steps:
                self._begin(engine, first=step + 1, last=step + steps)

    def __enter__(self) -> Profile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._last is not None:
            self._end()

    def _asked(self) -> int:
        """The number of steps that the file asks for, 0 without one. The file is gone when this returns a number."""
        try:
            if self._refused or not self._file.exists():
                return 0
            text = self._file.read_text(encoding="utf-8", errors="replace")[:20].strip()
        except OSError:  # removed meanwhile, or a file system in trouble: the next look will tell
            return 0
        try:
            self._file.unlink()
        except OSError as error:
            self._refused = True  # else the trace would begin again and again
            self._note(f"{self._file} cannot be removed ({error}); no trace is made in this run")
            return 0
        return min(max(int(text), 1), MOST_STEPS) if text.isdecimal() else self._config.steps

    def _begin(self, engine: Engine, *, first: int, last: int) -> None:
        self._last = last
        self._out = self._folder / FOLDER / f"step-{first:08d}" / f"rank-{engine.rank:05d}.json.gz"
        if engine.rank == 0:
            which = "all ranks" if self._config.ranks == "all" else "rank 0"
            self._note(f"tracing steps {first} to {last} of {which} into {self._out.parent}")
        elif self._config.ranks == "first":
            return
        activities = [ProfilerActivity.CPU]
        if engine.device.type == "cuda":
            torch.cuda.synchronize(engine.device)
            activities.append(ProfilerActivity.CUDA)
        try:
            self._out.parent.mkdir(parents=True, exist_ok=True)
            profiler = profile(activities=activities)
            profiler.start()
        except Exception as error:
            self._failed(error)
        else:
            self._profiler = profiler

    def _end(self) -> None:
        self._last, profiler, self._profiler = None, self._profiler, None
        if profiler is None:
            return
        part = self._out.with_name(f".{self._out.name}")  # torch packs by the ending
        try:
            profiler.stop()
            profiler.export_chrome_trace(str(part))
            part.replace(self._out)
        except Exception as error:
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        line = " ".join(str(error).split())[:300]
        self._note(f"no trace in {self._out}: {type(error).__name__}: {line}; training goes on")
