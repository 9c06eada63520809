"""GPT: a decoder-only Transformer over symbols, from GPT-2's exact architecture to a present-day small one.

B rows, T symbols of a row, n inputs read at once, D width, V symbols of the alphabet, C context.

[1] Radford et al.: Language Models are Unsupervised Multitask Learners (GPT-2), 2019.
[2] Su et al.: RoFormer (rotary positions), 2021. [3] So et al.: Primer (squared ReLU), 2021.
[4] Henry et al.: Query-Key Normalization, 2020. [5] Shazeer: GLU Variants, 2020; Ainslie et al.: GQA, 2023.

NOTE. GPT-2 writes "logits at t predict symbol t + 1"; here position t of the output is about symbol t of the input, and
the network reads [start, x_0 .. x_{T-2}]. With start = the symbol before the row these are the same numbers.
NOTE. Positions in a row with document masking: learned positions count from each document's start, so that a document
reads the same wherever it stands in a row. Rotary attention depends on differences of positions only, so there nothing
needs to be counted anew.
NOTE. Blind spot of rotary positions: attention averages values, and rotary says only how far apart two inputs are.
While all inputs read so far are the same symbol the average is the same, so a row that begins with n equal inputs is
predicted alike for every n. It ends with the first other symbol; learned positions do not have it.
NOTE. Learned positions start with the standard deviation of the symbols (0.02; OpenAI's code has 0.01 for positions).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lmtrain.errors import ConfigError, InputError
from lmtrain.models import ModelConfig
from lmtrain.nn.attention import Attention, KeyValueCache
from lmtrain.nn.counting import parameters
from lmtrain.nn.embedding import SymbolMatrix, read_out
from lmtrain.nn.head import Categorical
from lmtrain.nn.labels import class_embedding, class_vectors
from lmtrain.nn.mlp import MLP, Activation
from lmtrain.nn.norms import NormKind, norm
from lmtrain.nn.rotary import rotation
from lmtrain.nn.rows import document_mask, document_positions, need_symbols, shift
from lmtrain.nn.stream import CachedStream
from lmtrain.protocol import Cond, Distribution, Model, Spec, Stream

_GPT2: dict[str, Any] = {
    "context": 1024,
    "positions": "learned",
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "activation": "gelu-tanh",
    "qk_norm": False,
    "bias": True,
    "tied": True,
    "zero_projections": False,
    "dropout": 0.1,
}
_PRESETS: dict[str, dict[str, Any]] = {
    "gpt2": {**_GPT2, "layers": 12, "width": 768, "heads": 12},
    "gpt2-medium": {**_GPT2, "layers": 24, "width": 1024, "heads": 16},
    "gpt2-large": {**_GPT2, "layers": 36, "width": 1280, "heads": 20},
    "gpt2-xl": {**_GPT2, "layers": 48, "width": 1600, "heads": 25},
}


class Config(ModelConfig):
    """`model:` of kind gpt. A preset gives the published values of [1]; keys written beside it go before them."""

    kind: Literal["gpt"] = "gpt"
    preset: Literal["gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"] | None = None
    layers: int = Field(4, ge=1)
    width: int = Field(128, ge=1, description="channels of the residual stream")
    heads: int = Field(4, ge=1, description="query heads; divides width")
    kv_heads: int | None = Field(
        None, ge=1, description="key-value heads, divides heads; null = heads, 1 = multi-query"
    )
    context: int | None = Field(None, ge=1, description="inputs the model can read; null = data.context")
    positions: Literal["learned", "rotary"] = "rotary"
    rotary_base: float = Field(10_000.0, gt=1.0)
    norm: NormKind = "rmsnorm"
    norm_eps: float = Field(1e-5, gt=0.0)
    activation: Activation = "relu2"
    mlp_width: int | None = Field(None, ge=1, description="null = 4 width; for swiglu 8/3 width, up to a multiple of 8")
    qk_norm: bool = True
    tied: bool = Field(True, description="the output matrix is the input embedding")
    bias: bool = Field(False, description="biases in linear maps and in layernorm")
    zero_projections: bool = Field(True, description="maps back into the residual stream start at zero")
    init_std: float = Field(0.02, gt=0.0)
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="the default of the three below")
    embed_dropout: float | None = Field(None, ge=0.0, lt=1.0)
    attention_dropout: float | None = Field(None, ge=0.0, lt=1.0)
    residual_dropout: float | None = Field(None, ge=0.0, lt=1.0)
    conditional: bool = Field(False, description="add the vector of the row's class to every input")

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, tree: Any) -> Any:
        if isinstance(tree, Mapping) and tree.get("preset") in _PRESETS:
            return {**_PRESETS[tree["preset"]], **tree}
        return tree

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.width % self.heads:
            near = [h for h in range(1, self.width + 1) if self.width % h == 0]
            better = min(near, key=lambda h: abs(h - self.heads))
            raise ValueError(f"heads = {self.heads} does not divide width = {self.width}; use {better}")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads = {self.kv_heads} does not divide heads = {self.heads}")
        if self.positions == "rotary" and (self.width // self.heads) % 2:
            raise ValueError(
                f"rotary positions need an even head size, width / heads = {self.width // self.heads} is odd"
            )
        return self

    @property
    def hidden(self) -> int:
        """Channels inside the MLP."""
        if self.mlp_width is not None:
            return self.mlp_width
        return 8 * math.ceil(self.width / 3) if self.activation == "swiglu" else 4 * self.width


def build(config: Config, *, spec: Spec) -> Model:
    """The model of `config` for a corpus; ConfigError for one of real numbers."""
    return GPT(config, spec=spec)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


class Block(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: Config, *, layer: int) -> None:
        super().__init__()
        std = config.init_std
        out_std = 0.0 if config.zero_projections else std / math.sqrt(2 * config.layers)
        self.layer = layer
        self.recompute: str | None = None
        self.residual_dropout = _or(config.residual_dropout, config.dropout)
        self.attention_norm = norm(config.norm, config.width, eps=config.norm_eps, bias=config.bias)
        self.attention = Attention(
            config.width,
            heads=config.heads,
            kv_heads=config.kv_heads or config.heads,
            bias=config.bias,
            qk_norm=config.qk_norm,
            dropout=_or(config.attention_dropout, config.dropout),
            eps=config.norm_eps,
            std=std,
            out_std=out_std,
        )
        self.mlp_norm = norm(config.norm, config.width, eps=config.norm_eps, bias=config.bias)
        self.mlp = MLP(
            config.width,
            hidden=config.hidden,
            activation=config.activation,
            bias=config.bias,
            std=std,
            out_std=out_std,
        )

    def forward(
        self,
        h_BTD: Tensor,
        turn: Tensor | None,
        mask: Tensor | None,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """[B, T, D]. The part named by `recompute` keeps nothing but its input for the backward pass."""
        again = self.recompute if self.training and torch.is_grad_enabled() else None
        if again == "attention":
            h_BTD = checkpoint(self._attend, h_BTD, turn, mask, None, use_reentrant=False)
        else:
            h_BTD = self._attend(h_BTD, turn, mask, cache)
        out_BTD: Tensor = checkpoint(self._think, h_BTD, use_reentrant=False) if again == "mlp" else self._think(h_BTD)
        return out_BTD

    def _attend(self, h_BTD: Tensor, turn: Tensor | None, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        a_BTD = self.attention(self.attention_norm(h_BTD), turn=turn, mask=mask, cache=cache, layer=self.layer)
        return h_BTD + self._drop(a_BTD)

    def _think(self, h_BTD: Tensor) -> Tensor:
        return h_BTD + self._drop(self.mlp(self.mlp_norm(h_BTD)))

    def _drop(self, h_BTD: Tensor) -> Tensor:
        return F.dropout(h_BTD, self.residual_dropout, self.training) if self.residual_dropout else h_BTD


class GPT(Model):
    """The Transformer of `config` over the symbols of `spec`."""

    context: int
    parts_to_recompute = ("attention", "mlp")

    def __init__(self, config: Config, *, spec: Spec) -> None:
        super().__init__()
        need_symbols(spec, kind="gpt")
        self.config = config
        self.context = config.context or spec.context
        if self.context < spec.context:
            raise ConfigError(
                f"model.context = {self.context} is less than data.context = {spec.context}; "
                f"set model.context to null or to {spec.context} or more"
            )
        self.bos = spec.bos
        self.alphabet = spec.alphabet
        rows = max(spec.alphabet, spec.bos + 1)
        self.embed = SymbolMatrix(rows, config.width, alphabet=spec.alphabet, std=config.init_std)
        self.position_embed = (
            SymbolMatrix(self.context, config.width, alphabet=self.context, std=config.init_std)
            if config.positions == "learned"
            else None
        )
        self.label_embed = class_embedding(config.conditional, spec=spec, width=config.width, std=config.init_std)
        self.blocks = nn.ModuleList(Block(config, layer=i) for i in range(config.layers))
        self.final_norm = norm(config.norm, config.width, eps=config.norm_eps, bias=config.bias)
        self.lm_head = (
            None
            if config.tied
            else SymbolMatrix(spec.alphabet, config.width, alphabet=spec.alphabet, std=config.init_std)
        )
        self._embed_dropout = _or(config.embed_dropout, config.dropout)
        self._checkpointed = False

    def forward(
        self,
        x_BT: Tensor,
        *,
        cond: Cond,
        want: Literal["logp", "logits", "next"] = "logp",
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """logp_BT float32; InputError when rows are longer than the context.

        want="logits": the head's parameters, float32 [B, T, V]. want="next" (with a cache): x is read as inputs that
        follow the cached ones, without a shift, and the answer is float32 [B, V], the logits of the symbol after them.
        """
        if want == "next":
            in_BT, first_BT = x_BT, None
        else:
            in_BT, first_BT = shift(x_BT, cond=cond, bos=self.bos), cond.first_BT
        h_BTD = self._network(in_BT, cond=cond, first_BT=first_BT, cache=cache)
        return read_out(self.lm_head or self.embed, self.final_norm(h_BTD), x_BT, want=want)

    def predict(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        """Logits, float32 [B, T, V]."""
        out: Tensor = self(x_BT, cond=cond, want="logits")
        return out

    def distribution(self, params_B: Tensor) -> Distribution:
        """Categorical, of logits [B, V]."""
        return Categorical(params_B)

    def stream(self, batch: int, *, cond: Cond) -> Stream:
        """A stream with a key-value cache."""
        cache = KeyValueCache(self.config.layers)

        def read(in_Bn: Tensor) -> Distribution:
            return Categorical(self(in_Bn, cond=cond, want="next", cache=cache))

        return CachedStream(read, batch, cond=cond, context=self.context)

    def _network(self, in_BT: Tensor, *, cond: Cond, first_BT: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        past = 0 if cache is None else cache.length
        T = in_BT.shape[1]
        if past + T > self.context:
            raise InputError(f"rows of {past + T} symbols are longer than the model's context of {self.context}")
        position_T = torch.arange(past, past + T, device=in_BT.device)
        mask = None if first_BT is None else document_mask(first_BT)
        h_BTD: Tensor = self.embed(in_BT)
        if self.label_embed is not None:
            h_BTD = h_BTD + class_vectors(self.label_embed, cond)[:, None]
        turn = None
        if self.position_embed is not None:
            where = position_T if first_BT is None else document_positions(first_BT)
            h_BTD = h_BTD + self.position_embed(where)
        else:
            head = self.config.width // self.config.heads
            wide = torch.float64 if h_BTD.dtype == torch.float64 else torch.float32
            turn = rotation(position_T, head=head, base=self.config.rotary_base, dtype=wide)
        if self._embed_dropout:
            h_BTD = F.dropout(h_BTD, self._embed_dropout, self.training)
        for block in self.blocks:
            if self._checkpointed and self.training and torch.is_grad_enabled():
                h_BTD = checkpoint(block, h_BTD, turn, mask, None, use_reentrant=False)
            else:
                h_BTD = block(h_BTD, turn, mask, cache)
        if cache is not None:
            cache.advance(T)
        return h_BTD

    def checkpoint_activations(self, enabled: bool, *, part: str | None = None) -> None:
        """Keep only the input of each block for the backward pass, and compute the rest of it again there.

        part: one of `parts_to_recompute`; then only that half of each block (its norm included) is computed again.
        """
        self._checkpointed = enabled and part is None
        for block in self.blocks:
            assert isinstance(block, Block)
            block.recompute = part if enabled else None

    def flops_per_symbol(self, context: int) -> float:
        """Training FLOPs a symbol in rows of `context`: 3 times the forward products, attention over the past alone.

        A product with a matrix of m elements counts 2 m; attention at position t counts 4 (t + 1) width, here averaged
        over the row. Lookups, norms and the softmax are not counted.
        """
        c = self.config
        head = c.width // c.heads
        qkv = c.width * (c.heads + 2 * (c.kv_heads or c.heads)) * head
        mlp = c.width * c.hidden * (3 if c.activation == "swiglu" else 2)
        products = c.layers * (qkv + c.width * c.width + mlp) + self.alphabet * c.width
        attention = c.layers * c.width * (context + 1) / 2
        return 3.0 * (2.0 * products + 4.0 * attention)

    def parameter_counts(self) -> dict[str, int]:
        """total; without_embeddings: less symbols, positions, classes and an untied output matrix."""
        tables = [self.embed, self.position_embed, self.label_embed, self.lm_head]
        total = parameters(self)
        return {
            "total": total,
            "without_embeddings": total - sum(parameters(table) for table in tables if table is not None),
        }
