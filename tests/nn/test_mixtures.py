"""Heads for bits, levels and reals, against high-precision decimals, torch.distributions and their own definitions."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from torch import distributions

from lmtrain.errors import InputError
from lmtrain.nn.mixtures import (
    Bernoulli,
    DiscretisedLogistics,
    Gaussians,
    Logistics,
    bernoulli_log_prob,
    discretised_logistics_log_prob,
    gaussians_log_prob,
    logistics_log_prob,
    pixel_chain,
)

DENSITIES = {"gaussians": (Gaussians, gaussians_log_prob), "logistics": (Logistics, logistics_log_prob)}
every_density = pytest.mark.parametrize("name", DENSITIES)


def mixtures(lead, K, *, seed=0, dtype=torch.float64):
    """[..., K, 3]: weights, means in about [-1.5, 1.5], scales from 1/150 to 3."""
    g = torch.Generator().manual_seed(seed)
    weight, mean, scale = torch.rand(3, *lead, K, dtype=torch.float64, generator=g)
    return torch.stack([4 * weight, 3 * mean - 1.5, 6 * scale - 5], dim=-1).to(dtype)


def decimal_level(params, x, levels):
    """log p of one level, by differences of sigmoids with 120 digits."""
    with localcontext() as context:
        context.prec = 120
        weights = [Decimal(w).exp() for w, _, _ in params]
        total = Decimal(0)
        for weight, (_, mean, log_scale) in zip(weights, params, strict=True):
            centre, half = Decimal(2 * x) / (levels - 1) - 1, Decimal(1) / (levels - 1)

            def reached(edge, mean=mean, log_scale=log_scale):
                z = (edge - Decimal(mean)) / Decimal(log_scale).exp()
                return 1 / (1 + (-z).exp())

            high = reached(centre + half) if x < levels - 1 else Decimal(1)
            low = reached(centre - half) if x > 0 else Decimal(0)
            total += weight / sum(weights) * (high - low)
        return float(total.ln())


@pytest.mark.parametrize(("dtype", "relative"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("levels", [2, 5, 256])
def test_levels_against_decimals(levels, dtype, relative):
    cases = [[(0.3, 0.2, -1.0)], [(0.0, -0.4, -3.0), (1.0, 0.9, -7.0), (-2.0, 1.7, 1.5)], [(0.0, 0.1, 12.0)]]
    cases += [[(0.0, -1.3, -4.0)], [(0.5, 40.0, 0.0), (0.0, -2.0, 3.0)]]
    for given in cases:
        params = torch.tensor(given, dtype=dtype)
        for x in sorted({0, 1, levels // 2, levels - 2, levels - 1}):
            got = discretised_logistics_log_prob(params, torch.tensor(x), levels=levels)
            assert got.dtype == dtype
            want = decimal_level([tuple(row) for row in params.tolist()], x, levels)
            assert got.item() == pytest.approx(want, rel=relative, abs=relative), (given, x)


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
def test_levels_sum_to_one(levels):
    params = mixtures((400,), 5, dtype=torch.float32)
    params[200:, :, 2] = torch.linspace(-30, 30, 200)[:, None]
    logp = DiscretisedLogistics(params, levels=levels).log_pmf()
    assert logp.dtype == torch.float32
    assert logp.shape == (400, levels)
    assert torch.isfinite(logp).all()
    assert (logp.double().exp().sum(dim=1) - 1).abs().max() < 1e-6
    x = torch.randint(levels, (400,), generator=torch.Generator().manual_seed(1))
    again = DiscretisedLogistics(params, levels=levels).log_prob(x)
    torch.testing.assert_close(again, logp.gather(1, x[:, None])[:, 0], atol=1e-6, rtol=1e-6)


def extremes(dtype):
    """Every mixture of one to two components at and beyond the edges: [N, 2, 3]."""
    scales, means = [-1e3, -20.0, -7.0, 0.0, 7.0, 20.0, 1e3], [-1e6, -1.0, -0.999, 0.0, 1 / 255, 1.0, 1e6]
    rows = [[(w, m, s), (0.0, -m, 0.0)] for s in scales for m in means for w in (-200.0, 0.0, 200.0)]
    return torch.tensor(rows, dtype=dtype)


def test_gradients_are_finite_at_the_edges():
    for dtype in (torch.float32, torch.bfloat16):
        for x in (0, 1, 127, 254, 255):
            params = extremes(dtype).requires_grad_()
            out = discretised_logistics_log_prob(params, torch.full((len(params),), x), levels=256)
            assert out.dtype == torch.float32
            (gradient,) = torch.autograd.grad(out.sum(), params)
            assert torch.isfinite(out).all()
            assert torch.isfinite(gradient).all()
        for log_prob in (gaussians_log_prob, logistics_log_prob):
            for x in (-1e6, -1.0, 0.0, 1e6):
                params = extremes(dtype).requires_grad_()
                out = log_prob(params, torch.full((len(params),), x))
                assert out.dtype == torch.float32
                (gradient,) = torch.autograd.grad(out.sum(), params)
                assert torch.isfinite(out).all()
                assert torch.isfinite(gradient).all()
        logit = torch.tensor([-1e30, -200.0, 0.0, 200.0, 1e30], dtype=dtype, requires_grad=True)
        for x in (0, 1):
            out = bernoulli_log_prob(logit, torch.full((5,), x))
            (gradient,) = torch.autograd.grad(out.sum(), logit)
            assert torch.isfinite(out).all()
            assert torch.isfinite(gradient).all()


def test_gradients_are_those_of_finite_differences():
    params = mixtures((6,), 3).requires_grad_()
    x = torch.tensor([0, 1, 3, 7, 8, 8])
    torch.autograd.gradcheck(lambda p: discretised_logistics_log_prob(p, x, levels=9), params)
    real = torch.linspace(-2, 2, 6, dtype=torch.float64)
    for log_prob in (gaussians_log_prob, logistics_log_prob):
        torch.autograd.gradcheck(log_prob, (params, real.clone().requires_grad_()))
    chain = torch.randn(2, 3, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    pixels = torch.tensor([[0, 2, 4], [3, 1, 0]])
    torch.autograd.gradcheck(lambda p: pixel_chain(p, pixels, levels=5), chain)
    logit = torch.linspace(-3, 3, 6, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda logit: bernoulli_log_prob(logit, x % 2), logit)


def reference(name, params):
    """The same mixture from torch.distributions."""
    weight, mean, log_scale = params.unbind(-1)
    if name == "gaussians":
        part = distributions.Normal(mean, log_scale.exp())
    else:
        unit = distributions.Uniform(torch.zeros_like(mean), torch.ones_like(mean))
        moved = distributions.AffineTransform(mean, log_scale.exp())
        part = distributions.TransformedDistribution(unit, [distributions.SigmoidTransform().inv, moved])
    return distributions.MixtureSameFamily(distributions.Categorical(logits=weight), part, validate_args=False)


@every_density
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 2e-4)])
def test_densities_against_torch(name, dtype, close):
    kind, log_prob = DENSITIES[name]
    params = mixtures((50,), 4)
    x = torch.linspace(-3, 3, 50, dtype=torch.float64)
    want = reference(name, params)
    torch.testing.assert_close(
        log_prob(params.to(dtype), x.to(dtype)).double(), want.log_prob(x), atol=close, rtol=close
    )
    assert log_prob(params.to(dtype), x.to(dtype)).dtype == dtype
    torch.testing.assert_close(kind(params).log_prob(x), want.log_prob(x), atol=1e-10, rtol=0)
    torch.testing.assert_close(kind(params).cdf(x), want.cdf(x), atol=1e-12, rtol=0)


@every_density
def test_the_density_is_the_slope_of_its_cdf(name):
    kind, log_prob = DENSITIES[name]
    params = mixtures((50,), 4)
    x, h = torch.linspace(-2, 2, 50, dtype=torch.float64), 1e-6
    slope = (kind(params).cdf(x + h) - kind(params).cdf(x - h)) / (2 * h)
    torch.testing.assert_close(slope, log_prob(params, x).exp(), atol=1e-6, rtol=1e-5)


@every_density
def test_a_density_is_sampled_at_its_quantile(name):
    kind, _ = DENSITIES[name]
    u = torch.from_numpy(np.random.default_rng(0).random(2000))
    u[:6] = torch.tensor([0.0, 2.0**-53, 1e-9, 0.5, 1 - 1e-9, 1 - 2.0**-53], dtype=torch.float64)
    params = mixtures((2000,), 4)
    x = kind(params).sample(u)
    assert x.dtype == torch.float64
    torch.testing.assert_close(kind(params).cdf(x), u, atol=1e-13, rtol=0)
    assert torch.isfinite(x).all()
    # The smallest such number, to the last place: a hair before it the cdf is not beyond u.
    before = torch.nextafter(x, torch.full_like(x, -torch.inf))
    assert (kind(params).cdf(before) <= u + 1e-15).all()
    narrow = kind(params.float()).sample(u)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double()[6:], x[6:], atol=1e-4, rtol=1e-4)
    # Far apart, and of very different scales.
    wide = torch.tensor([[[0.0, -1e4, -15.0], [0.0, 3.0, -18.0], [-40.0, 0.0, 9.0]]], dtype=torch.float64)
    few = torch.tensor([0.0, 0.1, 0.49, 0.51, 0.9, 1 - 2.0**-53], dtype=torch.float64)
    at = kind(wide.expand(6, 3, 3)).sample(few)
    assert torch.isfinite(at).all()
    assert (at.diff() > 0).all()
    torch.testing.assert_close(at[[1, 4]], torch.tensor([-1e4, 3.0], dtype=torch.float64), atol=1e-5, rtol=0)


@every_density
def test_a_density_has_no_symbols(name):
    kind, _ = DENSITIES[name]
    with pytest.raises(InputError, match="density"):
        kind(mixtures((2,), 3)).log_pmf()


@pytest.mark.parametrize("levels", [2, 3, 17, 256])
def test_a_level_is_sampled_at_its_quantile(levels):
    params = mixtures((3000,), 4)
    u = torch.from_numpy(np.random.default_rng(0).random(3000))
    u[:2], u[2:4] = 0.0, 1 - 2.0**-53
    distribution = DiscretisedLogistics(params, levels=levels)
    x = distribution.sample(u)
    assert x.dtype == torch.int64
    assert x.min() >= 0
    assert x.max() < levels
    assert len(x.unique()) == levels or levels == 256
    reached = distribution.log_pmf().exp().cumsum(dim=1)
    here = reached.gather(1, x[:, None])[:, 0]
    below = torch.where(x > 0, reached.gather(1, (x - 1).clamp(min=0)[:, None])[:, 0], 0.0)
    assert (u >= below - 1e-12).all()
    assert (u < here + 1e-12).all()
    assert torch.isfinite(DiscretisedLogistics(params.float(), levels=levels).log_prob(x)).all()
    extreme = extremes(torch.float32)
    for noise in (0.0, 0.5, 1 - 2.0**-53):
        drawn = DiscretisedLogistics(extreme, levels=levels).sample(torch.full((len(extreme),), noise))
        logp = DiscretisedLogistics(extreme, levels=levels).log_prob(drawn)
        assert torch.isfinite(logp).all()


def test_bits_against_torch():
    logit = torch.linspace(-30, 30, 61)
    want = distributions.Bernoulli(logits=logit)
    for x in (0, 1):
        bits = torch.full((61,), x)
        torch.testing.assert_close(bernoulli_log_prob(logit, bits), want.log_prob(bits.float()), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(Bernoulli(logit).log_prob(bits), Bernoulli(logit).log_pmf()[:, x], atol=0, rtol=0)
    assert Bernoulli(logit.bfloat16()).log_pmf().dtype == torch.float32
    u = torch.from_numpy(np.random.default_rng(0).random(61))
    torch.testing.assert_close(Bernoulli(logit).sample(u), (u >= 1 / (1 + logit.double().exp())).long())
    certain = Bernoulli(torch.tensor([-1e4, 1e4]))
    for noise in (0.0, 1 - 2.0**-53):
        assert certain.sample(torch.full((2,), noise, dtype=torch.float64)).tolist() == [0, 1]


def joint(params, pixel, levels):
    """log p of a whole pixel by PixelCNN++'s equations, in float64: one index for all channels."""
    C, total = len(pixel), []
    place = [2 * v / (levels - 1) - 1 for v in pixel]
    for row in params.tolist():
        means, scales, coefficients = row[1 : 1 + C], row[1 + C : 1 + 2 * C], iter(row[1 + 2 * C :])
        for c in range(C):
            means[c] += sum(math.tanh(next(coefficients)) * place[before] for before in range(c))
        parts = [decimal_level([(0.0, means[c], scales[c])], pixel[c], levels) for c in range(C)]
        total.append(row[0] + sum(parts))
    weights = [row[0] for row in params.tolist()]
    return np.logaddexp.reduce(total) - np.logaddexp.reduce(weights)


