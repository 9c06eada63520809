"""Rotary positions: pairs of channels of queries and keys turn by an angle that grows with the position.

T positions, d channels of a head.
[1] Su et al.: RoFormer, 2021. The two channels of a pair are neighbours, as in [1]: a pair is a complex number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def rotation(position_T: Tensor, *, head: int, base: float, dtype: torch.dtype) -> Tensor:
    """exp(i angle), complex [T, 1, d / 2] of real precision `dtype`; pair j of position t turns by t base^(-2 j / d).

    Computed in each forward rather than kept as a buffer, which a cast of the model to bf16 would round; the angles are
    taken in float64, so that far positions are as exact as near ones.
    """
    even = torch.arange(0, head, 2, dtype=torch.float64, device=position_T.device)
    angle_TH = position_T.to(torch.float64)[:, None] * torch.pow(base, -even / head)
    return torch.complex(angle_TH.cos().to(dtype), angle_TH.sin().to(dtype))[:, None]


def rotate(h_BTHd: Tensor, turn_T1p: Tensor) -> Tensor:
    """[B, T, heads, d]: every head of position t turned by the angles of t ([1], eq. 34)."""
    out_BTHd: Tensor = _Rotate.apply(h_BTHd, turn_T1p)  # type: ignore[no-untyped-call]
    return out_BTHd


def _turned(h: Tensor, turn: Tensor) -> Tensor:
    pairs = h.to(turn.real.dtype).view(*h.shape[:-1], -1, 2)
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2).to(h.dtype)


class _Rotate(torch.autograd.Function):
    """A turn is orthogonal: the gradient is turned back."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, turn: Tensor) -> Tensor:
        ctx.save_for_backward(turn)
        return _turned(h, turn)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (turn,) = ctx.saved_tensors
        return _turned(grad.contiguous(), turn.conj()), None
