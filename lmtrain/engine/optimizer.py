"""Which optimizer, and which parameters it treats how. Groups go by a parameter's name and shape alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from lmtrain.config import Config
from lmtrain.engine.muon import Muon


class OptimizerConfig(Config):
    """AdamW, or Muon for the matrices with AdamW for the rest (embeddings, output layer, vectors)."""

    kind: Literal["adamw", "muon"] = Field("adamw", description="adamw, or muon for matrices and adamw for the rest")
    lr: float = Field(1e-3, gt=0, description="peak learning rate; with muon: of the matrices")
    betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW: decay of the two moments")
    eps: float = Field(1e-8, gt=0, description="AdamW: added to the root of the second moment")
    weight_decay: float = Field(0.1, ge=0, description="of matrices and kernels, never of biases and gains; times rate")
    decay_embeddings: bool = Field(True, description="whether embeddings are decayed too")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of the running average of the weights, say 0.999; null = none is kept"
    )
    ema_warmup: bool = Field(False, description="decay of step t at most (1 + t) / (10 + t), so that early ones fade")
    clip: float = Field(1.0, ge=0, description="largest l2 norm of the whole gradient; 0 = off")
    adamw_lr: float = Field(3e-3, gt=0, description="muon: peak rate of the parameters that AdamW takes")
    momentum: float = Field(0.95, ge=0, lt=1, description="muon: Nesterov momentum")
    momentum_start: float = Field(0.85, ge=0, lt=1, description="muon: momentum of step 0")
    momentum_warmup: int = Field(300, ge=0, description="muon: steps from momentum_start to momentum; 0 = none")
    newton_schulz: int = Field(5, ge=1, description="muon: iterations of the orthogonalisation")

    @model_validator(mode="after")
    def _possible(self) -> OptimizerConfig:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"optimizer.betas = {list(self.betas)}: wanted two numbers in [0, 1)")
        if self.ema_warmup and self.ema is None:
            raise ValueError("optimizer.ema_warmup = true, but optimizer.ema is null; give it a decay, say 0.999")
        if self.kind == "adamw":
            for name in ("adamw_lr", "momentum", "momentum_start", "momentum_warmup", "newton_schulz"):
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"optimizer.{name} is for kind = muon; kind is adamw")
        return self


def momentum(config: OptimizerConfig, step: int) -> float:
    """Muon's momentum at `step`: linear from `momentum_start` to `momentum` over `momentum_warmup` steps."""
    if step >= config.momentum_warmup:
        return config.momentum
    part = step / config.momentum_warmup
    return (1 - part) * config.momentum_start + part * config.momentum


def is_matrix(name: str, shape: Iterable[int]) -> bool:
    """Whether a parameter multiplies what it is given: a matrix or a kernel, no bias and no gain.

    Two dimensions or more, of which those after the first are not all 1 (a gain a channel, such as [C, 1, 1, 1]), and
    neither `bias` nor `gain` in the last word of its name (a bias a position and component has two dimensions, too).
    """
    shape, last = tuple(shape), name.rpartition(".")[2]
    return any(size != 1 for size in shape[1:]) and "bias" not in last and "gain" not in last


def takes_muon(name: str, shape: Iterable[int]) -> bool:
    """Whether Muon takes a parameter: a matrix (or kernel), no embedding and no output layer."""
    return is_matrix(name, shape) and "embed" not in name and "lm_head" not in name


def groups(config: OptimizerConfig, named: Iterable[tuple[str, nn.Parameter]]) -> list[dict[str, Any]]:
    """Parameter groups in an order that depends on names and shapes alone: matrices decayed and not, the rest likewise.

    Each group: params, names, weight_decay, muon (bool), rate (its learning rate as a multiple of the scheduled one).
    Frozen parameters are in none.
    """
    found: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, p in named:
        if not p.requires_grad:
            continue
        by_muon = config.kind == "muon" and takes_muon(name, p.shape)
        decayed = is_matrix(name, p.shape) and (config.decay_embeddings or "embed" not in name)
        group = found.setdefault(
            (by_muon, decayed),
            {
                "params": [],
                "names": [],
                "weight_decay": config.weight_decay if decayed else 0.0,
                "muon": by_muon,
                "rate": 1.0 if by_muon or config.kind == "adamw" else config.adamw_lr / config.lr,
            },
        )
        group["params"].append(p)
        group["names"].append(name)
    return [found[key] for key in sorted(found, reverse=True)]


def build(config: OptimizerConfig, grouped: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The torch optimizer over `groups(...)`. Fused kernels: CPU and CUDA both have them."""
    if config.kind == "muon":
        return Muon(grouped, lr=config.lr, betas=config.betas, eps=config.eps, newton_schulz=config.newton_schulz)
    return torch.optim.AdamW(grouped, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def moments(config: OptimizerConfig, group: dict[str, Any]) -> tuple[str, ...]:
    """The names of the optimizer's tensors for a parameter of `group`."""
    return ("momentum",) if group["muon"] else ("exp_avg", "exp_avg_sq")


def set_rates(optimizer: torch.optim.Optimizer, config: OptimizerConfig, *, lr: float, step: int) -> None:
    """Write this step's learning rate and momentum into every group."""
    now = momentum(config, step)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]
        if group["muon"]:
            group["momentum"] = now
