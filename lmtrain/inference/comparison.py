"""Is A better than B on the same units, by how much, and how sure is that: paired, over units and over seeds.

Shapes in names: G groups of units, S seeds (runs) of a side, R replicates.

Both sides answered for the same units, so each unit's difference is taken before anything is drawn: what makes a unit
hard for both cancels out. With one run a side the interval is a bootstrap over units, as in interval.py. With several,
a replicate draws units and, independently, the runs of each side [1, section 3.8]; runs deviate from their mean by
sqrt(S / (S - 1)) times what they do, since S draws from S runs spread too little; and the interval is the difference
plus and minus Student's quantile times the replicates' deviation, with the degrees of freedom of [2] for a sum of the
three parts (units, runs of A, runs of B). Two runs a side say little about runs, and the interval says so.

[1] Davison & Hinkley, Bootstrap Methods and their Application, 1997 (resampling of hierarchical data).
[2] Satterthwaite, An Approximate Distribution of Estimates of Variance Components, Biometrics Bulletin 2(6), 1946.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lmtrain.inference.interval import LEVEL, MIN_UNITS, REPLICATES, SEED, student_quantile, tail

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Comparison:
    """gain: how much less A costs than B, for each unit below the line: above 0, A is better.

    low, high: its 95 % interval; None with fewer than `MIN_UNITS` units. a_S, b_S: each run's own figure. spread_a,
    spread_b: standard deviation of the runs of a side (divided by S - 1); None of one run. freedom: degrees of
    freedom of the interval, None where it is a percentile interval over units.
    """

    gain: float
    low: float | None
    high: float | None
    a_S: tuple[float, ...]
    b_S: tuple[float, ...]
    spread_a: float | None
    spread_b: float | None
    groups: int
    freedom: float | None = None

    @property
    def verdict(self) -> str:
        """a, b, or undecided: whether the interval keeps to one side of 0."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "undecided"
        return "a" if self.low > 0 else "b"


def compare(
    a_SG: np.ndarray,
    b_SG: np.ndarray,
    below_G: np.ndarray,
    *,
    units: int | None = None,
    seed: int = SEED,
    replicates: int = REPLICATES,
) -> Comparison:
    """a_SG, b_SG: float64, what each group of units costs each run of a side. below_G: what they are divided by.

    units: how many units the groups hold (default G). The figure is (sum of b - sum of a) / sum of below, of the mean
    over the runs of each side.
    """
    a_SG, b_SG = np.atleast_2d(a_SG).astype(np.float64), np.atleast_2d(b_SG).astype(np.float64)
    below = float(below_G.sum())
    a_S, b_S = a_SG.sum(1) / below, b_SG.sum(1) / below
    gain = float(b_S.mean() - a_S.mean())
    groups, seeds = a_SG.shape[1], max(len(a_SG), len(b_SG))
    low = high = freedom = None
    if min(groups, units or groups) >= MIN_UNITS and np.isfinite(a_SG).all() and np.isfinite(b_SG).all():
        a_RS, b_RS = _drawn(a_SG, b_SG, below_G, seed=seed, replicates=replicates)
        gain_R = b_RS.mean(1) - a_RS.mean(1)
        if seeds == 1:
            alpha = tail(groups)
            low, high = (float(v) for v in np.quantile(gain_R, [alpha, 1 - alpha]))
        else:
            # Group-level variance is that of a mean of `groups` terms: bootstrap's divided by (1 - 1 / groups).
            parts = [(float(gain_R.var()) * groups / (groups - 1), groups - 1)]
            parts += [(float(v_S.var(ddof=1)) / len(v_S), len(v_S) - 1) for v_S in (a_S, b_S) if len(v_S) > 1]
            rng = np.random.default_rng([seed, 1])
            gain_R = _over_seeds(b_RS, rng) - _over_seeds(a_RS, rng)
            variance = sum(v for v, _ in parts)
            freedom = variance**2 / sum(v * v / nu for v, nu in parts) if variance else float(groups - 1)
            wide = _quantile((1 + LEVEL) / 2, freedom) * float(gain_R.std())
            low, high = gain - wide, gain + wide
    return Comparison(
        gain=gain,
        low=low,
        high=high,
        a_S=tuple(a_S.tolist()),
        b_S=tuple(b_S.tolist()),
        spread_a=float(a_S.std(ddof=1)) if len(a_S) > 1 else None,
        spread_b=float(b_S.std(ddof=1)) if len(b_S) > 1 else None,
        groups=groups,
        freedom=freedom,
    )


def _drawn(
    a_SG: np.ndarray, b_SG: np.ndarray, below_G: np.ndarray, *, seed: int, replicates: int
) -> tuple[np.ndarray, np.ndarray]:
    """float64 [R, S] of each side: every run's figure on the units of each replicate, the same units for all."""
    both = np.concatenate([a_SG, b_SG, below_G[None]]).T
    total_RJ = np.concatenate([times_RG @ both for times_RG in _times(len(below_G), seed=seed, replicates=replicates)])
    figure_RJ = total_RJ[:, :-1] / total_RJ[:, -1:]
    return figure_RJ[:, : len(a_SG)], figure_RJ[:, len(a_SG) :]


def _times(count: int, *, seed: int, replicates: int) -> Iterator[np.ndarray]:
    """float64 [r, G]: how often each group is drawn in each of the next r replicates."""
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // count)
    for done in range(0, replicates, step):
        yield rng.multinomial(count, np.full(count, 1 / count), size=min(step, replicates - done)).astype(np.float64)


def _over_seeds(figure_RS: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """float64 [R]: the mean of S runs drawn with replacement, their deviations made up for."""
    mean_R = figure_RS.mean(1)
    count = figure_RS.shape[1]
    if count == 1:
        return np.asarray(mean_R)
    times_RS = rng.multinomial(count, np.full(count, 1 / count), size=len(figure_RS))
    deviation_R = (figure_RS * times_RS).sum(1) / count - mean_R
    return np.asarray(mean_R + math.sqrt(count / (count - 1)) * deviation_R)


def _quantile(p: float, freedom: float) -> float:
    """Student's quantile for whole degrees of freedom below `freedom`; 1 and 2 in closed form."""
    nu = max(1, math.floor(freedom))
    if nu == 1:
        return math.tan(math.pi * (p - 0.5))
    if nu == 2:
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    return student_quantile(p, nu)
