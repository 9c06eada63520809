"""PixelCNN: masked convolutions over an image, each channel of each pixel a softmax over its levels.

B rows, H x W pixels of C channels, T = H * W * C symbols of a row, V levels, F feature maps.

[1] van den Oord, Kalchbrenner, Kavukcuoglu: Pixel Recurrent Neural Networks, 2016 (section 3.4 and table 1: a 7 x 7
convolution with mask A; residual blocks 2h -> h -> h -> 2h around a 3 x 3 convolution with mask B; two 1 x 1 layers;
the softmax. Feature maps belong to R, G or B, and are masked so at a pixel).

NOTE. Blind spot [1, and van den Oord et al., 2016b]: with a = first_kernel // 2 and b = kernel // 2, the network at
(r, c) does not read (r - d, c + e) for d >= 1 and e > a + b (d - 1): above and to the right, a cone is never seen.
(Like every stack of convolutions, it reads only a + b * blocks rows up and columns to the left.)
NOTE. Pixels are read as numbers in [-1, 1], as in [1] (scaled), beside a constant channel of ones that lets the network
see where the image ends. The row's start symbol is not read.
NOTE. The image's border is zero; maps that do not divide among the channels are shared out as equally as can be.
NOTE. Class labels, which [1] does not have, add a learned vector to the first layer's maps (`conditional`).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmtrain.errors import ConfigError
from lmtrain.models import ModelConfig
from lmtrain.nn.counting import without
from lmtrain.nn.head import Categorical
from lmtrain.nn.labels import class_embedding, class_vectors
from lmtrain.nn.levels import level_inputs, level_params, levels_log_prob
from lmtrain.nn.masked import MaskedConv, RowCache, groups, need_centre, products
from lmtrain.nn.pixelwise import pixel_stream
from lmtrain.nn.raster import image_grid, planes
from lmtrain.protocol import Cond, Distribution, Model, Spec, Stream


class Config(ModelConfig):
    """`model:` of kind pixelcnn. The paper's sizes: MNIST 7 blocks of width 32, CIFAR-10 15 of 256, head_width 1024."""

    kind: Literal["pixelcnn"] = "pixelcnn"
    blocks: int = Field(7, ge=0, description="residual blocks")
    width: int = Field(32, ge=2, description="feature maps between the blocks (2h); inside there are half as many")
    head_width: int = Field(32, ge=1, description="feature maps of the 1 x 1 layers before the softmax")
    first_kernel: int = Field(7, ge=3, description="rows and columns of the first convolution, odd")
    kernel: int = Field(3, ge=1, description="rows and columns of those in the blocks, odd")
    conditional: bool = Field(False, description="condition on class labels, where the corpus has them")

    @model_validator(mode="after")
    def _check(self) -> Config:
        need_centre(first_kernel=self.first_kernel, kernel=self.kernel)
        if self.width % 2:
            raise ValueError(f"width = {self.width} is odd; blocks have half of it inside, use an even one")
        return self


def build(config: Config, *, spec: Spec) -> Model:
    """The model of `config` for a corpus; ConfigError for one that is not of images."""
    return PixelCNN(config, spec=spec)


