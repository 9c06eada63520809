"""Batches as a function of (step, rank, world): no iterator, no state, nothing to save but the step.

The global batch of a step is `global_batch` rows at positions [step * global_batch, (step + 1) * global_batch) of the
run; order.py says which rows stand there. Micro-batch k is rows [k * micro_batch, (k + 1) * micro_batch) of it, and
rank r reads k = a * world + r for accumulation index a, so the union over ranks is the same for every world size.

Shapes: B rows of a micro-batch, G rows of the global batch, T symbols of a row, C corpora.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Discriminator, Field, Tag, model_validator

from lmtrain.config import Config
from lmtrain.data import order, transforms
from lmtrain.data.layout import BUCKETS
from lmtrain.data.prefetch import Prefetch
from lmtrain.data.rows import PreparedSplit, Rows
from lmtrain.data.shelf import RemoteConfig
from lmtrain.data.view import TRAINING, View, ViewConfig, ViewSplit
from lmtrain.errors import ConfigError, CorpusError
from lmtrain.protocol import Batch, Cond, Corpus

POSITIONS = 16_384
"""Rows whose places are computed in one call and kept: permuting thousands costs little more than permuting a few."""

STREAM_CONTEXT = 256
"""Symbols a row of a stream when the config does not say."""

POSITIONS_FIRST = 256
"""The same for a step that was not expected: the first one, say."""


class CorpusShare(Config):
    """One corpus of a mixture."""

    path: str = Field(min_length=1, description="folder of the prepared corpus")
    weight: int = Field(1, ge=1, description="rows of this corpus among `sum of weights` rows")


class DataConfig(Config):
    """What a run reads, and how rows make batches. `global_batch` and `micro_batch` count rows."""

    corpus: Annotated[
        Annotated[str, Tag("path"), Field(min_length=1)] | Annotated[tuple[CorpusShare, ...], Tag("mixture")],
        Discriminator(lambda value: "path" if isinstance(value, str) else "mixture"),
    ] = Field(description="folder or URL of a prepared corpus, or a mixture [{path, weight}, ...]")
    context: int | None = Field(
        None, ge=1, description="symbols a row: inputs, and scored symbols; null = those of a record, 256 of a stream"
    )
    view: ViewConfig = Field(ViewConfig(), description="what is done to records on their way to the model")
    global_batch: int = Field(32, ge=1, description="rows an optimizer step, over all ranks")
    micro_batch: int | None = Field(None, ge=1, description="rows a forward pass; null = global_batch / ranks")
    block_windows: int = Field(1, ge=1, description="rows that stay together in the order; 1 = fully random")
    document_masking: bool = Field(False, description="cut attention and state where a document begins")
    prefetch: bool = Field(True, description="read the next step's batch in a thread meanwhile")
    remote: RemoteConfig = Field(RemoteConfig(), description="how a corpus that is a URL is read")
    folds: int | None = Field(
        None,
        ge=3,
        le=BUCKETS,
        description="divide the prepared corpus anew into so many folds of buckets; null = as it is",
    )
    fold: int | None = Field(
        None, ge=1, description="with folds: which one is test, from 1; the one before it is valid, the rest train"
    )

    @model_validator(mode="after")
    def _fits(self) -> DataConfig:
        if self.micro_batch is not None and self.global_batch % self.micro_batch:
            near = _multiples(self.global_batch, self.micro_batch)
            raise ValueError(
                f"data.global_batch = {self.global_batch} is no multiple of data.micro_batch = {self.micro_batch}; "
                f"use {near}"
            )
        if (self.folds is None) != (self.fold is None) or (self.fold or 0) > (self.folds or 0):
            raise ValueError(f"data.folds = {self.folds} and data.fold = {self.fold}: give both, fold from 1 to folds")
        if not self.shares:
            raise ValueError("data.corpus is an empty list; name at least one corpus")
        paths = [os.path.normpath(share.path) for share in self.shares]
        twice = sorted({path for path in paths if paths.count(path) > 1})
        if twice:
            raise ValueError(f"data.corpus names {twice[0]} more than once; give it once, with the sum of the weights")
        return self

    @property
    def shares(self) -> tuple[CorpusShare, ...]:
        """The mixture; one corpus is a mixture of one."""
        return (CorpusShare(path=self.corpus, weight=1),) if isinstance(self.corpus, str) else self.corpus

    def row_length(self, corpus: Corpus) -> int:
        """Symbols a row of this corpus; ConfigError when its records have another length than `context`."""
        if corpus.record is None:
            return self.context or STREAM_CONTEXT
        if self.context not in (None, corpus.record):
            raise ConfigError(
                f"data.context = {self.context}, but a {corpus.unit} of {corpus.path} has {corpus.record} symbols; "
                "leave data.context out"
            )
        if self.document_masking:
            raise ConfigError(
                f"data.document_masking is for streams; {corpus.path} holds {corpus.unit}s, which are rows"
            )
        return corpus.record

    def layout(self, world: int) -> tuple[int, int]:
        """(micro_batch, accumulation) on `world` ranks; ConfigError names the numbers that would do."""
        rows = self.global_batch
        if self.micro_batch is None:
            if rows % world:
                raise ConfigError(
                    f"data.global_batch = {rows} does not divide among {world} ranks; use {_multiples(rows, world)}"
                )
            return rows // world, 1
        if rows % (self.micro_batch * world):
            fits = [m for m in range(1, rows // world + 1) if rows % (m * world) == 0]
            near = min(fits, key=lambda m: (abs(m - (self.micro_batch or 0)), m)) if fits else None
            also = f", or data.micro_batch = {near}" if near else ""
            together = self.micro_batch * world
            raise ConfigError(
                f"data.global_batch = {rows} does not divide into data.micro_batch = {self.micro_batch} x {world} ranks"
                f" = {together} rows; use {_multiples(rows, together)}{also}"
            )
        return self.micro_batch, rows // (self.micro_batch * world)


def _multiples(number: int, of: int) -> str:
    """The multiples of `of` next to `number`."""
    below = number // of * of
    return f"{below} or {below + of}" if below else str(of)


@dataclass(frozen=True, slots=True)
class _Stretch:
    """The places of the rows of steps [step, stop): N rows. found: where they lie, of a single prepared corpus."""

    step: int
    stop: int
    corpus_N: np.ndarray
    row_N: np.ndarray
    found: Rows | None


class Loader:
    """Batches of a mixture of corpora; `batch` and `total_weight` are pure functions of their arguments.

    corpora: those of `config.corpus`, opened, in its order. masking: default `config.document_masking`.
    Raises CorpusError: corpora of different alphabets or tokenizers, one corpus twice, an empty split.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        config: DataConfig,
        *,
        seed: int,
        split: str = "train",
        masking: bool | None = None,
    ) -> None:
        if len(corpora) != len(config.shares):
            raise ConfigError(f"{len(corpora)} corpora were opened, data.corpus names {len(config.shares)}")
        _check_mixture(corpora)
        self.config = config
        self.masking = config.document_masking if masking is None else masking
        self.context = config.row_length(corpora[0])
        self._seed = seed
        self._view = corpora[0] if isinstance(corpora[0], View) else None
        held = [corpus.split(split) for corpus in corpora]
        self._splits = [part.inner if isinstance(part, ViewSplit) else part for part in held]
        self._mixture = order.Mixture([share.weight for share in config.shares])
        self._shuffles = [
            order.Shuffle(
                part.rows(self.context), block=config.block_windows, seed=seed, source=f"{corpus.fingerprint}/{split}"
            )
            for corpus, part in zip(corpora, self._splits, strict=True)
        ]
        self._record = {
            "data.order": order.VERSION,
            "train.seed": seed,
            "data.split": split,
            "data.context": self.context,
            "data.global_batch": config.global_batch,
            "data.block_windows": config.block_windows,
            "data.corpus": [
                {"fingerprint": corpus.fingerprint, "weight": int(weight)}
                for corpus, weight in zip(corpora, self._mixture.weights_C, strict=True)
            ],
        }
        self._alphabet = corpora[0].alphabet
        if config.view.corrupt and not self._alphabet:
            raise ConfigError(
                f"data.view.corrupt = {config.view.corrupt:g} draws symbols, and {corpora[0].path} gives real "
                "numbers to the model; leave it out"
            )
        if self._view is not None or config.view.corrupt:
            # Runs from before there was corruption go on.
            unsaid = {"seed"} if config.view.corrupt else {"seed", "corrupt"}
            self._record["data.view"] = config.view.model_dump(mode="json", exclude=unsaid)
        sources = [part.corpus for part in self._splits if isinstance(part, PreparedSplit)]
        self._ahead = max((each.shelf.ahead for each in sources), default=0)
        self._announced = 0
        self._layouts: dict[int, tuple[int, int]] = {}
        self._kept: tuple[_Stretch, ...] = ()

    def layout(self, world: int) -> tuple[int, int]:
        """(rows of a micro-batch, accumulation) on `world` ranks; ConfigError names the numbers that would do."""
        if world not in self._layouts:
            self._layouts[world] = self.config.layout(world)
        return self._layouts[world]

    def micro_batches(self, world: int) -> int:
        """Micro-batches of a rank and step (the accumulation)."""
        return self.layout(world)[1]

    def batch(self, step: int, rank: int, world: int) -> list[Batch]:
        """This rank's micro-batches of a step, in order of accumulation.

        Raises CorpusError when symbols lie in a damaged file, ConfigError when the batch does not divide among ranks.
        """
        assert 0 <= rank < world, f"rank {rank} of {world}"
        micro, accumulation = self.layout(world)
        kept = self._stretch(step)
        first = (step - kept.step) * self.config.global_batch
        return [
            self._rows(kept, first, index, micro)
            for index in range(rank * micro, accumulation * world * micro, world * micro)
        ]

    def total_weight(self, step: int) -> float:
        """Sum of the weights of the whole global batch, without reading a symbol."""
        corpus_G, row_G = self.places(step)
        total = 0
        for number, split in enumerate(self._splits):
            rows = row_G if len(self._splits) == 1 else row_G[corpus_G == number]
            total += int(split.row_symbols(rows, self.context).sum())
        return float(total)

    def places(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """(corpus, row of its split), int64 [G] each, of the global batch of a step."""
        kept, rows = self._stretch(step), self.config.global_batch
        these = slice((step - kept.step) * rows, (step - kept.step + 1) * rows)
        return kept.corpus_N[these], kept.row_N[these]

    def _stretch(self, step: int) -> _Stretch:
        """The places of some steps, with `step` among them."""
        if step < 0:
            raise ConfigError(f"there is no step {step}; steps count from 0")
        for kept in self._kept:
            if kept.step <= step < kept.stop:
                return kept
        # A step that comes after those that are kept begins a long stretch, any other one a short one. Two threads may
        # both come here; each then has what is right, and the later one's stays.
        rows = self.config.global_batch
        steps = max(1, (POSITIONS if any(step == kept.stop for kept in self._kept) else POSITIONS_FIRST) // rows)
        corpus_N, row_N = self._locate(np.arange(step * rows, (step + steps) * rows, dtype=np.int64))
        alone = self._splits[0] if len(self._splits) == 1 else None
        found = alone.find(row_N, self.context) if isinstance(alone, PreparedSplit) else None
        made = _Stretch(step, step + steps, corpus_N, row_N, found)
        # The one before stays: while a thread reads step + 1, its caller asks for the weight of `step`.
        self._kept = (made, *self._kept[:1])
        return made

    def _locate(self, position_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if len(self._shuffles) == 1:
            return np.zeros_like(position_N), self._shuffles[0].rows(position_N)
        corpus_N, own_N = self._mixture.locate(position_N)
        row_N = np.empty_like(own_N)
        for number, shuffle in enumerate(self._shuffles):
            these = corpus_N == number
            row_N[these] = shuffle.rows(own_N[these])
        return corpus_N, row_N

    def _rows(self, kept: _Stretch, first: int, index: int, micro: int) -> Batch:
        """The micro-batch that begins at row `index` of the global batch, whose row 0 is at `first` of the stretch."""
        context, these = self.context, slice(first + index, first + index + micro)
        if kept.found is not None:
            assert isinstance(self._splits[0], PreparedSplit)
            batch = self._splits[0].take(kept.found, these, context, masking=self.masking)
        elif len(self._splits) == 1:
            batch = self._splits[0].fetch(kept.row_N[these], context, masking=self.masking)
        else:
            corpus_B, row_B = kept.corpus_N[these], kept.row_N[these]
            batch = _interleave(
                [
                    (torch.from_numpy(at), split.fetch(row_B[at], context, masking=self.masking))
                    for number, split in enumerate(self._splits)
                    if len(at := np.flatnonzero(corpus_B == number))
                ]
            )
        if self._view is not None or self.config.view.corrupt:
            place_B = kept.step * self.config.global_batch + np.arange(these.start, these.stop)
            if self._view is not None:
                batch = self._view.see(batch, seed=self._seed, place_B=place_B, use=TRAINING)
            if self.config.view.corrupt:
                batch = self._corrupt(batch, place_B)
        return replace(batch, index=index) if index else batch

    def _corrupt(self, batch: Batch, place_B: np.ndarray) -> Batch:
        """Symbols that count replaced by draws: inputs and what is to be predicted are the same symbols."""
        x_BT = batch.x_BT.numpy()
        noise_B2T = transforms.noise(f"{TRAINING}/corrupt", self._seed, place_B, 2 * x_BT.shape[1])
        x_BT = transforms.corrupt(x_BT, alphabet=self._alphabet, rate=self.config.view.corrupt, noise_B2T=noise_B2T)
        x_BT[batch.weight_BT.numpy() == 0] = 0
        return replace(batch, x_BT=torch.from_numpy(x_BT))

    def announce(self, step: int, rank: int, world: int) -> None:
        """Have what this rank reads from `step` on fetched beforehand, where corpora are remote."""
        if not self._ahead:
            return
        if not step <= self._announced <= step + self._ahead:
            self._announced = step
        micro, accumulation = self.layout(world)
        for later in range(self._announced, step + self._ahead):
            first = later * self.config.global_batch + rank * micro + np.arange(accumulation) * world * micro
            corpus_N, row_N = self._locate((first[:, None] + np.arange(micro)).ravel())
            for number, split in enumerate(self._splits):
                if isinstance(split, PreparedSplit) and not split.want(row_N[corpus_N == number], self.context):
                    return  # as much as the cache may hold is on its way
            self._announced = later + 1

    def order_record(self) -> dict[str, Any]:
        """What fixes the order, by config key, as JSON values: for the run's folder, and `compare_order`."""
        return dict(self._record)

    def prefetching(self) -> Prefetch:
        """The same loader with a thread that reads one step ahead (without one if `data.prefetch` is off)."""
        return Prefetch(self, threads=1 if self.config.prefetch else 0)


def _check_mixture(corpora: Sequence[Corpus]) -> None:
    first = corpora[0]
    seen: dict[str, Corpus] = {}
    for corpus in corpora:
        twin = seen.setdefault(corpus.fingerprint, corpus)
        if twin is not corpus:
            raise CorpusError(f"{twin.path} and {corpus.path} are the same corpus; give it once, with a larger weight")
        for what, ours, theirs in (
            ("kind", first.kind, corpus.kind),
            ("meaning of symbols", first.meaning, corpus.meaning),
            ("alphabet", first.alphabet, corpus.alphabet),
            ("start symbol", first.bos, corpus.bos),
            ("grid", first.grid, corpus.grid),
            ("number of classes", first.labels, corpus.labels),
        ):
            if ours != theirs:
                raise CorpusError(
                    f"{corpus.path} cannot be mixed with {first.path}: its {what} is {theirs}, the other's is {ours}; "
                    "prepare both alike (of a stream, with the same prepare.tokenizer.path)"
                )


def _interleave(parts: Sequence[tuple[torch.Tensor, Batch]]) -> Batch:
    """One batch whose rows `at` are those of each part."""
    at = torch.cat([where for where, _ in parts])
    back = torch.empty_like(at)
    back[at] = torch.arange(len(at))

    def rows(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
        given = [tensor for tensor in tensors if tensor is not None]
        return torch.cat(given)[back] if given else None

    def need(tensors: list[torch.Tensor | None]) -> torch.Tensor:
        out = rows(tensors)
        assert out is not None
        return out

    return Batch(
        x_BT=need([part.x_BT for _, part in parts]),
        weight_BT=need([part.weight_BT for _, part in parts]),
        cond=Cond(
            need([part.cond.start_B for _, part in parts]),
            rows([part.cond.first_BT for _, part in parts]),
            rows([part.cond.label_B for _, part in parts]),
        ),
        position_B=rows([part.position_B for _, part in parts]),
    )


def compare_order(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Refuse to go on with another order: ConfigError names the key that changed, both values, and what to do.

    recorded: the `order_record()` that the run began with. present: the one that it would have now.
    """
    for key in [*recorded, *(key for key in present if key not in recorded)]:
        before, now = recorded.get(key), present.get(key)
        if before != now:
            raise ConfigError(
                f"{key} was {_short(before)} when this run began and is {_short(now)} now: other batches would come; "
                "set it back, or start a new run under another run.name"
            )


def _short(value: Any) -> str:
    """A value of the record as a person reads it: fingerprints by their first digits."""
    if isinstance(value, list):
        return "[" + ", ".join(f"{part['fingerprint'][:12]} x {part['weight']}" for part in value) + "]"
    return str(value)
