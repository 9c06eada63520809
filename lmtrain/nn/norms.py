"""Normalisation of the last dimension. Statistics are computed in float32 whatever the input's dtype is.

[1] Ba, Kiros, Hinton: Layer Normalization, 2016. [2] Zhang, Sennrich: Root Mean Square Layer Normalization, 2019.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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
        return rms_norm(h, self.weight, eps=self.eps)


def norm(kind: NormKind, width: int, *, eps: float, bias: bool) -> nn.Module:
    """The norm of that kind; `bias` counts for layernorm alone."""
    return LayerNorm(width, eps=eps, bias=bias) if kind == "layernorm" else RMSNorm(width, eps=eps)


def rms_norm(h: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """[2] over the last dimension of `h`; `weight` has the shape of the last dimensions of `h`, one or more."""
    if h.is_cuda and weight.ndim == 1:
        return F.rms_norm(h, weight.shape, weight, eps)
    out: Tensor = _RMSNorm.apply(h, weight, eps)  # type: ignore[no-untyped-call]
    return out


class _RMSNorm(torch.autograd.Function):
    """On the CPU torch has no kernel for it: its composite backward takes 4 times as long as these few passes."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = h if h.dtype == torch.float64 else h.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(h.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(h, weight, scale)
        out: Tensor = (wide * scale).mul_(weight).to(h.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        h, weight, scale = ctx.saved_tensors
        unit = h * scale
        along = grad * unit
        dweight = along.reshape(-1, *weight.shape).sum(dim=0).to(weight.dtype)
        # d unit / d h = scale (1 - unit unit^T / D)
        mean = along.mul_(weight).mean(dim=-1, keepdim=True)
        dh = (grad * weight).sub_(unit.mul_(mean)).mul_(scale)
        return dh.to(h.dtype), dweight, None
