"""What checkpoints are called on disk; `store.py` says when they get their names and lose them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lmtrain.checkpoint.manifest import Manifest, read_manifest
from lmtrain.errors import CheckpointError

Which = int | Literal["best"] | None
"""A step, the best one, or (None) the newest."""

_WHOLE = re.compile(r"step-([0-9]{8,18})(?:\.([1-9][0-9]{0,8}))?")
LEFT_OVER = re.compile(r"step-[0-9]{8,18}(?:\.[1-9][0-9]{0,8})?\.[0-9a-f]{12}\.(?:writing|removing)")


@dataclass(frozen=True, slots=True, order=True)
class Saved:
    """A checkpoint on disk, by its name alone. `generation` counts the times that its step was saved."""

    step: int
    generation: int
    path: Path

    def manifest(self) -> Manifest:
        """Its manifest; CheckpointError naming the file."""
        return read_manifest(self.path)


def name_of(step: int, generation: int) -> str:
    """The folder of a checkpoint."""
    return f"step-{step:08d}" + (f".{generation}" if generation > 1 else "")


def saved_in(folder: Path) -> list[Saved]:
    """All checkpoints in a folder by name, oldest first, good or bad. Raises CheckpointError."""
    found = []
    try:
        names = sorted(os.listdir(folder))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror}") from None
    for name in names:
        match = _WHOLE.fullmatch(name)
        if match and (folder / name).is_dir():
            found.append(Saved(int(match[1]), int(match[2] or 1), folder / name))
    return sorted(found)
