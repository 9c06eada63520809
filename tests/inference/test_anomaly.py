"""Scores against enumeration and by hand, figures against scikit-learn, thresholds against simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn import metrics

from lmtrain import models
from lmtrain.errors import InputError
from lmtrain.inference import anomaly
from lmtrain.protocol import Cond, Spec


def drawn(rng: np.random.Generator, *, levels: int, sizes: tuple[int, int] = (70, 45)) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of scores on so many levels: few levels, many ties."""
    return rng.integers(0, levels, sizes[0]).astype(float), rng.integers(0, levels + 2, sizes[1]).astype(float)


@pytest.mark.parametrize("levels", [1, 2, 5, 1000])
@pytest.mark.parametrize("sign", [1, -1])
def test_figures_are_scikit_learns(levels: int, sign: int) -> None:
    rng = np.random.default_rng(levels)
    for _ in range(5):
        inside, outside = (sign * score for score in drawn(rng, levels=levels))
        found = anomaly.detect(inside, outside, replicates=20)
        label = np.r_[np.zeros(len(inside)), np.ones(len(outside))]
        score = np.r_[inside, outside]
        assert found.auroc == pytest.approx(metrics.roc_auc_score(label, score), abs=1e-12)
        assert found.auprc == pytest.approx(metrics.average_precision_score(label, score), abs=1e-12)
        fpr_K, tpr_K, _ = metrics.roc_curve(label, score, drop_intermediate=False)
        assert found.fpr == pytest.approx(fpr_K[np.argmax(tpr_K >= 0.95 - 1e-12)], abs=1e-12)


def test_replicates_are_what_repeating_units_gives() -> None:
    rng = np.random.default_rng(3)
    inside, outside = drawn(rng, levels=6)
    order = anomaly._Order(inside, outside)
    a = rng.multinomial(len(inside), np.full(len(inside), 1 / len(inside)))
    b = rng.multinomial(len(outside), np.full(len(outside), 1 / len(outside)))
    (weighted,) = order.figures(a[None].astype(float), b[None].astype(float), tpr=0.95)
    repeated = anomaly.detect(np.repeat(inside, a), np.repeat(outside, b), replicates=2)
    assert weighted.tolist() == pytest.approx([repeated.auroc, repeated.auprc, repeated.fpr], abs=1e-12)


def test_a_score_and_its_negation() -> None:
    inside, outside = drawn(np.random.default_rng(5), levels=9)
    one, other = anomaly.detect(inside, outside), anomaly.detect(-inside, -outside)
    assert one.auroc + other.auroc == pytest.approx(1)
    swapped = anomaly.detect(outside, inside)
    assert swapped.auroc == pytest.approx(other.auroc)
    assert one.auroc_interval is not None
    assert one.auroc_interval[0] < one.auroc < one.auroc_interval[1]


def test_sets_that_never_meet_and_infinite_scores() -> None:
    found = anomaly.detect(np.arange(20.0), np.arange(20.0) + 50)
    assert (found.auroc, found.auprc, found.fpr) == (1, 1, 0)
    assert found.auroc_interval == (1, 1)
    found = anomaly.detect(np.arange(20.0), np.full(20, np.inf))
    assert found.auroc == 1
    assert anomaly.detect(np.zeros(5), np.ones(50)).auroc_interval is None
    for bad in (np.zeros(0), np.array([math.nan])):
        with pytest.raises(InputError, match="nothing to compare"):
            anomaly.detect(bad, np.ones(3))


def test_intervals_cover_the_truth() -> None:
    """Normal scores a distance of 1 apart: AUROC = Phi(1 / sqrt 2). 200 trials; the share's standard error is 0.015."""
    rng, truth, hits = np.random.default_rng(11), 0.5 * (1 + math.erf(0.5)), 0
    for trial in range(200):
        found = anomaly.detect(rng.normal(size=60), rng.normal(1, 1, 40), replicates=200, seed=trial)
        assert found.auroc_interval is not None
        hits += found.auroc_interval[0] <= truth <= found.auroc_interval[1]
    assert 0.9 <= hits / 200 <= 0.995


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_scores_of_an_enumerable_model() -> None:
    """Every outcome of two models over 2^5: typicality and the ratio from the enumerated probabilities themselves."""
    spec = Spec(2, 5, 2)
    x_NT = torch.tensor(list(itertools.product(range(2), repeat=5)))
    cond = Cond(torch.full((32,), 2))
    logp_2N = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = models.build(models.parse({"kind": "made", "width": 12}), spec)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape), alpha=0.7)
            logp_2N.append(model(x_NT, cond=cond).double().sum(1).numpy())
    p_N, q_N = np.exp(logp_2N)
    assert p_N.sum() == pytest.approx(1, abs=1e-6)
    entropy = -float((p_N * np.log(p_N)).sum())
    nats_N = -logp_2N[0]
    typical_N = anomaly.typicality(nats_N, entropy=entropy, batch=1)
    np.testing.assert_allclose(typical_N, np.abs(-np.log(p_N) - entropy), rtol=1e-9)
    assert float((p_N * nats_N).sum()) == pytest.approx(entropy)
    ratio_N = anomaly.likelihood_ratio(nats_N, -logp_2N[1])
    np.testing.assert_allclose(np.exp(ratio_N), q_N / p_N, rtol=1e-9)
    rank_N = anomaly.rank_p(nats_N, nats_N)
    slow = [(1 + sum(p <= mine for p in p_N)) / 33 for mine in p_N]
    np.testing.assert_allclose(rank_N, slow)


