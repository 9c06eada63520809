"""RNN: recurrent language model with LSTM or GRU layers.

B rows, T symbols of a row, n inputs read at once, D width of embeddings, H hidden units, V symbols of the alphabet.

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
from torch.utils.checkpoint import checkpoint

from lmtrain.models import ModelConfig
from lmtrain.nn.counting import parameters
from lmtrain.nn.embedding import SymbolMatrix, read_out
from lmtrain.nn.head import Categorical
from lmtrain.nn.labels import class_embedding, class_vectors
from lmtrain.nn.linear import Linear
from lmtrain.nn.recurrent import GRU, LSTM, Hidden, locked_dropout
from lmtrain.nn.rows import Recut, need_symbols, recut, shift
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
    conditional: bool = Field(False, description="add the vector of the row's class to every input")


def build(config: Config, *, spec: Spec) -> Model:
    """The model of `config` for a corpus; ConfigError for one of real numbers."""
    return RNN(config, spec=spec)


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
        need_symbols(spec, kind="rnn")
        self.config = config
        self.bos = spec.bos
        self.alphabet = spec.alphabet
        D, H = config.embed_width or config.width, config.width
        self.embed = SymbolMatrix(max(spec.alphabet, spec.bos + 1), D, alphabet=spec.alphabet, std=config.embed_std)
        self.label_embed = class_embedding(config.conditional, spec=spec, width=D, std=config.embed_std)
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
        cut = None if first_BT is None else recut(first_BT, ends=state is not None)
        h_BTD = self.embed(in_BT)
        if self.label_embed is not None:
            h_BTD = h_BTD + class_vectors(self.label_embed, cond)[:, None]
        h_BTH, last = self._layers(h_BTD, cut, None if state is None else state.hidden)
        if state is not None:
            state.hidden = last
            state.last_B = None if want == "next" else x_BT[:, -1]
        if self.project is not None:
            h_BTH = self.project(h_BTH)
        return read_out(self.lm_head or self.embed, h_BTH, x_BT, want=want)

    def predict(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        """Logits, float32 [B, T, V]."""
        out: Tensor = self(x_BT, cond=cond, want="logits")
        return out

    def distribution(self, params_B: Tensor) -> Distribution:
        """Categorical, of logits [B, V]."""
        return Categorical(params_B)

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

    def _layers(self, h_BTH: Tensor, cut: Recut | None, begin: list[Hidden] | None) -> tuple[Tensor, list[Hidden]]:
        recompute = self._checkpointed and self.training and torch.is_grad_enabled()
        last: list[Hidden] = []
        h_BTH = self._drop(h_BTH, self._input_dropout, cut)
        for i, layer in enumerate(self.layers):
            start = None if begin is None else begin[i]
            if recompute:
                h_BTH, after = checkpoint(layer, h_BTH, cut, start, use_reentrant=False)
            else:
                h_BTH, after = layer(h_BTH, cut, start)
            last.append(after)
            h_BTH = self._drop(h_BTH, self._output_dropout, cut)
        return h_BTH, last

    def _drop(self, h_BTH: Tensor, dropout: float, cut: Recut | None) -> Tensor:
        return locked_dropout(h_BTH, dropout=dropout, cut=cut) if dropout and self.training else h_BTH

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
        """total; without_embeddings: less the symbols, the classes and an untied output matrix."""
        total = parameters(self)
        tables = [self.embed, self.label_embed, self.lm_head]
        return {
            "total": total,
            "without_embeddings": total - sum(parameters(table) for table in tables if table is not None),
        }
