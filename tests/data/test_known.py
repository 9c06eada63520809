"""Sources with known probabilities: enumeration, closed forms, other libraries and draws all agree with log_prob."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from lmtrain.config import build
from lmtrain.data.chains import Hidden, Markov, stationary, step_matrix
from lmtrain.data.corpus import open_corpus
from lmtrain.data.fields import Bernoulli, Gaussians, Ising, Standardised
from lmtrain.data.known import KnownSource, from_manifest
from lmtrain.data.prepare import PrepareConfig, prepare
from lmtrain.data.view import ViewConfig, view_of
from lmtrain.errors import ConfigError
from lmtrain.inference.divergence import space

SMALL: dict[str, dict[str, Any]] = {
    "markov": {"kind": "markov", "alphabet": 3, "order": 2, "length": 5},
    "memoryless": {"kind": "markov", "alphabet": 4, "order": 0, "length": 4},
    "hmm": {"kind": "hmm", "alphabet": 3, "states": 2, "order": 2, "length": 5},
    "bernoulli": {"kind": "bernoulli", "length": 7},
    "ising": {"kind": "ising", "size": [3, 3], "coupling": 0.4, "field": 0.1},
    "ising-row": {"kind": "ising", "size": [1, 6], "coupling": -0.7, "field": 0.3},
}


def source(tree: dict[str, Any]) -> Any:
    return build(KnownSource, tree, where="source").parameters


@pytest.mark.parametrize("name", SMALL)
def test_an_enumerated_source_adds_up_has_its_entropy_and_is_what_is_drawn(name: str) -> None:
    p = source(SMALL[name])
    x_XD = space(p.levels, p.record)
    logp_X = p.log_prob(x_XD)
    p_X = np.exp(logp_X)
    assert math.fsum(p_X.tolist()) == pytest.approx(1, abs=1e-12)
    if p.entropy is None:
        assert name == "hmm"
    else:
        assert p.entropy == pytest.approx(-float(np.sum(p_X * logp_X)), rel=1e-12)
    drawn_ND = p.draw(np.random.default_rng(3), 20_000)
    number_N = drawn_ND @ p.levels ** np.arange(p.record)[::-1]
    count_X = np.bincount(number_N, minlength=len(x_XD))

    def chance(of_X: np.ndarray) -> float:
        """Chi-square, cells with fewer than 5 expected pooled."""
        expected_X = 20_000 * of_X
        few = expected_X < 5
        cells = [np.append(v[~few], v[few].sum()) for v in (count_X, expected_X)]
        if cells[1][-1] == 0:
            cells = [v[:-1] for v in cells]
        return float(stats.chisquare(*cells).pvalue)

    assert chance(p_X) > 1e-4
    assert chance(np.roll(p_X, 1)) < 1e-4, "of another distribution it is told"
    again = type(p).from_json(p.to_json())
    np.testing.assert_array_equal(again.log_prob(x_XD), logp_X)


def test_the_entropy_rate_of_a_two_state_chain_is_the_textbook_one() -> None:
    a, b = 0.1, 0.3  # P(1 | 0), P(0 | 1): stationary (b, a) / (a + b), rate sum pi H [Cover & Thomas, example 4.2]
    chain = Markov(np.array([[1 - a, a], [b, 1 - b]]), order=1, length=10)

    def h(p: float) -> float:
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    rate = (b * h(a) + a * h(b)) / (a + b)
    assert chain.rate == pytest.approx(rate, rel=1e-12)
    assert chain.entropy == pytest.approx(h(a / (a + b)) + 9 * rate, rel=1e-12)


def test_the_stationary_distribution_of_a_chain_of_second_order() -> None:
    chain = source(SMALL["markov"])
    step_SS = step_matrix(chain.table_SV, 2)
    pi_S = stationary(step_SS)
    np.testing.assert_allclose(np.linalg.matrix_power(step_SS, 2000)[0], pi_S, atol=1e-10)
    # So every pair of neighbours has the same law, wherever it stands in a record.
    x_XD = space(3, 5)
    p_X = np.exp(chain.log_prob(x_XD))
    for t in range(4):
        pair_S = np.bincount(x_XD[:, t] * 3 + x_XD[:, t + 1], weights=p_X, minlength=9)
        np.testing.assert_allclose(pair_S, pi_S, atol=1e-12)


def test_a_hidden_chain_equals_the_sum_over_all_its_paths() -> None:
    hidden = source({"kind": "hmm", "alphabet": 3, "states": 2, "order": 1, "length": 4})
    pi_S = stationary(step_matrix(hidden.table_SH, 1))
    for x in itertools.product(range(3), repeat=4):
        total = 0.0
        for path in itertools.product(range(2), repeat=4):
            p = pi_S[path[0]] * hidden.emit_HV[path[0], x[0]]
            for t in range(1, 4):
                p *= hidden.table_SH[path[t - 1], path[t]] * hidden.emit_HV[path[t], x[t]]
            total += p
        assert hidden.log_prob(np.array([x]))[0] == pytest.approx(math.log(total), rel=1e-12)


def test_a_hidden_chain_that_tells_its_state_is_the_chain() -> None:
    chain = source({"kind": "markov", "alphabet": 2, "order": 2, "length": 6})
    told = Hidden(chain.table_SV, np.eye(2), order=2, length=6)
    np.testing.assert_allclose(told.log_prob(space(2, 6)), chain.log_prob(space(2, 6)), rtol=1e-12)


def test_spins_without_coupling_are_independent_bits_and_a_row_has_the_textbook_sum() -> None:
    free = Ising(3, 4, coupling=0.0, field=0.35)
    up = math.exp(0.35) / (2 * math.cosh(0.35))
    np.testing.assert_allclose(
        free.log_prob(space(2, 12)), Bernoulli(np.full(12, up)).log_prob(space(2, 12)), rtol=1e-10
    )
    row = Ising(1, 8, coupling=0.6, field=0.0)  # free borders: Z = 2 (2 cosh J)^(W - 1)
    assert row.log_z == pytest.approx(math.log(2) + 7 * math.log(2 * math.cosh(0.6)), rel=1e-12)
    column = Ising(8, 1, coupling=0.6, field=0.0)
    assert column.log_z == pytest.approx(row.log_z, rel=1e-12)


def test_gaussians_against_scipy() -> None:
    one = Gaussians(np.ones(1), np.array([[1.0, -2.0]]), np.array([[0.5, 3.0]]))
    assert one.entropy == pytest.approx(sum(stats.norm(scale=s).entropy() for s in (0.5, 3.0)), rel=1e-9)
    mix = Gaussians(np.array([0.3, 0.7]), np.array([[-2.0], [1.0]]), np.array([[0.5], [1.5]]))
    x_N1 = np.linspace(-6, 6, 101)[:, None]
    density_N = sum(w * stats.norm(m, s).pdf(x_N1[:, 0]) for w, m, s in ((0.3, -2.0, 0.5), (0.7, 1.0, 1.5)))
    np.testing.assert_allclose(np.exp(mix.log_prob(x_N1)), density_N, rtol=1e-12)
    drawn = mix.draw(np.random.default_rng(0), 20_000)[:, 0]

    def cdf(x: np.ndarray) -> np.ndarray:
        return np.asarray(0.3 * stats.norm(-2.0, 0.5).cdf(x) + 0.7 * stats.norm(1.0, 1.5).cdf(x))

    assert stats.kstest(drawn, cdf).pvalue > 1e-4
    assert stats.kstest(drawn + 0.1, cdf).pvalue < 1e-4
    assert mix.entropy == pytest.approx(-mix.log_prob(drawn[:, None]).mean(), abs=4 * 0.75 / 141)
    scaled = Standardised(mix, np.array([0.4]), np.array([2.0]))
    np.testing.assert_allclose(scaled.log_prob((x_N1 - 0.4) / 2), mix.log_prob(x_N1) + math.log(2), rtol=1e-12)
    assert mix.entropy is not None
    assert scaled.entropy == pytest.approx(mix.entropy - math.log(2))


def test_a_corpus_drawn_from_a_source_says_so_and_keeps_its_splits(tmp_path: Path) -> None:
    tree = {"source": {"kind": "ising", "size": [3, 4], "records": 1000, "valid": 0.2, "seed": 5}}
    prepare(build(PrepareConfig, tree, where="prepare"), tmp_path / "ising")
    corpus = open_corpus(tmp_path / "ising")
    assert (corpus.grid, corpus.alphabet, corpus.record) == ((3, 4, 1), 2, 12)
    assert [corpus.split(name).documents for name in ("train", "valid", "test")] == [700, 200, 100]
    own = build(PrepareConfig, tree, where="prepare").source
    assert isinstance(own, KnownSource)
    train = corpus.split("train")
    x_ND = train.read(0, train.symbols).reshape(-1, 12)
    assert corpus.known is not None
    np.testing.assert_array_equal(corpus.known.log_prob(x_ND), own.parameters.log_prob(x_ND))
    # Records go into splits by their number, not by content: equal ones may stand on both sides.
    sets = [{row.tobytes() for row in corpus.split(name).read(0, corpus.split(name).symbols).reshape(-1, 12)}
            for name in ("train", "test")]  # fmt: skip
    assert sets[0] & sets[1]
    assert from_manifest({}) is None
    (plain,) = view_of([corpus], ViewConfig(levels=None, seed=1))
    assert plain.known is not None
    (noisy,) = view_of([corpus], ViewConfig(dequantise=True))
    assert noisy.known is None


def test_a_standardised_view_knows_its_source_in_its_own_units(tmp_path: Path) -> None:
    mixture = {"kind": "gaussians", "means": [[0, 5], [4, -5]], "deviations": [[1, 2], [0.5, 1]], "records": 500}
    prepare(build(PrepareConfig, {"source": mixture}, where="prepare"), tmp_path / "mixture")
    corpus = open_corpus(tmp_path / "mixture")
    (view,) = view_of([corpus], ViewConfig(standardise=True))
    batch = view.split("valid").fetch(np.arange(20), 2)
    raw = corpus.split("valid").fetch(np.arange(20), 2)
    assert view.known is not None
    assert corpus.known is not None
    np.testing.assert_allclose(
        view.known.log_prob(batch.x_BT.numpy()),
        corpus.known.log_prob(raw.x_BT.numpy()) + view.measure.offset,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"kind": "markov", "size": [2, 2]}, "size belongs to the kind ising"),
        ({"kind": "ising"}, "kind ising needs size"),
        ({"kind": "ising", "size": [2, 11]}, "the width from 1 to 10"),
        ({"kind": "hmm", "order": 0}, "order 1 or more"),
        ({"kind": "markov", "order": 9, "length": 8}, "looks back further"),
        ({"kind": "bernoulli", "p": [0.5, 1.5]}, "from 0 to 1"),
        ({"kind": "gaussians", "means": [[0.0]], "deviations": [[1.0, 2.0]]}, "rows of equal length"),
        ({"kind": "gaussians", "means": [[0.0]], "deviations": [[0.0]]}, "above 0"),
        ({"kind": "markov", "records": 4, "valid": 0.01}, "leave a split empty"),
    ],
)
def test_what_is_no_source_is_refused(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(PrepareConfig, {"source": tree}, where="prepare")
    with pytest.raises(ConfigError, match="more than 1,024 contexts"):
        source({"kind": "markov", "alphabet": 4, "order": 6})
