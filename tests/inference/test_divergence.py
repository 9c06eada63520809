"""Divergences against scipy, closed forms and sums by hand; estimates within their standard errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial import distance

from lmtrain.errors import InputError
from lmtrain.inference.divergence import exact, sampled, space

MASSES = st.integers(2, 12).flatmap(
    lambda n: st.tuples(*[st.lists(st.floats(0.01, 1), min_size=n, max_size=n) for _ in range(2)])
)


@given(MASSES)
def test_enumerated_divergences_are_those_of_scipy(masses: tuple[list[float], list[float]]) -> None:
    p_X, q_X = (np.array(mass) / sum(mass) for mass in masses)
    found = exact(np.log(p_X), np.log(q_X))
    assert found.forward_kl == pytest.approx(stats.entropy(p_X, q_X), abs=1e-12)
    assert found.reverse_kl == pytest.approx(stats.entropy(q_X, p_X), abs=1e-12)
    assert found.jensen_shannon == pytest.approx(distance.jensenshannon(p_X, q_X) ** 2, abs=1e-12)
    assert found.total_variation == pytest.approx(distance.cityblock(p_X, q_X) / 2, abs=1e-12)
    n = 1e6  # scipy's statistic is n times Pearson's divergence
    assert found.chi_square == pytest.approx(stats.chisquare(n * p_X, n * q_X).statistic / n, abs=1e-9)
    assert found.hellinger == pytest.approx(distance.euclidean(np.sqrt(p_X), np.sqrt(q_X)) / math.sqrt(2), abs=1e-7)
    assert (found.total_p, found.total_q, found.outcomes) == (pytest.approx(1), pytest.approx(1), len(p_X))


def test_what_one_side_calls_impossible() -> None:
    p, q = np.array([0.5, 0.5, 0.0]), np.array([0.5, 0.0, 0.5])
    with np.errstate(divide="ignore"):
        found = exact(np.log(p), np.log(q))
    assert found.forward_kl == found.reverse_kl == found.chi_square == math.inf
    steep = exact(np.array([0.0, -800.0]), np.array([-800.0, 0.0]))  # p / q is beyond float64, and q is 0 in it
    assert steep.chi_square == math.inf
    assert steep.hellinger == pytest.approx(1.0)
    assert found.jensen_shannon == pytest.approx(math.log(2) / 2)
    assert found.total_variation == pytest.approx(0.5)
    assert found.hellinger == pytest.approx(math.sqrt(0.5))
    assert found.to_json()["forward_kl"] is None
    same = exact(np.log(p[:2]), np.log(p[:2]))
    assert (same.forward_kl, same.jensen_shannon, same.total_variation, same.hellinger) == (0, 0, 0, 0)


def test_what_is_no_distribution_is_refused() -> None:
    with pytest.raises(InputError, match=r"second add up to 0.9"):
        exact(np.log(np.array([0.5, 0.5])), np.log(np.array([0.5, 0.4])))
    with pytest.raises(InputError, match="the same enumerated space"):
        exact(np.zeros(1), np.zeros((1, 1)))
    with pytest.raises(InputError, match="2 or more"):
        sampled(of_p=(np.zeros(1), np.zeros(1)))
    with pytest.raises(InputError, match="was not drawn from it"):
        sampled(of_q=(np.zeros(2), np.array([0.0, -np.inf])))


def _normal(mean: float, std: float) -> stats.rv_continuous:
    return stats.norm(mean, std)


def test_estimates_lie_within_four_standard_errors_of_the_closed_form() -> None:
    p, q = _normal(0.0, 1.0), _normal(0.7, 1.3)
    rng = np.random.default_rng(11)
    x_N, y_N = rng.normal(0.0, 1.0, 40_000), rng.normal(0.7, 1.3, 40_000)
    found = sampled(of_p=(p.logpdf(x_N), q.logpdf(x_N)), of_q=(p.logpdf(y_N), q.logpdf(y_N)))

    def kl(m1: float, s1: float, m2: float, s2: float) -> float:
        return math.log(s2 / s1) + (s1**2 + (m1 - m2) ** 2) / (2 * s2**2) - 0.5

    grid_X = np.linspace(-12, 12, 200_001)
    cell = grid_X[1] - grid_X[0]
    p_X, q_X = p.pdf(grid_X) * cell, q.pdf(grid_X) * cell
    true = {
        "forward_kl": kl(0.0, 1.0, 0.7, 1.3),
        "reverse_kl": kl(0.7, 1.3, 0.0, 1.0),
        "jensen_shannon": distance.jensenshannon(p_X, q_X) ** 2,
        "total_variation": np.abs(p_X - q_X).sum() / 2,
    }
    for name, value in true.items():
        estimate = getattr(found, name)
        assert abs(estimate.value - value) < 4 * estimate.error, name
        assert estimate.error < 0.1 * value, "it says something"
        low, high = estimate.bounds
        assert high - low == pytest.approx(2 * 1.959964 * estimate.error, rel=1e-6)
    alone = sampled(of_p=(p.logpdf(x_N), q.logpdf(x_N)))
    assert alone.reverse_kl is None
    assert alone.jensen_shannon is None
    assert alone.forward_kl == found.forward_kl


def test_the_standard_error_is_that_of_the_mean() -> None:
    """Over many repetitions the estimates spread as their errors say."""
    p, q = _normal(0.0, 1.0), _normal(0.5, 1.0)
    rng = np.random.default_rng(2)
    found = []
    for _ in range(400):
        x_N = rng.normal(0.0, 1.0, 100)
        estimate = sampled(of_p=(p.logpdf(x_N), q.logpdf(x_N))).forward_kl
        assert estimate is not None
        found.append((estimate.value, estimate.error))
    values, errors = np.array(found).T
    assert values.std(ddof=1) == pytest.approx(errors.mean(), rel=0.15)
    assert values.mean() == pytest.approx(0.125, abs=4 * 0.05 / 20)


def test_a_space_is_every_record_in_order() -> None:
    x_XD = space(3, 2)
    assert x_XD.tolist() == [[a, b] for a in range(3) for b in range(3)]
