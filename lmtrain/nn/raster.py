"""The raster: an image of H rows, W columns and C channels is a row of T = H * W * C symbols.

B rows of a batch, V symbols of the alphabet. Order: row, column, channel, the channel fastest: symbol t belongs to the
pixel t // C and is its channel t % C. Networks over pixels want channels first, [B, C, H, W].
"""

from __future__ import annotations

import torch
from torch import Tensor

from lmtrain.errors import ConfigError, InputError
from lmtrain.protocol import Spec

Grid = tuple[int, int, int]
"""(H, W, C)."""


def image_grid(spec: Spec, *, kind: str) -> Grid:
    """The grid of a corpus of images with discrete symbols, for the model `kind`.

    Raises ConfigError when the corpus has no grid, has real numbers, or when rows are not whole images.
    """
    if spec.grid is None:
        raise ConfigError(
            f"model.kind = {kind} reads images, and this corpus has no grid; prepare a corpus of images, "
            "or take gpt or rnn"
        )
    if spec.alphabet < 2:
        what = "real numbers" if spec.alphabet == 0 else f"an alphabet of {spec.alphabet}"
        raise ConfigError(
            f"model.kind = {kind} needs pixels of 2 or more levels, and this corpus has {what}; "
            "set data.view.dequantise to false or prepare it with discrete levels"
        )
    height, width, channels = spec.grid
    symbols = height * width * channels
    if spec.context != symbols:
        raise ConfigError(
            f"data.context = {spec.context} is not a whole image of {height} x {width} x {channels} = {symbols} "
            "symbols; set data.context to null"
        )
    return spec.grid


def to_grid(x_BT: Tensor, grid: Grid) -> Tensor:
    """[B, H, W, C] of rows [B, T]; InputError when T is not H * W * C."""
    height, width, channels = grid
    if x_BT.ndim != 2 or x_BT.shape[1] != height * width * channels:
        raise InputError(
            f"rows of shape {tuple(x_BT.shape)} were given; an image is a row of "
            f"{height} x {width} x {channels} = {height * width * channels} symbols"
        )
    return x_BT.view(-1, height, width, channels)


def to_row(x_BHWC: Tensor) -> Tensor:
    """[B, T, ...] of [B, H, W, C, ...]."""
    return x_BHWC.flatten(1, 3)


def planes(x_BT: Tensor, grid: Grid) -> Tensor:
    """[B, C, H, W] of rows [B, T]; InputError when T is not H * W * C."""
    return to_grid(x_BT, grid).permute(0, 3, 1, 2)


def scaled(x: Tensor, *, levels: int) -> Tensor:
    """float32: symbols 0 .. levels - 1 spread evenly over [-1, 1]."""
    return x.float() * (2.0 / (levels - 1)) - 1.0


def places(grid: Grid, *, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(row_T, column_T, channel_T), int64: where each symbol of a row stands."""
    _, width, channels = grid
    t_T = torch.arange(grid[0] * width * channels, device=device)
    return t_T // (width * channels), t_T // channels % width, t_T % channels
