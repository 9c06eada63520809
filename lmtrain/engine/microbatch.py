"""The loss of a micro-batch, written once for all engines."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lmtrain.engine.noise import seed_noise
from lmtrain.errors import ConfigError
from lmtrain.protocol import Batch


@dataclass(slots=True)
class Nats:
    """-(logp * w) summed in float64 over micro-batches."""

    total: float = 0.0
    parts: list[Tensor] = field(default_factory=list)

    def add(self, logp_BT: Tensor, weight_BT: Tensor) -> None:
        """Add a micro-batch; the sum is read later, so that a GPU is not waited for."""
        self.parts.append(-(logp_BT.detach().double() * weight_BT.double()).sum())

    def value(self) -> float:
        """The sum."""
        return math.fsum(float(part) for part in self.parts)


def forward(model: nn.Module, batch: Batch, *, seed: int, step: int) -> Tensor:
    """logp_BT of the micro-batch, its noise seeded by (seed, step, batch.index)."""
    seed_noise(seed, step, batch.index)
    out: Tensor = model(batch.x_BT, cond=batch.cond)
    return out


def loss(logp_BT: Tensor, weight_BT: Tensor, *, scale: float) -> Tensor:
    """-(logp * w).sum() * scale. The scale makes the gradients that the engine adds or averages those of
    total nats / total weight of the whole global batch."""
    return -(logp_BT * weight_BT).sum() * scale


def checkpoint_activations(model: nn.Module, what: bool | str) -> None:
    """Ask the model to recompute activations, of whole blocks (True) or a part of each; ConfigError when it cannot."""
    switch = getattr(model, "checkpoint_activations", None)
    kind = type(model).__module__
    if switch is None:
        raise ConfigError(f"engine.activation_checkpointing = true, but {kind} does not offer it; set it to false")
    if isinstance(what, bool):
        switch(what)
        return
    parts = getattr(model, "parts_to_recompute", ())
    if what not in parts:
        others = f"true or {' or '.join(parts)}" if parts else "true"
        raise ConfigError(f"engine.activation_checkpointing = {what}, but {kind} has no such part; use {others}")
    switch(True, part=what)


def norm(gradients: list[Tensor]) -> float:
    """The l2 norm of all gradients together; not finite when any element is not."""
    if not gradients:
        return 0.0
    norms = torch.stack(torch._foreach_norm(gradients)).double()
    return float(norms.square().sum().sqrt())
