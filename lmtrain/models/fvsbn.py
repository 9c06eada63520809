"""FVSBN: a fully visible sigmoid belief network, one logistic regression a bit on the bits before it.

B rows, D bits of a record, n bits read at once.

[1] Neal: Connectionist learning of belief networks, 1992. [2] Frey, Hinton, Dayan: Does the wake-sleep algorithm
produce good density estimators?, 1996.

    p(x_d = 1 | x_<d) = sigmoid(b_d + sum of w_dj x_j over j < d)

NOTE. Weights start at zero: the likelihood is concave, so that there is no symmetry to break.
NOTE. Trained by stochastic gradients with the optimizer that the run names, where [2] uses plain gradients.
NOTE. `conditional` gives each class a bias of its own for every bit; [1, 2] have no classes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from torch import Tensor

from lmtrain.models import ModelConfig
from lmtrain.nn.labels import class_embedding, class_vectors
from lmtrain.nn.mixtures import Bernoulli, bernoulli_log_prob
from lmtrain.nn.ordered import OrderedLinear
from lmtrain.nn.records import Reading, check_records, record_stream
from lmtrain.protocol import Cond, Distribution, Model, Spec, Stream


class Config(ModelConfig):
    """`model:` of kind fvsbn."""

    kind: Literal["fvsbn"] = "fvsbn"
    conditional: bool = False


def build(config: Config, *, spec: Spec) -> Model:
    """The model of `config` for a corpus of records of bits; ConfigError for any other."""
    return FVSBN(config, spec=spec)


class FVSBN(Model):
    """One strictly lower-triangular matrix over the bits of a record."""

    def __init__(self, config: Config, *, spec: Spec) -> None:
        super().__init__()
        check_records(spec, kind=config.kind, reads="bits", conditional=config.conditional)
        self.context = self.symbols = spec.context
        degree_1D = np.arange(1, spec.context + 1)[None]
        self.matrix = OrderedLinear(degree_1D, degree_1D, strict=True, std=0.0)
        self.label_embed = class_embedding(config.conditional, spec=spec, width=spec.context, std=0.0)

    def forward(
        self,
        x_BT: Tensor,
        *,
        cond: Cond,
        want: Literal["logp", "logits", "next"] = "logp",
        state: Reading | None = None,
    ) -> Tensor:
        """logp_BT float32. want="logits": float32 [B, T]. want="next": [B], after the bits x and those in `state`."""
        if want == "next":
            assert state is not None
            return self._next(state.unread(x_BT), cond, state)
        logit_BT = self.matrix(x_BT)
        if self.label_embed is not None:
            logit_BT = logit_BT + class_vectors(self.label_embed, cond)
        return bernoulli_log_prob(logit_BT, x_BT) if want == "logp" else logit_BT.float()

    def _next(self, x_Bn: Tensor, cond: Cond, state: Reading) -> Tensor:
        """Logits of all bits are kept as far as the bits read make them; each bit adds its column."""
        if state.sums is None:
            first_BD = self.matrix(x_Bn.new_zeros(len(x_Bn), self.symbols))
            state.sums = (first_BD if self.label_embed is None else first_BD + class_vectors(self.label_embed, cond),)
        end = state.place + x_Bn.shape[1]
        if end > state.place:
            state.sums = (state.sums[0] + self.matrix(x_Bn, inputs=slice(state.place, end)),)
        state.place = end
        return state.sums[0][:, end].float()

    def predict(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        """Logits of a 1, float32 [B, T]."""
        out: Tensor = self(x_BT, cond=cond, want="logits")
        return out

    def distribution(self, params_B: Tensor) -> Distribution:
        """Bernoulli, of logits [B]."""
        return Bernoulli(params_B)

    def stream(self, batch: int, *, cond: Cond) -> Stream:
        """A stream that keeps the sums of all bits' logits."""
        return record_stream(self, batch, cond=cond)

    def flops_per_symbol(self, context: int) -> float:
        """Training FLOPs a bit: 3 times the forward product, 2 an element of the square matrix."""
        return 3.0 * 2.0 * context
