"""One process, torch alone: the reference that ZeRO is tested against, and the engine for small things."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmtrain.engine import averaging, microbatch, optimizer, pieces
from lmtrain.engine.optimizer import OptimizerConfig
from lmtrain.engine.settings import EngineConfig, on_cpu
from lmtrain.errors import ConfigError, EngineError
from lmtrain.protocol import Batch, Fragment, FragmentReader, Model, Place, StepReport, Weights


class PlainEngine:
    """fp32, or bf16 with fp32 master weights, fp32 gradient accumulation and fp32 moments.

    In bf16 the master weights are built from the bf16 weights, as ZeRO builds them.
    """

    def __init__(
        self, config: EngineConfig, model: Model, *, optimizer_config: OptimizerConfig, place: Place, seed: int
    ) -> None:
        if place.world != 1:
            raise ConfigError(
                f"engine.kind = plain is one process, but {place.world} ranks were started; use engine.kind = zero"
            )
        self.rank, self.world = 0, 1
        self.communicated = 0.0
        self.device = device_of(config, place)
        self.model = model.to(self.device)
        self.seed = seed
        self.config = optimizer_config
        self.optimizer_steps = 0
        self.skipped_steps = 0
        if config.activation_checkpointing:
            microbatch.checkpoint_activations(model, config.activation_checkpointing)
        self.low = torch.bfloat16 if config.precision == "bf16" else None
        named = list(model.named_parameters())
        if self.low is not None:
            for _, p in named:
                p.data = p.data.to(self.low)
        grouped = optimizer.groups(optimizer_config, named)
        moments = {n: optimizer.moments(optimizer_config, g) for g in grouped for n in g["names"]}
        self.masters: list[tuple[Tensor, Tensor]] = []
        homes: dict[str, Tensor] = {}
        if self.low is not None:
            for group in grouped:
                masters = [p.detach().float().requires_grad_() for p in group["params"]]
                self.masters += zip(group["params"], masters, strict=True)
                homes |= dict(zip(group["names"], masters, strict=True))
                group["params"] = masters
        self.trained: list[Tensor] = [p for group in grouped for p in group["params"]]
        self.optimizer = optimizer.build(optimizer_config, grouped)
        self.pieces = pieces.replicated(named, homes, moments, copies=1)
        self.average = averaging.make(optimizer_config, self.pieces)
        if config.compile:
            model.compile()

    def step(self, batches: Sequence[Batch], *, total_weight: float, lr: float, step: int) -> StepReport:
        """One optimizer step; see protocol.Engine."""
        self.model.train()
        nats = microbatch.Nats()
        for given in batches:
            batch = given.to(self.device)
            logp_BT = microbatch.forward(self.model, batch, seed=self.seed, step=step)
            nats.add(logp_BT, batch.weight_BT)
            microbatch.loss(logp_BT, batch.weight_BT, scale=1.0 / total_weight).backward()  # type: ignore[no-untyped-call]
            for p, master in self.masters:
                if p.grad is not None:
                    master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
                    p.grad = None
        for p in self.trained:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        gradients = [p.grad for p in self.trained if p.grad is not None]
        norm, total = microbatch.norm(gradients), nats.value()
        applied = math.isfinite(norm) and math.isfinite(total)
        if applied:
            if 0 < self.config.clip < norm + 1e-6:
                torch._foreach_mul_(gradients, self.config.clip / (norm + 1e-6))
            optimizer.set_rates(self.optimizer, self.config, lr=lr, step=step)
            self.optimizer.step()
            self.optimizer_steps += 1
            self._publish()
            if self.average is not None:
                self.average.update()
        else:
            self.skipped_steps += 1
        for p in self.trained:
            p.grad = None
        return StepReport(nats=total, weight=total_weight, grad_norm=norm, applied=applied)

    @torch.no_grad()
    def _publish(self) -> None:
        for p, master in self.masters:
            p.copy_(master)

    @contextmanager
    def evaluating(self, *, weights: Weights = "raw") -> Iterator[Model]:
        """The model in evaluation mode, without gradients, with its own weights or their average."""
        was = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), averaging.using(weights, self.average, self._publish, alone=True):
                yield self.model
        finally:
            self.model.train(was)

    def add(self, values: np.ndarray) -> np.ndarray:
        """The values themselves: there is one rank."""
        return np.array(values, dtype=np.float64)

    def agree(self, flag: int) -> int:
        """The flag itself: there is one rank."""
        return int(flag)

    def fragments(self) -> Iterator[Fragment]:
        """Every weight, moment and persistent buffer, whole."""
        averaged = self.average.of if self.average is not None else None
        return pieces.fragments(self.pieces, self.optimizer, self.model, rank=0, averaged=averaged)

    def restore(self, reader: FragmentReader, *, scalars: Mapping[str, Any]) -> None:
        """Read all tensors and the scalars; see protocol.Engine."""
        steps = int(scalars["optimizer_steps"])
        averaged = self.average.reads(scalars) if self.average is not None else None
        pieces.restore(self.pieces, self.optimizer, self.model, reader, steps=steps, averaged=averaged)
        if self.average is not None:
            self.average.restored(scalars)
        self._publish()
        self.optimizer_steps, self.skipped_steps = steps, int(scalars["skipped_steps"])

    def scalars(self) -> dict[str, Any]:
        """Optimizer steps, skipped steps and, where there is an average, the steps in it."""
        averaged = {averaging.UPDATES: self.average.updates} if self.average is not None else {}
        steps = {"optimizer_steps": self.optimizer_steps, "skipped_steps": self.skipped_steps}
        return {**steps, **averaged, "loss_scale": None}

    def close(self) -> None:
        """There is nothing to leave."""


def device_of(config: EngineConfig, place: Place) -> torch.device:
    """The device of this rank; EngineError when it is not there."""
    if on_cpu(config):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise EngineError("engine.device = cuda, but torch finds no CUDA device; use engine.device = cpu")
    if place.local_rank >= torch.cuda.device_count():
        raise EngineError(
            f"local rank {place.local_rank} has no device: this host has {torch.cuda.device_count()}; start fewer ranks"
        )
    return torch.device("cuda", place.local_rank)
