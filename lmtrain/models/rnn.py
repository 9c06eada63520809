"""RNN: recurrent language model with LSTM or GRU layers.

B rows, T symbols of a row, n inputs read at once, D width of embeddings, H hidden units, V symbols of the alphabet,
S sequences, N = B * T packed places.

[1] Mikolov et al.: Recurrent neural network based language model, 2010. [2] Sundermeyer et al.: LSTM Neural Networks
for Language Modeling, 2012. [3] Merity, Keskar, Socher: Regularizing and Optimizing LSTM Language Models, 2018 (tied
output, locked dropout). [4] Gal, Ghahramani, 2016 (locked dropout).

NOTE. In training the state starts at zero in every row, where [1-3] carry it from one batch to the next: rows are then
independent of each other, so that order, resuming and world size are functions of the step. Evaluation may carry it.
NOTE. No weight drop of recurrent weights, no activation regularisation [3].
NOTE. Locked dropout stands before each layer and before the output; its mask is drawn for each sequence (a row, or with
document masking each document's part of a row).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.checkpoint import checkpoint

from lmtrain.models import ModelConfig
from lmtrain.nn.counting import parameters
from lmtrain.nn.embedding import SymbolMatrix
from lmtrain.nn.head import Categorical
from lmtrain.nn.linear import Linear
from lmtrain.nn.recurrent import GRU, LSTM, locked_mask
from lmtrain.nn.rows import Packing, pack, shift
from lmtrain.nn.stream import CachedStream
from lmtrain.protocol import Cond, Distribution, Model, Spec, Stream


class Config(ModelConfig):
    """`model:` of kind rnn."""

    kind: Literal["rnn"] = "rnn"
    cell: Literal["lstm", "gru"] = "lstm"
    layers: int = Field(1, ge=1)
    width: int = Field(256, ge=1, description="hidden units of each layer")
    embed_width: int | None = Field(None, ge=1, description="null = width")
    tied: bool = Field(True, description="the output matrix is the input embedding")
    embed_std: float = Field(0.1, gt=0.0, description="first standard deviation of the embedding and the output matrix")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="locked dropout, the default of the two below")
    input_dropout: float | None = Field(None, ge=0.0, lt=1.0, description="before the first layer")
    output_dropout: float | None = Field(None, ge=0.0, lt=1.0, description="after every layer")


def build(config: Config, *, spec: Spec) -> Model:
    """The model of `config` for a corpus."""
    return RNN(config, spec=spec)


Hidden = tuple[Tensor, ...]
"""(h, c) of an LSTM layer, (h,) of a GRU layer; each [B, H]."""


@dataclass(slots=True)
class State:
    """What the network remembers.

    hidden: for each layer, None before anything was read. last_B: the symbol to read first (carried mode).
    """

    hidden: list[Hidden] | None = None
    last_B: Tensor | None = None


class RNN(Model):
    """The recurrent network of `config` over the symbols of `spec`; its context is unbounded."""

    context = None

    def __init__(self, config: Config, *, spec: Spec) -> None:
        super().__init__()
        self.config = config
        self.bos = spec.bos
        self.alphabet = spec.alphabet
        D, H = config.embed_width or config.width, config.width
        self.embed = SymbolMatrix(max(spec.alphabet, spec.bos + 1), D, alphabet=spec.alphabet, std=config.embed_std)
        cell = LSTM if config.cell == "lstm" else GRU
        self.layers = nn.ModuleList(cell(D if i == 0 else H, H) for i in range(config.layers))
        self.project = Linear(H, D, bias=False, std=H**-0.5) if config.tied and D != H else None
        self.lm_head = (
            None if config.tied else SymbolMatrix(spec.alphabet, H, alphabet=spec.alphabet, std=config.embed_std)
        )
        given = config.dropout
        self._input_dropout = given if config.input_dropout is None else config.input_dropout
        self._output_dropout = given if config.output_dropout is None else config.output_dropout
        self._checkpointed = False

    def forward(
        self,
        x_BT: Tensor,
        *,
        cond: Cond,
        want: Literal["logp", "logits", "next"] = "logp",
        state: State | None = None,
    ) -> Tensor:
        """logp_BT float32, the state starting at zero in every row, and at every document that `cond.first_BT` marks.

        want="logits": the head's parameters, float32 [B, T, V]. want="next": x is read as inputs, without a shift, and
        the answer is float32 [B, V], the logits of the symbol after them. A `state` is read, then updated.
        """
        first_BT = None
        if want == "next":
            in_BT = x_BT
        else:
            if state is not None and state.last_B is not None:
                cond = Cond(state.last_B, cond.first_BT, cond.label_B)
            in_BT, first_BT = shift(x_BT, cond=cond, bos=self.bos), cond.first_BT
        e_BTD = self.embed(in_BT)
        hidden = None if state is None else state.hidden
        if first_BT is None:
            h_BTH, last = self._layers(e_BTD, hidden)
        else:
            h_BTH, last = self._documents(e_BTD, pack(first_BT), hidden)
        if state is not None:
            state.hidden = last
            state.last_B = None if want == "next" else x_BT[:, -1]
        if want == "next":
            h_BTH = h_BTH[:, -1:]
        if self.project is not None:
            h_BTH = self.project(h_BTH)
        head = self.embed if self.lm_head is None else self.lm_head
        out: Tensor
        if want == "logp":
            out = head(h_BTH, x_BT, mode="logp")
        else:
            out = head(h_BTH, mode="logits")
        return out[:, 0] if want == "next" else out

    def predict(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        """Logits, float32 [B, T, V]."""
        out: Tensor = self(x_BT, cond=cond, want="logits")
        return out

    def stream(self, batch: int, *, cond: Cond) -> Stream:
        """A stream that keeps the recurrent state."""
        state = State()

        def read(in_Bn: Tensor) -> Distribution:
            return Categorical(self(in_Bn, cond=cond, want="next", state=state))

        return CachedStream(read, batch, cond=cond, context=None)

    def carry(self, x_BT: Tensor, *, cond: Cond, state: Any) -> tuple[Tensor, Any]:
        """(logp_BT, state after the row). A state remembers the row's last symbol, and reads that one first next time.

        `state` None starts at zero and reads `cond.start_B` first. The given state is not changed.
        """
        after = State() if state is None else State(state.hidden, state.last_B)
        logp_BT: Tensor = self(x_BT, cond=cond, state=after)
        return logp_BT, after

    def _layers(self, e_BTD: Tensor, hidden: list[Hidden] | None) -> tuple[Tensor, list[Hidden]]:
        B = e_BTD.shape[0]
        h_BTH = self._drop(e_BTD, self._input_dropout, B, None)
        last: list[Hidden] = []
        for i, layer in enumerate(self.layers):
            h_BTH, after = self._run(layer, h_BTH, None, None if hidden is None else hidden[i])
            last.append(after)
            h_BTH = self._drop(h_BTH, self._output_dropout, B, None)
        return h_BTH, last

    def _documents(self, e_BTD: Tensor, cut: Packing, hidden: list[Hidden] | None) -> tuple[Tensor, list[Hidden]]:
        """Rows re-cut where documents begin: each part runs by itself from zero, a row's first part from its state."""
        B, T, _ = e_BTD.shape
        h_NH = self._drop(e_BTD.flatten(0, 1)[cut.order_N], self._input_dropout, cut.segments, cut.segment_N)
        last: list[Hidden] = []
        for i, layer in enumerate(self.layers):
            begin = None
            if hidden is not None:
                begin = tuple(
                    h_BH.new_zeros(cut.segments, h_BH.shape[1]).index_copy(
                        0, cut.open_B, h_BH.masked_fill(cut.fresh_B[:, None], 0.0)
                    )
                    for h_BH in hidden[i]
                )
            h_NH, after = self._run(layer, h_NH, cut.sizes_L, begin)
            last.append(tuple(h_SH[cut.last_B] for h_SH in after))
            h_NH = self._drop(h_NH, self._output_dropout, cut.segments, cut.segment_N)
        return h_NH[cut.inverse_N].view(B, T, -1), last

    def _run(self, layer: nn.Module, h: Tensor, sizes_L: Tensor | None, begin: Hidden | None) -> tuple[Tensor, Hidden]:
        if self._checkpointed and self.training and torch.is_grad_enabled():
            out, *after = checkpoint(_layer, layer, h, sizes_L, begin, use_reentrant=False)
        else:
            out, *after = _layer(layer, h, sizes_L, begin)
        return out, tuple(after)

    def _drop(self, h: Tensor, dropout: float, sequences: int, sequence_N: Tensor | None) -> Tensor:
        """[B, T, H] with a mask for each row, or packed [N, H] with a mask for each sequence."""
        if not (dropout and self.training):
            return h
        mask_SH = locked_mask(sequences, h.shape[-1], dropout=dropout, like=h)
        return h * (mask_SH[:, None] if sequence_N is None else mask_SH[sequence_N])

    def checkpoint_activations(self, enabled: bool) -> None:
        """Keep only the input of each layer for the backward pass, and run the layer again there."""
        self._checkpointed = enabled

    def flops_per_symbol(self, context: int) -> float:
        """Training FLOPs a symbol (the same for every context): 3 times the forward products, 2 a matrix element."""
        c = self.config
        D, H = c.embed_width or c.width, c.width
        gates = 4 if c.cell == "lstm" else 3
        products = gates * H * (D + H) + (c.layers - 1) * gates * H * (H + H)
        products += self.alphabet * (D if c.tied else H)
        if self.project is not None:
            products += H * D
        return 3.0 * 2.0 * products

    def parameter_counts(self) -> dict[str, int]:
        """total; without_embeddings: less the symbols and an untied output matrix."""
        total = parameters(self)
        tables = [self.embed, self.lm_head]
        return {
            "total": total,
            "without_embeddings": total - sum(parameters(table) for table in tables if table is not None),
        }


def _layer(layer: nn.Module, h: Tensor, sizes_L: Tensor | None, begin: Hidden | None) -> tuple[Tensor, ...]:
    """(outputs, last h[, last c]) of one layer over rows [B, T, D], or over packed places [N, D] of sizes [L]."""
    lstm = isinstance(layer, nn.LSTM)
    given = None
    if begin is not None:
        given = tuple(b[None] for b in begin) if lstm else begin[0][None]
    value = h if sizes_L is None else PackedSequence(h, sizes_L)
    out, after = layer(value, given)
    if sizes_L is not None:
        out = out.data
    return (out, *(a[0] for a in (after if lstm else (after,))))
