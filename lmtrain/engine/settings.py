"""How a run is computed: one process or ZeRO, in which precision, and what DeepSpeed is told besides."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator

from lmtrain.config import Config


class EngineConfig(Config):
    """`zero` is DeepSpeed on any number of ranks; `plain` is torch alone in one process, the reference."""

    kind: Literal["zero", "plain"] = Field("zero", description="zero: DeepSpeed; plain: torch alone, one process")
    zero_stage: int = Field(
        1,
        ge=0,
        le=3,
        description="what the ranks divide: 0 nothing, 1 optimizer state, 2 gradients too, 3 weights too",
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="dtype of weights and activations; master weights and moments are fp32 always"
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda where there is one")
    offload: Literal["none", "cpu", "nvme"] = Field(
        "none", description="optimizer state: cpu in host memory (stages 1 to 3), nvme on a disk (stage 3)"
    )
    nvme_path: str | None = Field(None, min_length=1, description="folder on a disk of each host, for offload to NVMe")
    activation_checkpointing: bool | Literal["attention", "mlp"] = Field(
        False, description="recompute activations in the backward pass: true = whole blocks, or that part of each alone"
    )
    compile: bool = Field(False, description="torch.compile the model")
    timeout: float = Field(
        600.0, gt=0, description="seconds that a rank may keep others waiting; then it is named and all end"
    )
    deepspeed: str | dict[str, Any] | None = Field(
        None, description="more keys for DeepSpeed: inline, or the path of a ds_config.json"
    )

    @model_validator(mode="after")
    def _possible(self) -> EngineConfig:
        if self.kind == "plain":
            if self.precision == "fp16":
                raise ValueError("engine.kind = plain does not scale losses; use precision bf16, or kind zero")
            if self.offload != "none":
                raise ValueError(f"engine.offload = {self.offload} needs engine.kind = zero")
            if self.deepspeed is not None:
                raise ValueError("engine.deepspeed is given, but engine.kind = plain does not use DeepSpeed")
        elif self.zero_stage == 0:
            if self.precision != "fp32":
                raise ValueError(
                    f"engine.zero_stage = 0 cannot accumulate {self.precision} gradients in fp32; "
                    "use engine.zero_stage = 1"
                )
            if self.offload != "none":
                raise ValueError(
                    f"engine.offload = {self.offload} needs engine.zero_stage 1, 2 or 3; stage 0 divides nothing"
                )
        if self.offload == "nvme":
            if self.zero_stage != 3:
                raise ValueError(f"engine.offload = nvme needs engine.zero_stage = 3, it is {self.zero_stage}")
            if self.nvme_path is None:
                raise ValueError("engine.offload = nvme needs engine.nvme_path, a folder on a disk of each host")
        return self


def on_cpu(config: EngineConfig) -> bool:
    """Whether this host computes on its CPU: as the config says, or because it has nothing else."""
    return config.device == "cpu" or (config.device == "auto" and not torch.cuda.is_available())
