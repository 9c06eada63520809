"""How far two distributions are apart: exactly where they can be enumerated, from samples with errors where not.

Shapes in names: X outcomes of an enumerated space, N samples. Logarithms are natural, divergences in nats; total
variation and Hellinger are distances from 0 to 1.

With p the first and q the second:
  forward KL(p || q) = sum p ln p/q, reverse KL(q || p)
  Jensen-Shannon = (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2, at most ln 2 [1]
  total variation = sum |p - q| / 2
  chi-square(p || q) = sum (p - q)^2 / q (Pearson)
  Hellinger = sqrt(1 - sum sqrt(p q))

[1] Lin: Divergence Measures Based on the Shannon Entropy, IEEE Trans. Information Theory 37(1), 1991.
[2] Gibbs, Su: On Choosing and Bounding Probability Metrics, International Statistical Review 70(3), 2002.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from lmtrain.errors import InputError

LEVEL = 0.95
_TOTAL = 1e-3
"""How far from 1 the probabilities of an enumerated space may add up, in float32 sums over symbols."""


@dataclass(frozen=True, slots=True)
class Exact:
    """Divergences of two enumerated distributions. total_p, total_q: what their probabilities add up to."""

    forward_kl: float
    reverse_kl: float
    jensen_shannon: float
    total_variation: float
    chi_square: float
    hellinger: float
    total_p: float
    total_q: float
    outcomes: int

    def to_json(self) -> dict[str, Any]:
        """Numbers; infinite ones as null."""
        return {name: _finite(getattr(self, name)) for name in self.__slots__}


def exact(logp_X: np.ndarray, logq_X: np.ndarray) -> Exact:
    """Of two distributions over the same outcomes, each enumerated once; -inf where one is impossible.

    InputError when one of them does not add up to 1 within 1e-3, so is no distribution over these outcomes.
    """
    logp_X, logq_X = (np.asarray(log_X, np.float64) for log_X in (logp_X, logq_X))
    if logp_X.shape != logq_X.shape or logp_X.ndim != 1:
        raise InputError(f"{logp_X.shape} and {logq_X.shape} outcomes: give the same enumerated space twice")
    p_X, q_X = np.exp(logp_X), np.exp(logq_X)
    total_p, total_q = math.fsum(p_X.tolist()), math.fsum(q_X.tolist())
    for name, total in (("first", total_p), ("second", total_q)):
        if not abs(total - 1) <= _TOTAL:
            raise InputError(
                f"the probabilities of the {name} add up to {total:.6f}, not 1; enumerate every outcome once"
            )
    logm_X = np.logaddexp(logp_X, logq_X) - math.log(2)
    # By root of the ratio rather than of the product: nothing underflows that matters.
    affinity = math.fsum(np.exp((logp_X + logq_X) / 2).tolist())
    return Exact(
        forward_kl=_kl(logp_X, logq_X),
        reverse_kl=_kl(logq_X, logp_X),
        jensen_shannon=(_kl(logp_X, logm_X) + _kl(logq_X, logm_X)) / 2,
        total_variation=math.fsum(np.abs(p_X - q_X).tolist()) / 2,
        chi_square=_chi_square(logp_X, logq_X),
        hellinger=math.sqrt(max(0.0, (total_p + total_q) / 2 - affinity)),
        total_p=total_p,
        total_q=total_q,
        outcomes=len(p_X),
    )


def _kl(logp_X: np.ndarray, logq_X: np.ndarray) -> float:
    some = logp_X > -np.inf
    if (logq_X[some] == -np.inf).any():
        return math.inf
    return math.fsum((np.exp(logp_X[some]) * (logp_X[some] - logq_X[some])).tolist())


def _chi_square(logp_X: np.ndarray, logq_X: np.ndarray) -> float:
    some = logq_X > -np.inf
    if (logp_X[~some] > -np.inf).any():
        return math.inf
    p_X, q_X = logp_X[some], logq_X[some]
    with np.errstate(over="ignore", invalid="ignore"):
        # (p / q - 1)^2 q, and p^2 / q where p / q is beyond what can be squared.
        near_X = (np.exp(p_X - q_X) - 1) ** 2 * np.exp(q_X)
        return float(np.where(p_X - q_X < 300.0, near_X, np.exp(2 * p_X - q_X)).sum())


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over samples, its standard error, and how many there were."""

    value: float
    error: float
    samples: int

    @property
    def bounds(self) -> tuple[float, float]:
        """95 %, of a normal mean: too narrow where a few samples make the sum, as with KL of very unlike ones."""
        reach = NormalDist().inv_cdf((1 + LEVEL) / 2) * self.error
        return self.value - reach, self.value + reach

    def to_json(self) -> dict[str, Any]:
        """value, error, interval, samples; null for what is not finite."""
        interval = [_finite(bound) for bound in self.bounds]
        return {
            "value": _finite(self.value),
            "error": _finite(self.error),
            "interval": interval,
            "samples": self.samples,
        }


