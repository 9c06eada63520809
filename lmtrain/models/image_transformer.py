"""Image Transformer: self-attention over the pixels of an image, each block of them with a bounded memory.

B rows, T symbols of an image (rows, columns, channels), n inputs read at once, D width, V symbols of the alphabet.

[1] Parmar, Vaswani, Uszkoreit, Kaiser, Shazeer, Ku, Tran: Image Transformer, 2018.
[2] Salimans, Karpathy, Chen, Kingma: PixelCNN++ (discretised mixture of logistics), 2017.

NOTE. [1] describes rows and columns by sines, or learned, D/2 channels for the row and D/2 for the column and the
colour; here rows, columns and colours have learned vectors of D channels each, which are added.
NOTE. An input stands where the symbol stands that is predicted from it: the network reads [start, x_0 .. x_{T-2}], and
input t is given the row, the column and the colour of symbol t; its own colour shows in its vector, since each colour
has vectors of its own for the V intensities.
NOTE. With `head: logistics` [1] reads and predicts a pixel at a time, its three colours as one event of [2]. Here it is
one colour at a time, as for the categorical head: colours depend on each other through the network.
NOTE. In 2D local attention the image is taken rectangle by rectangle ([1], 3.3), so `order` is not the raster's unless
the rectangles are as wide as the image. Rectangles divide the image.
NOTE. `norm_first` moves layer normalisation from behind each sum, where [1] has it, to before attention and network.
NOTE. Classes (`conditional`) are vectors added to every input, as in [1] for its class-conditional images.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmtrain.errors import ConfigError, InputError
from lmtrain.models import ModelConfig
from lmtrain.nn.counting import parameters
from lmtrain.nn.embedding import SymbolMatrix, read_out
from lmtrain.nn.head import Categorical
from lmtrain.nn.labels import class_embedding, class_vectors
from lmtrain.nn.linear import Linear
from lmtrain.nn.local import Blocks, LocalAttention, LocalCache, in_line, in_plane, whole
from lmtrain.nn.mixtures import DiscretisedLogistics, discretised_logistics_log_prob
from lmtrain.nn.mlp import MLP, Activation
from lmtrain.nn.norms import LayerNorm
from lmtrain.nn.raster import Grid, image_grid, places
from lmtrain.nn.rows import shift
from lmtrain.nn.stream import CachedStream
from lmtrain.protocol import Cond, Distribution, Model, Spec, Stream

_EPS = 1e-6


class Config(ModelConfig):
    """`model:` of kind image_transformer."""

    kind: Literal["image_transformer"] = "image_transformer"
    layers: int = Field(4, ge=1)
    width: int = Field(128, ge=1, description="channels of the residual stream")
    heads: int = Field(4, ge=1, description="divides width")
    mlp_width: int | None = Field(None, ge=1, description="null = 4 width")
    activation: Activation = "relu"
    attention: Literal["local_1d", "local_2d", "full"] = "local_1d"
    query_block: int = Field(256, ge=1, description="symbols of a query block (local_1d)")
    memory_block: int = Field(256, ge=0, description="symbols before it that it sees (local_1d)")
    query_shape: tuple[int, int] = Field(
        (8, 16), description="rows and columns of a query block (local_2d); divide the grid"
    )
    memory_reach: tuple[int, int] = Field(
        (8, 16), description="rows above, and columns left and right, that a query block sees (local_2d)"
    )
    norm_first: bool = Field(False, description="normalise before attention and network instead of after the sum")
    bias: bool = Field(True, description="biases in linear maps and norms")
    init_std: float | None = Field(None, gt=0.0, description="of linear maps; null = 1 / sqrt(inputs)")
    embed_std: float = Field(0.1, gt=0.0, description="first standard deviation of all vectors that are looked up")
    head: Literal["categorical", "logistics"] = Field(
        "categorical", description="V logits, or a discretised mixture of logistics"
    )
    components: int = Field(10, ge=1, description="logistics of the mixture (head: logistics)")
    dropout: float = Field(
        0.0, ge=0.0, lt=1.0, description="of the inputs, and of what is added to the residual stream"
    )
    conditional: bool = Field(False, description="add the vector of the row's class to every input")

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.width % self.heads:
            near = [h for h in range(1, self.width + 1) if self.width % h == 0]
            better = min(near, key=lambda h: abs(h - self.heads))
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}; use {better}")
        if min(self.query_shape) < 1 or min(self.memory_reach) < 0:
            raise ValueError("query_shape wants two numbers >= 1, memory_reach two numbers >= 0")
        return self

    @property
    def hidden(self) -> int:
        """Channels inside the position-wise network."""
        return self.mlp_width or 4 * self.width


def build(config: Config, *, spec: Spec) -> Model:
    """The model of `config` for a corpus of images."""
    return ImageTransformer(config, spec=spec)


class Block(nn.Module):
    """norm(h + attention(h)), then norm(h + mlp(h)); with `norm_first` h + attention(norm(h)), h + mlp(norm(h))."""

    def __init__(self, config: Config, *, layer: int, blocks: Blocks) -> None:
        super().__init__()
        D, bias = config.width, config.bias
        std, down_std = config.init_std or D**-0.5, config.init_std or config.hidden**-0.5
        self.layer, self.first, self.dropout = layer, config.norm_first, config.dropout
        self.attention_norm = LayerNorm(D, eps=_EPS, bias=bias)
        self.attention = LocalAttention(D, heads=config.heads, blocks=blocks, bias=bias, std=std, out_std=std)
        self.mlp_norm = LayerNorm(D, eps=_EPS, bias=bias)
        self.mlp = MLP(D, hidden=config.hidden, activation=config.activation, bias=bias, std=std, out_std=down_std)

    def forward(self, h_BTD: Tensor, tables: tuple[Tensor, Tensor], cache: LocalCache | None) -> Tensor:
        """[B, T, D]."""

        def attend(h: Tensor) -> Tensor:
            a: Tensor = self.attention(h, tables=tables, cache=cache, layer=self.layer)
            return a

        if self.first:
            h_BTD = h_BTD + self._drop(attend(self.attention_norm(h_BTD)))
            return h_BTD + self._drop(self.mlp(self.mlp_norm(h_BTD)))
        h_BTD = self.attention_norm(h_BTD + self._drop(attend(h_BTD)))
        out_BTD: Tensor = self.mlp_norm(h_BTD + self._drop(self.mlp(h_BTD)))
        return out_BTD

    def _drop(self, h_BTD: Tensor) -> Tensor:
        return F.dropout(h_BTD, self.dropout, self.training) if self.dropout else h_BTD


def _blocks(config: Config, grid: Grid) -> Blocks:
    height, width, channels = grid
    if config.attention == "full":
        return whole(height * width * channels)
    if config.attention == "local_1d":
        return in_line(height * width * channels, query=config.query_block, memory=config.memory_block)
    if height % config.query_shape[0] or width % config.query_shape[1]:
        high, wide = config.query_shape
        raise ConfigError(
            f"model.query_shape = [{high}, {wide}] does not divide images of {height} x {width} pixels; "
            "use divisors of the two"
        )
    return in_plane(grid, query=config.query_shape, memory=config.memory_reach)


class ImageTransformer(Model):
    """The network of `config` over the images of `spec`."""

    context: int
    place_T3: Tensor
    offset_T: Tensor
    order_T: Tensor
    memory_NM: Tensor
    seen_N1LK: Tensor

    def __init__(self, config: Config, *, spec: Spec) -> None:
        super().__init__()
        grid = height, width, channels = image_grid(spec, kind="image_transformer")
        self.config, self.bos, self.alphabet, self.context = config, spec.bos, spec.alphabet, spec.context
        V, D, std = spec.alphabet, config.width, config.embed_std
        self.blocks = _blocks(config, grid)
        self.order = self.blocks.order
        self.embed = SymbolMatrix(channels * V + max(0, spec.bos + 1 - V), D, alphabet=channels * V, std=std)
        self.row_embed = SymbolMatrix(height, D, alphabet=height, std=std)
        self.column_embed = SymbolMatrix(width, D, alphabet=width, std=std)
        self.channel_embed = SymbolMatrix(channels, D, alphabet=channels, std=std)
        self.label_embed = class_embedding(config.conditional, spec=spec, width=D, std=std)
        self.layers = nn.ModuleList(Block(config, layer=i, blocks=self.blocks) for i in range(config.layers))
        self.final_norm = LayerNorm(D, eps=_EPS, bias=config.bias) if config.norm_first else None
        std = config.init_std or D**-0.5
        categorical = config.head == "categorical"
        self.lm_head = SymbolMatrix(V, D, alphabet=V, std=std) if categorical else None
        self.mixture = None if categorical else Linear(D, 3 * config.components, bias=True, std=std)
        self._keep_tables(grid)
        self._checkpointed = False

    def _keep_tables(self, grid: Grid) -> None:
        """By step, in `order`: where its symbol stands, and where the vectors of its input's colour begin."""
        place_T3 = torch.stack(places(grid), dim=1)
        order_T = torch.arange(len(place_T3)) if self.order is None else torch.tensor(self.order)
        place_T3 = place_T3[order_T]
        # The start's vector stands behind those of the last colour.
        colour_T = torch.cat([torch.full((1,), grid[2] - 1), place_T3[:-1, 2]])
        memory_NM, seen_N1LK = self.blocks.tables()
        tables = {"order_T": order_T, "place_T3": place_T3, "offset_T": colour_T * self.alphabet,
                  "memory_NM": memory_NM, "seen_N1LK": seen_N1LK}  # fmt: skip
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def forward(
        self,
        x_BT: Tensor,
        *,
        cond: Cond,
        want: Literal["logp", "logits", "next"] = "logp",
        cache: LocalCache | None = None,
    ) -> Tensor:
        """logp_BT float32; InputError for rows longer than an image (or shorter, when `order` is not the raster's).

        want="logits": the head's parameters, as of `predict`. want="next" (with a cache): x is read as inputs that
        follow the cached ones in `order`, at most to the end of a block, and the answer is the parameters
        of the symbol after them.
        """
        if want == "next":
            return self._read_out(self._network(x_BT, cond=cond, cache=cache), x_BT, want=want)
        symbols = x_BT.shape[1]
        if symbols > self.context or (symbols < self.context and self.order is not None):
            raise InputError(f"rows of {symbols} symbols were given; images have {self.context}")
        seen_BT = x_BT if self.order is None else x_BT[:, self.order_T]
        h_BTD = self._network(shift(seen_BT, cond=cond, bos=self.bos), cond=cond, cache=None)
        if self.order is not None:
            h_BTD = torch.empty_like(h_BTD).index_copy(1, self.order_T, h_BTD)
        return self._read_out(h_BTD, x_BT, want=want)

    def _read_out(self, h_BTD: Tensor, x_BT: Tensor, *, want: Literal["logp", "logits", "next"]) -> Tensor:
        if self.lm_head is not None:
            return read_out(self.lm_head, h_BTD, x_BT, want=want)
        assert self.mixture is not None
        params = self.mixture(h_BTD[:, -1] if want == "next" else h_BTD).unflatten(-1, (-1, 3))
        wide: Tensor = params.to(torch.promote_types(params.dtype, torch.float32))
        return discretised_logistics_log_prob(wide, x_BT, levels=self.alphabet) if want == "logp" else wide

    def predict(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        """Logits, float32 [B, T, V]; of a mixture float32 [B, T, K, 3]."""
        out: Tensor = self(x_BT, cond=cond, want="logits")
        return out

    def distribution(self, params_B: Tensor) -> Distribution:
        """Categorical, of logits [B, V]; discretised logistics, of a mixture [B, K, 3]."""
        return Categorical(params_B) if self.mixture is None else DiscretisedLogistics(params_B, levels=self.alphabet)

    def stream(self, batch: int, *, cond: Cond) -> Stream:
        """A stream that keeps the keys and values of what a memory block can still reach."""
        cache = LocalCache(self.blocks, self.config.layers)

        def read(in_Bn: Tensor) -> Distribution:
            while (left := cache.left()) < in_Bn.shape[1]:
                self(in_Bn[:, :left], cond=cond, want="next", cache=cache)
                in_Bn = in_Bn[:, left:]
            return self.distribution(self(in_Bn, cond=cond, want="next", cache=cache))

        return CachedStream(read, batch, cond=cond, context=self.context)

    def _network(self, in_BT: Tensor, *, cond: Cond, cache: LocalCache | None) -> Tensor:
        past, T = 0 if cache is None else cache.length, in_BT.shape[1]
        place_T3 = self.place_T3[past : past + T]
        h_BTD: Tensor = self.embed(in_BT + self.offset_T[past : past + T])
        h_BTD = h_BTD + (
            self.row_embed(place_T3[:, 0]) + self.column_embed(place_T3[:, 1]) + self.channel_embed(place_T3[:, 2])
        )
        if self.label_embed is not None:
            h_BTD = h_BTD + class_vectors(self.label_embed, cond)[:, None]
        if self.config.dropout:
            h_BTD = F.dropout(h_BTD, self.config.dropout, self.training)
        tables = (self.memory_NM, self.seen_N1LK)
        if cache is not None:
            cache.begin(in_BT.device)
        for layer in self.layers:
            if self._checkpointed and self.training and torch.is_grad_enabled():
                h_BTD = checkpoint(layer, h_BTD, tables, None, use_reentrant=False)
            else:
                h_BTD = layer(h_BTD, tables, cache)
        if cache is not None:
            cache.advance(T)
        return h_BTD if self.final_norm is None else self.final_norm(h_BTD)

    def checkpoint_activations(self, enabled: bool) -> None:
        """Keep only the input of each layer for the backward pass, and compute the rest of it again there."""
        self._checkpointed = enabled

    def flops_per_symbol(self, context: int) -> float:
        """Training FLOPs a symbol, averaged over an image: 3 times the forward products.

        A product with a matrix of m elements counts 2 m; a query with a key that it may see 4 width. Lookups, norms and
        the softmax are not counted.
        """
        c = self.config
        mlp = c.width * c.hidden * (3 if c.activation == "swiglu" else 2)
        products = c.layers * (4 * c.width * c.width + mlp)
        products += c.width * (self.alphabet if self.mixture is None else 3 * c.components)
        attention = c.layers * c.width * self.blocks.pairs() / self.context
        return 3.0 * (2.0 * products + 4.0 * attention)

    def parameter_counts(self) -> dict[str, int]:
        """total; without_embeddings: less symbols, places, classes and the output matrix."""
        tables = [self.embed, self.row_embed, self.column_embed, self.channel_embed, self.label_embed, self.lm_head]
        total = parameters(self)
        return {
            "total": total,
            "without_embeddings": total - sum(parameters(table) for table in tables if table is not None),
        }
