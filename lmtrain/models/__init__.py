"""The models. One file a model, and the file's name is the model's kind: nothing else has to know of it.

A model file defines `class Config(ModelConfig)` and `def build(config, *, spec) -> Model`.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from pydantic import Field

from lmtrain import config as configuration
from lmtrain.config import Config
from lmtrain.errors import ConfigError
from lmtrain.protocol import Model, Spec


class ModelConfig(Config):
    """What every model's configuration has."""

    kind: str = Field(description="the file in lmtrain/models that defines the model")


def kinds() -> list[str]:
    """The kinds of model there are, sorted."""
    return sorted(item.name for item in pkgutil.iter_modules(__path__) if not item.name.startswith("_"))


def parse(tree: Mapping[str, Any]) -> ModelConfig:
    """The `model` section, validated by its kind's own class; ConfigError names unknown kinds and keys."""
    kind = tree.get("kind")
    if kind is None:
        raise ConfigError(f"model.kind is not given; known: {', '.join(kinds())}")
    module = _module(kind)
    parsed: ModelConfig = configuration.build(module.Config, tree, where="model")
    return parsed


def build(config: ModelConfig, spec: Spec) -> Model:
    """The model of a configuration for a corpus; its weights are drawn from torch's default CPU generator."""
    model: Model = _module(config.kind).build(config, spec=spec)
    return model


def _module(kind: Any) -> ModuleType:
    if not isinstance(kind, str) or kind not in kinds():
        near = difflib.get_close_matches(str(kind), kinds(), n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(kinds())}"
        raise ConfigError(f"model.kind = {kind!r} is not a model; {hint}")
    return importlib.import_module(f"{__name__}.{kind}")
