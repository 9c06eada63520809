"""The loop: update, log, evaluate, save, stop on request. It takes finished parts and knows no model and no corpus."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from pydantic import Field, model_validator

from lmtrain import section
from lmtrain.config import Config
from lmtrain.errors import DivergenceError
from lmtrain.protocol import Batch, Engine, Score


class TrainConfig(Config):
    """How long to train, and how often to look and to save. `steps` or `tokens` (scored symbols), not both."""

    steps: int | None = Field(None, ge=1, description="optimizer steps")
    tokens: int | None = Field(None, ge=1, description="symbols to train on; rounded up to whole steps")
    seed: int = Field(0, ge=0, lt=2**63, description="seeds initialisation, order and noise")
    log_every: int = Field(10, ge=1, description="steps between two rows of metrics")
    eval_every: int = Field(0, ge=0, description="steps between evaluations; 0 = at the end only")
    save_every: int = Field(0, ge=0, description="steps between checkpoints; 0 = at the end only")
    patience: int | None = Field(
        None, ge=1, description="evaluations in a row without a better first set that end the run; null = never"
    )
    min_delta: float = Field(0.0, ge=0, description="with patience: nats a symbol that count as better, if exceeded")
    samples: int = Field(2, ge=0, description="samples in the run's table at the end; 0 = none")
    max_skipped: int = Field(20, ge=1, description="non-finite steps in a row that end the run")

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError(
                f"train.steps = {self.steps} and train.tokens = {self.tokens}: give exactly one of the two"
            )
        if self.patience is not None and not self.eval_every:
            raise ValueError(f"train.patience = {self.patience} counts evaluations; give train.eval_every too")
        if self.min_delta and self.patience is None:
            raise ValueError(f"train.min_delta = {self.min_delta} is for train.patience, which is null")
        return self

    def length(self, tokens_per_step: int) -> int:
        """Optimizer steps of the whole run."""
        return self.steps if self.steps is not None else math.ceil((self.tokens or 0) / tokens_per_step)

    def out_of_patience(self, at: Progress) -> bool:
        """Whether the held-out value has not become better for so long that the run is to end."""
        return self.patience is not None and at.stale >= self.patience


class Source(Protocol):
    """Where batches come from; a function of the step."""

    def batch(self, step: int, rank: int, world: int) -> list[Batch]:
        """This rank's micro-batches of the step."""
        ...

    def total_weight(self, step: int) -> float:
        """The weight of the whole global batch."""
        ...


class Evaluation(Protocol):
    """What the loop needs of a held-out result."""

    @property
    def score(self) -> Score:
        """The sums over the set."""
        ...


class Watcher(Protocol):
    """Who is told; rank 0 writes, the others keep silent."""

    def log_step(self, record: Mapping[str, Any]) -> None:
        """One row of training metrics."""
        ...

    def log_eval(self, name: str, result: Any, *, step: int, tokens: int) -> None:
        """One held-out result."""
        ...

    def alert(self, title: str, text: str) -> None:
        """Something a person should look at."""
        ...

    def preempting(self) -> None:
        """The run was asked to stop and will be started again."""
        ...


class Store(Protocol):
    """Where checkpoints go."""

    def save(self, engine: Engine, *, step: int, state: dict[str, Any], best: bool = False, wait: bool = True) -> Any:
        """One checkpoint, by all ranks; unless `wait`, what is written may be written while training goes on."""
        ...

    def attend(self, engine: Engine, *, wait: bool = False) -> None:
        """See to a checkpoint that is still being written, at the boundary of a step, by all ranks."""
        ...


