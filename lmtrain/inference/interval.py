"""A 95 % interval for a ratio of sums: which test set we happened to draw, and nothing else.

Shapes in names: U units, G groups of units, K denominators, R replicates.

The units (documents, or blocks of symbols where there are few documents) are drawn with replacement, each replicate
divides its own sums, and the interval is read off the replicates. Sums first and division last here too: a unit counts
by what it holds, so long documents weigh more than short ones, as they do in the figure itself.

The percentile interval of few units is too narrow (measured in tests/inference/test_interval.py and in
docs/evaluation.md); it is widened to the quantiles at which it would be Student's interval for a mean.

[1] Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).
[2] Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 69(4), 2015, section 3.2
    (the expanded percentile interval).
[3] Abramowitz & Stegun, Handbook of Mathematical Functions, 1964, 26.7.5 (Student's quantile from the normal one).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

LEVEL = 0.95
MIN_UNITS = 10
"""With fewer units than this no interval is given: ten draws say little about their own spread."""
MAX_GROUPS = 2048
"""More units than this are merged with their neighbours: the spread of 2,048 groups is known to 3 % already."""
REPLICATES = 2000
SEED = 20150401
LABEL = "test-set sampling only, one seed"

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Interval:
    """Bounds of each ratio, lower then upper, in the order of the denominators; what they were drawn from.

    low_K, high_K: floats, nan where the denominator is 0. unit: what was drawn with replacement. units: how many there
    were. groups: how many they were merged into before drawing (= units up to `MAX_GROUPS`).
    """

    low_K: tuple[float, ...]
    high_K: tuple[float, ...]
    unit: str
    units: int
    groups: int
    level: float = LEVEL
    replicates: int = REPLICATES
    label: str = LABEL


def group_of(unit_N: np.ndarray, units: int) -> np.ndarray:
    """int64 [N]: the group of each unit; equal runs of neighbours, and the unit itself up to `MAX_GROUPS`."""
    if units <= MAX_GROUPS:
        return unit_N
    return unit_N * MAX_GROUPS // units


def groups(units: int) -> int:
    """How many groups `group_of` makes of so many units."""
    return min(units, MAX_GROUPS)


def student_quantile(p: float, freedom: int) -> float:
    """The p-quantile of Student's t, within 1e-3 from 9 degrees of freedom on ([3], three terms)."""
    z = NormalDist().inv_cdf(p)
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / freedom + g2 / freedom**2 + g3 / freedom**3


def tail(units: int, level: float = LEVEL) -> float:
    """The quantile of the replicates that is the lower bound: (1 - level) / 2 with many units, less with few [2]."""
    t = student_quantile((1 + level) / 2, units - 1)
    return NormalDist().cdf(-math.sqrt(units / (units - 1)) * t)


def bootstrap(
    above_U: np.ndarray,
    *,
    below_UK: np.ndarray,
    unit: str,
    units: int | None = None,
    seed: int = SEED,
    replicates: int = REPLICATES,
) -> Interval | None:
    """The interval of sum(above) / sum(below_k) for each k; None with fewer than `MIN_UNITS` units.

    above_U: float64 [U], what each unit or group adds above the line (nats). below_UK: float64 [U, K], below it
    (symbols, bytes). units: the number of units before they were merged into U groups (default U). The draws depend on
    `seed` and U alone, so the same evaluation prints the same interval everywhere.
    """
    count = len(above_U)
    units = count if units is None else units
    if units < MIN_UNITS or not np.isfinite(above_U).all():
        return None
    sums_UJ = np.concatenate([above_U[:, None], below_UK], axis=1).astype(np.float64)
    ratio_RK = _replicates(sums_UJ, seed=seed, replicates=replicates)
    alpha = tail(count)
    low_K, high_K = np.quantile(ratio_RK, [alpha, 1 - alpha], axis=0)
    return Interval(
        low_K=tuple(float(v) for v in low_K),
        high_K=tuple(float(v) for v in high_K),
        unit=unit,
        units=units,
        groups=count,
        replicates=replicates,
    )


def _replicates(sums_UJ: np.ndarray, *, seed: int, replicates: int) -> np.ndarray:
    """float64 [R, K]: each replicate counts U units drawn with replacement (a multinomial) and divides its sums."""
    rng = np.random.default_rng(seed)
    count = len(sums_UJ)
    step = max(1, _CHUNK // count)
    out = []
    for done in range(0, replicates, step):
        rows = min(step, replicates - done)
        drawn_RU = rng.integers(0, count, size=(rows, count))
        drawn_RU += np.arange(rows)[:, None] * count
        times_RU = np.bincount(drawn_RU.ravel(), minlength=rows * count).reshape(rows, count)
        total_RJ = times_RU.astype(np.float64) @ sums_UJ
        below_RK = total_RJ[:, 1:]
        out.append(total_RJ[:, :1] / np.where(below_RK > 0, below_RK, np.nan))
    return np.concatenate(out)
