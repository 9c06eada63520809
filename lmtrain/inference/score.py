"""Held-out scores: every symbol of a split once, sums before quotients, the same for every batch and world size.

Shapes in names: B rows, T symbols of a row, N scored symbols, D documents, U units (documents or blocks) that hold a
scored symbol, G groups of units, J summed columns, V symbols of the alphabet.

docs/evaluation.md has the definitions.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from lmtrain.config import Config
from lmtrain.data.folds import seen_by_tokenizer
from lmtrain.errors import ConfigError, CorpusError
from lmtrain.inference.cut import Alone, Cut, Documents, Sliding, Windows
from lmtrain.inference.interval import bootstrap, group_of, groups
from lmtrain.inference.reopen import Plan
from lmtrain.inference.resting import device_of, resting
from lmtrain.inference.result import Result, Truth
from lmtrain.inference.temperature import tempered
from lmtrain.protocol import Batch, Carries, Corpus, Model, Score, Split, Weights

Mode = Literal["window", "sliding", "carried"]
BLOCK = 2048
"""Symbols of a block, the unit of the interval where there are fewer than `MANY_DOCUMENTS` documents."""
MANY_DOCUMENTS = 30

NATS, SYMBOLS, KNOWN, COUNT, BYTES, LINES = range(6)


class EvalSet(Config):
    """A named set: a split of the run's own corpus, or of another one made with the same tokenizer."""

    corpus: str | None = Field(default=None, description="a prepared corpus; null = the run's own")
    split: str = Field(default="valid", min_length=1, description="which split of it")
    max_symbols: int | None = Field(default=None, ge=1, description="cap of this set alone; null = eval.max_symbols")

    @field_validator("split")
    @classmethod
    def _not_test(cls, split: str) -> str:
        if split == "test" or split.endswith(":test"):
            raise ValueError(
                f"split {split!r} would be read during training; `lmtrain eval RUN --split test` reads it on request"
            )
        return split