@dataclass(frozen=True, slots=True)
class Sampled:
    """Estimates from samples of either side; None where that side was not drawn from.

    forward_kl from samples of p, reverse_kl from samples of q, the others from both.
    """

    forward_kl: Estimate | None
    reverse_kl: Estimate | None
    jensen_shannon: Estimate | None
    total_variation: Estimate | None

    def to_json(self) -> dict[str, Any]:
        """Each estimate, or null."""
        found = {name: getattr(self, name) for name in self.__slots__}
        return {name: None if one is None else one.to_json() for name, one in found.items()}


def sampled(
    *, of_p: tuple[np.ndarray, np.ndarray] | None = None, of_q: tuple[np.ndarray, np.ndarray] | None = None
) -> Sampled:
    """Divergences from independent samples: (log p, log q) [N] each of samples of p, and of samples of q.

    Total variation is (E_p (1 - q/p)+ + E_q (1 - p/q)+) / 2: terms within [0, 1], for which no ratio is too large.
    InputError for fewer than two samples, or a sample that its own distribution calls impossible.
    """
    forward, js_p, tv_p = _side(of_p, "first") if of_p is not None else (None, None, None)
    reverse, js_q, tv_q = _side(None if of_q is None else (of_q[1], of_q[0]), "second") if of_q else (None, None, None)
    return Sampled(
        forward_kl=None if forward is None else _mean(forward),
        reverse_kl=None if reverse is None else _mean(reverse),
        jensen_shannon=_half(js_p, js_q),
        total_variation=_half(tv_p, tv_q),
    )


def _side(pair: tuple[np.ndarray, np.ndarray] | None, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The terms of samples of one side: ln own/other, ln own/m, (1 - other/own)+."""
    assert pair is not None
    own_N, other_N = (np.asarray(log_N, np.float64) for log_N in pair)
    if len(own_N) < 2 or own_N.shape != other_N.shape:
        raise InputError(f"{len(own_N)} and {len(other_N)} log-probabilities of samples of the {name}: give 2 or more")
    if not np.isfinite(own_N).all():
        raise InputError(f"a sample of the {name} is impossible under the {name} itself: it was not drawn from it")
    middle_N = np.logaddexp(own_N, other_N) - math.log(2)
    return own_N - other_N, own_N - middle_N, np.maximum(0.0, -np.expm1(np.minimum(other_N - own_N, 1.0)))


def _mean(term_N: np.ndarray) -> Estimate:
    if not np.isfinite(term_N).all():
        return Estimate(math.inf, math.nan, len(term_N))
    return Estimate(float(term_N.mean()), float(term_N.std(ddof=1)) / math.sqrt(len(term_N)), len(term_N))


def _half(first_N: np.ndarray | None, second_N: np.ndarray | None) -> Estimate | None:
    """The mean of the two sides' means."""
    if first_N is None or second_N is None:
        return None
    one, other = _mean(first_N), _mean(second_N)
    error = math.hypot(one.error, other.error) / 2
    return Estimate((one.value + other.value) / 2, error, one.samples + other.samples)


def space(alphabet: int, length: int) -> np.ndarray:
    """int64 [alphabet^length, length]: every record, in order."""
    number_X = np.arange(alphabet**length)
    return np.stack([number_X // alphabet ** (length - 1 - t) % alphabet for t in range(length)], axis=1)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
