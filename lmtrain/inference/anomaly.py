"""Scores of how strange something is to a model, thresholds that keep their promise, and how well sets are told apart.

Shapes in names: U units, N units that are known to be inside, R replicates, K distinct scores, M units of a batch.

Every score is larger for what is stranger. Nothing here knows a model: what comes in are nats and lengths.

[1] Nalisnick, Matsukawa, Teh, Lakshminarayanan: Detecting Out-of-Distribution Inputs to Deep Generative Models Using
    Typicality, 2019, eq. 7 (the distance of a batch's mean cost from the entropy, estimated on held-out data).
[2] Ren et al.: Likelihood Ratios for Out-of-Distribution Detection, NeurIPS 2019, eq. 4.
[3] Serra et al.: Input Complexity and Out-of-Distribution Detection with Likelihood-Based Generative Models, ICLR 2020,
    eq. 2 (both terms in bits).
[4] Song, Kim, Nowozin, Ermon, Kushman: PixelDefend, ICLR 2018, section 3.3 (the rank of a likelihood among known ones).
[5] Vovk, Gammerman, Shafer: Algorithmic Learning in a Random World, 2005 (conformal prediction; its quantile).
[6] Fawcett: An Introduction to ROC Analysis, Pattern Recognition Letters 27, 2006 (ties).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lmtrain.errors import InputError
from lmtrain.inference.interval import MIN_UNITS, tail

REPLICATES = 400
SEED = 20191210
_CHUNK = 1 << 22


# ---- scores ----------------------------------------------------------------------------------------------------------


def typicality(cost_U: np.ndarray, *, entropy: float, batch: int, seed: int = SEED) -> np.ndarray:
    """float64 [U // M]: |mean cost of a batch - entropy| of units dealt into batches in a fixed random order [1].

    entropy: the mean cost of held-out units, in the same measure. With `batch` 1 the units keep their order. A rest
    that fills no batch is left out.
    """
    if batch < 1:
        raise InputError(f"a batch of {batch} units was asked for; wanted at least 1")
    if batch == 1:
        return np.abs(cost_U - entropy)
    dealt_U = np.random.default_rng(seed).permutation(len(cost_U))[: len(cost_U) // batch * batch]
    return np.asarray(np.abs(cost_U[dealt_U].reshape(-1, batch).mean(1) - entropy))


def likelihood_ratio(nats_U: np.ndarray, background_U: np.ndarray) -> np.ndarray:
    """float64 [U]: ln p_background(x) - ln p(x) [2]."""
    return np.asarray(nats_U - background_U)


def complexity_corrected(cost_U: np.ndarray, length_U: np.ndarray, *, base: float = math.e) -> np.ndarray:
    """float64 [U] bits: the model's code length minus a compressor's [3].

    cost_U: minus the logarithm of the probability, to `base` (nats by default). length_U: the compressor's bytes.
    """
    return np.asarray(cost_U * math.log2(base) - 8.0 * length_U)


def rank_p(nats_U: np.ndarray, known_N: np.ndarray) -> np.ndarray:
    """float64 [U]: p-values, (1 + how many known units cost as much or more) / (N + 1) [4].

    Of a unit that is exchangeable with the known ones, P(p <= a) <= a.
    """
    above_U = len(known_N) - np.searchsorted(np.sort(known_N), nats_U, side="left")
    return np.asarray((1 + above_U) / (len(known_N) + 1))


def threshold(known_N: np.ndarray, *, fpr: float) -> float:
    """What the scores of at most a share `fpr` of further inside units exceed, on average over the known ones [5].

    The ceil((N + 1)(1 - fpr))-th smallest known score; infinity when there are too few to promise that.
    """
    if not 0 < fpr < 1:
        raise InputError(f"a false-positive rate of {fpr:g} was asked for; wanted one between 0 and 1")
    rank = math.ceil((len(known_N) + 1) * (1 - fpr) - 1e-9)
    return math.inf if rank > len(known_N) else float(np.sort(known_N)[rank - 1])


# ---- telling sets apart ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Detection:
    """How well a score tells outside from inside; outside is what is to be found.

    auroc: P(outside > inside) + P(equal) / 2. auprc: average precision, whose worth depends on the share of outside.
    fpr: share of inside at the highest threshold that finds the share `tpr` of outside. Intervals are 95 %, both sets
    drawn anew; None with fewer than `MIN_UNITS` units in one of them.
    """

    auroc: float
    auprc: float
    fpr: float
    auroc_interval: tuple[float, float] | None
    auprc_interval: tuple[float, float] | None
    fpr_interval: tuple[float, float] | None
    inside: int
    outside: int


def detect(
    inside_U: np.ndarray,
    outside_U: np.ndarray,
    *,
    tpr: float = 0.95,
    replicates: int = REPLICATES,
    seed: int = SEED,
) -> Detection:
    """Raises InputError when a set is empty or a score is no number (infinite ones are compared as they are)."""
    for name, score_U in (("inside", inside_U), ("outside", outside_U)):
        if not len(score_U) or np.isnan(score_U).any():
            raise InputError(f"the scores {name} are none, or not numbers; there is nothing to compare")
    order = _Order(np.asarray(inside_U, np.float64), np.asarray(outside_U, np.float64))
    (found_3,) = order.figures(np.ones((1, len(inside_U))), np.ones((1, len(outside_U))), tpr=tpr)
    intervals: list[tuple[float, float] | None] = [None, None, None]
    fewest = min(len(inside_U), len(outside_U))
    if fewest >= MIN_UNITS:
        parts = [order.figures(a, b, tpr=tpr) for a, b in _drawn(order, replicates=replicates, seed=seed)]
        alpha = tail(fewest)
        low_3, high_3 = np.quantile(np.concatenate(parts), [alpha, 1 - alpha], axis=0)
        intervals = [(float(low), float(high)) for low, high in zip(low_3, high_3, strict=True)]
    return Detection(
        auroc=float(found_3[0]),
        auprc=float(found_3[1]),
        fpr=float(found_3[2]),
        auroc_interval=intervals[0],
        auprc_interval=intervals[1],
        fpr_interval=intervals[2],
        inside=len(inside_U),
        outside=len(outside_U),
    )


class _Order:
    """All scores from the highest down, ties together, so that every replicate is sums over the same order."""

    def __init__(self, inside_U: np.ndarray, outside_U: np.ndarray) -> None:
        self.sizes = len(inside_U), len(outside_U)
        score_U = np.concatenate([inside_U, outside_U])
        self._order_U = np.argsort(-score_U, kind="stable")
        sorted_U = score_U[self._order_U]
        self._begin_K = np.flatnonzero(np.concatenate([[True], sorted_U[1:] != sorted_U[:-1]]))

    def figures(self, inside_RU: np.ndarray, outside_RU: np.ndarray, *, tpr: float) -> np.ndarray:
        """float64 [R, 3]: AUROC, average precision, FPR at `tpr`, of units that count so many times [6]."""
        none_RU = np.zeros_like(inside_RU), np.zeros_like(outside_RU)
        hit_RU = np.concatenate([none_RU[0], outside_RU], axis=1)[:, self._order_U]
        false_RU = np.concatenate([inside_RU, none_RU[1]], axis=1)[:, self._order_U]
        hit_RK = np.add.reduceat(hit_RU, self._begin_K, axis=1)
        false_RK = np.add.reduceat(false_RU, self._begin_K, axis=1)
        hits_RK, falses_RK = hit_RK.cumsum(1), false_RK.cumsum(1)
        all_R1, none_R1 = hits_RK[:, -1:], falses_RK[:, -1:]
        auroc_R = (false_RK * (hits_RK - hit_RK / 2)).sum(1) / (all_R1 * none_R1)[:, 0]
        with np.errstate(invalid="ignore"):  # a replicate may have drawn nothing of the highest scores: 0 / 0 times 0
            precision_RK = np.nan_to_num(hits_RK / (hits_RK + falses_RK))
        auprc_R = (hit_RK / all_R1 * precision_RK).sum(1)
        first_R1 = (hits_RK >= tpr * all_R1 - 1e-9).argmax(1)[:, None]
        fpr_R = np.take_along_axis(falses_RK, first_R1, 1)[:, 0] / none_R1[:, 0]
        return np.stack([auroc_R, auprc_R, fpr_R], axis=1)


def _drawn(order: _Order, *, replicates: int, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """How often each unit of each set is drawn, some replicates at a time."""
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // sum(order.sizes))
    for done in range(0, replicates, step):
        rows = min(step, replicates - done)
        inside, outside = (rng.multinomial(n, np.full(n, 1 / n), size=rows).astype(np.float64) for n in order.sizes)
        yield inside, outside
