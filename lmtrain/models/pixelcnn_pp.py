"""PixelCNN++: shifted convolutions at several scales, and a discretised mixture of logistics for each pixel.

B rows, H x W pixels of C channels, T = H * W * C symbols of a row, V levels, F feature maps, K components, P parameters
of a component.

[1] Salimans, Karpathy, Chen, Kingma: PixelCNN++, 2017. [2] van den Oord et al.: Conditional Image Generation with
PixelCNN Decoders, 2016 (the two stacks). [3] Salimans, Kingma: Weight Normalization, 2016. [4] Ramachandran et al.:
Fast Generation for Convolutional Autoregressive Models, 2017 (a coarse pixel is computed once for its 2 x 2).

As [1]: one stack of maps reads all rows above, one its own row to the left and the first stack; residual layers of two
convolutions, concatenated ELUs, dropout between them, a sigmoid gate; a layer down to every coarser scale, short-cuts
from each layer on the way down to its counterpart on the way up; channels of a pixel share the mixture's index, and
their means depend linearly on the earlier channels. The networks read nothing of the pixel itself.
NOTE. Maps are moved one row down (right) before their first convolution instead of after it; the moved border is zero,
and the constant channel of ones tells the network where it is.
NOTE. Weight normalisation without the data-dependent first values of [3]: lengths start so that maps of variance 1 give
maps of variance 1 (of 0.01 where [1] scales by 0.1).
NOTE. The output layer is not normalised, and its outputs are what is added to components that stand evenly over [-1, 1]
with scale 1 / K: those that start alike take long to part.
NOTE. Log-scales are held above -20 rather than -7. The average of weights over time is the trainer's affair.
NOTE. Sizes that are odd at some scale are rounded up going down, and cut going up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmtrain.models import ModelConfig
from lmtrain.nn.counting import without
from lmtrain.nn.embedding import SymbolMatrix
from lmtrain.nn.labels import given_labels, label_classes
from lmtrain.nn.levels import level_inputs
from lmtrain.nn.masked import CausalConv, CausalUp, RowCache, down, products, right
from lmtrain.nn.mixtures import DiscretisedLogistics, discretised_logistics_log_prob, pixel_chain
from lmtrain.nn.pixelwise import pixel_stream
from lmtrain.nn.raster import image_grid, planes, to_grid, to_row
from lmtrain.protocol import Cond, Distribution, Model, Spec, Stream


class Config(ModelConfig):
    """`model:` of kind pixelcnn_pp. The paper's CIFAR-10 model: 3 scales, 5 layers, 160 maps (as its code has)."""

    kind: Literal["pixelcnn_pp"] = "pixelcnn_pp"
    scales: int = Field(3, ge=1, description="resolutions, each half of the one before; 1 = no down-sampling")
    layers: int = Field(2, ge=1, description="residual layers of each stack at each scale, on each way")
    width: int = Field(32, ge=1, description="feature maps of each stack")
    components: int = Field(10, ge=1, description="logistics in a pixel's mixture")
    dropout: float = Field(0.5, ge=0.0, lt=1.0)
    weight_norm: bool = True
    conditional: bool = Field(False, description="condition on class labels, where the corpus has them")


def build(config: Config, *, spec: Spec) -> Model:
    """The model of `config` for a corpus; ConfigError for one that is not of images."""
    return PixelCNNpp(config, spec=spec)


def concat_elu(h_BFHW: Tensor) -> Tensor:
    """[B, 2F, H, W]: ELU of the maps and of their negatives."""
    return F.elu(torch.cat([h_BFHW, -h_BFHW], dim=1))


@dataclass(slots=True)
class Kept:
    """What a stream keeps of one scale: rows of the inputs of its convolutions, and what the coarser scale said last.

    rows, blocks: [B, F, 2, W], to the vertical and the horizontal stack of the two rows that it covers.
    """

    cache: RowCache
    rows: Tensor | None = None
    blocks: Tensor | None = None


@dataclass(slots=True)
class Reading:
    """What a stream keeps: of each scale, and of the row and the pixel that were computed last.

    above: for each scale the vertical maps of its present row, after each layer. params: of the pixel at `place`.
    """

    scales: list[Kept]
    above: list[list[Tensor]]
    row: int = -1
    place: tuple[int, int] | None = None
    params: Tensor | None = None