class EvalConfig(Config):
    """What is scored while training, and how rows are cut then and in `lmtrain eval`. The first set picks the best."""

    sets: dict[str, EvalSet] = Field(
        default={"valid": EvalSet()}, description="name -> {corpus, split}; logged as eval/<name>/..."
    )
    mode: Mode = Field(
        default="window", description="window, sliding (needs a stride), or carried (models with a state)"
    )
    stride: int | None = Field(
        default=None, ge=1, description="mode sliding: symbols scored a row; null = half the context"
    )
    max_symbols: int | None = Field(
        default=None, ge=1, description="cap while training: a fixed subset by hash, printed as one; null = everything"
    )
    weights: Weights = Field(
        default="raw", description="raw, or ema: the average that optimizer.ema keeps; also for samples"
    )
    batch: int = Field(default=16, ge=1, description="rows a call; changes speed and memory, not the result")

    @field_validator("sets", mode="before")
    @classmethod
    def _names(cls, sets: Any) -> Any:
        if isinstance(sets, list) and all(isinstance(name, str) for name in sets):
            sets = {name: {"split": name} for name in sets}
        for name in sets if isinstance(sets, dict) else ():
            if not name or not all(c.isalnum() or c in "-_." for c in str(name)):
                raise ValueError(f"set name {name!r} goes into metric names: use letters, digits, '-', '_' and '.'")
        return sets

    @model_validator(mode="after")
    def _stride_for_sliding(self) -> EvalConfig:
        if self.stride is not None and self.mode != "sliding":
            raise ValueError(
                f"eval.stride = {self.stride} is for eval.mode = sliding, and the mode is {self.mode}; "
                "set stride to null or the mode to sliding"
            )
        return self

    def capped(self, chosen: EvalSet) -> EvalConfig:
        """These settings for one of the sets, with its own cap."""
        return self if chosen.max_symbols is None else self.model_copy(update={"max_symbols": chosen.max_symbols})

    def plan(self, context: int) -> Plan:
        """How rows of `context` symbols overlap; ConfigError when the stride does not fit."""
        if self.mode != "sliding":
            return Plan(context, context)
        return Plan(context, max(1, context // 2) if self.stride is None else self.stride)


def evaluate(
    model: Model,
    split: Split,
    corpus: Corpus,
    *,
    config: EvalConfig,
    context: int,
    name: str | None = None,
    masking: bool = False,
    rank: int = 0,
    world: int = 1,
    add: Callable[[np.ndarray], np.ndarray] | None = None,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
    temperature: float = 1.0,
    documents_N: np.ndarray | None = None,
    alone: bool = False,
    observe: Callable[[Batch, Tensor], None] | None = None,
    tell_groups: Callable[[np.ndarray], None] | None = None,
) -> Result:
    """Score a split under a model; collective when `world` > 1 (every rank calls it and gets the same result).

    context: symbols a row (mode carried: symbols a call, which changes nothing else). masking: rows carry the marks of
        document starts, as the model was trained with them. add: float64 sum over ranks, such as `Engine.add`.
    device: where rows go; default the model's first parameter's. progress: told (calls done, calls of this rank).
    temperature: of every symbol's distribution (temperature.py). alone: each document from its own beginning, whatever
        stands before it. documents_N: int64, of records or with `alone` only these. observe: told every call and its
        log-probabilities, whose symbols of weight 0 say nothing. tell_groups: told, at last, the float64 [G, 4] sums of
        nats, symbols, bytes and lines over each group of units that the interval is drawn from.

    Raises ConfigError when mode, context or stride do not fit the model or the corpus; CorpusError when symbols and the
    counts of the manifest do not belong together.
    """
    _check(model, corpus, config=config, context=context)
    if temperature != 1 and config.mode == "carried":
        raise ConfigError("a temperature is not for eval.mode = carried; use window or sliding")
    if alone or documents_N is not None:
        cut: Cut = _some(split, corpus, config=config, context=context, documents_N=documents_N)
    else:
        cut = _cut(split, config=config, context=context, masking=masking)
    tally = _Tally(split, corpus, cut)
    place = device_of(model) if device is None else torch.device(device)
    total = cut.count(world)
    state: Any = None
    with resting(model):
        for number, call in enumerate(cut.calls(rank, world)):
            batch = call.batch.to(place)
            if config.mode == "carried":
                assert isinstance(model, Carries)
                logp_BT, state = model.carry(batch.x_BT, cond=batch.cond, state=None if call.fresh else state)
            else:
                logp_BT = tempered(model, batch.x_BT, cond=batch.cond, temperature=temperature)
            tally.add(call.batch, logp_BT)
            if observe is not None:
                observe(call.batch, logp_BT)
            if progress is not None:
                progress(number + 1, total)
    sums_GJ = tally.sums_GJ if add is None else np.asarray(add(tally.sums_GJ.ravel())).reshape(tally.sums_GJ.shape)
    found = _result(
        sums_GJ, tally, split=split, corpus=corpus, cut=cut, config=config, context=context, name=name, masking=masking
    )
    mode = "alone" if isinstance(cut, Alone) else found.mode
    if tell_groups is not None:
        tell_groups(sums_GJ[:, [NATS, SYMBOLS, BYTES, LINES]])
    return replace(found, mode=mode, temperature=temperature)


def _check(model: Model, corpus: Corpus, *, config: EvalConfig, context: int) -> None:
    if model.context is not None and context > model.context:
        raise ConfigError(
            f"rows of {context} symbols are longer than the model's context of {model.context}; "
            f"evaluate with a context of at most {model.context}"
        )
    if config.mode == "carried" and not isinstance(model, Carries):
        raise ConfigError(
            f"eval.mode = carried needs a model that carries a state, {type(model).__name__} does not; "
            "use window or sliding"
        )
    if config.mode != "window" and corpus.record is not None:
        raise ConfigError(
            f"eval.mode = {config.mode} is for streams, and {corpus.path} holds {corpus.unit}s, whose rows do not "
            "continue each other; use window"
        )


def _cut(split: Split, *, config: EvalConfig, context: int, masking: bool) -> Cut:
    plan = config.plan(context)
    if config.mode == "sliding":
        return Sliding(split, plan=plan, batch=config.batch, max_symbols=config.max_symbols, masking=masking)
    if config.mode == "carried":
        return Documents(split, context=context, batch=config.batch, max_symbols=config.max_symbols)
    return Windows(split, context=context, batch=config.batch, max_symbols=config.max_symbols, masking=masking)


def _some(split: Split, corpus: Corpus, *, config: EvalConfig, context: int, documents_N: np.ndarray | None) -> Cut:
    """Each document alone: records are so anyway; the rows of a stream begin at documents."""
    if corpus.record is not None:
        return Windows(split, context=context, batch=config.batch, rows_N=documents_N)
    if config.mode == "carried":
        raise ConfigError("eval.mode = carried begins at documents already; leave that mode or --alone out")
    return Alone(split, plan=config.plan(context), batch=config.batch, documents_N=documents_N)


class _Tally:
    """float64 sums for each group of units, on this rank: nats, weights, nats under a known source, symbols, bytes,
    lines."""

    def __init__(self, split: Split, corpus: Corpus, cut: Cut) -> None:
        end_D = split.document_ends()
        from_N, to_N = cut.spans()
        held_D = _held(np.searchsorted(end_D, from_N, "right"), np.searchsorted(end_D, to_N - 1, "right"), len(end_D))
        self.documents = int(held_D.sum())
        self._end_D: np.ndarray | None = end_D
        held = held_D
        self.unit = corpus.unit
        if self.documents < MANY_DOCUMENTS and corpus.record is None:
            self._end_D = None
            self.unit = f"block of {BLOCK:,} symbols"
            held = _held(from_N // BLOCK, (to_N - 1) // BLOCK, -(-split.symbols // BLOCK))
        self.units = int(held.sum())
        self._unit = np.cumsum(held) - 1
        self.sums_GJ = np.zeros((groups(self.units), LINES + 1), dtype=np.float64)
        self._known = corpus.known
        # A tokenizer decodes symbol by symbol, so that its symbols' own bytes say all there is to say.
        pieces_V = corpus.pieces()
        self._bytes_V = np.asarray(corpus.symbol_bytes_V, dtype=np.float64) if pieces_V else None
        self.exact = bool(pieces_V) and one_segmentation(pieces_V)
        self._newlines = _newlines(pieces_V) if pieces_V else None
        self._end = corpus.bos

    @property
    def counts_bytes(self) -> bool:
        """Whether symbols stand for bytes."""
        return self._bytes_V is not None

    def add(self, batch: Batch, logp_BT: Tensor) -> None:
        """Add a call's rows. Symbols of weight 0 are not looked at, whatever the model says of them."""
        assert batch.position_B is not None
        weight_BT = batch.weight_BT.numpy()
        b_N, t_N = np.nonzero(weight_BT)
        if not len(b_N):
            return
        x_BT = batch.x_BT.numpy()
        w_N = weight_BT[b_N, t_N].astype(np.float64)
        logp_N = logp_BT.float().cpu().numpy()[b_N, t_N].astype(np.float64)
        x_N = x_BT[b_N, t_N]
        position_N = batch.position_B.numpy()[b_N] + t_N
        where_N = position_N // BLOCK if self._end_D is None else np.searchsorted(self._end_D, position_N, "right")
        group_N = group_of(self._unit[where_N], self.units)
        columns = [-logp_N * w_N, w_N, self._known_nats(x_BT, b_N, t_N) * w_N, np.ones(len(w_N))]
        if self._bytes_V is not None and self._newlines is not None:
            columns.append(self._bytes_V[x_N] * w_N)
            before_BT = np.concatenate([batch.cond.start_B.numpy()[:, None], x_BT[:, :-1]], axis=1)
            columns.append(self._lines(x_N, before_BT[b_N, t_N]) * w_N)
        for j, column_N in enumerate(columns):
            self.sums_GJ[:, j] += np.bincount(group_N, weights=column_N, minlength=len(self.sums_GJ))

    def _known_nats(self, x_BT: np.ndarray, b_N: np.ndarray, t_N: np.ndarray) -> np.ndarray:
        """-ln p of each record under the source that it was drawn from, all of it at its first symbol; 0 if unknown."""
        if self._known is None:
            return np.zeros(len(b_N))
        rows, first_N = np.unique(b_N, return_index=True)
        nats_N = np.zeros(len(b_N))
        nats_N[first_N] = -self._known.log_prob(x_BT[rows])
        return nats_N

    def _lines(self, x_N: np.ndarray, before_N: np.ndarray) -> np.ndarray:
        """Lines that each symbol ends: its newlines, and at a document's end a last line that had none."""
        assert self._newlines is not None
        count_V, closed_V = self._newlines
        unclosed_N = (x_N == self._end) & (before_N != self._end) & ~closed_V[np.minimum(before_N, len(closed_V) - 1)]
        return np.asarray(count_V[x_N] + unclosed_N)


def _held(from_N: np.ndarray, last_N: np.ndarray, total: int) -> np.ndarray:
    """bool [total]: whether any of the inclusive ranges [from, last] covers it."""
    edge = np.zeros(total + 1, dtype=np.int64)
    np.add.at(edge, from_N, 1)
    np.add.at(edge, last_N + 1, -1)
    return np.asarray(np.cumsum(edge[:-1]) > 0)


def _newlines(pieces_V: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """float64 [V] newlines in each symbol, bool [V] whether its last byte is one."""
    count_V = np.array([piece.count(b"\n") for piece in pieces_V], dtype=np.float64)
    return count_V, np.array([piece.endswith(b"\n") for piece in pieces_V], dtype=bool)


def _truth(corpus: Corpus, sums_GJ: np.ndarray, *, known: float, symbols: float, tally: _Tally) -> Truth | None:
    """What is known of the source, with an interval for nats - known over symbols."""
    source = corpus.known
    if source is None:
        return None
    interval = bootstrap(
        sums_GJ[:, NATS] - sums_GJ[:, KNOWN], below_UK=sums_GJ[:, [SYMBOLS]], unit=tally.unit, units=tally.units
    )
    return Truth(nats=known, records=symbols / source.record, entropy=source.entropy, interval=interval)


def one_segmentation(pieces_V: list[bytes]) -> bool:
    """Whether no text can be written in two ways: no symbol's bytes begin another symbol's (a prefix code).

    Bytes are one, and characters without byte fallback, since UTF-8 is; subwords never are.
    """
    ordered = sorted(piece for piece in pieces_V if piece)
    return not any(after.startswith(before) for before, after in itertools.pairwise(ordered))


def _result(
    sums_GJ: np.ndarray,
    tally: _Tally,
    *,
    split: Split,
    corpus: Corpus,
    cut: Cut,
    config: EvalConfig,
    context: int,
    name: str | None,
    masking: bool,
) -> Result:
    nats, symbols, known, count, raw_bytes, lines = sums_GJ.sum(axis=0).tolist()
    assert count == cut.symbols, f"{count} symbols were scored, {cut.symbols} were to be"
    complete = cut.symbols == split.symbols
    if complete and split.bytes and tally.counts_bytes and raw_bytes != split.bytes:
        raise CorpusError(
            f"{corpus.path}, split {split.name}: its symbols stand for {raw_bytes:.0f} raw bytes, the manifest says "
            f"{split.bytes}; tokenizer and shards do not belong together, prepare the corpus afresh"
        )
    return Result(
        name=name or split.name,
        corpus=str(corpus.path),
        fingerprint=corpus.fingerprint,
        split=split.name,
        score=Score(
            nats=nats,
            symbols=symbols,
            words=float(split.words) if complete else 0.0,
            bytes=raw_bytes,
            dims=symbols * corpus.symbol_dims,
            offset=tally.documents * corpus.measure.offset,
        ),
        mode=config.mode,
        context=None if config.mode == "carried" else context,
        stride=config.plan(context).stride if config.mode == "sliding" else None,
        masking=masking and config.mode != "carried",
        share=1.0 if complete else cut.symbols / split.symbols,
        documents=tally.documents,
        unit=tally.unit,
        units=tally.units,
        interval=bootstrap(sums_GJ[:, NATS], below_UK=sums_GJ[:, [SYMBOLS, BYTES]], unit=tally.unit, units=tally.units),
        exact=tally.exact,
        tokenizer=(corpus.manifest.get("tokenizer") or {}).get("kind"),
        lines=lines if complete and tally.counts_bytes else None,
        records=tally.documents if corpus.record is not None else None,
        measure=corpus.measure,
        weights=config.weights,
        truth=_truth(corpus, sums_GJ, known=known, symbols=symbols, tally=tally),
        warning=seen_by_tokenizer(corpus.manifest, split.name),
    )
