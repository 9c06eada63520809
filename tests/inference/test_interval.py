"""The interval: against a plain loop, against the textbook's standard error, and by counting how often it is right."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from lmtrain.inference.interval import MAX_GROUPS, bootstrap, group_of, groups, student_quantile, tail

RNG = np.random.Generator


def ratios(seed: int, units: int) -> tuple[np.ndarray, np.ndarray]:
    """Documents of very uneven length, with a level of their own and noise in every symbol."""
    rng = np.random.default_rng(seed)
    symbols = np.maximum(5.0, np.round(rng.lognormal(5, 1, units)))
    nats = symbols * (3 + 0.3 * rng.standard_normal(units)) + np.sqrt(symbols) * 2 * rng.standard_normal(units)
    return nats, symbols


def test_a_plain_loop_finds_the_same_quantiles() -> None:
    """An independent bootstrap: Python's own draws, one replicate at a time, plain percentiles widened by hand."""
    nats, symbols = ratios(0, 40)
    rng = np.random.default_rng(123)
    plain = []
    for _ in range(4000):
        drawn = rng.choice(40, size=40, replace=True)
        plain.append(nats[drawn].sum() / symbols[drawn].sum())
    want = np.quantile(plain, [tail(40), 1 - tail(40)])
    got = bootstrap(nats, below_UK=symbols[:, None], unit="document")
    assert got is not None
    width = want[1] - want[0]
    assert abs(got.low_K[0] - want[0]) < 0.06 * width
    assert abs(got.high_K[0] - want[1]) < 0.06 * width
    assert (got.units, got.groups, got.unit, got.level) == (40, 40, "document", 0.95)


def test_many_units_agree_with_the_linearised_standard_error() -> None:
    """For 2,000 units the interval is +- 1.96 standard errors of a ratio (the textbook's formula)."""
    nats, symbols = ratios(1, 2000)
    ratio = nats.sum() / symbols.sum()
    error = math.sqrt(((nats - ratio * symbols) ** 2).sum() * 2000 / 1999) / symbols.sum()
    got = bootstrap(nats, below_UK=symbols[:, None], unit="document")
    assert got is not None
    assert got.low_K[0] == pytest.approx(ratio - 1.96 * error, abs=0.1 * error)
    assert got.high_K[0] == pytest.approx(ratio + 1.96 * error, abs=0.1 * error)


def test_two_denominators_are_drawn_together() -> None:
    """Bytes that are 4 times the symbols: bounds are a quarter. And nothing is divided by zero bytes."""
    nats, symbols = ratios(2, 50)
    got = bootstrap(nats, below_UK=np.stack([symbols, 4 * symbols, 0 * symbols], axis=1), unit="document")
    assert got is not None
    assert got.low_K[0] == pytest.approx(4 * got.low_K[1])
    assert got.high_K[0] == pytest.approx(4 * got.high_K[1])
    assert math.isnan(got.low_K[2])
    assert bootstrap(nats, below_UK=symbols[:, None], unit="document") == bootstrap(
        nats, below_UK=symbols[:, None], unit="document"
    )


def test_no_interval_of_nine_units_or_of_infinite_nats() -> None:
    nats, symbols = ratios(3, 10)
    assert bootstrap(nats[:9], below_UK=symbols[:9, None], unit="document") is None
    assert bootstrap(nats, below_UK=symbols[:, None], unit="document") is not None
    for bad in (np.inf, np.nan):
        assert bootstrap(np.append(nats, bad), below_UK=np.append(symbols, 1.0)[:, None], unit="document") is None


def _documents(rng: RNG, units: int) -> tuple[np.ndarray, np.ndarray]:
    symbols = np.maximum(5.0, rng.lognormal(6, 0.7, units))
    return symbols * (3 + 0.4 * rng.standard_normal(units) + 0.1 * (np.log(symbols) - 6)), symbols


def _blocks(rng: RNG, units: int) -> tuple[np.ndarray, np.ndarray]:
    return 2048 * (2 + 0.2 * rng.standard_normal(units)), np.full(units, 2048.0)


@pytest.mark.parametrize(
    ("draw", "units", "least"),
    [(_blocks, 10, 0.92), (_blocks, 40, 0.925), (_documents, 30, 0.91), (_documents, 100, 0.92)],
)
def test_coverage(draw: Callable[[RNG, int], tuple[np.ndarray, np.ndarray]], units: int, least: float) -> None:
    """Of 500 test sets drawn from one source, how many intervals hold the source's own ratio? About 95 %.

    With 500 sets the share is known to 1 point (one standard deviation); uneven documents cost some points when there
    are few. Plain percentiles of 10 blocks hold it 88 % of the time, and would fail here.
    """
    rng = np.random.default_rng(7)
    nats, symbols = draw(rng, 2_000_000)
    truth = nats.sum() / symbols.sum()
    hit, below, above = 0, 0, 0
    for seed in range(500):
        nats, symbols = draw(rng, units)
        got = bootstrap(nats, below_UK=symbols[:, None], unit="document", seed=seed, replicates=500)
        assert got is not None
        below += truth < got.low_K[0]
        above += truth > got.high_K[0]
        hit += got.low_K[0] <= truth <= got.high_K[0]
    assert least <= hit / 500 <= 0.975
    assert max(below, above) < 40


def test_students_quantile() -> None:
    """Against printed tables (Abramowitz & Stegun, table 26.10)."""
    for freedom, want in ((9, 2.262), (14, 2.145), (19, 2.093), (29, 2.045), (60, 2.000), (120, 1.980)):
        assert student_quantile(0.975, freedom) == pytest.approx(want, abs=1e-3)
    assert tail(10) == pytest.approx(0.0086, abs=2e-4)
    assert tail(10**6) == pytest.approx(0.025, abs=1e-5)


def test_groups_of_neighbours() -> None:
    """More units than groups: equal runs of neighbours, every group hit, and the spread stays what it was."""
    units = 3 * MAX_GROUPS + 17
    group = group_of(np.arange(units), units)
    assert groups(units) == MAX_GROUPS
    assert (np.diff(group) >= 0).all()
    assert set(np.bincount(group, minlength=MAX_GROUPS).tolist()) <= {3, 4}
    np.testing.assert_array_equal(group_of(np.arange(9), 9), np.arange(9))
    nats, symbols = ratios(4, units)
    ratio = nats.sum() / symbols.sum()
    error = math.sqrt(((nats - ratio * symbols) ** 2).sum()) / symbols.sum()
    got = bootstrap(
        np.bincount(group, weights=nats),
        below_UK=np.bincount(group, weights=symbols)[:, None],
        unit="document",
        units=units,
    )
    assert got is not None
    assert (got.units, got.groups) == (units, MAX_GROUPS)
    assert got.high_K[0] - got.low_K[0] == pytest.approx(2 * 1.96 * error, rel=0.1)
