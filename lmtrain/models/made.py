"""MADE: an autoencoder of 1 or 2 hidden layers whose masks make it autoregressive; one mask, or an ensemble of them.

B rows, D symbols of a record, V symbols of the alphabet, M masks, I numbers in a symbol (1 for bits, else V), n symbols
read at once.

[1] Germain, Gregor, Murray, Larochelle: MADE: Masked Autoencoder for Distribution Estimation, ICML 2015.

With `masks: 1` every conditional is p(x_d | the symbols before it in the ordering), in one pass. With more, a training
step's micro-batch uses one of them, drawn from the noise of (seed, step, index of the micro-batch); evaluation is the
mixture of the M joint distributions, log (1/M sum of p_m(x)). Averaging the conditionals (or logits) instead, under
orderings that differ, lets a symbol see itself. A mixture has one log-probability a record: it stands on the last
symbol, with 0 elsewhere; it has no `predict` and no `stream`, and is drawn from by drawing a mask.

NOTE. Masks are computed from degrees where they are used and multiplied with the weights, which are never overwritten.
NOTE. [1] cycles through its masks by minibatches; here they are drawn, so that a step is a function of its number.
NOTE. No weights that tell the hidden units which mask it is (section 4.2 of [1]).
NOTE. Records of V > 2 levels are read one-hot and have a softmax a symbol; [1] has bits.
NOTE. `conditional` adds a bias of each class to the first hidden layer and to the outputs; [1] has no classes.
NOTE. First values: N(0, 1 / inputs) for hidden layers, and zeros for what makes the outputs; [1] does not say.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from lmtrain.errors import InputError
from lmtrain.models import ModelConfig
from lmtrain.nn.embedding import SymbolMatrix
from lmtrain.nn.head import Categorical
from lmtrain.nn.labels import class_embedding, class_vectors
from lmtrain.nn.mixtures import Bernoulli, bernoulli_log_prob
from lmtrain.nn.ordered import OrderedLinear, degrees
from lmtrain.nn.records import Reading, check_records, record_stream
from lmtrain.protocol import Cond, Distribution, Model, Spec, Stream


class Config(ModelConfig):
    """`model:` of kind made."""

    kind: Literal["made"] = "made"
    width: int = Field(500, ge=1, description="hidden units a layer")
    layers: int = Field(1, ge=1, le=2, description="hidden layers")
    activation: Literal["relu", "sigmoid"] = "relu"
    ordering: Literal["natural", "drawn"] = Field("natural", description="of the symbols; drawn: from mask_seed")
    masks: int = Field(1, ge=1, le=4096, description="more than one: trained in turn, evaluated as a mixture")
    orderings: Literal["one", "each"] = Field("one", description="with masks > 1, ordering drawn: one for all, or each")
    mask_seed: int = Field(0, ge=0, lt=2**63, description="of orderings and of the hidden units' degrees")
    direct: bool = Field(False, description="masked connections from the inputs to the outputs too")
    conditional: bool = Field(False, description="biases of each class")

    @model_validator(mode="after")
    def _own_orderings(self) -> Config:
        if self.orderings == "each" and (self.masks == 1 or self.ordering == "natural"):
            raise ValueError(
                f"orderings = each, with masks = {self.masks} and ordering = {self.ordering}: give masks > 1 and "
                "ordering = drawn, or leave orderings out"
            )
        return self


def build(config: Config, *, spec: Spec) -> Model:
    """The model of `config` for a corpus of records of bits or levels; ConfigError for any other."""
    return MADE(config, spec=spec) if config.masks == 1 else Ensemble(config, spec=spec)


class MADE(Model):
    """The masked autoencoder under one mask."""

    def __init__(self, config: Config, *, spec: Spec) -> None:
        super().__init__()
        check_records(spec, kind=config.kind, reads="levels", conditional=config.conditional)
        self.config = config
        self.context = self.symbols = spec.context
        self.alphabet = spec.alphabet
        self.numbers = 1 if spec.alphabet == 2 else spec.alphabet
        symbols_MD, hidden = degrees(
            spec.context,
            hidden=[config.width] * config.layers,
            masks=config.masks,
            seed=config.mask_seed,
            shuffled=config.ordering == "drawn",
            own=config.orderings == "each",
        )
        self.orders: list[list[int]] = np.argsort(symbols_MD, axis=1).tolist()
        self.order = tuple(self.orders[0])
        outer_MI = np.repeat(symbols_MD, self.numbers, axis=1)
        self.layers = nn.ModuleList(
            OrderedLinear(before, after, strict=False, std=before.shape[1] ** -0.5)
            for before, after in zip([outer_MI, *hidden], hidden, strict=False)
        )
        self.out = OrderedLinear(hidden[-1], outer_MI, strict=True, std=0.0)
        self.direct = OrderedLinear(outer_MI, outer_MI, strict=True, std=0.0, bias=False) if config.direct else None
        self.label_embed = self._classes(spec, config.width)
        self.label_embed_out = self._classes(spec, outer_MI.shape[1])

    def _classes(self, spec: Spec, width: int) -> SymbolMatrix | None:
        return class_embedding(self.config.conditional, spec=spec, width=width, std=0.01)

    def forward(
        self,
        x_BT: Tensor,
        *,
        cond: Cond,
        want: Literal["logp", "logits", "next"] = "logp",
        state: Reading | None = None,
    ) -> Tensor:
        """logp_BT float32. want="logits": float32 [B, T] of bits, [B, T, V] of levels. want="next": those of the symbol
        after the symbols x, and those in `state`, in the model's order."""
        if want == "next":
            assert state is not None
            return self._next(state.unread(x_BT), cond, state)
        logits_BT = self._logits(x_BT, cond, 0)
        return self._log_prob(logits_BT, x_BT) if want == "logp" else logits_BT

    def _read(self, x_Bn: Tensor) -> Tensor:
        """[B, n * I] the numbers of symbols."""
        return x_Bn if self.numbers == 1 else F.one_hot(x_Bn, self.alphabet).flatten(1)

    def _activated(self, h: Tensor) -> Tensor:
        return torch.relu(h) if self.config.activation == "relu" else torch.sigmoid(h)

    def _outputs(self, h_BH: Tensor, cond: Cond, member: int | Tensor, outputs: slice | None) -> Tensor:
        """What the first layer's sums and the classes make of (some of) the outputs."""
        if self.label_embed is not None:
            h_BH = h_BH + class_vectors(self.label_embed, cond)
        for layer in self.layers[1:]:
            h_BH = layer(self._activated(h_BH), member=member)
        out_BO: Tensor = self.out(self._activated(h_BH), member=member, outputs=outputs)
        if self.label_embed_out is not None:
            out_BO = out_BO + class_vectors(self.label_embed_out, cond)[:, outputs or slice(None)]
        return out_BO

    def _logits(self, x_BT: Tensor, cond: Cond, member: int | Tensor) -> Tensor:
        """float32 [B, T] or [B, T, V], under a mask."""
        in_BI = self._read(x_BT)
        out_BO = self._outputs(self.layers[0](in_BI, member=member), cond, member, None)
        if self.direct is not None:
            out_BO = out_BO + self.direct(in_BI, member=member)
        out_BO = out_BO.float()
        return out_BO if self.numbers == 1 else out_BO.view(len(x_BT), -1, self.alphabet)

    def _next(self, x_Bn: Tensor, cond: Cond, state: Reading) -> Tensor:
        """The first layer's sums, and those of the direct connections, are kept; each symbol adds its columns."""
        readers = [layer for layer in (self.layers[0], self.direct) if layer is not None]
        if state.sums is None:
            nothing_BI = torch.zeros(len(x_Bn), self.symbols * self.numbers, device=x_Bn.device)
            state.sums = tuple(layer(nothing_BI) for layer in readers)
        kept, order = list(state.sums), self.orders[0]
        for x_B in x_Bn.unbind(dim=1):
            column, in_BI = self._place(order[state.place]), self._read(x_B[:, None])
            kept = [sum_BO + layer(in_BI, inputs=column) for sum_BO, layer in zip(kept, readers, strict=True)]
            state.place += 1
        state.sums = tuple(kept)
        place = self._place(order[state.place])
        out_BO = self._outputs(kept[0], cond, 0, place)
        if self.direct is not None:
            out_BO = out_BO + kept[1][:, place]
        return out_BO[:, 0].float() if self.numbers == 1 else out_BO.float()

    def _place(self, symbol: int) -> slice:
        return slice(symbol * self.numbers, (symbol + 1) * self.numbers)

    def _log_prob(self, logits_BT: Tensor, x_BT: Tensor) -> Tensor:
        if self.numbers == 1:
            return bernoulli_log_prob(logits_BT, x_BT)
        return torch.log_softmax(logits_BT, dim=-1).gather(-1, x_BT[..., None])[..., 0]

    def predict(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        """Logits, float32: of a 1 [B, T], or of V levels [B, T, V]."""
        out: Tensor = self(x_BT, cond=cond, want="logits")
        return out

    def distribution(self, params_B: Tensor) -> Distribution:
        """Bernoulli or categorical, of logits [B] or [B, V]."""
        return Bernoulli(params_B) if self.numbers == 1 else Categorical(params_B)

    def stream(self, batch: int, *, cond: Cond) -> Stream:
        """A stream that keeps the first layer's sums: O(H) a symbol with one hidden layer."""
        return record_stream(self, batch, cond=cond)

    def flops_per_symbol(self, context: int) -> float:
        """Training FLOPs a symbol: 3 times the forward products under one mask, masked elements counted."""
        H, outer = self.config.width, context * self.numbers
        products = 2 * outer * H + (self.config.layers - 1) * H * H + (outer * outer if self.config.direct else 0)
        return 3.0 * 2.0 * products / context


class Ensemble(MADE):
    """The mixture over M masks: one log-probability a record."""

    def __init__(self, config: Config, *, spec: Spec) -> None:
        super().__init__(config, spec=spec)
        self.order = None

    def forward(
        self,
        x_BT: Tensor,
        *,
        cond: Cond,
        want: Literal["logp", "logits", "next"] = "logp",
        state: Reading | None = None,
        member_B: Tensor | None = None,
    ) -> Tensor:
        """Evaluating: float32 [B, T], log of the mean over masks of p(x) on the last symbol, 0 elsewhere.

        Training: logp of each symbol under the one mask of this call. With `member_B` int64 [B]: logits of each row
        under a mask of its own.
        """
        if member_B is not None:
            return self._logits(x_BT, cond, member_B)
        if self.training:
            return self._log_prob(self._logits(x_BT, cond, int(torch.randint(self.config.masks, ()))), x_BT)
        masks = range(self.config.masks)
        joint_MB = torch.stack([self._log_prob(self._logits(x_BT, cond, m), x_BT).sum(dim=1) for m in masks])
        logp_BT = torch.zeros(x_BT.shape, dtype=joint_MB.dtype, device=x_BT.device)
        logp_BT[:, -1] = torch.logsumexp(joint_MB, dim=0) - math.log(len(masks))
        return logp_BT

    def draw(self, noise_BN: Tensor, *, cond: Cond) -> Tensor:
        """int64 [B, T]: a row's first number chooses its mask, the others its symbols, each at its own position."""
        B, T = len(noise_BN), noise_BN.shape[1] - 1
        member_B = (noise_BN[:, 0] * self.config.masks).long()
        order_BT = torch.tensor(self.orders, device=noise_BN.device)[member_B]
        x_BT = torch.zeros(B, T, dtype=torch.int64, device=noise_BN.device)
        with torch.no_grad():
            for t in range(T):
                at_B1 = order_BT[:, t, None]
                logits_BT = self(x_BT, cond=cond, member_B=member_B)
                index = at_B1 if self.numbers == 1 else at_B1[:, :, None].expand(-1, -1, self.alphabet)
                next_B = self.distribution(logits_BT.gather(1, index)[:, 0])
                x_BT.scatter_(1, at_B1, next_B.sample(noise_BN[:, 1:].gather(1, at_B1)[:, 0])[:, None])
        return x_BT

    def predict(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        """InputError: a mixture of orderings has no conditionals in one of them."""
        raise InputError(
            f"a mixture of {self.config.masks} masks has no parameters a symbol; train with model.masks = 1 for them"
        )

    def stream(self, batch: int, *, cond: Cond) -> Stream:
        """InputError: a mixture of orderings has no order to be read in."""
        raise InputError(
            f"a mixture of {self.config.masks} masks reads whole records alone; train with model.masks = 1 to stream"
        )
