"""Convolutions that read only what comes before, in raster order: masked ones, and ones whose window is shifted.

B rows of a batch, F feature maps, H rows and W columns of an image, C channels of a pixel, n columns read at once.

[1] van den Oord, Kalchbrenner, Kavukcuoglu: Pixel Recurrent Neural Networks, 2016 (masks A and B, groups of channels).
[2] Salimans, Karpathy, Chen, Kingma: PixelCNN++, 2017 (shifted windows instead of masks).
[3] Salimans, Kingma: Weight Normalization, 2016. [4] Ramachandran et al.: Fast Generation for Convolutional
Autoregressive Models, 2017 (keeping what was computed).

The window of output (r, c) ends in row r: kernels have kh rows, r - kh + 1 .. r, and kw columns, c - left ..
c - left + kw - 1. A window that reads row r to the right of c is for maps that are one row behind (a vertical stack),
or has to be masked there.
NOTE. [1] stores k x k kernels whose lower half is masked; the rows below the centre are not stored here at all.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.nn.initial import normal_


def need_centre(**sizes: int) -> None:
    """ValueError naming a kernel size that is even."""
    for key, size in sizes.items():
        if size % 2 == 0:
            raise ValueError(f"{key} = {size} is even; a masked window has a centre, use an odd one")


def groups(width: int, channels: int) -> Tensor:
    """int64 [width]: the channel of the pixel (R = 0, G = 1, B = 2) that each of `width` feature maps belongs to [1].

    In runs that are as equal as can be; `width` need not be a multiple of `channels`, but not less than it.
    """
    assert width >= channels, "every channel needs a feature map"
    return torch.arange(width) * channels // width


class RowCache:
    """What a stream keeps of an image that it reads pixel by pixel: for every convolution the rows it can still read.

    row, column: where the maps that are read next stand. A layer that was read at a pixel may be read there again (when
    another channel of the pixel is known): the later maps take the place of the earlier ones.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self.row = 0
        self.column = 0
        self._bands: dict[nn.Module, tuple[int, Tensor]] = {}

    def move(self, row: int, column: int) -> RowCache:
        """The cache itself, standing at another place: further right, or in a later row."""
        self.row, self.column = row, column
        return self

    def window(self, owner: nn.Module, h_BFn: Tensor, *, rows: int, left: int, right: int) -> Tensor:
        """Keep maps [B, F, 1, n] of `owner`, which begin at this place; [B, F, rows, left + n + right] around them.

        Zero outside of the image and where nothing was read.
        """
        n = h_BFn.shape[3]
        row, band = self._bands.get(owner, (0, None))
        if band is None:
            band = h_BFn.new_zeros(*h_BFn.shape[:2], rows, left + self.width + right)
        if row < self.row:
            band = F.pad(band[:, :, self.row - row :], (0, 0, 0, min(rows, self.row - row)))
        self._bands[owner] = (self.row, band)
        band[:, :, -1:, left + self.column : left + self.column + n] = h_BFn
        return band[:, :, :, self.column : self.column + left + n + right]


