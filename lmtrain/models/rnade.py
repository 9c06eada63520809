"""RNADE: NADE of real numbers, a mixture of Gaussians or logistics a dimension.

B rows, D numbers of a record, n numbers read at once, H hidden units, K components.

[1] Uria, Murray, Larochelle: RNADE: The real-valued neural autoregressive density-estimator, 2013.

    a_1 = c,  a_{d+1} = a_d + x_d W_d,  h_d = max(0, rho_d a_d)
    log-weights, means and log-scales of x_d's mixture: V_d h_d + b_d, three numbers a component

The scaling rho_d of each place is learned [1]. Records are to be standardised (`data.view.standardise`).

NOTE. `head: logistics` is ours; [1] has Gaussians and Laplace densities.
NOTE. Gradients are those of the likelihood. [1] multiplies the gradient of each mean by its standard deviation, against
steps that are too long where a component is narrow; AdamW, which divides by the gradient's own size, is used instead.
NOTE. At its bend the gradient of max(0, .) is taken as 0; [1] does not say.
NOTE. rho_d starts at 1, and b_d with the means at the quantiles (k + 1/2) / K of a standard Gaussian, equal weights and
scales of 1, the same for all places; [1] does not say. Log-scales are held within +-20 (nn/mixtures.py).
NOTE. Numbers are read as they stand in the record. `conditional` gives each class a bias of its own for the hidden
units; [1] has no classes.
"""

from __future__ import annotations

from statistics import NormalDist
from typing import Literal

from pydantic import Field
from torch import Tensor

from lmtrain.models import ModelConfig
from lmtrain.nn.labels import class_embedding, class_vectors
from lmtrain.nn.mixtures import Gaussians, Logistics, gaussians_log_prob, logistics_log_prob
from lmtrain.nn.records import Reading, check_records, record_stream
from lmtrain.nn.running import RunningHidden
from lmtrain.protocol import Cond, Distribution, Model, Spec, Stream


class Config(ModelConfig):
    """`model:` of kind rnade."""

    kind: Literal["rnade"] = "rnade"
    width: int = Field(50, ge=1, description="hidden units")
    components: int = Field(10, ge=1, description="of the mixture of each number")
    head: Literal["gaussians", "logistics"] = "gaussians"
    std: float = Field(0.05, gt=0.0, description="first standard deviation of the weights")
    conditional: bool = Field(False, description="a bias of the hidden units for each class")


def build(config: Config, *, spec: Spec) -> Model:
    """The model of `config` for a corpus of records of reals; ConfigError for any other."""
    return RNADE(config, spec=spec)


class RNADE(Model):
    """Running hidden units and a mixture of densities a number."""

    def __init__(self, config: Config, *, spec: Spec) -> None:
        super().__init__()
        check_records(spec, kind=config.kind, reads="reals", conditional=config.conditional)
        self.config = config
        self.context = spec.context
        K = config.components
        first_O = [number for k in range(K) for number in (0.0, NormalDist().inv_cdf((k + 0.5) / K), 0.0)]
        self.hidden = RunningHidden(
            spec.context, config.width, first_O=first_O, activation="relu", scaled=True, std=config.std
        )
        self.label_embed = class_embedding(config.conditional, spec=spec, width=config.width, std=config.std)

    def forward(
        self,
        x_BT: Tensor,
        *,
        cond: Cond,
        want: Literal["logp", "mixtures", "next"] = "logp",
        state: Reading | None = None,
    ) -> Tensor:
        """logp_BT float32, of densities. want="mixtures": float32 [B, T, K, 3]. want="next": [B, K, 3], after the
        numbers x and those in `state`."""
        shift_BH = None if self.label_embed is None else class_vectors(self.label_embed, cond)
        if want == "next":
            assert state is not None
            return state.step(self.hidden, x_BT, shift_BH).view(len(x_BT), -1, 3)
        params_BTK3: Tensor = self.hidden(x_BT, shift_BH=shift_BH).view(*x_BT.shape, -1, 3)
        if want == "mixtures":
            return params_BTK3
        log_prob = gaussians_log_prob if self.config.head == "gaussians" else logistics_log_prob
        return log_prob(params_BTK3, x_BT)

    def predict(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        """Log-weights, means and log-scales, float32 [B, T, K, 3]."""
        out: Tensor = self(x_BT, cond=cond, want="mixtures")
        return out

    def distribution(self, params_B: Tensor) -> Distribution:
        """A mixture of densities, of its parameters [B, K, 3]."""
        return Gaussians(params_B) if self.config.head == "gaussians" else Logistics(params_B)

    def stream(self, batch: int, *, cond: Cond) -> Stream:
        """A stream that keeps the running sums: O(H K) a number."""
        return record_stream(self, batch, cond=cond)

    def flops_per_symbol(self, context: int) -> float:
        """Training FLOPs a number: 3 times the forward pass, which reads W_d once and V_d's 3 K rows once."""
        return 3.0 * 2.0 * self.config.width * (1 + 3 * self.config.components)
