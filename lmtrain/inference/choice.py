"""Spread over folds, and the choice among candidates by one standard error.

Shapes in names: F folds, C candidates.

[1] Breiman, Friedman, Olshen, Stone: Classification and Regression Trees, 1984, section 3.4.3 (the 1 SE rule).
[2] Hastie, Tibshirani, Friedman: The Elements of Statistical Learning, 2nd ed., 2009, section 7.10.
[3] Bengio, Grandvalet: No Unbiased Estimator of the Variance of K-Fold Cross-Validation, JMLR 5, 2004.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Spread:
    """Values of F folds, one of each.

    The standard error treats folds as independent draws. Their training sets overlap, so it is too small by an amount
    that the folds themselves cannot tell [3].
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """The arithmetic mean: every fold counts the same."""
        return math.fsum(self.values) / len(self.values) if self.values else math.nan

    @property
    def sd(self) -> float:
        """Standard deviation over folds, divided by F - 1; nan of a single fold."""
        if len(self.values) < 2:
            return math.nan
        mean = self.mean
        return math.sqrt(math.fsum((value - mean) ** 2 for value in self.values) / (len(self.values) - 1))

    @property
    def se(self) -> float:
        """sd / sqrt(F): the standard error of the mean; nan of a single fold."""
        return self.sd / math.sqrt(len(self.values)) if self.values else math.nan

    def to_json(self) -> dict[str, Any]:
        """values, mean, sd, se; null where there is no number."""
        numbers = {"mean": self.mean, "sd": self.sd, "se": self.se}
        shown: dict[str, Any] = {key: value if math.isfinite(value) else None for key, value in numbers.items()}
        return {"values": list(self.values), **shown}


@dataclass(frozen=True, slots=True)
class Choice:
    """best: index of the lowest mean. limit: that mean plus its standard error. chosen: index of the choice."""

    best: int
    limit: float
    chosen: int


def one_standard_error(mean_C: Sequence[float], se_C: Sequence[float], simplicity_C: Sequence[float]) -> Choice:
    """The simplest candidate whose mean is not above the lowest mean plus the standard error of that one [1, 2].

    mean_C: lower is better; candidates whose mean is not finite are out. se_C: a standard error that is not finite
    counts as 0, so the best is chosen. simplicity_C: larger is simpler; of equally simple ones the lower mean is taken,
    of equal means the one that was given first. ValueError when no mean is finite.
    """
    able = [c for c, mean in enumerate(mean_C) if math.isfinite(mean)]
    if not able:
        raise ValueError("no candidate has a finite mean")
    best = min(able, key=lambda c: (mean_C[c], c))
    limit = mean_C[best] + (se_C[best] if math.isfinite(se_C[best]) else 0.0)
    within = [c for c in able if mean_C[c] <= limit]
    chosen = min(within, key=lambda c: (-simplicity_C[c], mean_C[c], c))
    return Choice(best, limit, chosen)
