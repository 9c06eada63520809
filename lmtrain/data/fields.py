"""Sources with known probabilities: products of Bernoulli bits, Ising grids, mixtures of Gaussians, as records.

Shapes in names: N records, D symbols of a record, H, W rows and columns of a grid, R = 2^W states of a grid's row,
K components.

[1] Baxter: Exactly Solved Models in Statistical Mechanics, 1982, section 2.1 and chapter 7 (transfer matrix).
[2] Trefethen, Weideman: The Exponentially Convergent Trapezoidal Rule, SIAM Review 56(3), 2014.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lmtrain.data.chains import entropy, pick
from lmtrain.meaning import Known

_REACH = 9.0
"""Deviations beyond a mean at which a Gaussian is nothing to a float64."""
_POINTS = {1: 8001, 2: 1201}


class Bernoulli:
    """Independent bits with P(x_d = 1) = p_D."""

    kind = "bernoulli"
    levels = 2
    grid: tuple[int, int, int] | None = None
    rate: float | None = None

    def __init__(self, p_D: np.ndarray) -> None:
        self.p_D, self.record = p_D, len(p_D)
        self.entropy: float | None = float(sum(entropy(np.array([p, 1 - p])) for p in p_D))

    def log_prob(self, x_ND: np.ndarray) -> np.ndarray:
        """float64 [N]: ln p of each record."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.where(x_ND == 1, np.log(self.p_D), np.log1p(-self.p_D)).sum(axis=1))

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """int64 [count, D]."""
        return np.asarray(rng.random((count, self.record)) < self.p_D).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """Every number of it."""
        return {"kind": self.kind, "p": self.p_D.tolist()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Bernoulli:
        """Inverse of `to_json`."""
        return cls(np.array(value["p"]))


class Ising:
    """Spins s = 2 x - 1 on a grid with free borders: p proportional to exp(coupling sum s s' + field sum s).

    The first sum is over neighbours up, down, left and right. Exact by a transfer matrix from row to row [1].
    """

    kind = "ising"
    levels = 2
    rate: float | None = None

    def __init__(self, height: int, width: int, *, coupling: float, field: float) -> None:
        self.coupling, self.field = coupling, field
        self.grid: tuple[int, int, int] | None = (height, width, 1)
        self.record = height * width
        self._height, self._width = height, width
        states = np.arange(2**width)
        self._bits_RW = states[:, None] >> np.arange(width)[::-1] & 1
        spin_RW = 2 * self._bits_RW - 1
        self._inside_R = coupling * (spin_RW[:, 1:] * spin_RW[:, :-1]).sum(axis=1) + field * spin_RW.sum(axis=1)
        self._between_RR = coupling * spin_RW @ spin_RW.T
        below_R = np.zeros(len(states))
        self._below = [below_R]  # of row h: the logarithm of the sum over all rows below it
        for _ in range(height - 1):
            below_R = _logsumexp(self._between_RR + self._inside_R + below_R, axis=1)
            self._below.insert(0, below_R)
        self.log_z = float(_logsumexp(self._inside_R + self._below[0], axis=0))
        self.entropy: float | None = self.log_z - self._mean_exponent()

    def _mean_exponent(self) -> float:
        """E[coupling sum s s' + field sum s], by passing the marginals down row by row."""
        p_R = np.exp(self._inside_R + self._below[0] - self.log_z)
        total = float(p_R @ self._inside_R)
        for row in range(1, self._height):
            pair_RR = p_R[:, None] * self._next(row)
            p_R = pair_RR.sum(axis=0)
            total += float((pair_RR * self._between_RR).sum() + p_R @ self._inside_R)
        return total

    def _next(self, row: int) -> np.ndarray:
        """[R, R]: P(row | the row above it)."""
        given_RR = self._between_RR + self._inside_R + self._below[row]
        return np.asarray(np.exp(given_RR - _logsumexp(given_RR, axis=1)[:, None]))

    def log_prob(self, x_ND: np.ndarray) -> np.ndarray:
        """float64 [N]: ln p of each record."""
        s_NHW = 2.0 * x_ND.reshape(-1, self._height, self._width) - 1
        pairs_N = (s_NHW[:, 1:] * s_NHW[:, :-1]).sum(axis=(1, 2)) + (s_NHW[:, :, 1:] * s_NHW[:, :, :-1]).sum(
            axis=(1, 2)
        )
        return np.asarray(self.coupling * pairs_N + self.field * s_NHW.sum(axis=(1, 2)) - self.log_z)

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """int64 [count, D]: row by row, each given the one above it."""
        p_R = np.exp(self._inside_R + self._below[0] - self.log_z)
        state_N = pick(np.broadcast_to(p_R, (count, len(p_R))), rng.random(count))
        rows = [state_N]
        for row in range(1, self._height):
            state_N = pick(self._next(row)[state_N], rng.random(count))
            rows.append(state_N)
        return np.asarray(np.concatenate([self._bits_RW[state_N] for state_N in rows], axis=1)).astype(np.int64)

    def to_json(self) -> dict[str, Any]:
        """Every number of it."""
        sizes = {"height": self._height, "width": self._width}
        return {"kind": self.kind, **sizes, "coupling": self.coupling, "field": self.field}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ising:
        """Inverse of `to_json`."""
        return cls(value["height"], value["width"], coupling=value["coupling"], field=value["field"])


class Gaussians:
    """A mixture of K Gaussians with independent dimensions: weights w_K, means and deviations [K, D].

    `entropy` by the trapezoidal rule in one and two dimensions [2], None in more. As elsewhere densities are about the
    float32 numbers that are stored.
    """

    kind = "gaussians"
    levels = 0
    grid: tuple[int, int, int] | None = None
    rate: float | None = None

    def __init__(self, w_K: np.ndarray, mean_KD: np.ndarray, std_KD: np.ndarray) -> None:
        self.w_K, self.mean_KD, self.std_KD = w_K, mean_KD, std_KD
        self.record = mean_KD.shape[1]
        self.entropy: float | None = self._entropy()

    def log_prob(self, x_ND: np.ndarray) -> np.ndarray:
        """float64 [N]: ln density of each record."""
        z_NKD = (np.asarray(x_ND, np.float64)[:, None] - self.mean_KD) / self.std_KD
        log_NK = np.log(self.w_K) - 0.5 * (z_NKD**2).sum(axis=2) - np.log(self.std_KD).sum(axis=1)
        return np.asarray(_logsumexp(log_NK, axis=1) - 0.5 * self.record * math.log(2 * math.pi))

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """float32 [count, D]."""
        k_N = pick(np.broadcast_to(self.w_K, (count, len(self.w_K))), rng.random(count))
        noise_ND = rng.standard_normal((count, self.record))
        return np.asarray(self.mean_KD[k_N] + self.std_KD[k_N] * noise_ND).astype(np.float32)

    def _entropy(self) -> float | None:
        if self.record not in _POINTS:
            return None
        axes, cell = [], 1.0
        for d in range(self.record):
            low = float((self.mean_KD[:, d] - _REACH * self.std_KD[:, d]).min())
            high = float((self.mean_KD[:, d] + _REACH * self.std_KD[:, d]).max())
            axes.append(np.linspace(low, high, _POINTS[self.record]))
            cell *= (high - low) / (_POINTS[self.record] - 1)
        total = 0.0
        for first in np.array_split(axes[0], 64):
            points = np.stack(np.meshgrid(first, *axes[1:], indexing="ij"), axis=-1).reshape(-1, self.record)
            log_N = self.log_prob(points)
            total -= float((np.exp(log_N) * log_N).sum())
        return total * cell

    def to_json(self) -> dict[str, Any]:
        """Every number of it."""
        parts = {"weights": self.w_K, "means": self.mean_KD, "deviations": self.std_KD}
        return {"kind": self.kind, **{name: part.tolist() for name, part in parts.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Gaussians:
        """Inverse of `to_json`."""
        return cls(np.array(value["weights"]), np.array(value["means"]), np.array(value["deviations"]))


class Standardised:
    """A source of real numbers in other units: x -> (x - mean) / std, dimension by dimension."""

    levels = 0
    rate: float | None = None

    def __init__(self, source: Known, mean_D: np.ndarray, std_D: np.ndarray) -> None:
        self._source, self.record = source, source.record
        self._mean_D, self._std_D = mean_D, std_D
        self._log_scale = float(np.log(self._std_D).sum())
        self.entropy: float | None = None if source.entropy is None else source.entropy - self._log_scale

    def log_prob(self, x_ND: np.ndarray) -> np.ndarray:
        """float64 [N]: ln density of records in these units."""
        return self._source.log_prob(np.asarray(x_ND, np.float64) * self._std_D + self._mean_D) + self._log_scale

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """float32 [count, D]."""
        x_ND = (self._source.draw(rng, count) - self._mean_D) / self._std_D
        return np.asarray(x_ND).astype(np.float32)


def _logsumexp(x: np.ndarray, *, axis: int) -> np.ndarray:
    top = x.max(axis=axis, keepdims=True)
    return np.asarray(np.log(np.exp(x - top).sum(axis=axis)) + top.squeeze(axis))
