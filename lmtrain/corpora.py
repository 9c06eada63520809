"""The corpora of a config: prepared, opened, seen through the run's view; and what a model must know of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from lmtrain.data import parts as in_parts
from lmtrain.data import prepare as preparing
from lmtrain.data.corpus import PreparedCorpus, open_corpus
from lmtrain.data.folds import refold
from lmtrain.data.loader import DataConfig
from lmtrain.data.remote import is_url
from lmtrain.data.view import Fit, View, view_of
from lmtrain.errors import ConfigError
from lmtrain.protocol import Corpus, Place, Spec
from lmtrain.schema import RunConfig

_PATIENCE = 0.5
"""Seconds between two looks at a corpus that another rank is preparing."""


def say(text: str) -> None:
    """A line for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)


def prepare_corpus(
    config: RunConfig, *, processes: int = 0, force: bool = False, part: str | None = None, merge: bool = False
) -> preparing.Prepared | in_parts.PreparedPart:
    """Make `data.corpus` as the config's `prepare` section says; a corpus made so already is left as it is.

    part: `i/n`, only the blocks i modulo n of it. merge: put it together from its parts.
    """
    if config.prepare is None:
        raise ConfigError("prepare is not given; say at least prepare.source.kind")
    out = config.data.corpus
    if isinstance(out, str) and is_url(out):
        raise ConfigError(f"data.corpus = {out} is a URL; prepare into a folder and copy it there")
    if not isinstance(out, str):
        raise ConfigError("data.corpus is a mixture; prepare its corpora one by one, each with its own config")
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_console(), transient=True, disable=not sys.stderr.isatty()) as bar:
        tasks: dict[str, Any] = {}

        def progress(stage: str, done: int, total: int | None) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        if part is not None:
            mine = in_parts.Part.parse(part)
            return in_parts.prepare_part(
                config.prepare, Path(out), mine, processes=processes, progress=progress, force=force
            )
        make = in_parts.merge if merge else preparing.prepare
        return make(config.prepare, Path(out), processes=processes, progress=progress, force=force)


def train_tokenizer(config: RunConfig, out: Path) -> dict[str, Any]:
    """Train the tokenizer that `prepare` would train, save it in the folder `out`, and return its recipe."""
    if config.prepare is None:
        raise ConfigError("prepare is not given; say at least prepare.source.kind")
    return preparing.train_tokenizer(config.prepare, out)


def _console() -> Any:
    from rich.console import Console

    return Console(stderr=True)


def corpora_for(config: RunConfig, place: Place) -> list[Corpus]:
    """The corpora of `data.corpus`, opened; a missing one is prepared first when the config says how."""
    names = [share.path for share in config.data.shares]
    paths = [Path(name) for name in names if not is_url(name)]
    if len(names) == len(paths) == 1 and config.prepare is not None and not (paths[0] / "manifest.json").exists():
        if place.rank == 0:
            say(f"{paths[0]} is not there yet; preparing it")
            say(prepare_corpus(config).describe())
        else:
            while not (paths[0] / "manifest.json").exists():
                time.sleep(_PATIENCE)
    return [folded(open_corpus(name, remote=config.data.remote, note=say), config.data) for name in names]


def folded(corpus: PreparedCorpus, data: DataConfig) -> PreparedCorpus:
    """A corpus divided as `data.folds` and `data.fold` say; itself where they say nothing."""
    return corpus if data.folds is None or data.fold is None else refold(corpus, folds=data.folds, fold=data.fold)


def seen(
    config: RunConfig, corpora: Sequence[Corpus], *, stored: Mapping[str, Any] | None = None
) -> tuple[RunConfig, list[Corpus]]:
    """The corpora through `data.view`, and the config with `data.context` filled in. stored: a checkpoint's fit."""
    fit = None if stored is None else Fit.from_json(stored)
    weights = [share.weight for share in config.data.shares]
    views = view_of(corpora, config.data.view, weights=weights, fit=fit)
    data = config.data.model_copy(update={"context": config.data.row_length(corpora[0])})
    return config.model_copy(update={"data": data}), views


def fit_of(corpus: Corpus) -> dict[str, Any] | None:
    """What was fitted on the train split, for the checkpoint; None where nothing is."""
    return corpus.fit.to_json() if isinstance(corpus, View) and corpus.fit is not None else None


def alike(corpus: Corpus, own: Corpus) -> Corpus:
    """Another corpus, seen as the run's own."""
    return View(corpus, own.config, fit=own.fit) if isinstance(own, View) else corpus


def spec_of(corpus: Corpus, config: RunConfig) -> Spec:
    """What the model must know of a corpus."""
    return Spec(
        alphabet=corpus.alphabet,
        context=config.data.row_length(corpus),
        bos=corpus.bos,
        grid=corpus.grid,
        labels=corpus.labels,
    )


def told_classes(config: RunConfig) -> bool:
    """Whether the model is told the class of a record."""
    return bool(getattr(config.model, "conditional", False))


def classes_in_turn(config: RunConfig, spec: Spec, count: int) -> np.ndarray | None:
    """int64 [count]: a class for each record to be drawn; None for a model that is not told any."""
    return np.arange(count) % spec.labels if told_classes(config) else None


def bytes_per_symbol(corpus: Corpus) -> float:
    """The training split's mean, so that the console can show bits per byte; 0 where there are no bytes."""
    counts = corpus.manifest["counts"]["train"]
    if corpus.record is not None:
        return 0.0
    return counts["bytes"] / counts["symbols"] if counts["symbols"] else 0.0


def require_same_symbols(corpus: Corpus, own: Corpus, *, what: str) -> None:
    """Refuse a corpus whose symbols are not those that the model was trained on."""
    if corpus.meaning != own.meaning:
        if corpus.record is not None or own.record is not None:
            raise ConfigError(
                f"{what} = {corpus.path} is {corpus.meaning}, and {own.path} is {own.meaning}; prepare it alike"
            )
        raise ConfigError(
            f"{what} = {corpus.path} was prepared with another tokenizer than {own.path}; "
            "prepare it with prepare.tokenizer.path set to the run's tokenizer"
        )
