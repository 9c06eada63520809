"""Which documents train and which are held out: by hash of the content, by the source's own word, or by the tail.

A prepared corpus knows cells (group, bucket): the bucket is the hash of a document's raw bytes modulo 1,000, the group
is 0 unless the source (or the tail) says 1 = valid or 2 = test. A split is a set of cells; this page chooses the sets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from lmtrain.config import Config
from lmtrain.data.layout import BUCKETS
from lmtrain.errors import ConfigError, CorpusError

NAMES = ("train", "valid", "test")
NO_GROUP = 255
"""Stored for a document whose source says nothing about splits."""

_FEW = 100
"""Of so many documents one in twenty by hash is none with chance 0.006."""
_GROUP_OF = {"train": 0, "valid": 1, "validation": 1, "val": 1, "dev": 1, "test": 2}


def group_of(split: str | None) -> int:
    """0, 1, 2 for the name that a source gives a split, NO_GROUP for None; CorpusError for another name."""
    if split is None:
        return NO_GROUP
    if split not in _GROUP_OF:
        raise CorpusError(f"the source brings a split named {split!r}; wanted one of {', '.join(_GROUP_OF)}")
    return _GROUP_OF[split]


class SplitConfig(Config):
    """How documents are divided into train, valid and test."""

    kind: Literal["auto", "source", "hash", "tail"] = Field(
        "auto",
        description="hash: buckets of the content's hash; source: what the source says of each document; tail: the end "
        "of the concatenation of all documents; auto: source if every document brings a split and some are held out, "
        "tail if there are fewer than 100 documents, else hash",
    )
    valid: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="fraction held out for validation (kind tail: or a whole number of raw bytes); when not given: "
        "hash 0.05, tail 0.1, source what the source brings. A split that the source does not bring may be "
        "given as a fraction: it is taken from train by hash",
    )
    test: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="the same for the test split; when not given: none, but hash 0.05 if valid is not given either",
    )
    folds: int | None = Field(
        None, ge=3, le=BUCKETS, description="kind hash: cut the buckets into so many folds; not with valid and test"
    )
    fold: int | None = Field(
        None,
        ge=1,
        description="which fold is test, counted from 1; the one before it (the last before the first) is valid, the "
        "rest train. Without folds: the number in the names of a source that brings folds",
    )

    @model_validator(mode="after")
    def _limits(self) -> SplitConfig:
        if self.folds is not None:
            if self.kind not in ("hash", "auto") or self.valid is not None or self.test is not None:
                raise ValueError("split.folds is for kind hash, and says all of valid and test; leave the others out")
            if self.fold is None or self.fold > self.folds:
                raise ValueError(f"split.folds = {self.folds} wants split.fold from 1 to {self.folds}")
        sizes = {"valid": self.valid or 0.0, "test": self.test or 0.0}
        for name, size in sizes.items():
            if size >= 1 and self.kind not in ("tail", "auto"):
                raise ValueError(f"split.{name} = {size:g} is no fraction below 1 (only kind tail takes raw bytes)")
            if size >= 1 and size != int(size):
                raise ValueError(f"split.{name} = {size} is neither a fraction below 1 nor a whole number of bytes")
        if all(size < 1 for size in sizes.values()) and sum(_exact(size) for size in sizes.values()) >= 1:
            raise ValueError(
                f"split.valid = {sizes['valid']:g} and split.test = {sizes['test']:g} leave nothing to train on; "
                "make their sum less than 1"
            )
        return self


@dataclass(frozen=True, slots=True)
class Division:
    """A resolved split: cells of each split's name, and for kind tail where each group begins.

    splits: {name: {"groups": [...], "buckets": [[low, high), ...]}}, as the manifest has it; train comes first.
    cuts: (raw bytes before it in the concatenation of all documents, group from there on), ascending; () unless tail.
    """

    kind: str
    splits: dict[str, dict[str, Any]]
    cuts: tuple[tuple[int, int], ...] = ()

    def json(self) -> dict[str, Any]:
        """As plain values; `Division(**value)` is its inverse up to list/tuple."""
        return {"kind": self.kind, "splits": self.splits, "cuts": [list(cut) for cut in self.cuts]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Division:
        """Inverse of `json`, also where the keys were sorted meanwhile: their order counts."""
        splits = {name: value["splits"][name] for name in NAMES if name in value["splits"]}
        return cls(value["kind"], splits, tuple((int(at), int(group)) for at, group in value["cuts"]))

    @property
    def names(self) -> list[str]:
        """The splits there are, train first."""
        return list(self.splits)

    def table(self) -> NDArray[np.uint8]:
        """uint8 [3, BUCKETS]: for each cell the index in `names` of the split that has it."""
        out = np.full((len(NAMES), BUCKETS), NO_GROUP, dtype=np.uint8)
        for index, cells in enumerate(self.splits.values()):
            for group in cells["groups"]:
                for low, high in cells["buckets"]:
                    out[group, low:high] = index
        return out

    def pieces(self, documents: Sequence[bytes], source_D: NDArray[np.uint8], start: int) -> list[tuple[bytes, int]]:
        """(raw, group) of the documents of one block, whose first byte is number `start` of the concatenation.

        Documents that a cut runs through become two; everything else stays whole.
        """
        if self.kind == "source":
            return [(raw, int(group)) for raw, group in zip(documents, source_D, strict=True)]
        if self.kind == "hash":
            return [(raw, 0) for raw in documents]
        out: list[tuple[bytes, int]] = []
        for raw in documents:
            group, begin = 0, 0
            for at, following in self.cuts:
                if at - start >= len(raw):
                    break
                if at - start > begin:
                    out.append((raw[begin : at - start], group))
                    begin = at - start
                group = following
            out.append((raw[begin:], group))
            start += len(raw)
        return out


def divide(
    config: SplitConfig,
    *,
    documents: Mapping[int, int],
    total_bytes: int,
    boundary: Callable[[int], int],
) -> Division:
    """Resolve a split against what the source gave.

    documents: number of documents of each group that the source names (NO_GROUP: it names none).
    boundary: moves a position in the concatenation back to where a character begins.
    Raises ConfigError / CorpusError naming the counts.
    """
    count = sum(documents.values())
    brings = not documents.get(NO_GROUP) and bool(documents.get(0)) and len([g for g in documents if documents[g]]) > 1
    kind = config.kind
    if config.folds is not None and config.fold is not None:
        return Division("hash", fold_cells(config.fold - 1, config.folds))
    if kind == "auto":
        kind = "source" if brings else "tail" if count < _FEW else "hash"
    if kind == "tail":
        return _tail(config, total_bytes, boundary)
    for name in NAMES[1:]:
        if (getattr(config, name) or 0) >= 1:
            raise ConfigError(f"split.{name} = {getattr(config, name):g} bytes needs split.kind = tail, not {kind}")
    if kind == "hash":
        valid = _buckets(config, "valid", 0.05)
        test = _buckets(config, "test", 0.05 if config.valid is None else 0.0)
        return Division("hash", _carve(test=test, valid=valid, own={}))
    if documents.get(NO_GROUP):
        raise ConfigError(
            f"split.kind = source, but {documents[NO_GROUP]} of {count} documents bring no split; use hash or tail"
        )
    shown = ", ".join(f"{name} {documents.get(group, 0)}" for group, name in enumerate(NAMES))
    own: dict[str, int] = {name: group for group, name in enumerate(NAMES) if group and documents.get(group)}
    for name in own:
        if getattr(config, name):
            raise ConfigError(
                f"split.{name} = {getattr(config, name):g}, but the source brings its own {name} split ({shown} "
                f"documents); leave split.{name} out or use split.kind = hash"
            )
    sizes = {name: 0 if name in own else _buckets(config, name, 0.0) for name in NAMES[1:]}
    if not documents.get(0) or not (own or any(sizes.values())):
        raise CorpusError(
            f"the source brings {shown} documents: train and at least one held-out split are wanted; "
            "give split.valid as a fraction of train, or use split.kind = hash"
        )
    return Division("source", _carve(test=sizes["test"], valid=sizes["valid"], own=own))


def _exact(fraction: float) -> Fraction:
    return Fraction(repr(fraction))  # 0.1 is one tenth, not the nearest binary number


def _size(config: SplitConfig, name: str, default: float) -> Fraction:
    value = getattr(config, name)
    return _exact(default if value is None else value)


def _buckets(config: SplitConfig, name: str, default: float) -> int:
    size = _size(config, name, default)
    buckets = round(size * BUCKETS)
    if size and not buckets:
        raise ConfigError(
            f"split.{name} = {float(size):g} is less than one of {BUCKETS:,} buckets; use 0.001 or more, or kind tail"
        )
    return buckets


def _carve(*, test: int, valid: int, own: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Test has the lowest buckets, so that another size of valid moves no document between test and train."""
    if test + valid >= BUCKETS:
        raise ConfigError(f"valid and test take all {BUCKETS:,} buckets and leave nothing to train on")
    splits: dict[str, dict[str, Any]] = {"train": {"groups": [0], "buckets": [[test + valid, BUCKETS]]}}
    for name, low, high in (("valid", test, test + valid), ("test", 0, test)):
        if name in own:
            splits[name] = {"groups": [own[name]], "buckets": [[0, BUCKETS]]}
        elif high > low:
            splits[name] = {"groups": [0], "buckets": [[low, high]]}
    return splits


