"""The learning rate as a pure function of the step. There is no scheduler state to save."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, model_validator

from lmtrain.config import Config


class ScheduleConfig(Config):
    """Linear warm-up, then constant, half a cosine, or constant with a linear end (wsd)."""

    kind: Literal["cosine", "constant", "wsd"] = Field("cosine", description="shape after the warm-up")
    warmup: float = Field(0.02, ge=0, description="steps; below 1 a fraction of all steps")
    min_lr: float | None = Field(None, ge=0, description="absolute rate at the end; default: a tenth of optimizer.lr")
    decay: float = Field(0.2, ge=0, description="wsd: length of the end in steps; up to 1 a fraction of all steps")

    @model_validator(mode="after")
    def _whole(self) -> ScheduleConfig:
        for name, value in (("warmup", self.warmup), ("decay", self.decay)):
            if value > 1 and value != int(value):
                raise ValueError(f"schedule.{name} = {value} is neither a fraction below 1 nor a whole number of steps")
        return self


def rate(config: ScheduleConfig, *, step: int, steps: int, base: float) -> float:
    """The learning rate of optimizer step `step` (from 0) of `steps`, for the peak rate `base`.

    Warm-up: base * (step + 1) / (warmup + 1), so the first step is not lost and the peak is first reached after it.
    cosine: min + (base - min) (1 + cos(pi u)) / 2, u from 0 after the warm-up to 1 at `steps`. wsd (warm-up, stable,
    decay): linear from base to min over the last `decay` steps. At and beyond `steps` the rate is min (constant: base).
    Raises ValueError for a negative step.
    """
    if step < 0:
        raise ValueError(f"step = {step} is negative")
    warmup = _steps(config.warmup, steps, whole_at_one=True)
    low = base / 10 if config.min_lr is None else config.min_lr
    if step < warmup:
        return base * (step + 1) / (warmup + 1)
    if config.kind == "constant":
        return base
    if step >= steps:
        return low
    if config.kind == "cosine":
        part = (step - warmup) / max(1, steps - warmup)
        return low + (base - low) * 0.5 * (1.0 + math.cos(math.pi * part))
    end = _steps(config.decay, steps, whole_at_one=False)
    return base if step < steps - end else low + (base - low) * (steps - step) / (end + 1)


def _steps(value: float, steps: int, *, whole_at_one: bool) -> int:
    fraction = value < 1 if whole_at_one else value <= 1
    return round(value * steps) if fraction else int(value)
