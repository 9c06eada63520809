"""NADE: the neural autoregressive distribution estimator of bits, whose hidden units read one bit more at each place.

B rows, D bits of a record, n bits read at once, H hidden units.

[1] Larochelle, Murray: The Neural Autoregressive Distribution Estimator, 2011.

    h_d = sigmoid(c + sum of W_j x_j over j < d),  p(x_d = 1 | x_<d) = sigmoid(b_d + V_d h_d)

The weights W are shared by all places, so that a record costs O(H D), in forward as in a stream. The running sums are
cumulative over chunks of bits, and the backward pass computes the hidden units again (nn/running.py).

NOTE. Bits are read as they stand in the record; [1] draws one order and keeps it, which is a matter of the corpus.
NOTE. Trained with the optimizer that the run names, where [1] uses plain stochastic gradients with a falling rate.
NOTE. `conditional` gives each class a bias of its own for the hidden units; [1] has no classes.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from lmtrain.models import ModelConfig
from lmtrain.nn.labels import class_embedding, class_vectors
from lmtrain.nn.mixtures import Bernoulli, bernoulli_log_prob
from lmtrain.nn.records import Reading, check_records, record_stream
from lmtrain.nn.running import RunningHidden
from lmtrain.protocol import Cond, Distribution, Model, Spec, Stream


class Config(ModelConfig):
    """`model:` of kind nade."""

    kind: Literal["nade"] = "nade"
    width: int = Field(500, ge=1, description="hidden units")
    std: float = Field(0.05, gt=0.0, description="first standard deviation of the weights")
    conditional: bool = Field(False, description="a bias of the hidden units for each class")


def build(config: Config, *, spec: Spec) -> Model:
    """The model of `config` for a corpus of records of bits; ConfigError for any other."""
    return NADE(config, spec=spec)


class NADE(Model):
    """Running hidden units and one logit a bit."""

    def __init__(self, config: Config, *, spec: Spec) -> None:
        super().__init__()
        check_records(spec, kind=config.kind, reads="bits", conditional=config.conditional)
        self.config = config
        self.context = spec.context
        self.hidden = RunningHidden(
            spec.context, config.width, first_O=[0.0], activation="sigmoid", scaled=False, std=config.std
        )
        self.label_embed = class_embedding(config.conditional, spec=spec, width=config.width, std=config.std)

    def forward(
        self,
        x_BT: Tensor,
        *,
        cond: Cond,
        want: Literal["logp", "logits", "next"] = "logp",
        state: Reading | None = None,
    ) -> Tensor:
        """logp_BT float32. want="logits": float32 [B, T]. want="next": [B], after the bits x and those in `state`."""
        shift_BH = None if self.label_embed is None else class_vectors(self.label_embed, cond)
        if want == "next":
            assert state is not None
            return state.step(self.hidden, x_BT, shift_BH)[:, 0]
        logit_BT = self.hidden(x_BT, shift_BH=shift_BH)[:, :, 0]
        return logit_BT if want == "logits" else bernoulli_log_prob(logit_BT, x_BT)

    def predict(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        """Logits of a 1, float32 [B, T]."""
        out: Tensor = self(x_BT, cond=cond, want="logits")
        return out

    def distribution(self, params_B: Tensor) -> Distribution:
        """Bernoulli, of logits [B]."""
        return Bernoulli(params_B)

    def stream(self, batch: int, *, cond: Cond) -> Stream:
        """A stream that keeps the running sums: O(H) a bit."""
        return record_stream(self, batch, cond=cond)

    def flops_per_symbol(self, context: int) -> float:
        """Training FLOPs a bit: 3 times the forward pass, which reads W_d once and V_d once."""
        return 3.0 * 2.0 * 2 * self.config.width
