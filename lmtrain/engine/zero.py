"""DeepSpeed ZeRO on any number of ranks: the only module that imports deepspeed.

The loss of a step is total nats / total weight of the global batch, whatever the ranks' weights are: DeepSpeed averages
over ranks, so a micro-batch's loss is nats * world / total weight, not divided by the accumulation steps again.
"""

from __future__ import annotations

import importlib
import io
import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lmtrain import section
from lmtrain.engine import averaging, communication, microbatch, nvme, optimizer, pieces, rendezvous, stages
from lmtrain.engine.ds_config import deepspeed_json
from lmtrain.engine.optimizer import OptimizerConfig
from lmtrain.engine.plain import device_of
from lmtrain.engine.settings import EngineConfig
from lmtrain.errors import ConfigError, EngineError
from lmtrain.protocol import Batch, Fragment, FragmentReader, Model, Place, StepReport, Weights


class ZeroEngine:
    """See protocol.Engine. Collective: every rank makes the same calls in the same order."""

    def __init__(
        self,
        config: EngineConfig,
        model: Model,
        *,
        optimizer_config: OptimizerConfig,
        place: Place,
        micro_batch: int,
        accumulation: int,
        seed: int,
    ) -> None:
        self.rank, self.world = place.rank, place.world
        self.device = device_of(config, place)
        self.config, self.optimizer_config, self.seed = config, optimizer_config, seed
        self.optimizer_steps = 0
        self.skipped_steps = 0
        self.deepspeed_json = deepspeed_json(
            config, optimizer_config, micro_batch=micro_batch, accumulation=accumulation, world=place.world
        )
        on_nvme = nvme.is_used(self.deepspeed_json)
        if on_nvme and optimizer_config.ema is not None:
            raise ConfigError(
                "optimizer.ema averages the master weights after every step, and engine.offload = nvme keeps them on a "
                "disk; set optimizer.ema to null, or offload to cpu"
            )
        deepspeed = _prepare(place, self.device, timeout=config.timeout, on_nvme=on_nvme)
        if config.precision == "fp16" and not deepspeed.accelerator.get_accelerator().is_fp16_supported():
            raise EngineError(
                f"engine.precision = fp16 is not supported on {self.device.type}; use fp32, or bf16 on a GPU"
            )
        if config.activation_checkpointing:
            microbatch.checkpoint_activations(model, config.activation_checkpointing)
        self.swap: nvme.SwapFolder | None = None
        if on_nvme:
            self.swap = nvme.SwapFolder(str(config.nvme_path))
            self.deepspeed_json = nvme.placed(self.deepspeed_json, self.swap.folder)
        self.control = rendezvous.join(place, self.device, timeout=config.timeout)
        named = list(model.named_parameters())
        grouped = optimizer.groups(optimizer_config, named)
        moments = {n: optimizer.moments(optimizer_config, g) for g in grouped for n in g["names"]}
        self.optimizer = optimizer.build(optimizer_config, grouped)
        try:
            with redirect_stdout(io.StringIO()):  # its bf16 wrapper prints memory tables
                self.engine, *_ = deepspeed.initialize(
                    model=model, optimizer=self.optimizer, config=self.deepspeed_json
                )
        except (ValueError, AssertionError, NotImplementedError, TypeError) as error:
            # Values of keys that we only pass on: pydantic's ValidationError is a ValueError.
            _leave()
            line = " ".join(str(error).split())[:300]
            raise ConfigError(f"DeepSpeed refuses its configuration: {line}; see engine.deepspeed") from error
        self.model = model
        self.stage = self._stage(named, moments)
        self.average = averaging.make(optimizer_config, self.stage.pieces)
        if config.compile:
            self.engine.compile()

    def _stage(self, named: stages.Named, moments: stages.Moments) -> stages.Stage:
        stage = self.config.zero_stage
        if stage == 0:
            clip = self.optimizer_config.clip
            return stages.Stage0(self.engine, named, world=self.world, moments=moments, clip=clip)
        kind: type[stages.Stage12] | type[stages.Stage1Bf16] | type[stages.Stage3]
        if stage == 3:
            kind = stages.Stage3
        elif hasattr(self.engine.optimizer, "fp32_groups_flat_partition"):
            kind = stages.Stage1Bf16
        else:
            kind = stages.Stage12
        group = dist.group.WORLD if self.world > 1 else None
        return kind(self.engine, named, rank=self.rank, world=self.world, moments=moments, group=group)

    def step(self, batches: Sequence[Batch], *, total_weight: float, lr: float, step: int) -> StepReport:
        """One optimizer step; see protocol.Engine."""
        section.enter(f"step {step + 1}")
        self.engine.train()
        nats = microbatch.Nats()
        for i, given in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(i == len(batches) - 1)
            batch = given.to(self.device)
            logp_BT = microbatch.forward(self.engine, batch, seed=self.seed, step=step)
            nats.add(logp_BT, batch.weight_BT)
            loss = microbatch.loss(logp_BT, batch.weight_BT, scale=self.world / total_weight)
            self.engine.backward(loss, scale_wrt_gas=False)
        total, scaled = self._agree_on(nats.value(), microbatch.norm(self.stage.gradients()))
        scale = self._loss_scale()
        finite = math.isfinite(total) and math.isfinite(scaled)
        optimizer.set_rates(self.optimizer, self.optimizer_config, lr=lr, step=step)
        self.stage.step(scaled if finite else math.nan)
        applied = bool(self.engine.was_step_applied()) and finite
        assert applied == finite, "DeepSpeed and we disagree whether the step was applied"
        if applied and self.average is not None:
            self.average.update()
        self.optimizer_steps += applied
        self.skipped_steps += not applied
        section.begin()
        return StepReport(nats=total, weight=total_weight, grad_norm=scaled / scale, applied=applied, loss_scale=scale)

    def _agree_on(self, nats: float, norm: float) -> tuple[float, float]:
        """The sum of nats over ranks, and the norm of the whole gradient; the same two numbers on every rank."""
        square = norm * norm if self.stage.divided or self.rank == 0 else 0.0
        total, square = (float(x) for x in self.add(np.array([nats, square])))
        return total, math.sqrt(square)

    def _loss_scale(self) -> float:
        return float(getattr(self.engine.optimizer, "loss_scale", 1.0)) if self.config.precision == "fp16" else 1.0

    @contextmanager
    def evaluating(self, *, weights: Weights = "raw") -> Iterator[Model]:
        """The model in evaluation mode, without gradients, with its own weights or their average.

        Collective with the average. At stage 3 all ranks must call the model alike.
        """
        was = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), averaging.using(weights, self.average, self.stage.publish, alone=self.world == 1):
                yield self.model
        finally:
            self.model.train(was)

    def add(self, values: np.ndarray) -> np.ndarray:
        """float64 sum over ranks."""
        total = torch.from_numpy(np.array(values, dtype=np.float64))
        if self.control is not None:
            with communication.CLOCK.blocking():
                dist.all_reduce(total, group=self.control)
        out: np.ndarray = total.numpy()
        return out

    def agree(self, flag: int) -> int:
        """The largest flag of any rank."""
        largest = torch.tensor([flag], dtype=torch.int64)
        if self.control is not None:
            with communication.CLOCK.blocking():
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    @property
    def communicated(self) -> float:
        """Seconds this process has been in collectives; see protocol.Engine."""
        return communication.CLOCK.seconds

    def fragments(self) -> Iterator[Fragment]:
        """What this rank owns; see protocol.Engine."""
        stage = self.stage
        averaged = self.average.of if self.average is not None else None
        return pieces.fragments(
            stage.pieces, self.optimizer, self.model, rank=self.rank, averaged=averaged, lend=stage.lend
        )

    def restore(self, reader: FragmentReader, *, scalars: Mapping[str, Any]) -> None:
        """Read what this rank needs, whatever the ranks and the stage were that saved it."""
        steps = int(scalars["optimizer_steps"])
        stage = self.stage
        averaged = self.average.reads(scalars) if self.average is not None else None
        pieces.restore(
            stage.pieces, self.optimizer, self.model, reader, steps=steps, averaged=averaged, lend=stage.lend
        )
        if self.average is not None:
            self.average.restored(scalars)
        stage.publish()
        self.optimizer_steps, self.skipped_steps = steps, int(scalars["skipped_steps"])
        saved = scalars.get("loss_scale")
        scaler = getattr(self.engine.optimizer, "loss_scaler", None)
        if saved and self.config.precision == "fp16":
            for name, value in saved.items():
                setattr(scaler, name, value)

    def scalars(self) -> dict[str, Any]:
        """Optimizer steps, skipped steps, the steps in the average if there is one, in fp16 the loss scale's state."""
        scale = None
        if self.config.precision == "fp16":
            scaler = self.engine.optimizer.loss_scaler
            names = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
            scale = {name: getattr(scaler, name) for name in names if hasattr(scaler, name)}
        return {
            "optimizer_steps": self.optimizer_steps,
            "skipped_steps": self.skipped_steps,
            **({averaging.UPDATES: self.average.updates} if self.average is not None else {}),
            "loss_scale": scale,
        }

    def close(self) -> None:
        """Leave the process group. Without the other ranks: a rank that failed leaves alone."""
        if dist.is_initialized():
            self.engine.destroy()
            _leave()
            self.control = None
            if self.swap is not None:
                self.swap.close()


