"""What is tried, and on which folds: the configs of a cross-validation.

A grid is one or two config keys with their values. The values of a key are given from the most complex model to the
simplest: `model.dropout=0,0.1,0.2`, `optimizer.weight_decay=0,0.1`, `model.width=256,128`. A candidate's simplicity is
the sum of the places of its values.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lmtrain.config import build, override, parse_yaml
from lmtrain.errors import ConfigError, InputError
from lmtrain.schema import RunConfig

MOST_AXES = 2
Way = Literal["buckets", "tokenizer", "own", "published"]
WAYS: dict[str, str] = {
    "buckets": "folds are sets of buckets of one prepared corpus",
    "tokenizer": "folds are sets of buckets; the corpus is prepared for each fold, its tokenizer trained on that "
    "fold's train split",
    "own": "the source's own folds",
    "published": "the corpus's own splits, no folds",
}
TRAIN = "train"
"""The set that is evaluated beside the held-out one, for the gap between them."""


@dataclass(frozen=True, slots=True)
class Axis:
    """A config key and its values, from the most complex model to the simplest."""

    key: str
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, text: str) -> Axis:
        """Of `key.sub=v1,v2,...`, values in YAML; InputError for anything else."""
        key, sign, raw = text.partition("=")
        values = parse_yaml(f"[{raw}]", where=f"--grid {key}=") if sign else None
        if not key.strip() or not values:
            raise InputError(f"--grid {text!r} is not of the form key.sub=value,value,...")
        if any(value in values[:at] for at, value in enumerate(values)):
            raise InputError(f"--grid {text}: a value is given twice; give each once")
        return cls(key.strip(), tuple(values))

    @property
    def name(self) -> str:
        """The last word of the key."""
        return self.key.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A point of the grid. at: the place of its value on each axis."""

    label: str
    values: Mapping[str, Any]
    at: tuple[int, ...]

    @property
    def simplicity(self) -> int:
        """Larger is simpler."""
        return sum(self.at)


def candidates(axes: Sequence[Axis]) -> list[Candidate]:
    """Every point of the grid, the last axis running fastest; one candidate, the config as it is, without axes."""
    if len(axes) > MOST_AXES or len({axis.key for axis in axes}) < len(axes):
        raise InputError(f"--grid was given {len(axes)} times; give one key or two different ones")
    out = []
    for at in itertools.product(*(range(len(axis.values)) for axis in axes)):
        values = {axis.key: axis.values[place] for axis, place in zip(axes, at, strict=True)}
        words = [f"{axis.name}={_word(axis.values[place])}" for axis, place in zip(axes, at, strict=True)]
        out.append(Candidate(" ".join(words) or "as given", values, at))
    return out


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def way_of(config: RunConfig, *, published: bool) -> Way:
    """How folds of this config's corpus come about; ConfigError when it says already which fold it is."""
    if config.data.folds is not None:
        raise ConfigError(
            f"data.folds = {config.data.folds} is what crossval decides for each training; leave it and data.fold out"
        )
    if published:
        return "published"
    if config.prepare is not None:
        if getattr(config.prepare.source, "has_folds", False):
            return "own"
        if config.prepare.trains_tokenizer:
            return "tokenizer"
    return "buckets"


def fold_keys(config: RunConfig, way: Way, *, fold: int, folds: int) -> dict[str, Any]:
    """The keys that make a config that of one fold (from 1)."""
    if way == "published":
        return {}
    if way == "buckets":
        return {"data.folds": folds, "data.fold": fold}
    if not isinstance(config.data.corpus, str):
        raise ConfigError("data.corpus is a mixture, of which no folds can be prepared; give one corpus")
    if way == "own":
        return {"prepare.split.fold": fold, "data.corpus": f"{config.data.corpus}-fold{fold}"}
    split = {"kind": "hash", "folds": folds, "fold": fold}
    return {"prepare.split": split, "data.corpus": f"{config.data.corpus}-fold{fold}of{folds}"}


def with_keys(config: RunConfig, keys: Mapping[str, Any], *, where: str) -> RunConfig:
    """The config with `a.b` keys set; ConfigError as for a config file."""
    tree = override(config.model_dump(mode="json"), [])
    for key, value in keys.items():
        *outer, last = key.split(".")
        at = tree
        for word in outer:
            if not isinstance(at.get(word), dict):
                at[word] = {}
            at = at[word]
        at[last] = value
    return build(RunConfig, tree, where=where)


def held_out_set(config: RunConfig) -> tuple[str, str]:
    """(name, split) of the first set of `eval.sets`, which stops early and chooses."""
    for name, chosen in config.eval.sets.items():
        if chosen.corpus is not None:
            raise ConfigError(
                f"eval.sets.{name}.corpus = {chosen.corpus}: the first set is to be of the run's own corpus"
            )
        return name, chosen.split
    raise ConfigError("eval.sets is empty; crossval chooses by its first set")


def beside_train(config: RunConfig, *, most: int) -> RunConfig:
    """The config with a set of training rows evaluated too, `most` symbols of them; as it is where there is one."""
    if TRAIN in config.eval.sets:
        return config
    sets = {name: chosen.model_dump(mode="json") for name, chosen in config.eval.sets.items()}
    return with_keys(config, {"eval.sets": {**sets, TRAIN: {"split": "train", "max_symbols": most}}}, where="eval.sets")


def job_name(config: RunConfig, *, label: str, fold: int | None, fingerprint: str) -> str:
    """A folder's name that is another for every config that trains otherwise, and every corpus."""
    tree = {key: value for key, value in config.model_dump(mode="json").items() if key not in ("run", "wandb", "laws")}
    text = json.dumps([tree, fingerprint], sort_keys=True)
    words = re.sub(r"[^\w.=+-]+", "-", label).strip("-.")[:60]
    where = "" if fold is None else f"-fold{fold}"
    return f"{words}{where}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
