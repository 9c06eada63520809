"""Gated PixelCNN: a vertical and a horizontal stack of gated convolutions, which together read every earlier pixel.

B rows, H x W pixels of C channels, T = H * W * C symbols of a row, V levels, F feature maps.

[1] van den Oord, Kalchbrenner, Vinyals, Espeholt, Graves, Kavukcuoglu: Conditional Image Generation with PixelCNN
Decoders, 2016 (section 2 and figure 2: the vertical stack reads all rows above, the horizontal one its own row to the
left and the vertical maps; tanh times sigmoid; residual connections in the horizontal stack, not in its first layer;
class labels add a vector inside the gates). [2] van den Oord et al.: Pixel Recurrent Neural Networks, 2016 (masks,
groups of channels, the 1 x 1 layers before the softmax).

No blind spot: at (r, c) everything before it is read, as far as the kernels of all layers together reach: with
a = first_kernel // 2 and b = kernel // 2, a + b (layers - 1) rows up and columns to the left, as many to the right
above.
NOTE. The vertical stack reads the image moved one row down, so that no row of it is masked; its kernels are the upper
halves (with the centre row, after the first layer) of the k x k kernels of [1].
NOTE. Only the horizontal stack is masked at the pixel itself, by channel; vertical maps know whole rows above and
belong to no channel.
NOTE. Pixels are read as numbers in [-1, 1], beside a constant channel of ones that lets the network see where the image
ends. The row's start symbol is not read.
NOTE. The label's vector reaches the horizontal stack through the vertical one too, since what a vertical layer says to
its neighbour is taken before the gate and after the label.
NOTE. [1] does not give the first layer's kernel; 7 is that of [2], as are the head's two layers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmtrain.errors import ConfigError
from lmtrain.models import ModelConfig
from lmtrain.nn.counting import without
from lmtrain.nn.embedding import SymbolMatrix
from lmtrain.nn.head import Categorical
from lmtrain.nn.labels import given_labels, label_classes
from lmtrain.nn.levels import level_inputs, level_params, levels_log_prob
from lmtrain.nn.masked import CausalConv, MaskedConv, RowCache, down, groups, need_centre, products
from lmtrain.nn.pixelwise import pixel_stream
from lmtrain.nn.raster import image_grid, planes
from lmtrain.protocol import Cond, Distribution, Model, Spec, Stream


class Config(ModelConfig):
    """`model:` of kind gated_pixelcnn. The paper's sizes on ImageNet: 20 layers of 384 maps, 5 x 5."""

    kind: Literal["gated_pixelcnn"] = "gated_pixelcnn"
    layers: int = Field(8, ge=1, description="pairs of a vertical and a horizontal layer")
    width: int = Field(32, ge=1, description="feature maps of each stack (p)")
    head_width: int = Field(64, ge=1, description="feature maps of the 1 x 1 layer before the softmax")
    first_kernel: int = Field(7, ge=3, description="rows and columns of the first layer's kernels, odd")
    kernel: int = Field(3, ge=3, description="rows and columns of the others, odd")
    conditional: bool = Field(False, description="condition on class labels, where the corpus has them")

    @model_validator(mode="after")
    def _check(self) -> Config:
        need_centre(first_kernel=self.first_kernel, kernel=self.kernel)
        return self


def build(config: Config, *, spec: Spec) -> Model:
    """The model of `config` for a corpus; ConfigError for one that is not of images."""
    return GatedPixelCNN(config, spec=spec)


def gated(a_BFHW: Tensor) -> Tensor:
    """tanh of the first half of the maps times the sigmoid of the second [1, eq. 2]."""
    value, gate = a_BFHW.chunk(2, dim=1)
    return torch.tanh(value) * torch.sigmoid(gate)


@dataclass(slots=True)
class Kept:
    """What a stream keeps: rows of both stacks' inputs, and what the vertical stack says to the row that is being read.

    row: the last one that the vertical stack was computed for. across: for each layer [B, 2p, 1, W].
    """

    cache: RowCache
    row: int = -1
    across: list[Tensor] = field(default_factory=list)


