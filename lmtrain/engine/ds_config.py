"""The DeepSpeed configuration of a run, generated from ours."""

from __future__ import annotations

from typing import Any

from lmtrain.engine.optimizer import OptimizerConfig
from lmtrain.engine.settings import EngineConfig


def deepspeed_json(
    config: EngineConfig, optimizer: OptimizerConfig, *, micro_batch: int, accumulation: int, world: int
) -> dict[str, Any]:
    """What DeepSpeed is given, as a JSON mapping."""
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage == 3:
        zero["memory_efficient_linear"] = False
    if config.offload == "cpu":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    out: dict[str, Any] = {
        "train_batch_size": micro_batch * accumulation * world,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.clip,
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if config.precision != "fp32":
        out[config.precision] = {"enabled": True}
        out["data_types"] = {"grad_accum_dtype": "fp32"}
    return out
