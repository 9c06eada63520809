"""Heads for bits, for levels and for real numbers: one logit, or a mixture of K logistics or Gaussians a symbol.

B rows, K components, V levels, C channels of a pixel. A mixture's parameters are [..., K, 3]: unnormalised log-weight,
mean, log-scale. Everything is float32 inside (float64 for float64), also for bf16 and fp16 models, and log-scales are
held within +-20, so that no gradient is infinite. Every distribution is of one symbol; a pixel of C channels is a chain
of them (`pixel_chain`).

[1] Salimans et al.: PixelCNN++, ICLR 2017 (discretised mixture of logistics). [2] Uria, Murray, Larochelle: RNADE, 2013
(mixture of Gaussians a dimension).
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.errors import InputError
from lmtrain.nn.precision import at_least_float32
from lmtrain.protocol import Distribution

WIDEST = 20.0
"""Log-scales are held within +- this: a scale of 2e-9 is finer than any data, and its square is still a float32."""

_HALVINGS = 128
_LEAST = 2.0**-54


def _parts(params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised log-weights, means, log-scales: [..., K] each, float32 or wider."""
    wide = params.to(at_least_float32(params.dtype))
    log_weight, mean, log_scale = wide.unbind(dim=-1)
    return torch.log_softmax(log_weight, dim=-1), mean, log_scale.clamp(-WIDEST, WIDEST)


def bernoulli_log_prob(logit: Tensor, x: Tensor) -> Tensor:
    """[...] log p(x) in nats of bits x [...], where sigmoid(logit) is the probability of a 1."""
    wide = logit.to(at_least_float32(logit.dtype))
    return F.logsigmoid(torch.where(x.bool(), wide, -wide))


def _level_log_prob(mean: Tensor, log_scale: Tensor, x: Tensor, *, levels: int) -> Tensor:
    """[...] log p(x) of one component each, x [...] float levels 0 .. V-1.

    log(sigmoid(a) - sigmoid(b)) = logsigmoid(a) + logsigmoid(-b) + log(1 - exp(b - a)), exact however small it is. The
    edges of a bin are counted in bins, where they are exact: what one level loses by rounding, the next one gains.
    """
    centre = (mean + 1.0) * ((levels - 1) / 2)
    bins = torch.exp(-log_scale) * (2 / (levels - 1))  # one bin's width in scales: a - b
    below = F.logsigmoid((x + 0.5 - centre) * bins)
    above = F.logsigmoid((centre - (x - 0.5)) * bins)
    within = torch.log(-torch.expm1(-bins))
    lowest, highest = x <= 0, x >= levels - 1
    zero = torch.zeros((), dtype=below.dtype, device=below.device)
    return (
        torch.where(highest, zero, below)
        + torch.where(lowest, zero, above)
        + torch.where(lowest | highest, zero, within)
    )


def discretised_logistics_log_prob(params: Tensor, x: Tensor, *, levels: int) -> Tensor:
    """[...] log p(x) of levels x [...] in 0 .. V-1, params [..., K, 3] [1].

    Level x stands at 2x/(V-1) - 1 and takes what falls within 1/(V-1) of it; the first and the last take the tails.
    """
    assert levels >= 2, "one level has nothing to tell"
    log_weight, mean, log_scale = _parts(params)
    level = x.to(mean.dtype)[..., None]
    return torch.logsumexp(log_weight + _level_log_prob(mean, log_scale, level, levels=levels), dim=-1)


def gaussians_log_prob(params: Tensor, x: Tensor) -> Tensor:
    """[...] log density of reals x [...] under a mixture of Gaussians, params [..., K, 3]; the scale is sigma."""
    log_weight, mean, log_scale = _parts(params)
    z = (x.to(mean.dtype)[..., None] - mean) * torch.exp(-log_scale)
    return torch.logsumexp(log_weight - 0.5 * z.square() - log_scale - 0.5 * math.log(2 * math.pi), dim=-1)