def test_batches_of_typicality() -> None:
    cost_U = np.random.default_rng(0).exponential(size=103)
    batched = anomaly.typicality(cost_U, entropy=1.0, batch=10)
    assert len(batched) == 10
    np.testing.assert_array_equal(batched, anomaly.typicality(cost_U, entropy=1.0, batch=10))
    assert len(anomaly.typicality(cost_U, entropy=1.0, batch=200)) == 0
    whole = anomaly.typicality(cost_U, entropy=1.0, batch=103)
    assert whole == pytest.approx([abs(cost_U.mean() - 1)])
    # On average over inside units, a batch's mean is nearer to the entropy by the root of the batch.
    many = np.random.default_rng(1).exponential(size=40_000)
    one, sixteen = (anomaly.typicality(many, entropy=1.0, batch=b) for b in (1, 16))
    assert np.sqrt((one**2).mean() / (sixteen**2).mean()) == pytest.approx(4, rel=0.05)
    with pytest.raises(InputError, match="at least 1"):
        anomaly.typicality(cost_U, entropy=1.0, batch=0)


def test_complexity_does_not_depend_on_the_logarithm() -> None:
    rng = np.random.default_rng(2)
    nats_U, length_U = rng.uniform(100, 900, 50), rng.integers(20, 200, 50)
    in_nats = anomaly.complexity_corrected(nats_U, length_U)
    in_bits = anomaly.complexity_corrected(nats_U / math.log(2), length_U, base=2)
    in_tens = anomaly.complexity_corrected(nats_U / math.log(10), length_U, base=10)
    np.testing.assert_allclose(in_nats, in_bits, rtol=1e-12)
    np.testing.assert_allclose(in_nats, in_tens, rtol=1e-12)
    assert not np.allclose(in_nats, nats_U - 8 * length_U)  # nats minus bits: the defect
    # A model that codes as the compressor does is never surprised.
    np.testing.assert_allclose(anomaly.complexity_corrected(8 * length_U * math.log(2), length_U), 0, atol=1e-9)


def test_ranks_with_ties() -> None:
    known = np.array([1.0, 2, 2, 3])
    np.testing.assert_allclose(anomaly.rank_p(np.array([0.0, 2, 3, 4]), known), [1, 4 / 5, 2 / 5, 1 / 5])


def test_rank_p_values_are_valid() -> None:
    """P(p <= a) <= a for exchangeable units, and nearly equal where there are no ties."""
    rng = np.random.default_rng(4)
    p_values = np.array([anomaly.rank_p(rng.normal(size=1), rng.normal(size=39))[0] for _ in range(4000)])
    for a in (0.05, 0.1, 0.5):
        assert abs((p_values <= a + 1e-12).mean() - a) < 4 * math.sqrt(a * (1 - a) / 4000)


@pytest.mark.parametrize(("fpr", "known"), [(0.05, 99), (0.05, 50), (0.1, 19), (0.3, 10)])
def test_thresholds_keep_their_promise(fpr: float, known: int) -> None:
    """Over many calibrations the flagged share of further units is (N + 1 - k) / (N + 1), which is at most fpr."""
    rng, trials = np.random.default_rng(6), 3000
    flagged = np.mean([rng.normal() > anomaly.threshold(rng.normal(size=known), fpr=fpr) for _ in range(trials)])
    wanted = (known + 1 - math.ceil((known + 1) * (1 - fpr) - 1e-9)) / (known + 1)
    assert wanted <= fpr
    assert abs(flagged - wanted) < 4 * math.sqrt(max(wanted, 0.01) / trials)


def test_thresholds_by_hand() -> None:
    known = np.arange(1.0, 20)
    assert anomaly.threshold(known, fpr=0.05) == 19
    assert anomaly.threshold(known, fpr=0.1) == 18
    assert anomaly.threshold(known[:18], fpr=0.05) == math.inf  # too few: nothing may be flagged
    for wrong in (0.0, 1.0, math.nan):
        with pytest.raises(InputError, match="between 0 and 1"):
            anomaly.threshold(known, fpr=wrong)
