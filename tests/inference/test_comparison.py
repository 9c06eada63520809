"""Comparisons: the paired difference is exact, and its interval covers the truth as often as it says."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from lmtrain.inference.comparison import _quantile, compare


def test_the_figure_is_a_difference_of_sums() -> None:
    a = np.array([[3.0, 5, 9, *[1] * 9], [5.0, 5, 9, *[1] * 9]])
    b = np.array([[6.0, 8, 4, *[2] * 9]])
    below = np.array([2.0, 4, 6, *[1] * 9])
    found = compare(a, b, below)
    assert found.gain == pytest.approx((36 - (26 + 28) / 2) / 21)
    assert found.a_S == pytest.approx((26 / 21, 28 / 21))
    assert found.spread_a == pytest.approx(np.std([26 / 21, 28 / 21], ddof=1))
    assert found.spread_b is None
    assert found.b_S == pytest.approx((36 / 21,))


def test_pairing_takes_out_what_units_share() -> None:
    rng = np.random.default_rng(0)
    hard = rng.exponential(100, 200)
    a, b = hard + rng.normal(0, 1, 200), hard + 0.5 + rng.normal(0, 1, 200)
    found = compare(a, b, np.ones(200))
    assert found.verdict == "a"
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low < 1  # unpaired it would be about 40
    swapped = compare(b, a, np.ones(200))
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low))
    assert swapped.verdict == "b"


def test_few_units_or_infinite_costs_give_no_interval() -> None:
    a = np.arange(9.0)
    assert compare(a, a + 1, np.ones(9)).low is None
    assert compare(a, a + 1, np.ones(9)).verdict == "undecided"
    a = np.append(np.arange(20.0), np.inf)
    assert compare(a, np.zeros(21), np.ones(21)).low is None
    assert compare(np.zeros(20), np.zeros(20), np.ones(20), units=5).low is None


def test_alike_runs_are_undecided() -> None:
    a = np.random.default_rng(1).normal(size=(1, 50))
    found = compare(a, a, np.ones(50))
    assert (found.gain, found.low, found.high, found.verdict) == (0, 0, 0, "undecided")


@pytest.mark.parametrize("freedom", [1, 2, 3.9, 7, 40])
def test_students_quantile(freedom: float) -> None:
    assert _quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, int(freedom)), rel=0.01)


def covered(*, seeds: tuple[int, int], units: int, trials: int, seed_spread: float) -> float:
    """Share of trials whose interval holds the true gain, for runs that differ by their seed and by unit."""
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(trials):
        hard = rng.gamma(2.0, 1.0, units)
        each = rng.normal(0.3, 0.5, units)
        a = hard + rng.normal(0, seed_spread, (seeds[0], 1)) + rng.normal(0, 0.1, (seeds[0], units))
        b = hard + each + rng.normal(0, seed_spread, (seeds[1], 1)) + rng.normal(0, 0.1, (seeds[1], units))
        found = compare(a, b, np.ones(units), seed=trial, replicates=400)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.3 <= found.high
    return hits / trials


@pytest.mark.parametrize(
    ("seeds", "spread"), [((1, 1), 0.0), ((3, 3), 0.2), ((2, 5), 0.2), ((4, 1), 0.0)], ids=lambda v: str(v)
)
def test_coverage(seeds: tuple[int, int], spread: float) -> None:
    """200 trials: the standard error of a share of 0.95 is 0.015. Conservative with very few seeds."""
    share = covered(seeds=seeds, units=40, trials=200, seed_spread=spread)
    assert 0.9 <= share <= 1.0


def test_units_alone_do_not_cover_runs_that_differ() -> None:
    """What the seeds are drawn for: with one run a side, runs that differ by seed are missed."""
    assert covered(seeds=(1, 1), units=40, trials=200, seed_spread=0.2) < 0.7
