"""Normalisation of the last dimension. Statistics are computed in float32 whatever the input's dtype is.

[1] Ba, Kiros, Hinton: Layer Normalization, 2016. [2] Zhang, Sennrich: Root Mean Square Layer Normalization, 2019.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NormKind = Literal["layernorm", "rmsnorm"]


class LayerNorm(nn.Module):
    """[1]: (h - mean) / sqrt(var + eps) * weight (+ bias) over the last dimension."""

    def __init__(self, width: int, *, eps: float, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None
        self.eps = eps

    def forward(self, h: Tensor) -> Tensor:
        """Same shape and dtype as `h`."""
        return F.layer_norm(h, self.weight.shape, self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """[2]: h / sqrt(mean(h^2) + eps) * weight over the last dimension."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, h: Tensor) -> Tensor:
        """Same shape and dtype as `h`."""
        return F.rms_norm(h, self.weight.shape, self.weight, self.eps)


def norm(kind: NormKind, width: int, *, eps: float, bias: bool) -> nn.Module:
    """The norm of that kind; `bias` counts for layernorm alone."""
    return LayerNorm(width, eps=eps, bias=bias) if kind == "layernorm" else RMSNorm(width, eps=eps)