class Vertical(nn.Module):
    """A layer of the vertical stack: its next maps, and what it says to the horizontal layer beside it."""

    def __init__(self, inputs: int, config: Config, *, kernel: tuple[int, int], classes: int) -> None:
        super().__init__()
        p = config.width
        self.convolve = CausalConv(inputs, 2 * p, kernel=kernel, left=kernel[1] // 2)
        self.across = CausalConv(2 * p, 2 * p)
        self.label_embed = SymbolMatrix(classes, 2 * p, alphabet=classes, std=0.1) if classes else None

    def forward(
        self, v_BFHW: Tensor, label_B: Tensor | None, at: RowCache | None = None, bordered: bool = False
    ) -> tuple[Tensor, Tensor]:
        """[B, p, H, W] and [B, 2p, H, W]."""
        a_BFHW = self.convolve(v_BFHW, at, bordered=bordered)
        if self.label_embed is not None:
            a_BFHW = a_BFHW + self.label_embed(label_B)[:, :, None, None]
        return gated(a_BFHW), self.across(a_BFHW)


class Horizontal(nn.Module):
    """A layer of the horizontal stack."""

    def __init__(
        self, read: Tensor, config: Config, *, columns: int, kind: Literal["A", "B"], channels: int, classes: int
    ) -> None:
        super().__init__()
        p = groups(config.width, channels)
        self.residual = kind == "B"
        self.convolve = MaskedConv(read, torch.cat([p, p]), kind=kind, kernel=(1, columns), left=columns - 1)
        self.out = MaskedConv(p, p, kind="B")
        self.label_embed = SymbolMatrix(classes, 2 * config.width, alphabet=classes, std=0.1) if classes else None

    def forward(
        self,
        h_BFHW: Tensor,
        across_BFHW: Tensor,
        label_B: Tensor | None,
        at: RowCache | None = None,
        bordered: bool = False,
    ) -> Tensor:
        """[B, p, H, W]."""
        a_BFHW = self.convolve(h_BFHW, at, bordered=bordered) + across_BFHW
        if self.label_embed is not None:
            a_BFHW = a_BFHW + self.label_embed(label_B)[:, :, None, None]
        out_BFHW: Tensor = self.out(gated(a_BFHW))
        return h_BFHW + out_BFHW if self.residual else out_BFHW


class GatedPixelCNN(Model):
    """The network of `config` over the images of `spec`. It reads whole images."""

    context: int

    def __init__(self, config: Config, *, spec: Spec) -> None:
        super().__init__()
        self.config = config
        self.grid = image_grid(spec, kind=config.kind)
        self.alphabet, self.context = spec.alphabet, spec.context
        C, p = self.grid[2], config.width
        if min(p, config.head_width) < C:
            raise ConfigError(
                f"model.width = {p} and model.head_width = {config.head_width} leave a channel of {C} "
                f"without feature maps; use {C} or more"
            )
        classes = label_classes(spec, conditional=config.conditional)
        a, b = config.first_kernel // 2, config.kernel // 2
        pixel, maps, head = torch.cat([torch.arange(C), torch.tensor([-1])]), groups(p, C), groups(config.head_width, C)
        self.verticals, self.horizontals = nn.ModuleList(), nn.ModuleList()
        for i in range(config.layers):
            up, inputs = ((a, config.first_kernel), C + 1) if i == 0 else ((b + 1, config.kernel), p)
            self.verticals.append(Vertical(inputs, config, kernel=up, classes=classes))
            self.horizontals.append(
                Horizontal(
                    pixel if i == 0 else maps,
                    config,
                    columns=1 + (b if i else a),
                    kind="B" if i else "A",
                    channels=C,
                    classes=classes,
                )
            )
        self.head = MaskedConv(maps, head, kind="B")
        levels = torch.arange(C).repeat_interleave(spec.alphabet)
        self.lm_head = MaskedConv(head, levels, kind="B", gain=0.1, wide=True)
        self._checkpointed = False

    def forward(
        self,
        x_BT: Tensor,
        *,
        cond: Cond,
        want: Literal["logp", "logits", "pixel"] = "logp",
        kept: Kept | None = None,
    ) -> Tensor:
        """logp_BT float32; InputError when rows are not whole images, or labels are wanted and were not given.

        want="logits": float32 [B, T, V]. want="pixel", with `kept`: [B, C, V], those of the pixel where it stands.
        """
        in_BFHW = level_inputs(planes(x_BT, self.grid), levels=self.alphabet)
        label_B = given_labels(cond) if self.config.conditional else None
        if want == "pixel":
            assert kept is not None, "a pixel is computed with what was kept of those before"
            return level_params(self._pixel(in_BFHW, label_B, kept), self.alphabet)
        logits_BTV = level_params(self._image(in_BFHW, label_B), self.alphabet)
        return levels_log_prob(logits_BTV, x_BT) if want == "logp" else logits_BTV

    def _image(self, in_BFHW: Tensor, label_B: Tensor | None) -> Tensor:
        recompute = self._checkpointed and self.training and torch.is_grad_enabled()
        v_BFHW, h_BFHW = down(in_BFHW), in_BFHW
        for vertical, horizontal in zip(self.verticals, self.horizontals, strict=True):
            if recompute:
                v_BFHW, across = checkpoint(vertical, v_BFHW, label_B, use_reentrant=False)
                h_BFHW = checkpoint(horizontal, h_BFHW, across, label_B, use_reentrant=False)
            else:
                v_BFHW, across = vertical(v_BFHW, label_B)
                h_BFHW = horizontal(h_BFHW, across, label_B)
        return self._read_out(h_BFHW)

    def _pixel(self, in_BFHW: Tensor, label_B: Tensor | None, kept: Kept) -> Tensor:
        """[B, C * V, 1, 1]. The vertical stack knows the rows above alone: it is computed once a row, for all of it."""
        row, column = kept.cache.row, kept.cache.column
        top, side = self.verticals[0], self.horizontals[0]
        assert isinstance(top, Vertical)
        assert isinstance(side, Horizontal)
        if kept.row != row:
            kept.row, kept.across = row, []
            v_BFHW = top.convolve.near(down(in_BFHW), row, 0, columns=self.grid[1])
            for i, vertical in enumerate(self.verticals):
                v_BFHW, across = vertical(v_BFHW, label_B, kept.cache.move(row, 0) if i else None, bordered=i == 0)
                kept.across.append(across)
            kept.cache.move(row, column)
        h_BFHW = side.convolve.near(in_BFHW, row, column)
        for i, (horizontal, across) in enumerate(zip(self.horizontals, kept.across, strict=True)):
            here = across[:, :, :, column : column + 1]
            h_BFHW = horizontal(h_BFHW, here, label_B, kept.cache if i else None, bordered=i == 0)
        return self._read_out(h_BFHW)

    def _read_out(self, h_BFHW: Tensor) -> Tensor:
        out_BFHW: Tensor = self.lm_head(F.relu(self.head(F.relu(h_BFHW))))
        return out_BFHW

    def predict(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        """Logits, float32 [B, T, V]."""
        out: Tensor = self(x_BT, cond=cond, want="logits")
        return out

    def distribution(self, params_B: Tensor) -> Distribution:
        """Categorical, of logits [B, V]."""
        return Categorical(params_B)

    def stream(self, batch: int, *, cond: Cond) -> Stream:
        """A stream that computes the vertical stack a row and the horizontal one a pixel at a time."""
        kept = Kept(RowCache(self.grid[1]))

        def network(image_BT: Tensor, row: int, column: int) -> Tensor:
            kept.cache.move(row, column)
            out: Tensor = self(image_BT, cond=cond, want="pixel", kept=kept)
            return out

        return pixel_stream(network, batch, grid=self.grid, cond=cond, distribution=self.distribution)

    def checkpoint_activations(self, enabled: bool) -> None:
        """Keep only the inputs of each layer for the backward pass, and compute the layer again there."""
        self._checkpointed = enabled

    def parameter_counts(self) -> dict[str, int]:
        """total; without_embeddings: less the labels and the output layer."""
        labels = [part for name, part in self.named_modules() if name.endswith("label_embed")]
        return without(self, self.lm_head, *labels)

    def flops_per_symbol(self, context: int) -> float:
        """Training FLOPs a symbol: 3 times the forward products, 2 a stored weight and pixel (masked ones included)."""
        return 3.0 * 2.0 * products(self) / self.grid[2]
