"""A save on its way, from its beginning until it is a checkpoint or is given up, and what is told of it."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmtrain.protocol import Engine


@dataclass(slots=True)
class Flight:
    """A save on its way, `behind`: while training goes on."""

    step: int
    best: bool
    aside: Path
    began: float
    behind: bool
    blocked: float = 0.0
    writing: float = 0.0
    bytes: int = 0
    generation: int = 0

    @property
    def what(self) -> str:
        """How an error about it begins."""
        return f"checkpoint of step {self.step} was not saved, older ones are intact"

    def wrote(self, engine: Engine, seconds: float) -> None:
        """The slowest rank's seconds count. Collective."""
        self.writing = engine.agree(round(seconds * 1e6)) / 1e6

    def told(self, *, failed: str | None) -> dict[str, Any]:
        """`step`, `best`, `background`, `bytes` of all ranks; `seconds` until now, from the beginning.

        `blocked`: how many of them the loop stood still. `writing`: the slowest rank's seconds. `failed`: None, or why
        there is no checkpoint, though training goes on.
        """
        told = {name: getattr(self, name) for name in ("step", "best", "bytes", "blocked", "writing")}
        return {**told, "seconds": time.perf_counter() - self.began, "failed": failed, "background": self.behind}