def logistics_log_prob(params: Tensor, x: Tensor) -> Tensor:
    """[...] log density of reals x [...] under a mixture of logistics, params [..., K, 3]."""
    log_weight, mean, log_scale = _parts(params)
    far = ((x.to(mean.dtype)[..., None] - mean) * torch.exp(-log_scale)).abs()  # the density is symmetric
    return torch.logsumexp(log_weight - far - 2 * F.softplus(-far) - log_scale, dim=-1)


def pixel_chain(params: Tensor, x: Tensor, *, levels: int) -> Tensor:
    """[..., C, K, 3]: PixelCNN++'s pixel with a shared mixture index [1] as the chain p(r), p(g|r), p(b|r,g).

    params: [..., K, 1 + 2C + C(C-1)/2]: log-weight, C means, C log-scales, then the coefficients g|r, b|r, b|g.
    x: levels [..., C]; the parameters of channel c depend on the channels before it alone. The log-weights of a channel
    are the index's log-posterior given the earlier channels, and tanh(coefficient) times an earlier channel's place in
    [-1, 1] is added to the mean; so the chain's log-probabilities add up to the joint one.
    """
    C = x.shape[-1]
    assert params.shape[-1] == 1 + 2 * C + C * (C - 1) // 2, "weights, means, scales and coefficients of each channel"
    wide = params.to(at_least_float32(params.dtype))
    log_weight = torch.log_softmax(wide[..., 0], dim=-1)
    coefficient = torch.tanh(wide[..., 1 + 2 * C :])
    level = x.to(wide.dtype)
    place = level * (2 / (levels - 1)) - 1
    chain, first = [], 0
    for c in range(C):
        mean, log_scale = wide[..., 1 + c], wide[..., 1 + C + c].clamp(-WIDEST, WIDEST)
        for before in range(c):
            mean = mean + coefficient[..., first + before] * place[..., before, None]
        first += c
        chain.append(torch.stack([log_weight, mean, log_scale], dim=-1))
        if c < C - 1:
            seen = log_weight + _level_log_prob(mean, log_scale, level[..., c, None], levels=levels)
            log_weight = torch.log_softmax(seen, dim=-1)
    return torch.stack(chain, dim=-3)


class Bernoulli(Distribution):
    """A bit, of its logit [B]."""

    def __init__(self, logit_B: Tensor) -> None:
        self._logit_B = logit_B.detach().to(at_least_float32(logit_B.dtype))

    def log_pmf(self) -> Tensor:
        """float32 [B, 2]: log-probability of 0 and of 1."""
        return F.logsigmoid(torch.stack([-self._logit_B, self._logit_B], dim=1))

    def log_prob(self, x_B: Tensor) -> Tensor:
        """float32 [B] log p(x_B) in nats."""
        return bernoulli_log_prob(self._logit_B, x_B)

    def sample(self, noise_B: Tensor) -> Tensor:
        """int64 [B]: 0 while the noise is below its probability, else 1."""
        return (noise_B.double() >= torch.sigmoid(-self._logit_B.double())).long()


class DiscretisedLogistics(Distribution):
    """A level in 0 .. V-1, of a mixture [B, K, 3] (`discretised_logistics_log_prob`)."""

    def __init__(self, params_BK3: Tensor, *, levels: int) -> None:
        self._params_BK3 = params_BK3.detach()
        self._levels = levels

    def log_pmf(self) -> Tensor:
        """float32 [B, V]: exact log-probability of every level."""
        level_V = torch.arange(self._levels, device=self._params_BK3.device)
        level_BV = level_V.expand(self._params_BK3.shape[0], -1)
        return discretised_logistics_log_prob(self._params_BK3[:, None], level_BV, levels=self._levels)

    def log_prob(self, x_B: Tensor) -> Tensor:
        """float32 [B] log p(x_B) in nats."""
        return discretised_logistics_log_prob(self._params_BK3, x_B, levels=self._levels)

    def sample(self, noise_B: Tensor) -> Tensor:
        """int64 [B]: the smallest level whose cumulative probability, in float64, exceeds the noise."""
        log_weight_BK, mean_BK, log_scale_BK = _parts(self._params_BK3.double())
        weight_BK, bins_BK = log_weight_BK.exp(), torch.exp(-log_scale_BK) * (2 / (self._levels - 1))
        centre_BK = (mean_BK + 1.0) * ((self._levels - 1) / 2)
        low_B = torch.zeros(noise_B.shape, dtype=torch.int64, device=noise_B.device)
        high_B = torch.full_like(low_B, self._levels - 1)  # its cumulative probability is 1
        for _ in range((self._levels - 1).bit_length()):
            middle_B = (low_B + high_B) // 2
            reached_BK = torch.sigmoid((middle_B[:, None] + 0.5 - centre_BK) * bins_BK)
            exceeds_B = ((weight_BK * reached_BK).sum(dim=1) > noise_B.double()) | (low_B == high_B)
            high_B = torch.where(exceeds_B, middle_B, high_B)
            low_B = torch.where(exceeds_B, low_B, middle_B + 1)
        return high_B


