"""Sources with known probabilities: Markov chains of any order and hidden Markov models, as records of a fixed length.

Records begin in the stationary distribution, so that every stretch of a record has the same law and the entropy of a
record is exact.

Shapes in names: N records, D symbols of a record, V symbols of the alphabet, S contexts (V^order of them, or hidden
states), H hidden symbols.

[1] Cover, Thomas: Elements of Information Theory, 2nd ed., 2006, section 4.2 (entropy rate of a Markov chain).
[2] Rabiner: A Tutorial on Hidden Markov Models, Proc. IEEE 77(2), 1989, section III.A (forward algorithm).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lmtrain.errors import ConfigError

MOST_CONTEXTS = 1024


def entropy(p_X: np.ndarray) -> float:
    """-sum p ln p in nats, 0 ln 0 = 0."""
    p = p_X[p_X > 0]
    return float(-(p * np.log(p)).sum())


def pick(p_NK: np.ndarray, u_N: np.ndarray) -> np.ndarray:
    """int64 [N]: for each row the index at quantile u of its probabilities."""
    edge_NK = np.cumsum(p_NK, axis=1)
    return np.asarray(np.minimum((u_N[:, None] * edge_NK[:, -1:] >= edge_NK).sum(axis=1), p_NK.shape[1] - 1))


def step_matrix(table_SV: np.ndarray, order: int) -> np.ndarray:
    """[S, S] from the context (x_1 .. x_order) to (x_2 .. x_order, x); contexts are numbers in base V."""
    S, V = table_SV.shape
    step_SS = np.zeros((S, S))
    for context in range(S):
        for symbol in range(V):
            step_SS[context, (context * V + symbol) % S] += table_SV[context, symbol]
    return step_SS


def stationary(step_SS: np.ndarray) -> np.ndarray:
    """[S] the distribution that a step leaves as it is, by least squares on its equations."""
    S = len(step_SS)
    equations = np.concatenate([step_SS.T - np.eye(S), np.ones((1, S))])
    pi_S: np.ndarray = np.linalg.lstsq(equations, np.append(np.zeros(S), 1.0), rcond=None)[0]
    pi_S = np.maximum(pi_S, 0)
    return np.asarray(pi_S / pi_S.sum())


class Markov:
    """A stationary chain: p(x_t | the `order` symbols before it). table_SV: a row for each context, in base V.

    `rate`: nats a symbol, sum over contexts of pi H(row) [1]; `entropy` of a record: H(its first `order` symbols), and
    the rate for each of the others.
    """

    kind = "markov"
    grid: tuple[int, int, int] | None = None

    def __init__(self, table_SV: np.ndarray, *, order: int, length: int) -> None:
        self.table_SV, self.order, self.record = table_SV, order, length
        self.levels = table_SV.shape[1]
        self._pi_S = stationary(step_matrix(table_SV, order))
        self.rate: float | None = float(sum(pi * entropy(row) for pi, row in zip(self._pi_S, table_SV, strict=True)))
        self.entropy: float | None = entropy(self._pi_S) + (length - order) * (self.rate or 0.0)

    def log_prob(self, x_ND: np.ndarray) -> np.ndarray:
        """float64 [N]: ln p of each record."""
        context_N = np.zeros(len(x_ND), np.int64)
        for t in range(self.order):
            context_N = context_N * self.levels + x_ND[:, t]
        with np.errstate(divide="ignore"):
            table_SV, out_N = np.log(self.table_SV), np.log(self._pi_S)[context_N]
        for t in range(self.order, self.record):
            out_N = out_N + table_SV[context_N, x_ND[:, t]]
            context_N = (context_N * self.levels + x_ND[:, t]) % len(table_SV)
        return np.asarray(out_N)

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """int64 [count, D]."""
        x_ND = np.zeros((count, self.record), np.int64)
        context_N = pick(np.broadcast_to(self._pi_S, (count, len(self._pi_S))), rng.random(count))
        for t in range(self.order):
            x_ND[:, t] = context_N // self.levels ** (self.order - 1 - t) % self.levels
        for t in range(self.order, self.record):
            x_ND[:, t] = pick(self.table_SV[context_N], rng.random(count))
            context_N = (context_N * self.levels + x_ND[:, t]) % len(self.table_SV)
        return x_ND

    def to_json(self) -> dict[str, Any]:
        """Every number of it."""
        return {"kind": self.kind, "order": self.order, "length": self.record, "table": self.table_SV.tolist()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Markov:
        """Inverse of `to_json`."""
        return cls(np.array(value["table"]), order=value["order"], length=value["length"])


class Hidden:
    """A hidden Markov model: a stationary chain of `order` over H hidden symbols, each giving a symbol by emit_HV.

    It has no closed form of the entropy, which is None; a sample's own -ln p, by the forward algorithm [2], stands in.
    """

    kind = "hmm"
    grid: tuple[int, int, int] | None = None
    rate: float | None = None
    entropy: float | None = None

    def __init__(self, table_SH: np.ndarray, emit_HV: np.ndarray, *, order: int, length: int) -> None:
        self.table_SH, self.emit_HV, self.order, self.record = table_SH, emit_HV, order, length
        self.levels = emit_HV.shape[1]
        self._step_SS = step_matrix(table_SH, order)
        self._pi_S = stationary(self._step_SS)
        self._emit_SV = emit_HV[np.arange(len(table_SH)) % len(emit_HV)]  # a context's last hidden symbol speaks

    def log_prob(self, x_ND: np.ndarray) -> np.ndarray:
        """float64 [N]: ln p of each record, hidden symbols summed out."""
        alpha_NS = self._pi_S * self._emit_SV[:, x_ND[:, 0]].T
        out_N = np.zeros(len(x_ND))
        for t in range(1, self.record + 1):
            total_N = alpha_NS.sum(axis=1)
            with np.errstate(divide="ignore", invalid="ignore"):
                out_N += np.log(total_N)
                alpha_NS = np.nan_to_num(alpha_NS / total_N[:, None])
            if t < self.record:
                alpha_NS = alpha_NS @ self._step_SS * self._emit_SV[:, x_ND[:, t]].T
        return out_N

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """int64 [count, D]."""
        x_ND = np.zeros((count, self.record), np.int64)
        state_N = pick(np.broadcast_to(self._pi_S, (count, len(self._pi_S))), rng.random(count))
        for t in range(self.record):
            x_ND[:, t] = pick(self._emit_SV[state_N], rng.random(count))
            state_N = pick(self._step_SS[state_N], rng.random(count))
        return x_ND

    def to_json(self) -> dict[str, Any]:
        """Every number of it."""
        tables = {"table": self.table_SH.tolist(), "emit": self.emit_HV.tolist()}
        return {"kind": self.kind, "order": self.order, "length": self.record, **tables}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Hidden:
        """Inverse of `to_json`."""
        emit_HV = np.array(value["emit"])
        return cls(np.array(value["table"]), emit_HV, order=value["order"], length=value["length"])


def table(rng: np.random.Generator, *, alphabet: int, order: int, concentration: float) -> np.ndarray:
    """[V^order, V]: rows drawn from a symmetric Dirichlet; ConfigError for too many contexts."""
    if order * math.log(alphabet) > math.log(MOST_CONTEXTS):
        raise ConfigError(
            f"an alphabet of {alphabet} with order {order} has more than {MOST_CONTEXTS:,} contexts; use smaller ones"
        )
    table_SV: np.ndarray = rng.dirichlet(np.full(alphabet, concentration), size=alphabet**order)
    return table_SV
