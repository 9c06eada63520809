"""A stream over an image network that is computed one pixel at a time.

B rows of a batch, n symbols read at once, C channels of a pixel, T symbols of an image.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lmtrain.nn.raster import Grid
from lmtrain.nn.stream import CachedStream
from lmtrain.protocol import Cond, Distribution, Stream

Network = Callable[[Tensor, int, int], Tensor]
"""(image_BT, row, column) -> [B, C, ...], the parameters of that pixel's channels; pixels not yet known are 0.

Called for the pixels in raster order, for one of several channels again when another channel is known. Maps that belong
to channel c depend on the channels before c alone, so what was computed when all but the last were known is final."""


def pixel_stream(
    network: Network, batch: int, *, grid: Grid, cond: Cond, distribution: Callable[[Tensor], Distribution]
) -> Stream:
    """The stream of a network that keeps what it computed; `distribution`: of one symbol's parameters [B, ...]."""
    read = _Reader(network, grid)
    symbols = grid[0] * grid[1] * grid[2]
    return CachedStream(lambda in_Bn: distribution(read(in_Bn)), batch, cond=cond, context=symbols)


class _Reader:
    """Fills the image as symbols come, and computes the pixels that the next symbol needs."""

    def __init__(self, network: Network, grid: Grid) -> None:
        self._network, self._grid = network, grid
        self._image_BT: Tensor | None = None
        self._known = 0
        self._final = 0

    def __call__(self, in_Bn: Tensor) -> Tensor:
        """[B, ...]: the parameters of the symbol after those that came so far."""
        height, width, channels = self._grid
        if self._image_BT is None:
            in_Bn = in_Bn[:, 1:]  # the start symbol says nothing: masks see zeros before the first pixel
            self._image_BT = torch.zeros(
                in_Bn.shape[0], height * width * channels, dtype=torch.int64, device=in_Bn.device
            )
        self._image_BT[:, self._known : self._known + in_Bn.shape[1]] = in_Bn
        self._known += in_Bn.shape[1]
        pixel, channel = divmod(self._known, channels)
        for place in range(self._final, pixel):
            self._network(self._image_BT, *divmod(place, width))
        params_BC = self._network(self._image_BT, *divmod(pixel, width))
        self._final = pixel + (channel == channels - 1)
        return params_BC[:, channel]
