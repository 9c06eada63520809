"""Probabilities are probabilities, and samples follow them: whole spaces are listed, densities are integrated.

B rows, T symbols of a row, V symbols of the alphabet, N outcomes of the enumerated space, G places of a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from lmtrain.nn.head import Categorical
from lmtrain.protocol import Distribution
from tests.laws.cases import Case, cases
from tests.laws.law import chi_square, kolmogorov, logp, predict

CASES = cases()
Pick = Callable[[Distribution, Tensor, int], Tensor]


def named(found: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", found, ids=lambda case: case.name)


def probabilities(case: Case, begin: tuple[int, int | None] | None = None) -> Tensor:
    """float64 [N] of every outcome."""
    x_NT = case.outcomes
    return logp(case.pushed, x_NT, case.cond(len(x_NT), begin)).double().sum(1).exp()


@named([case for case in CASES if not case.real])
def test_probabilities_sum_to_one(case: Case):
    for begin in case.beginnings():
        p_N = probabilities(case, begin)
        assert abs(p_N.sum().item() - 1.0) < 1e-5
        # Not by being uniform, which any error would leave in place.
        assert p_N.max() / p_N.min() > 5.0


@named([case for case in CASES if case.real])
@pytest.mark.parametrize("dimensions", [1, 2])
def test_a_density_integrates_to_one(case: Case, dimensions: int):
    """Trapezoids over x = sinh(y), which reaches as far as any tail and is dense where most of the mass is."""
    small = replace(case, spec=replace(case.spec, context=dimensions))
    y_G = torch.linspace(-8, 8, 641, dtype=torch.float64)
    x_NT = torch.cartesian_prod(*[torch.sinh(y_G)] * dimensions).reshape(-1, dimensions)
    width_NT = torch.cartesian_prod(*[torch.cosh(y_G) * (y_G[1] - y_G[0])] * dimensions).reshape(-1, dimensions)
    for begin in small.beginnings():
        p_N = torch.cat(
            [logp(small.pushed, x_nT.float(), small.cond(len(x_nT), begin)).double().sum(1).exp()
             for x_nT in x_NT.split(100_000)]
        )  # fmt: skip
        assert (p_N * width_NT.prod(dim=1)).sum().item() == pytest.approx(1.0, abs=1e-4)


def test_chi_square_is_the_tail_of_its_distribution():
    # Two cells: the statistic is a squared normal. 60 heads of 100: z = 2, two-sided p = 0.0455.
    assert chi_square(np.array([60, 40]), np.array([0.5, 0.5])) == pytest.approx(0.0455003, abs=1e-6)
    # Tail of 3.841 with one degree of freedom is 5 %, of 11.070 with five degrees 5 %.
    for freedom, critical in ((1, 3.841459), (5, 11.070498)):
        cells = freedom + 1
        expected = np.full(cells, 100.0)
        shift = math.sqrt(critical * 100.0 / 2)
        count = expected + np.array([shift, -shift] + [0.0] * (cells - 2))
        assert chi_square(count, expected / expected.sum()) == pytest.approx(0.05, abs=1e-6)


def test_kolmogorov_is_the_tail_of_its_distribution():
    # Published critical distances at 5 % and 1 %: 0.1340 and 0.1608 for 100 numbers.
    for distance, tail in ((0.1340, 0.05), (0.1608, 0.01)):
        grid = (np.arange(100) + 1) / 100 - distance
        assert kolmogorov(np.clip(grid, 0, 1)) == pytest.approx(tail, rel=0.03)
    # 5 % of uniform draws are beyond 5 %.
    draw = np.random.default_rng(0)
    beyond = sum(kolmogorov(draw.random(200)) < 0.05 for _ in range(2000))
    assert 70 < beyond < 130


def stream_rows(case: Case, B: int, pick: Pick) -> Tensor:
    """[B, T]: rows drawn by a stream, in the model's order."""
    noise_BT = torch.from_numpy(np.random.default_rng(7).random((B, case.spec.context)))
    stream, drawn = case.pushed.stream(B, cond=case.cond(B)), {}
    for t, place in enumerate(case.order):
        drawn[place] = pick(stream.distribution(), noise_BT[:, t], t)
        stream.push(drawn[place])
    return torch.stack([drawn[t] for t in range(case.spec.context)], dim=1)


