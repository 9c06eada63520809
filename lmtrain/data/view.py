"""A corpus of records as the model sees it: binarised, dequantised, standardised, moved about. `data.view`.

A `View` wraps a corpus and is one (protocol.Corpus). What depends on chance is a function of (seed, place) and what
depends on the train split is fitted once, kept in the checkpoint and taken from there (`Fit`). See transforms.py.

In this order: fewer grey levels; flip and shift (training only); binarisation or dequantisation; standardisation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import PurePath
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from lmtrain.config import Config
from lmtrain.data import transforms
from lmtrain.data.fields import Standardised
from lmtrain.errors import ConfigError, CorpusError, InputError
from lmtrain.meaning import Known, Measure
from lmtrain.protocol import Batch, Corpus, Split

_ROWS = 1024
TRAINING = "training"
"""The use of records that are trained on; every other is an evaluation, of a split."""


class ViewConfig(Config):
    """What is done to records on their way to the model."""

    binarise: Literal["none", "threshold", "draw"] = Field(
        "none", description="threshold: 1 where the intensity, symbol / (alphabet - 1), reaches `threshold`; draw: 1 "
        "with that intensity as probability"
    )  # fmt: skip
    threshold: float = Field(0.5, gt=0, le=1, description="binarise threshold: least intensity of a 1")
    levels: int | None = Field(
        None, ge=2, description="grey levels to read instead of the corpus's; null = as they are"
    )
    dequantise: bool = Field(False, description="add uniform noise: symbols become real numbers in [0, 1)")
    flip: bool = Field(False, description="training: exchange left and right of every other image")
    shift: int = Field(0, ge=0, description="training: move images by up to so many pixels either way")
    standardise: bool = Field(False, description="reals: subtract the train split's mean and divide by its deviation")
    corrupt: float = Field(
        0.0, ge=0, lt=1, description="training, text too: each symbol is drawn anew, uniformly, with this probability"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of the noise in evaluation, so that runs see the same sets")

    @model_validator(mode="after")
    def _fits(self) -> ViewConfig:
        if self.binarise != "none" and (self.dequantise or self.standardise):
            raise ValueError("binarise gives symbols, dequantise and standardise are for real numbers; choose one")
        if self.threshold != 0.5 and self.binarise != "threshold":
            raise ValueError(f"threshold = {self.threshold:g} belongs to binarise = threshold, not {self.binarise}")
        return self

    @property
    def is_plain(self) -> bool:
        """Whether what is evaluated is left as it is; what `corrupt` does, the loader does."""
        return self == ViewConfig(seed=self.seed, corrupt=self.corrupt)


@dataclass(frozen=True, slots=True)
class Fit:
    """Mean and standard deviation of every dimension of a train split, float64."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """A JSON mapping; floats keep every bit in it."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Fit:
        """Inverse of `to_json`."""
        return cls(tuple(map(float, value["mean"])), tuple(map(float, value["std"])))