@pytest.mark.parametrize("C", [1, 2, 3, 4])
def test_the_chain_of_a_pixel_is_its_joint(C):
    levels, K = 7, 3
    g = torch.Generator().manual_seed(C)
    params = torch.randn(12, K, 1 + 2 * C + C * (C - 1) // 2, dtype=torch.float64, generator=g)
    x = torch.randint(levels, (12, C), generator=g)
    chain = pixel_chain(params, x, levels=levels)
    assert chain.shape == (12, C, K, 3)
    logp = discretised_logistics_log_prob(chain, x, levels=levels).sum(dim=1)
    want = [joint(params[n], x[n].tolist(), levels) for n in range(12)]
    torch.testing.assert_close(logp, torch.tensor(want, dtype=torch.float64), atol=1e-10, rtol=0)


def test_the_chain_sums_to_one_over_all_pixels():
    levels = 5
    params = torch.randn(3, 10, generator=torch.Generator().manual_seed(3)) * 1.5
    x = torch.cartesian_prod(*[torch.arange(levels)] * 3)
    chain = pixel_chain(params.expand(len(x), 3, 10), x, levels=levels)
    assert chain.dtype == torch.float32
    p = discretised_logistics_log_prob(chain, x, levels=levels).double().sum(dim=1).exp()
    assert abs(p.sum().item() - 1) < 1e-6
    assert p.max() / p.min() > 5


def test_a_channel_depends_on_the_earlier_ones_alone():
    levels, C = 256, 3
    params = torch.randn(20, 5, 10, generator=torch.Generator().manual_seed(4))
    x = torch.randint(levels, (20, C), generator=torch.Generator().manual_seed(5))
    chain = pixel_chain(params, x, levels=levels)
    for c in range(C):
        other = x.clone()
        other[:, c] = (other[:, c] + 100) % levels
        changed = pixel_chain(params, other, levels=levels)
        assert torch.equal(changed[:, : c + 1], chain[:, : c + 1])
        for later in range(c + 1, C):
            assert not torch.equal(changed[:, later], chain[:, later])
