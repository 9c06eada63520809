"""Rotary positions: pairs of channels of queries and keys turn by an angle that grows with the position.

[1] Su et al.: RoFormer, 2021. The two channels of a pair stand head / 2 apart (the layout of GPT-NeoX and Llama).
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotation(position_T: Tensor, *, head: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cos, sin), each [T, 1, head / 2]; angles are taken in float64, so that far positions are as exact as near ones.

    Computed in each forward rather than kept as buffers, which a cast of the model to bf16 would round.
    """
    half = torch.arange(0, head, 2, dtype=torch.float64, device=position_T.device)
    angle_TH = position_T.to(torch.float64)[:, None] * torch.pow(base, -half / head)
    return angle_TH.cos().to(dtype)[:, None], angle_TH.sin().to(dtype)[:, None]


def rotate(h_BTHd: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """[B, T, heads, d]: every head of position t turned by the angles of t ([1], eq. 34)."""
    cos, sin = turn
    a, b = h_BTHd.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(h_BTHd.dtype)