class View:
    """`corpus` seen through `config`; implements protocol.Corpus.

    fit: needed with standardise; `fitted` makes one. Raises ConfigError when the corpus has not what a transform needs.
    """

    def __init__(self, corpus: Corpus, config: ViewConfig, *, fit: Fit | None = None) -> None:
        _check(corpus, config)
        if fit is not None and len(fit.mean) != corpus.record:
            raise ConfigError(
                f"the run was standardised over {len(fit.mean)} dimensions, and a {corpus.unit} of {corpus.path} has "
                f"{corpus.record}; give the run's own corpus"
            )
        self.corpus, self.config, self.fit = corpus, config, fit
        self.path: PurePath = corpus.path
        self.fingerprint, self.kind, self.grid = corpus.fingerprint, corpus.kind, corpus.grid
        self.labels, self.record, self.unit = corpus.labels, corpus.record, corpus.unit
        self.manifest: Mapping[str, Any] = corpus.manifest
        self.levels = config.levels or corpus.alphabet
        self.alphabet = 2 if config.binarise != "none" else 0 if config.dequantise else self.levels
        self.bos = self.alphabet
        self._splits: dict[str, ViewSplit] = {}

    @property
    def meaning(self) -> str:
        """The corpus's own, and what is made of it: another view is other data."""
        return f"{self.corpus.meaning}; {self._words('')}"

    def _words(self, seed: str) -> str:
        config, words = self.config, []
        if config.levels:
            words.append(f"{config.levels} levels")
        if config.binarise == "threshold":
            words.append(f"binarised at {config.threshold:g}")
        if config.binarise == "draw":
            words.append(f"binarised by draw{seed}")
        if config.dequantise:
            words.append(f"dequantised{seed}")
        if config.standardise:
            words.append("standardised")
        return ", ".join(words)

    @property
    def symbol_dims(self) -> int:
        """1 where there are bits: for symbols, and for dequantised symbols."""
        return int(self.corpus.alphabet > 0)

    @property
    def symbol_bytes_V(self) -> np.ndarray:
        """int64 [V] zeros: records do not stand for bytes."""
        return np.zeros(self.alphabet, np.int64)

    @cached_property
    def measure(self) -> Measure:
        """A dequantised symbol is an interval of 1 / levels: ln levels a dimension; deviations scale densities too."""
        assert self.record is not None
        offset = self.record * math.log(self.levels) if self.config.dequantise else 0.0
        if self.fit is not None:
            offset += math.fsum(math.log(value) for value in self.fit.std)
        kind: Any = "bound" if self.config.dequantise else self.corpus.measure.kind
        return Measure(kind, offset, self._words(f" with seed {self.config.seed}"))

    @cached_property
    def known(self) -> Known | None:
        """The corpus's own where records are read as they are or standardised; nothing is known of other views."""
        source = self.corpus.known
        plain = self.config.model_copy(update={"standardise": False})
        if source is None or not plain.is_plain:
            return None
        if self.fit is None:
            return source
        return Standardised(source, np.array(self.fit.mean), np.array(self.fit.std))

    def pieces(self) -> list[bytes]:
        """None: records do not stand for bytes."""
        return []

    def split(self, name: str) -> ViewSplit:
        """A split by name, with the noise of evaluation."""
        if name not in self._splits:
            self._splits[name] = ViewSplit(self, self.corpus.split(name))
        return self._splits[name]

    def decode(self, symbols: Sequence[int]) -> bytes:
        """InputError: records are not text."""
        raise InputError(f"{self.path} holds records, which cannot be decoded to text")

    def encode(self, raw: bytes) -> np.ndarray:
        """InputError: records are not text."""
        raise InputError(f"{self.path} holds records, which text cannot be encoded to")

    def apply(self, x_BD: np.ndarray, *, seed: int, place_B: np.ndarray, use: str) -> np.ndarray:
        """Records as the model reads them, int64 or float32 [B, D].

        use: TRAINING, when `place_B` is the position in the run, or what tells evaluated sets apart: the split's name.
        """
        config, count = self.config, x_BD.shape[1]

        def noise(purpose: str, numbers: int) -> np.ndarray:
            return transforms.noise(f"{use}/{purpose}", seed, place_B, numbers)

        if config.levels:
            x_BD = transforms.fewer_levels(x_BD, alphabet=self.corpus.alphabet, levels=config.levels)
        if use == TRAINING and config.flip:
            x_BD = transforms.flip(x_BD, grid=self.grid or (), noise_B=noise("flip", 1)[:, 0])
        if use == TRAINING and config.shift:
            x_BD = transforms.shift(x_BD, grid=self.grid or (), most=config.shift, noise_B2=noise("shift", 2))
        if config.binarise == "threshold":
            return transforms.threshold(x_BD, alphabet=self.levels, at=config.threshold)
        if config.binarise == "draw":
            return transforms.bernoulli(x_BD, alphabet=self.levels, noise_BD=noise("binarise", count))
        if config.dequantise:
            x_BD = transforms.dequantise(x_BD, alphabet=self.levels, noise_BD=noise("dequantise", count))
            if not config.standardise:
                return transforms.float32_below(x_BD, 1.0)
        if config.standardise:
            assert self.fit is not None, "a standardising view is fitted before it is read"
            x_BD = (x_BD - np.array(self.fit.mean)) / np.array(self.fit.std)
        return x_BD.astype(np.int64 if self.alphabet else np.float32)

    def see(self, batch: Batch, *, seed: int, place_B: np.ndarray, use: str) -> Batch:
        """A batch of the corpus's own records as the model reads it; padding rows become zeros."""
        assert batch.position_B is not None
        padding_B = batch.position_B.numpy() < 0
        x_BD = self.apply(batch.x_BT.numpy(), seed=seed, place_B=place_B, use=use)
        x_BD[padding_B] = 0
        start_B = torch.full_like(batch.cond.start_B, self.bos)
        return replace(
            batch, x_BT=torch.from_numpy(np.ascontiguousarray(x_BD)), cond=replace(batch.cond, start_B=start_B)
        )