def _prepare(place: Place, device: torch.device, *, timeout: float, on_nvme: bool) -> Any:
    """Import deepspeed so that it asks for nothing, builds nothing, prints nothing on stdout and keeps the time-out."""
    os.environ["DS_ACCELERATOR"] = device.type
    for name, value in (
        ("RANK", place.rank),
        ("WORLD_SIZE", place.world),
        ("LOCAL_RANK", place.local_rank),
        ("MASTER_ADDR", place.address),
        ("MASTER_PORT", place.port),
    ):
        os.environ[name] = str(value)
    # Nothing is built by default; what a key of engine.deepspeed builds must not wait for the lock of a killed build.
    private = nvme.extensions() if on_nvme else Path(tempfile.gettempdir()) / f"lmtrain-{os.getpid()}"
    extensions = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(private)))
    import deepspeed
    from deepspeed.comm.torch import TorchBackend
    from deepspeed.utils import logger

    # Only its own inference kernels use this extension, and building it takes 46 s and a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _import_uncompiled("deepspeed.runtime.zero.muon.original_muon")
    limit = timedelta(seconds=timeout)
    # ZeRO's groups would wait 30 minutes, whatever the default group was given.
    TorchBackend.new_group = lambda self, ranks: dist.new_group(ranks, timeout=limit)
    communication.time_collectives(TorchBackend, streams=device.type == "cuda")
    for handler in logger.handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setStream(sys.stderr)
    logger.addFilter(_quiet)
    warnings.filterwarnings("ignore", "`torch.distributed.*deprecated", FutureWarning)  # DeepSpeed's calls, not ours
    if on_nvme:
        _build_async_io(extensions)
    return deepspeed


