"""Learning curves out of metrics.jsonl: training and held-out rows under the same weights, at the same steps.

Both are evaluations of the resting model (no dropout, the weights that `eval.weights` says), so that their difference,
the gap, is about the data alone. Overfitting starts at the step of the lowest held-out value.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Curve:
    """Values at steps, in one unit. train: None where training rows were not evaluated."""

    steps: tuple[int, ...]
    held: tuple[float, ...]
    train: tuple[float, ...] | None

    @property
    def best_step(self) -> int | None:
        """The step of the lowest held-out value, the first of equal ones; None without a finite value."""
        able = [(value, step) for value, step in zip(self.held, self.steps, strict=True) if math.isfinite(value)]
        return min(able)[1] if able else None

    @property
    def overfits(self) -> bool:
        """Whether the held-out value rose after its lowest."""
        return bool(self.steps) and self.best_step is not None and self.best_step < self.steps[-1]

    @property
    def gap(self) -> float:
        """Held-out minus training value at the best step; nan where it is not known."""
        if self.train is None or self.best_step is None:
            return math.nan
        at = self.steps.index(self.best_step)
        return self.held[at] - self.train[at]

    def to_json(self) -> dict[str, Any]:
        """Numbers that are not finite become null."""

        def strict(values: Sequence[float]) -> list[float | None]:
            return [value if math.isfinite(value) else None for value in values]

        return {
            "steps": list(self.steps),
            "held_out": strict(self.held),
            "train": None if self.train is None else strict(self.train),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Curve:
        """Inverse of `to_json`, null as nan."""

        def numbers(values: Sequence[float | None]) -> tuple[float, ...]:
            return tuple(math.nan if one is None else one for one in values)

        train = value["train"]
        return cls(tuple(value["steps"]), numbers(value["held_out"]), None if train is None else numbers(train))


def value_of(result: Mapping[str, Any], unit: str) -> float:
    """A figure of `Result.to_json`; inf where it is no number."""
    value = result.get(unit)
    return math.inf if value is None else float(value)


def curve_of(rows: Iterable[Mapping[str, Any]], *, held: str, train: str, unit: str) -> Curve:
    """The curve of two sets of a run's metrics.jsonl."""
    found: dict[str, dict[int, float]] = {held: {}, train: {}}
    for row in rows:
        if row["kind"] == "eval" and row["set"] in found:
            found[row["set"]][row["step"]] = _value(row, unit)
    steps = sorted(found[held])
    beside = train != held and all(step in found[train] for step in steps)
    return Curve(
        tuple(steps),
        tuple(found[held][step] for step in steps),
        tuple(found[train][step] for step in steps) if beside else None,
    )


def _value(row: Mapping[str, Any], unit: str) -> float:
    if unit == "nats_per_record":
        nats = row["score"]["nats"]
        return math.nan if nats is None else float(nats / row["records"])
    value = row.get(f"eval/{row['set']}/{'loss' if unit == 'nats_per_symbol' else unit}")
    return math.nan if value is None else float(value)


def mean_curve(curves: Sequence[Curve]) -> Curve:
    """The mean over folds at the steps that all of them have."""
    steps = sorted(set.intersection(*(set(curve.steps) for curve in curves))) if curves else []

    def mean(of: str) -> tuple[float, ...]:
        return tuple(
            math.fsum(getattr(curve, of)[curve.steps.index(step)] for curve in curves) / len(curves) for step in steps
        )

    return Curve(
        tuple(steps), mean("held"), mean("train") if all(curve.train is not None for curve in curves) else None
    )