def frequencies(case: Case, x_BT: Tensor) -> float:
    """p-value of rows against exp(log p) of all outcomes."""
    cell_B = torch.zeros(len(x_BT), dtype=torch.int64)
    for x_B in x_BT.unbind(dim=1):
        cell_B = cell_B * case.spec.alphabet + x_B
    p_N = probabilities(case).numpy()
    return chi_square(np.bincount(cell_B.numpy(), minlength=len(p_N)), p_N)


def transformed(case: Case, x_BT: Tensor) -> float:
    """p-value of the probabilities below each number given those before it, which are uniform and independent.

    By trapezoids of exp(log p): the cdf and the quantiles of the distribution itself have no part in it. The least
    p-value of all numbers, and of all neighbours' sums modulo 1, times how many there are.
    """
    params_BT = predict(case.pushed, x_BT, case.cond(len(x_BT)))
    step_G = torch.linspace(60.0, 0.0, 1001, dtype=torch.float64)
    below = []
    for t in case.order:
        at_BG = x_BT[:, t, None].double() - step_G
        params_N = params_BT[:, t].repeat_interleave(len(step_G), dim=0)
        p_N = case.pushed.distribution(params_N).log_prob(at_BG.flatten().float()).double().exp()
        below.append(torch.trapezoid(p_N.view(at_BG.shape), at_BG, dim=1).numpy())
    uniform = below + [(a + b) % 1.0 for a, b in pairwise(below)]
    return len(uniform) * min(kolmogorov(u_B) for u_B in uniform)


def warm(d: Distribution, noise_B: Tensor, _: int) -> Tensor:
    """A wrong sampler: the distribution a little flatter than it is."""
    return Categorical(d.log_pmf() / 1.2).sample(noise_B)


def narrow(d: Distribution, noise_B: Tensor, _: int) -> Tensor:
    """A wrong sampler of a density: less of its tails."""
    return d.sample(0.5 + 0.7 * (noise_B - 0.5))


class Forgetful:
    """A wrong sampler: from the second symbol on it never asks again."""

    def __init__(self) -> None:
        self.first: list[Distribution] = []

    def __call__(self, d: Distribution, noise_B: Tensor, t: int) -> Tensor:
        self.first.append(d)
        return self.first[0 if t == 0 else 1].sample(noise_B)


@pytest.mark.parametrize(
    "case",
    [  # images of 12 symbols are left out of the inner loop
        pytest.param(case, marks=pytest.mark.slow if case.spec.grid and case.spec.context > 6 else [])
        for case in CASES
        if case.steps
    ],
    ids=lambda case: case.name,
)
def test_sampler_agrees_with_its_probabilities_and_a_wrong_one_does_not(case: Case):
    B, verdict, wrong = (1000, transformed, narrow) if case.real else (10_000, frequencies, warm)
    assert verdict(case, stream_rows(case, B, lambda d, noise_B, _: d.sample(noise_B))) > 1e-4
    assert verdict(case, stream_rows(case, B, wrong)) < 1e-4
    if case.spec.context > 2:
        assert verdict(case, stream_rows(case, B, Forgetful())) < 1e-4


@named([case for case in CASES if not case.steps])
def test_a_model_that_draws_rows_in_its_own_way_follows_its_probabilities(case: Case):
    B, T = 10_000, case.spec.context
    noise_BN = torch.from_numpy(np.random.default_rng(7).random((B, T + 1)))
    x_BT = case.pushed.draw(noise_BN, cond=case.cond(B))
    assert x_BT.dtype == torch.int64
    assert frequencies(case, x_BT) > 1e-4
    assert torch.equal(case.pushed.draw(noise_BN[:7], cond=case.cond(7)), x_BT[:7])
    for wrong in (slice(0, 1), slice(1, None)):  # one way for all; and less of the extremes
        other_BN = noise_BN.clone()
        other_BN[:, wrong] = 0.0 if wrong.start == 0 else 0.5 + 0.85 * (noise_BN[:, wrong] - 0.5)
        assert frequencies(case, case.pushed.draw(other_BN, cond=case.cond(B))) < 1e-4