class _Mixture(Distribution):
    """A real number, of a mixture [B, K, 3] of densities that are shifted and scaled copies of one."""

    def __init__(self, params_BK3: Tensor) -> None:
        self._params_BK3 = params_BK3.detach()

    def log_pmf(self) -> Tensor:
        """InputError: a density has no symbols to list."""
        raise InputError(
            "a density of real numbers has no probability for each symbol; ask for log_prob, or train on levels"
        )

    @abstractmethod
    def log_prob(self, x_B: Tensor) -> Tensor:
        """float32 [B] log density at x_B in nats."""

    @abstractmethod
    def _below(self, z: Tensor) -> Tensor:
        """The standard component's probability below z."""

    @abstractmethod
    def _place(self, u: Tensor) -> Tensor:
        """Where the standard component's probability below reaches u."""

    def cdf(self, x_B: Tensor) -> Tensor:
        """float64 [B]: the probability of a number below x_B."""
        log_weight_BK, mean_BK, log_scale_BK = _parts(self._params_BK3.double())
        z_BK = (x_B.double()[:, None] - mean_BK) * torch.exp(-log_scale_BK)
        return (log_weight_BK.exp() * self._below(z_BK)).sum(dim=1)

    def sample(self, noise_B: Tensor) -> Tensor:
        """float32 [B] (float64 for float64): the number at quantile `noise_B`, by bisection of the cdf in float64.

        It lies between the components' own quantiles. Noise 0 is read as 2^-54, below which no noise comes.
        """
        _, mean_BK, log_scale_BK = _parts(self._params_BK3.double())
        u_B = noise_B.double().clamp(min=_LEAST)
        own_BK = mean_BK + torch.exp(log_scale_BK) * self._place(u_B[:, None])
        low_B, high_B = own_BK.amin(dim=1), own_BK.amax(dim=1)
        for _ in range(_HALVINGS):
            middle_B = low_B + (high_B - low_B) / 2
            reached_B = self.cdf(middle_B) >= u_B
            high_B = torch.where(reached_B, middle_B, high_B)
            low_B = torch.where(reached_B, low_B, middle_B)
            if bool((torch.nextafter(low_B, high_B) >= high_B).all()):
                break
        return high_B.to(at_least_float32(self._params_BK3.dtype))


class Gaussians(_Mixture):
    """A real number, of a mixture of Gaussians [B, K, 3] (`gaussians_log_prob`)."""

    def log_prob(self, x_B: Tensor) -> Tensor:
        """float32 [B] log density at x_B in nats."""
        return gaussians_log_prob(self._params_BK3, x_B)

    def _below(self, z: Tensor) -> Tensor:
        below: Tensor = torch.special.ndtr(z)
        return below

    def _place(self, u: Tensor) -> Tensor:
        place: Tensor = torch.special.ndtri(u)
        return place


class Logistics(_Mixture):
    """A real number, of a mixture of logistics [B, K, 3] (`logistics_log_prob`)."""

    def log_prob(self, x_B: Tensor) -> Tensor:
        """float32 [B] log density at x_B in nats."""
        return logistics_log_prob(self._params_BK3, x_B)

    def _below(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    def _place(self, u: Tensor) -> Tensor:
        return torch.logit(u)
