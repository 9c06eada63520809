"""PixelRNN: LSTM layers over the pixels of an image, of rows or of diagonals in two directions.

B rows of a batch, T symbols of an image, F feature maps, H rows, W columns, C channels of a pixel, V symbols.

[1] van den Oord, Kalchbrenner, Kavukcuoglu: Pixel Recurrent Neural Networks, 2016.

NOTE. The start symbol is not read: what stands outside of the image is zero in every convolution, as in [1].
NOTE. Two symbols are two logits where [1] has a sigmoid: the same distributions.
NOTE. [1] has ReLU and a 1 x 1 convolution twice, then the softmax; the softmax has a 1 x 1 convolution of its own here,
behind another ReLU.
NOTE. No multi-scale network, no skip connections to the output: [1] reports little for them beside the residual ones.
NOTE. Classes (`conditional`, not in [1]) are vectors added to the first layer's feature maps at every pixel.
NOTE. Receptive field. The Row LSTM leaves out what lies in the rows above to the right of a triangle, which the first
layer's window begins three columns to the right. The Diagonal BiLSTM sees all rows above, but for one blind spot that
[1] does not mention: with mask A no position of a row knows the row's last pixel, and the mirrored map is moved down by
a row; so the last pixel of the row directly above is known only where the window reaches it, from column W - 4 on.
NOTE. `stream` recomputes: a pixel needs the whole row before it, in every layer.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmtrain.errors import ConfigError
from lmtrain.models import ModelConfig
from lmtrain.nn.counting import parameters
from lmtrain.nn.head import Categorical
from lmtrain.nn.labels import class_embedding, class_vectors
from lmtrain.nn.masked import MaskedConv, groups, products
from lmtrain.nn.raster import image_grid, planes, scaled
from lmtrain.nn.raster_lstm import DiagonalBiLSTM, RowLSTM
from lmtrain.nn.stream import RecomputingStream
from lmtrain.protocol import Cond, Distribution, Model, Spec, Stream


class Config(ModelConfig):
    """`model:` of kind pixelrnn."""

    kind: Literal["pixelrnn"] = "pixelrnn"
    variant: Literal["row_lstm", "diagonal_bilstm"] = "diagonal_bilstm"
    layers: int = Field(7, ge=1, description="residual LSTM layers")
    hidden: int = Field(16, ge=1, description="h: units of an LSTM layer; between layers there are 2 h feature maps")
    head_width: int = Field(32, ge=1, description="feature maps of the two layers before the output")
    conditional: bool = Field(False, description="add the vector of the row's class to the first feature maps")


def build(config: Config, *, spec: Spec) -> Model:
    """The model of `config` for a corpus of images."""
    return PixelRNN(config, spec=spec)


class Block(nn.Module):
    """x + up(lstm(x)): h units, brought back to 2 h feature maps ([1], 3.3)."""

    def __init__(self, config: Config, *, channels: int) -> None:
        super().__init__()
        h = config.hidden
        layer = RowLSTM if config.variant == "row_lstm" else DiagonalBiLSTM
        self.lstm = layer(2 * h, h, channels=channels)
        self.up = MaskedConv(groups(h, channels), groups(2 * h, channels), kind="B")

    def forward(self, x_BFHW: Tensor) -> Tensor:
        """[B, F, H, W], like the input."""
        out_BFHW: Tensor = x_BFHW + self.up(self.lstm(x_BFHW))
        return out_BFHW


class PixelRNN(Model):
    """The network of `config` over the images of `spec`."""

    context: int

    def __init__(self, config: Config, *, spec: Spec) -> None:
        super().__init__()
        self.grid = image_grid(spec, kind="pixelrnn")
        self.config, self.context, self.alphabet = config, spec.context, spec.alphabet
        C = self.grid[2]
        if min(config.hidden, config.head_width) < C:
            raise ConfigError(
                f"model.hidden = {config.hidden} and model.head_width = {config.head_width}: "
                f"each of the {C} channels of a pixel needs a feature map; use {C} or more"
            )
        maps, deep = groups(2 * config.hidden, C), groups(config.head_width, C)
        self.first = MaskedConv(torch.arange(C), maps, kind="A", kernel=(4, 7), left=3)
        self.label_embed = class_embedding(config.conditional, spec=spec, width=len(maps), std=0.1)
        self.layers = nn.ModuleList(Block(config, channels=C) for _ in range(config.layers))
        self.head = nn.ModuleList(
            [MaskedConv(maps, deep, kind="B", gain=2**0.5), MaskedConv(deep, deep, kind="B", gain=2**0.5)]
        )
        self.out = MaskedConv(deep, torch.arange(C).repeat_interleave(spec.alphabet), kind="B", wide=True)
        self._checkpointed = False

    def forward(self, x_BT: Tensor, *, cond: Cond, want: Literal["logp", "logits"] = "logp") -> Tensor:
        """logp_BT float32; InputError for rows that are not whole images. want="logits": float32 [B, T, V]."""
        h_BFHW = self.first(scaled(planes(x_BT, self.grid), levels=self.alphabet))
        if self.label_embed is not None:
            h_BFHW = h_BFHW + class_vectors(self.label_embed, cond)[:, :, None, None]
        for layer in self.layers:
            if self._checkpointed and self.training and torch.is_grad_enabled():
                h_BFHW = checkpoint(layer, h_BFHW, use_reentrant=False)
            else:
                h_BFHW = layer(h_BFHW)
        for layer in (*self.head, self.out):
            h_BFHW = layer(F.relu(h_BFHW))
        height, width, C = self.grid
        logits_BTV: Tensor = h_BFHW.view(-1, C, self.alphabet, height, width).permute(0, 3, 4, 1, 2).flatten(1, 3)
        if want == "logits":
            return logits_BTV
        return torch.log_softmax(logits_BTV, dim=-1).gather(2, x_BT[:, :, None])[:, :, 0]

    def predict(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        """Logits, float32 [B, T, V]."""
        out: Tensor = self(x_BT, cond=cond, want="logits")
        return out

    def distribution(self, params_B: Tensor) -> Distribution:
        """Categorical, of logits [B, V]."""
        return Categorical(params_B)

    def stream(self, batch: int, *, cond: Cond) -> Stream:
        """A stream that computes the whole image again for each symbol."""
        return RecomputingStream(self, batch, cond=cond, length=self.context)

    def checkpoint_activations(self, enabled: bool) -> None:
        """Keep only the input of each LSTM layer for the backward pass, and run the layer again there."""
        self._checkpointed = enabled

    def flops_per_symbol(self, context: int) -> float:
        """Training FLOPs a symbol (images have one size): 3 times the forward products of a pixel / its channels.

        Kernels count whole, masked parts included, as they are computed; cells outside of a skewed image do not.
        """
        state = sum(part.products for part in self.modules() if isinstance(part, RowLSTM | DiagonalBiLSTM))
        return 3.0 * 2.0 * (products(self) + state) / self.grid[2]

    def parameter_counts(self) -> dict[str, int]:
        """total; without_embeddings: less the vectors of classes."""
        total = parameters(self)
        return {
            "total": total,
            "without_embeddings": total - (0 if self.label_embed is None else parameters(self.label_embed)),
        }
