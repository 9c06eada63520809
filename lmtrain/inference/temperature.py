"""Log-probabilities at a temperature: every symbol's own distribution sharpened or flattened, and normalised again.

Shapes in names: B rows, T symbols of a row, V symbols of the alphabet, N positions.

p_T(x_t | x_<t) = p(x_t | x_<t)^(1/T) / sum over v of p(v | x_<t)^(1/T): the distribution that sampling at temperature T
draws from (sample.py), symbol by symbol. It is not the whole text's p(x)^(1/T), whose normaliser nobody can sum.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmtrain.errors import InputError
from lmtrain.protocol import Cond, Model

_CHUNK = 1 << 24
"""Numbers of log-probability that are held at a time."""


def tempered(model: Model, x_BT: Tensor, *, cond: Cond, temperature: float) -> Tensor:
    """float32 [B, T]: log p_T of each symbol in nats; at temperature 1 the model's own forward.

    Raises InputError for a temperature that is not above 0, for densities (the power of a density has another
    normaliser, which needs an integral), and for models without a distribution a symbol.
    """
    if temperature == 1:
        own_BT: Tensor = model(x_BT, cond=cond)
        return own_BT
    if not 0 < temperature < float("inf"):
        raise InputError(f"temperature {temperature:g} was given; wanted a number above 0")
    if x_BT.is_floating_point():
        raise InputError("a temperature is for probabilities of symbols, and this model has a density of real numbers")
    params_BT = model.predict(x_BT, cond=cond)
    params_N, x_N = params_BT.flatten(0, 1), x_BT.flatten()
    one_V = model.distribution(params_N[:1]).log_pmf().shape[-1]
    step = max(1, _CHUNK // one_V)
    parts = []
    for low in range(0, len(x_N), step):
        scaled_NV = model.distribution(params_N[low : low + step]).log_pmf() / temperature
        at_N1 = scaled_NV.gather(1, x_N[low : low + step, None].clamp(0, one_V - 1))
        parts.append(at_N1[:, 0] - scaled_NV.logsumexp(dim=1))
    return torch.cat(parts).reshape(x_BT.shape)