class Stops(Protocol):
    """Who may ask the run to stop."""

    def requested(self, engine: Engine) -> str | None:
        """The reason, agreed by all ranks, or None."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a run stands; this, the order's record and the tensors are what a checkpoint holds.

    best, best_step: the lowest held-out value. bar: the value that counted as better last; stale: evaluations since.
    """

    step: int = 0
    tokens: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best: float | None = None
    best_step: int | None = None
    bar: float | None = None
    stale: int = 0

    def judge(self, value: float, *, min_delta: float) -> Progress:
        """After an evaluation gave `value`: lower than `best` is the best; lower than `bar` by more than `min_delta`
        begins the count of `stale` ones anew. So small steps count when they add up. What is not finite is neither."""
        best = math.isfinite(value) and (self.best is None or value < self.best)
        better = math.isfinite(value) and (self.bar is None or value < self.bar - min_delta)
        return replace(
            self,
            best=value if best else self.best,
            best_step=self.step if best else self.best_step,
            bar=value if better else self.bar,
            stale=0 if better else self.stale + 1,
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON mapping that `Progress(**mapping)` reads back."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Parts:
    """All that the loop uses. `rate` is the learning rate of a step; `state` is what every checkpoint repeats.

    observers: called with what `watcher.log_step` got, after everything else of a step, by every rank.
    """

    engine: Engine
    source: Source
    rate: Callable[[int], float]
    evaluate: Callable[[], Mapping[str, Evaluation]]
    store: Store
    watcher: Watcher
    stops: Stops
    steps: int
    state: Mapping[str, Any] = field(default_factory=dict)
    observers: Sequence[Callable[[Engine, Mapping[str, Any]], None]] = ()


def train(parts: Parts, config: TrainConfig, progress: Progress) -> tuple[Progress, str | None]:
    """Train from `progress` to `parts.steps` or `config.patience`; the reason is None, or why it was asked to stop.

    Raises DivergenceError after `config.max_skipped` non-finite steps in a row; the last checkpoint stays as it was.
    """
    engine, at = parts.engine, progress

    def save(*, best: bool, wait: bool) -> None:
        section.enter(f"checkpoint of step {at.step}")
        parts.store.save(engine, step=at.step, state={**parts.state, "progress": at.to_json()}, best=best, wait=wait)

    over = at.step >= parts.steps or config.out_of_patience(at)
    while not over:
        section.enter(f"batch of step {at.step + 1}")
        began = time.perf_counter()
        batches = parts.source.batch(at.step, engine.rank, engine.world)
        weight = parts.source.total_weight(at.step)
        waited = time.perf_counter() - began
        lr, talked = parts.rate(at.step), engine.communicated
        report = engine.step(batches, total_weight=weight, lr=lr, step=at.step)
        at = replace(
            at,
            step=at.step + 1,
            tokens=at.tokens + round(weight),
            skipped=at.skipped + (not report.applied),
            skipped_in_a_row=0 if report.applied else at.skipped_in_a_row + 1,
        )
        record = {
            "step": at.step,
            "steps": parts.steps,
            "tokens": at.tokens,
            "loss": report.nats / report.weight,
            "grad_norm": report.grad_norm,
            "lr": lr,
            "applied": report.applied,
            "skipped": at.skipped,
            "loss_scale": report.loss_scale,
            "batch": digest(batches),
            "step_tokens": weight,
            "step_seconds": time.perf_counter() - began,
            "data_wait": waited,
            "communication": engine.communicated - talked,
        }
        parts.watcher.log_step(record)
        if at.skipped_in_a_row >= config.max_skipped:
            text = (
                f"{at.skipped_in_a_row} steps in a row up to step {at.step} were not finite and changed "
                "nothing. Lower optimizer.lr, set optimizer.clip, or look at the data; the last checkpoint is intact"
            )
            parts.watcher.alert("training diverged", text)
            parts.store.attend(engine, wait=True)
            raise DivergenceError(text)
        over = at.step == parts.steps
        improved = False
        if over or (config.eval_every and at.step % config.eval_every == 0):
            at, improved = _evaluate(parts, at, config)
            over = bool(engine.agree(int(over or config.out_of_patience(at))))
        reason = parts.stops.requested(engine)
        if over or reason or improved or (config.save_every and at.step % config.save_every == 0):
            save(best=improved, wait=over or reason is not None)  # what a run ends with is on disk before it ends
        else:
            parts.store.attend(engine)
        if reason and not over:
            parts.watcher.preempting()
            return at, reason
        for observe in parts.observers:
            observe(engine, record)
    return at, None


def ending(config: TrainConfig, at: Progress, *, steps: int, judge: str) -> str | None:
    """Why a run ended before its `steps`, `judge` being the set that decides; None when it did not."""
    if at.step >= steps or not config.out_of_patience(at):
        return None
    than = f" by more than {config.min_delta:g}" if config.min_delta else ""
    found = "it was never finite" if at.best is None else f"best {at.best:.4f} at step {at.best_step}"
    return f"early at step {at.step}: {judge} not better{than} in {at.stale} evaluations ({found})"


def digest(batches: Sequence[Batch]) -> str:
    """CRC-32 of this rank's symbols, so that two runs can be seen to have read the same."""
    crc = 0
    for batch in batches:
        crc = zlib.crc32(batch.x_BT.contiguous().numpy().data, crc)
    return f"{crc:08x}"


def _evaluate(parts: Parts, at: Progress, config: TrainConfig) -> tuple[Progress, bool]:
    """Evaluate every set; the first one decides which checkpoint is the best, and whether it goes on."""
    section.enter(f"evaluation after step {at.step}")
    results = parts.evaluate()
    for name, result in results.items():
        parts.watcher.log_eval(name, result, step=at.step, tokens=at.tokens)
    if not results:
        return at, False
    after = at.judge(next(iter(results.values())).score.nats_per_symbol, min_delta=config.min_delta)
    return after, after.best_step == at.step