class Layer(nn.Module):
    """h + gated(two convolutions of it), other maps added between them [1]."""

    def __init__(self, config: Config, *, kernel: tuple[int, int], beside: int, classes: int) -> None:
        super().__init__()
        width, norm = config.width, config.weight_norm
        self.dropout = config.dropout
        self.first = CausalConv(2 * width, width, kernel=kernel, left=1, weight_norm=norm)
        self.beside = CausalConv(2 * beside, width, weight_norm=norm) if beside else None
        self.second = CausalConv(2 * width, 2 * width, kernel=kernel, left=1, gain=0.1, weight_norm=norm)
        self.label_embed = SymbolMatrix(classes, 2 * width, alphabet=classes, std=0.1) if classes else None
        self.recompute = False

    def forward(
        self, h_BFHW: Tensor, beside: Tensor | None, label_B: Tensor | None, at: RowCache | None = None
    ) -> Tensor:
        """[B, F, H, W], keeping for the backward pass nothing but its inputs when `recompute`."""
        if self.recompute and self.training and torch.is_grad_enabled():
            again: Tensor = checkpoint(self._compute, h_BFHW, beside, label_B, None, use_reentrant=False)
            return again
        return self._compute(h_BFHW, beside, label_B, at)

    def _compute(self, h_BFHW: Tensor, beside: Tensor | None, label_B: Tensor | None, at: RowCache | None) -> Tensor:
        a_BFHW = self.first(concat_elu(h_BFHW), at)
        if self.beside is not None:
            assert beside is not None
            a_BFHW = a_BFHW + self.beside(concat_elu(beside))
        a_BFHW = F.dropout(concat_elu(a_BFHW), self.dropout, self.training)
        a_BFHW = self.second(a_BFHW, at)
        if self.label_embed is not None:
            a_BFHW = a_BFHW + self.label_embed(label_B)[:, :, None, None]
        value, gate = a_BFHW.chunk(2, dim=1)
        out: Tensor = h_BFHW + value * torch.sigmoid(gate)
        return out