class Block(nn.Module):
    """h + three convolutions of it, each after a ReLU [1, figure 5]."""

    def __init__(self, config: Config, *, channels: int) -> None:
        super().__init__()
        outer, inner = groups(config.width, channels), groups(config.width // 2, channels)
        b = config.kernel // 2
        self.reduce = MaskedConv(outer, inner, kind="B")
        self.convolve = MaskedConv(inner, inner, kind="B", kernel=(b + 1, config.kernel), left=b)
        self.expand = MaskedConv(inner, outer, kind="B", gain=config.blocks**-0.5)

    def forward(self, h_BFHW: Tensor, at: RowCache | None = None) -> Tensor:
        """[B, width, H, W]."""
        a_BFHW = self.convolve(F.relu(self.reduce(F.relu(h_BFHW), at)), at)
        out_BFHW: Tensor = h_BFHW + self.expand(F.relu(a_BFHW), at)
        return out_BFHW


class PixelCNN(Model):
    """The network of `config` over the images of `spec`. It reads whole images."""

    context: int

    def __init__(self, config: Config, *, spec: Spec) -> None:
        super().__init__()
        self.config = config
        self.grid = image_grid(spec, kind=config.kind)
        self.alphabet, self.context = spec.alphabet, spec.context
        C = self.grid[2]
        if min(config.width // 2, config.head_width) < C:
            raise ConfigError(
                f"model.width = {config.width} and model.head_width = {config.head_width} leave a channel of {C} "
                f"without feature maps; use {2 * C} and {C} or more"
            )
        self.label_embed = class_embedding(config.conditional, spec=spec, width=config.width, std=0.1)
        a = config.first_kernel // 2
        inner, head = groups(config.width, C), groups(config.head_width, C)
        pixel = torch.cat([torch.arange(C), torch.tensor([-1])])
        self.first = MaskedConv(pixel, inner, kind="A", kernel=(a + 1, config.first_kernel), left=a)
        self.blocks = nn.ModuleList(Block(config, channels=C) for _ in range(config.blocks))
        self.head = nn.ModuleList([MaskedConv(inner, head, kind="B"), MaskedConv(head, head, kind="B")])
        levels = torch.arange(C).repeat_interleave(spec.alphabet)
        self.lm_head = MaskedConv(head, levels, kind="B", gain=0.1, wide=True)
        self._checkpointed = False

    def forward(
        self,
        x_BT: Tensor,
        *,
        cond: Cond,
        want: Literal["logp", "logits", "pixel"] = "logp",
        cache: RowCache | None = None,
    ) -> Tensor:
        """logp_BT float32; InputError when rows are not whole images, or labels are wanted and were not given.

        want="logits": float32 [B, T, V]. want="pixel", with a cache: [B, C, V], those of the pixel where it stands.
        """
        in_BFHW = level_inputs(planes(x_BT, self.grid), levels=self.alphabet)
        if want == "pixel":
            assert cache is not None, "a pixel is computed with what was kept of those before"
            near = self.first.near(in_BFHW, cache.row, cache.column)
            return level_params(self._layers(self.first(near, bordered=True), cond, cache), self.alphabet)
        logits_BTV = level_params(self._layers(self.first(in_BFHW), cond, None), self.alphabet)
        return levels_log_prob(logits_BTV, x_BT) if want == "logp" else logits_BTV

    def _layers(self, h_BFHW: Tensor, cond: Cond, cache: RowCache | None) -> Tensor:
        if self.label_embed is not None:
            h_BFHW = h_BFHW + class_vectors(self.label_embed, cond)[:, :, None, None]
        recompute = self._checkpointed and self.training and torch.is_grad_enabled()
        for block in self.blocks:
            h_BFHW = checkpoint(block, h_BFHW, use_reentrant=False) if recompute else block(h_BFHW, cache)
        for layer in self.head:
            h_BFHW = layer(F.relu(h_BFHW), cache)
        out_BFHW: Tensor = self.lm_head(F.relu(h_BFHW), cache)
        return out_BFHW

    def predict(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        """Logits, float32 [B, T, V]."""
        out: Tensor = self(x_BT, cond=cond, want="logits")
        return out

    def distribution(self, params_B: Tensor) -> Distribution:
        """Categorical, of logits [B, V]."""
        return Categorical(params_B)

    def stream(self, batch: int, *, cond: Cond) -> Stream:
        """A stream that computes one pixel at a time and keeps the rows that its convolutions can still read."""
        cache = RowCache(self.grid[1])

        def network(image_BT: Tensor, row: int, column: int) -> Tensor:
            out: Tensor = self(image_BT, cond=cond, want="pixel", cache=cache.move(row, column))
            return out

        return pixel_stream(network, batch, grid=self.grid, cond=cond, distribution=self.distribution)

    def checkpoint_activations(self, enabled: bool) -> None:
        """Keep only the input of each block for the backward pass, and compute the block again there."""
        self._checkpointed = enabled

    def parameter_counts(self) -> dict[str, int]:
        """total; without_embeddings: less the labels and the output layer."""
        return without(self, self.label_embed, self.lm_head)

    def flops_per_symbol(self, context: int) -> float:
        """Training FLOPs a symbol: 3 times the forward products, 2 a stored weight and pixel (masked ones included)."""
        return 3.0 * 2.0 * products(self) / self.grid[2]