class CausalConv(nn.Module):
    """A convolution with the window described above; zero outside of the image.

    wide: the products are float32 or wider, also for half-precision models (an output layer). weight_norm: rows of the
    matrix are directions, each with a length of its own [3]. Weights start as N(0, gain^2 / inputs of an output),
    biases at zero.
    """

    mask: Tensor | None

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        kernel: tuple[int, int] = (1, 1),
        left: int = 0,
        stride: int = 1,
        bias: bool = True,
        gain: float = 1.0,
        wide: bool = False,
        weight_norm: bool = False,
        mask: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.kernel = kernel
        self.left, self.right = left, kernel[1] - 1 - left
        assert left >= 0 <= self.right, "the window holds the column of its output"
        self.stride, self.wide = stride, wide
        self.register_buffer("mask", mask, persistent=False)
        self.products = inputs * outputs * kernel[0] * kernel[1]
        read = self.products if mask is None else int(mask.sum().item()) * (self.products // mask.numel())
        std = gain / math.sqrt(max(1.0, read / outputs))
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *kernel))
        normal_(self.weight, std=std)
        self.length = nn.Parameter(torch.full((outputs,), gain)) if weight_norm else None
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, h_BFHW: Tensor, at: RowCache | None = None, *, bordered: bool = False) -> Tensor:
        """[B, outputs, H, W]. With `at`: h is [B, F, 1, n], the maps of n columns at that place; so is the answer.

        bordered: h holds what is around the outputs (`crop`), kh - 1 more rows and kw - 1 more columns than they are.
        """
        kh, kw = self.kernel
        weight, bias = self._weight()
        if kh * kw == 1:
            pass
        elif at is not None:
            h_BFHW = at.window(self, h_BFHW, rows=kh, left=self.left, right=self.right)
        elif not bordered:
            h_BFHW = F.pad(h_BFHW, (self.left, self.right, kh - 1, 0))
        h_BFHW = h_BFHW.to(weight.dtype)
        if not self.wide:
            return self._convolve(h_BFHW, weight, bias)
        with torch.autocast(h_BFHW.device.type, enabled=False):
            return self._convolve(h_BFHW, weight, bias)

    def near(self, h_BFHW: Tensor, row: int, column: int, *, columns: int = 1) -> Tensor:
        """What outputs (row, column .. column + columns - 1) read of the maps [B, F, H, W], for `bordered`."""
        return crop(
            h_BFHW,
            rows=(row - self.kernel[0] + 1, row + 1),
            columns=(column - self.left, column + columns + self.right),
        )

    def keep(self, h_BFHW: Tensor, at: RowCache) -> None:
        """What forward does to the cache, without an answer: for places that a strided convolution passes over."""
        at.window(self, h_BFHW, rows=self.kernel[0], left=self.left, right=self.right)

    def _convolve(self, h_BFHW: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if h_BFHW.shape[2:] == weight.shape[2:]:  # one pixel: far cheaper as a product
            return F.linear(h_BFHW.flatten(1), weight.flatten(1), bias)[:, :, None, None]
        return F.conv2d(h_BFHW, weight, bias, stride=self.stride)

    def _weight(self) -> tuple[Tensor, Tensor | None]:
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.wide:
            dtype = torch.promote_types(weight.dtype, torch.float32)
            weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        if self.mask is not None:
            weight = weight * self.mask.to(weight.dtype)
        if self.length is not None:
            weight = _of_length(weight, self.length, outputs=0)
        return weight, bias


def _of_length(weight: Tensor, length: Tensor, *, outputs: int) -> Tensor:
    """The weights of each output (dimension `outputs`) divided by their norm, times its length [3]."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    others = [dim for dim in range(4) if dim != outputs]
    norm = (wide.square().sum(others, keepdim=True) + 1e-12).sqrt()
    return (wide * (length.view([-1 if dim == outputs else 1 for dim in range(4)]) / norm)).to(weight.dtype)


class CausalUp(nn.Module):
    """A transposed convolution of stride 2: every pixel becomes 2 x 2 [2].

    Row i of the input reaches rows 2i and 2i + 1; column j reaches 2j - 1 .. 2j + 1 (`sideways`, for maps that are a
    row behind) or 2j and 2j + 1.
    """

    def __init__(self, inputs: int, outputs: int, *, sideways: bool, weight_norm: bool = False) -> None:
        super().__init__()
        self.left = 1 if sideways else 0
        kw = 3 if sideways else 2
        self.products = inputs * outputs * 2 * kw
        self.weight = nn.Parameter(torch.empty(inputs, outputs, 2, kw))
        normal_(self.weight, std=(inputs * kw / 2) ** -0.5)  # an output is reached from kw / 2 columns
        first = torch.full((outputs,), 2.0)  # of the 2 kw products that share a length an output adds up kw / 2
        self.length = nn.Parameter(first) if weight_norm else None
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, h_BFHW: Tensor, height: int, width: int) -> Tensor:
        """[B, outputs, height, width], cut from twice the input's size."""
        weight: Tensor = self.weight
        if self.length is not None:
            weight = _of_length(weight, self.length, outputs=1)
        out_BFHW = F.conv_transpose2d(h_BFHW, weight, self.bias, stride=2)
        return out_BFHW[:, :, :height, self.left : self.left + width]


class MaskedConv(CausalConv):
    """A convolution that reads of its own pixel only what comes before, by groups of channels [1].

    from_groups, to_groups: int64 [inputs], [outputs], the channel that each map belongs to (`groups`); -1 for an input
    that every output may read. At the pixel itself an output of channel g reads inputs of channels < g (mask A, for the
    pixels themselves) or <= g (mask B, for feature maps). To the right of it nothing is read; everything to the left
    and, with kernels of several rows, above is.
    """

    def __init__(
        self,
        from_groups: Tensor,
        to_groups: Tensor,
        *,
        kind: Literal["A", "B"],
        kernel: tuple[int, int] = (1, 1),
        left: int = 0,
        bias: bool = True,
        gain: float = 1.0,
        wide: bool = False,
    ) -> None:
        mask = torch.ones(len(to_groups), len(from_groups), *kernel)
        mask[:, :, -1, left + 1 :] = 0.0
        reads = from_groups < to_groups[:, None] if kind == "A" else from_groups <= to_groups[:, None]
        mask[:, :, -1, left] = reads.to(mask.dtype)
        super().__init__(
            len(from_groups),
            len(to_groups),
            kernel=kernel,
            left=left,
            bias=bias,
            gain=gain,
            wide=wide,
            mask=None if bool(mask.all()) else mask,
        )


def crop(h_BFHW: Tensor, *, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """Rows and columns [from, to) of the maps, zero outside of them."""
    height, width = h_BFHW.shape[2:]
    return F.pad(h_BFHW, (-columns[0], columns[1] - width, -rows[0], rows[1] - height))


def down(h_BFHW: Tensor) -> Tensor:
    """Every row one row lower, zero in the first: row r holds what stood in row r - 1."""
    return F.pad(h_BFHW, (0, 0, 1, -1))


def right(h_BFHW: Tensor) -> Tensor:
    """Every column one to the right, zero in the first: column c holds what stood in column c - 1."""
    return F.pad(h_BFHW, (1, -1, 0, 0))


def products(module: nn.Module) -> int:
    """Multiplications a pixel (of its own scale) of all causal convolutions of a module, masked ones included."""
    return sum(part.products for part in module.modules() if isinstance(part, CausalConv))
