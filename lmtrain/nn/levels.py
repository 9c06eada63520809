"""Levels of pixels as inputs and outputs of a convolutional network: scaled numbers in, a softmax over the levels out.

B rows, H x W pixels of C channels, T = H * W * C symbols of a row, V levels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lmtrain.nn.raster import scaled


def level_inputs(x_BCHW: Tensor, *, levels: int) -> Tensor:
    """float32 [B, C + 1, H, W]: levels as numbers in [-1, 1], and a channel of ones (zero outside the image)."""
    return F.pad(scaled(x_BCHW, levels=levels), (0, 0, 0, 0, 0, 1), value=1.0)


def level_params(maps_BFHW: Tensor, size: int) -> Tensor:
    """[B, T, size] of maps [B, C * size, H, W]: the `size` parameters of every symbol."""
    B, maps, H, W = maps_BFHW.shape
    return maps_BFHW.view(B, maps // size, size, H, W).permute(0, 3, 4, 1, 2).reshape(B, -1, size)


def levels_log_prob(logits_BTV: Tensor, x_BT: Tensor) -> Tensor:
    """[B, T]: log softmax(logits)[x] in nats, float32 (float64 for float64)."""
    wide = torch.promote_types(logits_BTV.dtype, torch.float32)
    return torch.log_softmax(logits_BTV.to(wide), dim=-1).gather(-1, x_BT[..., None])[..., 0]
