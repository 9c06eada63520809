"""Engines: DeepSpeed ZeRO, and one process of plain torch. Optimizers and schedules."""

from __future__ import annotations

from lmtrain.engine.ds_config import deepspeed_json, untested
from lmtrain.engine.optimizer import OptimizerConfig
from lmtrain.engine.plain import PlainEngine
from lmtrain.engine.rendezvous import channel
from lmtrain.engine.schedule import ScheduleConfig, rate
from lmtrain.engine.settings import EngineConfig
from lmtrain.protocol import Engine, Model, Place

__all__ = [
    "EngineConfig",
    "OptimizerConfig",
    "ScheduleConfig",
    "channel",
    "deepspeed_json",
    "make",
    "rate",
    "untested",
]


def make(
    config: EngineConfig,
    model: Model,
    *,
    optimizer: OptimizerConfig,
    place: Place,
    micro_batch: int,
    accumulation: int,
    seed: int,
) -> Engine:
    """The engine of this rank. `micro_batch` rows a micro-batch, `accumulation` of them a rank and step.

    `seed` goes into the noise of training alone; the model comes initialised, the same on every rank. Raises
    ConfigError for what cannot be run, EngineError when the ranks do not meet.
    """
    if config.kind == "plain":
        return PlainEngine(config, model, optimizer_config=optimizer, place=place, seed=seed)
    from lmtrain.engine.zero import ZeroEngine  # deepspeed takes a second to import

    return ZeroEngine(
        config,
        model,
        optimizer_config=optimizer,
        place=place,
        micro_batch=micro_batch,
        accumulation=accumulation,
        seed=seed,
    )
