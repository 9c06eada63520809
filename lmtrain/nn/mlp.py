"""The position-wise network of a Transformer block.

[1] Hendrycks, Gimpel: Gaussian Error Linear Units, 2016 (the tanh form is the one of GPT-2).
[2] Shazeer: GLU Variants Improve Transformer, 2020. [3] So et al.: Primer, 2021 (squared ReLU).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lmtrain.nn.linear import Linear

Activation = Literal["gelu", "gelu-tanh", "swiglu", "relu", "relu2"]


class MLP(nn.Module):
    """width -> hidden -> width; `swiglu` [2] computes its two hidden maps in one product."""

    def __init__(
        self, width: int, *, hidden: int, activation: Activation, bias: bool, std: float, out_std: float
    ) -> None:
        super().__init__()
        self.activation = activation
        self.up = Linear(width, hidden * (2 if activation == "swiglu" else 1), bias=bias, std=std)
        self.down = Linear(hidden, width, bias=bias, std=out_std)

    def forward(self, h_BTD: Tensor) -> Tensor:
        """[B, T, width], each position by itself."""
        a_BTF = self.up(h_BTD)
        if self.activation == "swiglu":
            gate_BTF, value_BTF = a_BTF.chunk(2, dim=-1)
            a_BTF = F.silu(gate_BTF) * value_BTF
        elif self.activation == "relu2":
            a_BTF = squared_relu(a_BTF)
        elif self.activation == "relu":
            a_BTF = F.relu(a_BTF)
        else:
            a_BTF = F.gelu(a_BTF, approximate="tanh" if self.activation == "gelu-tanh" else "none")
        out_BTD: Tensor = self.down(a_BTF)
        return out_BTD


def squared_relu(a: Tensor) -> Tensor:
    """max(a, 0)^2 [3]."""
    out: Tensor = _SquaredReLU.apply(a)  # type: ignore[no-untyped-call]
    return out


class _SquaredReLU(torch.autograd.Function):
    """2 max(a, 0) is the derivative: two passes backwards, where the composition of relu and square takes five."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        positive = F.relu(a)
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        out: Tensor = (grad * positive).mul_(2.0)
        return out