def fold_cells(fold: int, folds: int, *, groups: Sequence[int] = (0,)) -> dict[str, dict[str, Any]]:
    """Fold `fold` (from 0) is test, the one before it valid; the buckets between folds are those of all others.

    groups: those whose documents are divided.
    """
    edges = [number * BUCKETS // folds for number in range(folds + 1)]
    held = {"test": fold, "valid": (fold - 1) % folds}
    train = [[low, high] for n, (low, high) in enumerate(pairwise(edges)) if n not in held.values()]
    splits: dict[str, dict[str, Any]] = {"train": {"groups": list(groups), "buckets": train}}
    for name in ("valid", "test"):
        splits[name] = {"groups": list(groups), "buckets": [[edges[held[name]], edges[held[name] + 1]]]}
    return splits


def _tail(config: SplitConfig, total: int, boundary: Callable[[int], int]) -> Division:
    """The last bytes are test, those before them valid. Train has floor(total * (1 - valid - test)) bytes, as nanoGPT's
    `data[:int(n * 0.9)]`, or up to 3 fewer where a cut would fall inside a character."""
    valid, test = _size(config, "valid", 0.1), _size(config, "test", 0.0)
    in_bytes = [size if size >= 1 else size * total for size in (valid, test)]
    ends = [math.floor(total - in_bytes[0] - in_bytes[1]), math.floor(total - in_bytes[1])]
    shown = f"train {max(ends[0], 0)}, valid {ends[1] - max(ends[0], 0)}, test {total - ends[1]} bytes of {total}"
    if ends[0] <= 0:
        raise CorpusError(f"split by tail leaves nothing to train on: {shown}; make split.valid and split.test smaller")
    ends = [boundary(end) if end < total else total for end in ends]
    splits: dict[str, dict[str, Any]] = {"train": {"groups": [0], "buckets": [[0, BUCKETS]]}}
    cuts = []
    for group, (name, size, begin, end) in enumerate(
        (("valid", valid, ends[0], ends[1]), ("test", test, ends[1], total)), start=1
    ):
        if not size:
            continue
        if end <= begin or begin <= 0:
            raise CorpusError(f"split {name!r} by tail is empty ({shown}); make split.{name} larger")
        splits[name] = {"groups": [group], "buckets": [[0, BUCKETS]]}
        cuts.append((begin, group))
    if not cuts:
        raise ConfigError(
            "split.kind = tail with split.valid = 0 and split.test = 0 holds nothing out; set split.valid"
        )
    return Division("tail", splits, tuple(cuts))