class ViewSplit:
    """A split seen through a view with the noise of evaluation, a function of (view.seed, row); protocol.Split.

    inner: the split of the corpus itself, which the loader reads to add the noise of training.
    """

    def __init__(self, view: View, inner: Split) -> None:
        self.view, self.inner = view, inner
        self.name, self.symbols, self.documents = inner.name, inner.symbols, inner.documents
        self.words, self.bytes = inner.words, inner.bytes
        self._use = f"split {inner.name}"

    def rows(self, context: int) -> int:
        """How many records; ConfigError when they have another length."""
        return self.inner.rows(context)

    def row_symbols(self, index_N: np.ndarray, context: int) -> np.ndarray:
        """int64 [N]: symbols of each row."""
        return self.inner.row_symbols(index_N, context)

    def fetch(self, index_B: np.ndarray, context: int, *, masking: bool = False) -> Batch:
        """The rows `index_B`."""
        batch = self.inner.fetch(index_B, context, masking=masking)
        return self.view.see(batch, seed=self.view.config.seed, place_B=np.asarray(index_B, np.int64), use=self._use)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Symbols of [start, stop) of the concatenation: of whole records, cut to size."""
        size = self.view.record
        assert size is not None
        low, high = start // size, -(-stop // size)
        x_BT = self.inner.read(low * size, min(high * size, self.symbols)).reshape(-1, size)
        seen = self.view.apply(x_BT, seed=self.view.config.seed, place_B=np.arange(low, high), use=self._use)
        return seen.reshape(-1)[start - low * size : stop - low * size]

    def start_symbol(self, position: int) -> int:
        """The reserved start before a record, and inside one the symbol before."""
        if position % (self.view.record or 1) == 0:
            return self.view.bos
        return int(self.read(position - 1, position)[0])

    def document_ends(self) -> np.ndarray:
        """int64 [D], ascending."""
        return self.inner.document_ends()


def view_of(corpora: Sequence[Corpus], config: ViewConfig, *, weights: Sequence[int] = (1,), fit: Fit | None = None,
            split: str = "train") -> list[Corpus]:  # fmt: skip
    """The corpora as the model sees them; themselves where the config leaves them so.

    fit: a stored one; without it, it is made of `split`. Raises ConfigError (a transform does not fit), CorpusError.
    """
    if config.is_plain:
        return list(corpora)
    if config.standardise and fit is None:
        fit = fitted(corpora, config, weights=weights, split=split)
    return [View(corpus, config, fit=fit if config.standardise else None) for corpus in corpora]


def fitted(corpora: Sequence[Corpus], config: ViewConfig, *, weights: Sequence[int], split: str) -> Fit:
    """Mean and deviation (divided by N) of each dimension of the mixture's train split, in two float64 passes.

    Flips and shifts are left out, and the noise of dequantisation is not drawn: it adds 1/2 to the mean and 1/12 to the
    variance of a symbol. CorpusError names a dimension that does not vary.
    """
    for corpus in corpora:
        _check(corpus, config)
    share_C = np.array(weights[: len(corpora)], np.float64) / sum(weights[: len(corpora)])

    def over(of: Any) -> np.ndarray:
        total: np.ndarray = np.zeros(1)
        for corpus, share in zip(corpora, share_C.tolist(), strict=True):
            total = total + share * _mean(corpus, config, split, of)
        return total

    mean_D = over(lambda x_ND: x_ND)
    var_D = over(lambda x_ND: (x_ND - mean_D) ** 2)
    if config.dequantise:
        levels = config.levels or corpora[0].alphabet
        mean_D, var_D = (mean_D + 0.5) / levels, (var_D + 1 / 12) / levels**2
    if not (var_D > 0).all():
        raise CorpusError(
            f"dimension {int(np.argmin(var_D))} of {corpora[0].path} is the same in the whole {split} split and cannot "
            "be standardised; leave it out, or data.view.standardise"
        )
    return Fit(tuple(mean_D.tolist()), tuple(np.sqrt(var_D).tolist()))


def _mean(corpus: Corpus, config: ViewConfig, split: str, of: Any) -> np.ndarray:
    part, size = corpus.split(split), corpus.record
    assert size is not None
    total = np.zeros(size)
    for low in range(0, part.documents, _ROWS):
        x_ND = part.read(low * size, min((low + _ROWS) * size, part.symbols)).reshape(-1, size)
        if config.levels:
            x_ND = transforms.fewer_levels(x_ND, alphabet=corpus.alphabet, levels=config.levels)
        total += of(x_ND.astype(np.float64)).sum(axis=0)
    return total / part.documents


def _check(corpus: Corpus, config: ViewConfig) -> None:
    def refuse(key: str, why: str) -> ConfigError:
        return ConfigError(f"data.view.{key} = {getattr(config, key)}: {corpus.path} {why}; leave it out")

    given = {key: value for key, value in config.model_dump().items() if key not in ("seed", "corrupt")}
    set_keys = [key for key, value in given.items() if value != getattr(_PLAIN, key)]
    if corpus.record is None and set_keys:
        raise refuse(set_keys[0], "holds no records")
    for key in ("binarise", "levels", "dequantise"):
        if key in set_keys and not corpus.alphabet:
            raise refuse(key, "holds real numbers, and this is for symbols")
    if config.levels is not None and config.levels > corpus.alphabet:
        raise refuse("levels", f"has {corpus.alphabet} levels only")
    for key in ("flip", "shift"):
        if key in set_keys and corpus.grid is None:
            raise refuse(key, "holds no images")
    if config.shift and corpus.grid is not None and config.shift >= min(corpus.grid[:2]):
        raise refuse("shift", f"has images of {corpus.grid[0]} x {corpus.grid[1]}, which it would move out of sight")
    if config.standardise and corpus.alphabet and not config.dequantise:
        raise refuse("standardise", "holds symbols, not real numbers (dequantise makes such of them)")


_PLAIN = ViewConfig()
