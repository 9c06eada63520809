"""The one YAML schema: every section's model lives beside what it configures; here they become a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from lmtrain import models
from lmtrain.checkpoint import CheckpointConfig
from lmtrain.config import Config, build, override, read_yaml
from lmtrain.data.loader import DataConfig
from lmtrain.data.prepare import PrepareConfig
from lmtrain.data.remote import is_url
from lmtrain.engine import EngineConfig, OptimizerConfig, ScheduleConfig
from lmtrain.errors import ConfigError
from lmtrain.fleet import WatchConfig
from lmtrain.inference.score import EvalConfig
from lmtrain.models import ModelConfig
from lmtrain.profiling import ProfileConfig
from lmtrain.tracker import WandbConfig, environment_settings
from lmtrain.train import TrainConfig


class RunSection(Config):
    """Where a run lives. Its folder is `dir/name`; the name defaults to the config file's."""

    dir: str = Field("runs", min_length=1, description="folder of runs")
    name: str | None = Field(None, min_length=1, description="folder of this run below `dir`")
    resume: Literal["auto", "never", "required"] = Field("auto", description="go on from the newest valid checkpoint?")

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str | None) -> str | None:
        if name is not None and (name in {".", ".."} or "/" in name):
            raise ValueError(f"run.name = {name!r} is no folder name; put the path into run.dir")
        return name


class RunConfig(Config):
    """A whole config file. `prepare` makes `data.corpus` when it is absent; `laws` is read by tests alone."""

    run: RunSection = RunSection()
    train: TrainConfig | None = None
    prepare: PrepareConfig | None = None
    data: DataConfig
    model: SerializeAsAny[ModelConfig] | None = None
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    engine: EngineConfig = EngineConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    wandb: WandbConfig = WandbConfig()
    watch: WatchConfig = WatchConfig()
    profile: ProfileConfig = ProfileConfig()
    laws: dict[str, Any] = Field(default_factory=dict)

    @field_validator("model", mode="before")
    @classmethod
    def _by_kind(cls, tree: Any) -> Any:
        if tree is None or isinstance(tree, ModelConfig):
            return tree
        try:
            return models.parse(tree)
        except ConfigError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        if self.eval.weights == "ema" and self.optimizer.ema is None:
            raise ValueError("eval.weights = ema, but optimizer.ema is null; give it a decay, say 0.999")
        if self.train is not None and self.train.patience is not None and not self.eval.sets:
            raise ValueError("train.patience waits for the first set of eval.sets, which is empty; name one")
        afar = any(is_url(share.path) for share in self.data.shares)
        if afar and self.data.remote.patience >= self.engine.timeout:
            raise ValueError(
                f"data.remote.patience = {self.data.remote.patience:g} is not below engine.timeout = "
                f"{self.engine.timeout:g}: while one rank waits for the store of a corpus, the others give it up; "
                "lower the one or raise the other"
            )
        return self

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.run.dir) / (self.run.name or "run")


def load(path: Path, overrides: Iterable[str] = (), *, environment: Mapping[str, str] | None = None) -> RunConfig:
    """The config in a file, under WANDB_* of `environment`, under `a.b=c` overrides.

    Raises ConfigError in one line when anything in it cannot be run.
    """
    tree = read_yaml(path)
    wandb = environment_settings(environment or {})
    if wandb and isinstance(tree.get("wandb") or {}, dict):
        tree["wandb"] = {**(tree.get("wandb") or {}), **wandb}
    tree = override(tree, overrides)
    run = tree.setdefault("run", {})
    if isinstance(run, dict) and run.get("name") is None:
        run["name"] = path.stem
    return build(RunConfig, tree, where=str(path))


def need_train(config: RunConfig) -> tuple[TrainConfig, ModelConfig]:
    """The sections that training cannot do without."""
    if config.train is None:
        raise ConfigError("train is not given; say at least train.steps or train.tokens")
    return config.train, need_model(config)


def need_model(config: RunConfig) -> ModelConfig:
    """The model's section."""
    if config.model is None:
        raise ConfigError("model is not given; say at least model.kind, one of " + ", ".join(models.kinds()))
    return config.model