def _build_async_io(folder: Path) -> None:
    """Build, or load, the extension that reads and writes NVMe; before the ranks meet, so that none waits in vain."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    with redirect_stdout(io.StringIO()):
        if not builder.is_compatible(verbose=False):
            raise EngineError("offload to NVMe needs libaio with its headers; apt-get install libaio-dev")
        try:
            with nvme.only_builder(folder) if folder == nvme.extensions() else nullcontext():
                builder.load(verbose=False)
        except (RuntimeError, OSError) as error:
            line = " ".join(str(error).split())[:300]
            raise EngineError(f"DeepSpeed's async_io for NVMe cannot be built in {folder}: {line}") from error


def _leave() -> None:
    """Destroy the process groups, DeepSpeed's references to them included."""
    from deepspeed import comm

    (comm if comm.is_initialized() else dist).destroy_process_group()


def _import_uncompiled(name: str) -> None:
    """Import a module whose decorators compile functions that we never call: it would load all of torch's compiler."""
    compiler = torch.compile
    torch.compile = lambda function=None, **_: function or (lambda f: f)  # type: ignore[assignment]
    try:
        importlib.import_module(name)
    finally:
        torch.compile = compiler


def _quiet(record: logging.LogRecord) -> bool:
    """Drop the warnings that tell what we chose, or what our own metrics report."""
    text = record.getMessage()
    return "untested optimizer" not in text and "OVERFLOW" not in text
