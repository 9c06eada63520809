"""First values of weights. Drawn on the CPU in float32, so that a seed gives the same model on every device.

Every module draws its own weights while it is being built (never afterwards, from outside), so that a model can also be
built in pieces that are handed out to ranks as soon as they exist.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normal_(weight: Tensor, *, std: float) -> None:
    """Fill `weight` with N(0, std^2) from torch's default CPU generator; std = 0 fills with zeros and draws nothing."""
    with torch.no_grad():
        if std == 0.0:
            weight.zero_()
        elif not weight.is_meta:
            weight.copy_(torch.normal(0.0, std, weight.shape, device="cpu"))


def uniform_(weight: Tensor, *, bound: float) -> None:
    """Fill `weight` with U(-bound, bound) from torch's default CPU generator."""
    if weight.is_meta:
        return
    with torch.no_grad():
        weight.copy_(torch.rand(weight.shape, device="cpu", dtype=torch.float32).mul_(2.0).sub_(1.0).mul_(bound))
