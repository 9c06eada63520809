"""What the laws are said with: reading a model, training it a little, and tests of samples."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lmtrain.protocol import Cond, Distribution, Model


def logp(model: Model, x_BT: Tensor, cond: Cond) -> Tensor:
    """log p(x_t) of each symbol, without gradients."""
    with torch.no_grad():
        out: Tensor = model(x_BT, cond=cond)
    return out


def predict(model: Model, x_BT: Tensor, cond: Cond) -> Tensor:
    """The head's parameters, without gradients."""
    with torch.no_grad():
        return model.predict(x_BT, cond=cond)


def says(distribution: Distribution, *, batch: int, real: bool) -> Tensor:
    """[B, ...] what it says: the log-probability of every symbol; of a density, some quantiles and log p around them."""
    if not real:
        return distribution.log_pmf()
    quantiles = [distribution.sample(torch.full((batch,), u, dtype=torch.float64)) for u in (0.05, 0.4, 0.9)]
    found = [distribution.log_prob(quantiles[1] + shift) for shift in (-3.0, -0.3, 0.0, 0.7, 4.0)]
    return torch.stack([*quantiles, *found], dim=1)


def train(model: Model, x_BT: Tensor, cond: Cond, *, steps: int, lr: float) -> float:
    """Adam on one batch, the rate falling to zero over the last two thirds; nats a row in the end."""
    model.train()
    adam = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10, 1.5 * (1 - step / steps))
        adam.zero_grad()
        loss = -model(x_BT, cond=cond).sum() / x_BT.shape[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
    model.eval()
    return -logp(model, x_BT, cond).sum().item() / x_BT.shape[0]


def chi_square(count_N: np.ndarray, p_N: np.ndarray) -> float:
    """p-value of counts under probabilities; cells that expect fewer than 5 are pooled."""
    draws = count_N.sum()
    expected_N = p_N / p_N.sum() * draws
    small_N = expected_N < 5.0
    counts, expected = count_N[~small_N], expected_N[~small_N]
    if expected_N[small_N].sum() > 0:
        counts = np.append(counts, count_N[small_N].sum())
        expected = np.append(expected, expected_N[small_N].sum())
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    return torch.special.gammaincc(
        torch.tensor(freedom / 2, dtype=torch.float64), torch.tensor(statistic / 2, dtype=torch.float64)
    ).item()


def kolmogorov(u_N: np.ndarray) -> float:
    """p-value of numbers in [0, 1] being uniform, by the largest distance from their cdf (Stephens' formula)."""
    N, sorted_N = len(u_N), np.sort(u_N)
    rank_N = np.arange(N)
    distance = max((sorted_N - rank_N / N).max(), ((rank_N + 1) / N - sorted_N).max())
    size = (math.sqrt(N) + 0.12 + 0.11 / math.sqrt(N)) * distance
    if size < 0.2:
        return 1.0  # the series converges slowly there, to 1
    return min(1.0, 2 * sum((-1) ** (j - 1) * math.exp(-2 * (j * size) ** 2) for j in range(1, 101)))