class Scale(nn.Module):
    """Both stacks at one resolution, on the way down and up, around the coarser scales."""

    def __init__(self, config: Config, *, scale: int, classes: int) -> None:
        super().__init__()
        width, norm = config.width, config.weight_norm
        self.scale = scale
        coarser = scale + 1 < config.scales

        def stack(kernel: tuple[int, int], count: int, beside: int) -> nn.ModuleList:
            return nn.ModuleList(Layer(config, kernel=kernel, beside=beside, classes=classes) for _ in range(count))

        self.vertical_down, self.horizontal_down = stack((2, 3), config.layers, 0), stack((2, 2), config.layers, width)
        ups = config.layers + coarser  # below the coarsest scale there is one more map to meet: what came from above
        self.vertical_up, self.horizontal_up = stack((2, 3), ups, width), stack((2, 2), ups, 2 * width)
        self.coarser = Scale(config, scale=scale + 1, classes=classes) if coarser else None
        if coarser:
            self.vertical_shrink = CausalConv(width, width, kernel=(2, 3), left=1, stride=2, weight_norm=norm)
            self.horizontal_shrink = CausalConv(width, width, kernel=(2, 2), left=1, stride=2, weight_norm=norm)
            self.vertical_grow = CausalUp(width, width, sideways=True, weight_norm=norm)
            self.horizontal_grow = CausalUp(width, width, sideways=False, weight_norm=norm)

    def vertical(
        self, u_BFHW: Tensor, above: list[list[Tensor]], label_B: Tensor | None, kept: list[Kept] | None = None
    ) -> Tensor:
        """The vertical maps [B, F, H, W]; `above` gets for this and coarser scales those after each layer.

        With `kept`, of one row: that of `kept`'s cache.
        """
        at = None if kept is None else kept[self.scale].cache
        passed, mine = [u_BFHW], above[self.scale]
        mine.clear()
        for layer in self.vertical_down:
            u_BFHW = layer(u_BFHW, None, label_B, at)
            passed.append(u_BFHW)
            mine.append(u_BFHW)
        u_BFHW = passed.pop() if self.coarser is None else self._vertical_coarser(u_BFHW, above, label_B, kept)
        for layer in self.vertical_up:
            u_BFHW = layer(u_BFHW, passed.pop(), label_B, at)
            mine.append(u_BFHW)
        return u_BFHW

    def _vertical_coarser(
        self, u_BFHW: Tensor, above: list[list[Tensor]], label_B: Tensor | None, kept: list[Kept] | None
    ) -> Tensor:
        assert self.coarser is not None
        H, W = u_BFHW.shape[2:]
        if kept is None:
            low = self.coarser.vertical(self.vertical_shrink(u_BFHW), above, label_B)
            whole: Tensor = self.vertical_grow(low, H, W)
            return whole
        mine, theirs = kept[self.scale], kept[self.scale + 1]
        row = mine.cache.row
        if row % 2:
            self.vertical_shrink.keep(u_BFHW, mine.cache)
        else:
            theirs.cache.move(row // 2, 0)
            low = self.vertical_shrink(u_BFHW, mine.cache)
            mine.rows = self.vertical_grow(self.coarser.vertical(low, above, label_B, kept), 2, W)
        assert mine.rows is not None
        return mine.rows[:, :, row % 2 : row % 2 + 1]

    def horizontal(
        self, h_BFHW: Tensor, above: list[list[Tensor]], label_B: Tensor | None, kept: list[Kept] | None = None
    ) -> Tensor:
        """The horizontal maps [B, F, H, W]; `above`: what `vertical` said. With `kept`, of one pixel."""
        at = None if kept is None else kept[self.scale].cache
        beside = iter(above[self.scale])

        def near() -> Tensor:
            u_BFHW = next(beside)
            return u_BFHW if at is None else u_BFHW[:, :, :, at.column : at.column + 1]

        passed = [h_BFHW]
        for layer in self.horizontal_down:
            h_BFHW = layer(h_BFHW, near(), label_B, at)
            passed.append(h_BFHW)
        h_BFHW = passed.pop() if self.coarser is None else self._horizontal_coarser(h_BFHW, above, label_B, kept)
        for layer in self.horizontal_up:
            h_BFHW = layer(h_BFHW, torch.cat([near(), passed.pop()], dim=1), label_B, at)
        return h_BFHW

    def _horizontal_coarser(
        self, h_BFHW: Tensor, above: list[list[Tensor]], label_B: Tensor | None, kept: list[Kept] | None
    ) -> Tensor:
        assert self.coarser is not None
        H, W = h_BFHW.shape[2:]
        if kept is None:
            low = self.coarser.horizontal(self.horizontal_shrink(h_BFHW), above, label_B)
            whole: Tensor = self.horizontal_grow(low, H, W)
            return whole
        mine, theirs = kept[self.scale], kept[self.scale + 1]
        row, column = mine.cache.row, mine.cache.column
        if row % 2 or column % 2:
            self.horizontal_shrink.keep(h_BFHW, mine.cache)
        else:
            theirs.cache.move(row // 2, column // 2)
            low = self.coarser.horizontal(self.horizontal_shrink(h_BFHW, mine.cache), above, label_B, kept)
            if mine.blocks is None:
                mine.blocks = low.new_zeros(*low.shape[:2], 2, 2 * theirs.cache.width)
            mine.blocks[:, :, :, column : column + 2] = self.horizontal_grow(low, 2, 2)
        assert mine.blocks is not None
        return mine.blocks[:, :, row % 2 : row % 2 + 1, column : column + 1]

    def multiplications(self, height: int, width: int) -> int:
        """In the forward pass of an image of this size."""
        layers = [self.vertical_down, self.horizontal_down, self.vertical_up, self.horizontal_up]
        here = sum(map(products, layers)) * height * width
        if self.coarser is None:
            return here
        low = ((height + 1) // 2, (width + 1) // 2)
        between: list[CausalConv | CausalUp] = [self.vertical_shrink, self.horizontal_shrink]
        between += [self.vertical_grow, self.horizontal_grow]
        return here + sum(part.products for part in between) * low[0] * low[1] + self.coarser.multiplications(*low)


class PixelCNNpp(Model):
    """The network of `config` over the images of `spec`. It reads whole images."""

    context: int
    start_KP: Tensor

    def __init__(self, config: Config, *, spec: Spec) -> None:
        super().__init__()
        self.config = config
        self.grid = image_grid(spec, kind=config.kind)
        self.alphabet, self.context = spec.alphabet, spec.context
        C, F_, norm = self.grid[2], config.width, config.weight_norm
        classes = label_classes(spec, conditional=config.conditional)
        self.first_above = CausalConv(C + 1, F_, kernel=(2, 3), left=1, weight_norm=norm)
        self.first_row = CausalConv(C + 1, F_, kernel=(1, 3), left=1, weight_norm=norm)
        self.first_left = CausalConv(C + 1, F_, kernel=(2, 1), weight_norm=norm)
        self.scales = Scale(config, scale=0, classes=classes)
        self.size = 1 + 2 * C + C * (C - 1) // 2
        K = config.components
        start_KP = torch.zeros(K, self.size)
        start_KP[:, 1 : 1 + C] = torch.linspace(-1.0, 1.0, K)[:, None]
        start_KP[:, 1 + C : 1 + 2 * C] = -math.log(K)
        self.register_buffer("start_KP", start_KP, persistent=False)
        self.lm_head = CausalConv(F_, config.components * self.size, gain=0.5, wide=True)

    def forward(
        self,
        x_BT: Tensor,
        *,
        cond: Cond,
        want: Literal["logp", "params", "pixel"] = "logp",
        reading: Reading | None = None,
    ) -> Tensor:
        """logp_BT float32; InputError when rows are not whole images, or labels are wanted and were not given.

        want="params": the chain of logistics, float32 [B, T, K, 3]. want="pixel", with a `reading`: [B, C, K, 3], those
        of the pixel where it stands.
        """
        in_BFHW = level_inputs(planes(x_BT, self.grid), levels=self.alphabet)
        label_B = given_labels(cond) if self.config.conditional else None
        x_BHWC = to_grid(x_BT, self.grid)
        if want == "pixel":
            assert reading is not None, "a pixel is computed with what was kept of those before"
            cache = reading.scales[0].cache
            x_BHWC = x_BHWC[:, cache.row : cache.row + 1, cache.column : cache.column + 1]
            maps_BFHW = self._pixel(in_BFHW, label_B, reading)
        else:
            maps_BFHW = self._image(in_BFHW, label_B)
        B, _, H, W = maps_BFHW.shape
        maps_BHWKP = maps_BFHW.view(B, -1, self.size, H, W).permute(0, 3, 4, 1, 2) + self.start_KP
        params_BTK3 = to_row(pixel_chain(maps_BHWKP, x_BHWC, levels=self.alphabet))
        return params_BTK3 if want != "logp" else self._score(params_BTK3, x_BT)

    def _score(self, params_BTK3: Tensor, x_BT: Tensor) -> Tensor:
        return discretised_logistics_log_prob(params_BTK3, x_BT, levels=self.alphabet)

    def _image(self, in_BFHW: Tensor, label_B: Tensor | None) -> Tensor:
        above: list[list[Tensor]] = [[] for _ in range(self.config.scales)]
        moved = down(in_BFHW)
        self.scales.vertical(self.first_above(moved), above, label_B)
        h_BFHW = self.first_row(moved) + self.first_left(right(in_BFHW))
        return self._read_out(self.scales.horizontal(h_BFHW, above, label_B))

    def _pixel(self, in_BFHW: Tensor, label_B: Tensor | None, reading: Reading) -> Tensor:
        """[B, K * P, 1, 1]. The vertical stack is computed once a row; nothing is computed twice for a pixel."""
        cache = reading.scales[0].cache
        row, column = cache.row, cache.column
        if reading.params is not None and reading.place == (row, column):
            return reading.params  # another channel of the pixel is known, which the networks do not read
        moved = down(in_BFHW)
        if reading.row != row:
            near = self.first_above.near(moved, row, 0, columns=self.grid[1])
            cache.move(row, 0)
            self.scales.vertical(self.first_above(near, bordered=True), reading.above, label_B, reading.scales)
            cache.move(row, column)
        h_BFHW = self.first_row(self.first_row.near(moved, row, column), bordered=True)
        h_BFHW = h_BFHW + self.first_left(self.first_left.near(right(in_BFHW), row, column), bordered=True)
        params = self._read_out(self.scales.horizontal(h_BFHW, reading.above, label_B, reading.scales))
        reading.row, reading.place, reading.params = row, (row, column), params
        return params

    def _read_out(self, h_BFHW: Tensor) -> Tensor:
        out_BFHW: Tensor = self.lm_head(F.elu(h_BFHW))
        return out_BFHW

    def predict(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        """The chain of logistics, float32 [B, T, K, 3]: at channel c of a pixel given its channels before c."""
        out: Tensor = self(x_BT, cond=cond, want="params")
        return out

    def distribution(self, params_B: Tensor) -> Distribution:
        """A discretised mixture of logistics, of params [B, K, 3]."""
        return DiscretisedLogistics(params_B, levels=self.alphabet)

    def stream(self, batch: int, *, cond: Cond) -> Stream:
        """A stream that computes the vertical stacks a row and the horizontal ones a pixel at a time, at each scale."""
        widths = [-(-self.grid[1] // 2**scale) for scale in range(self.config.scales)]
        reading = Reading([Kept(RowCache(width)) for width in widths], [[] for _ in widths])

        def network(image_BT: Tensor, row: int, column: int) -> Tensor:
            reading.scales[0].cache.move(row, column)
            out: Tensor = self(image_BT, cond=cond, want="pixel", reading=reading)
            return out

        return pixel_stream(network, batch, grid=self.grid, cond=cond, distribution=self.distribution)

    def checkpoint_activations(self, enabled: bool) -> None:
        """Keep only the inputs of each residual layer for the backward pass, and compute the layer again there."""
        for part in self.modules():
            if isinstance(part, Layer):
                part.recompute = enabled

    def parameter_counts(self) -> dict[str, int]:
        """total; without_embeddings: less the labels and the output layer."""
        labels = [part for name, part in self.named_modules() if name.endswith("label_embed")]
        return without(self, self.lm_head, *labels)

    def flops_per_symbol(self, context: int) -> float:
        """Training FLOPs a symbol: 3 times the forward products of all scales, 2 a weight and pixel."""
        height, width, channels = self.grid
        ends = sum(map(products, [self.first_above, self.first_row, self.first_left, self.lm_head]))
        pixels = height * width
        return 3.0 * 2.0 * (ends * pixels + self.scales.multiplications(height, width)) / (pixels * channels)
