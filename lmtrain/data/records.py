"""From a source of records (images, rows of tables) to a prepared corpus. The format, the splits and the folder in
which it is made are those of text (layout.py, splits.py, workplace.py); no tokenizer, hence a single pass.

A record is a document of exactly D symbols; its raw bytes are its little-endian symbols as they are stored, so equal
records have one bucket and cannot straddle a split by hash. The published split is kept where a source brings one, and
what it lacks of valid is taken from train by hash. Memory: a few times `block_bytes`, and 20 bytes a record.

What was killed begins anew: nothing takes long here.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmtrain.data.blocks import Progress
from lmtrain.data.duplicates import duplicates
from lmtrain.data.known import KnownSource
from lmtrain.data.layout import REALS, smallest_dtype
from lmtrain.data.record_sources import Opened, Piece, RecordSource, open_source
from lmtrain.data.sources import SourceConfig
from lmtrain.data.splits import Division, SplitConfig, divide, group_of
from lmtrain.data.workplace import clear
from lmtrain.data.writer import finish, read_documents, write_block
from lmtrain.errors import ConfigError, CorpusError

if TYPE_CHECKING:
    from lmtrain.data.prepare import PrepareConfig

HELD_OUT = 0.1
"""What is held out for valid, and where the source brings no split for test, when nothing else is said."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What all records of a corpus have in common. levels: 0 for real numbers. grid: None for a table."""

    record: int
    levels: int
    grid: tuple[int, int, int] | None
    labels: bool

    @property
    def dtype(self) -> np.dtype[Any]:
        """How they are stored."""
        return smallest_dtype(self.levels) if self.levels else REALS


def check_config(config: PrepareConfig) -> None:
    """ValueError for settings that belong to text."""
    if config.tokenizer != type(config).model_fields["tokenizer"].default:
        raise ValueError(f"tokenizer is for text; records of kind {config.source.kind} have none, leave it out")
    if config.drop not in ("none", "duplicates") or config.drop_share:
        raise ValueError(f"drop = {config.drop} looks for text; records can drop none or duplicates")
    if config.split.kind == "tail":
        raise ValueError("split.kind = tail is for text; records are split by hash, or as the source says")


def prepare_records(config: PrepareConfig, folder: Path, progress: Progress) -> None:
    """Write the corpus into the folder `folder`, which is held. CorpusError, ConfigError."""
    clear(folder)
    split = config.split
    known = None
    if isinstance(config.source, KnownSource):
        opened, known = config.source.open(), config.source.parameters.to_json()
    else:
        assert isinstance(config.source, RecordSource)
        opened = open_source(config.source, fold=split.fold if split.folds is None else None)
    kind = split.kind if split.kind != "auto" else "hash" if split.folds or not _splits(opened) else "source"
    if kind == "source" and not opened.brings:
        raise ConfigError(f"split.kind = source, but the source {config.source.kind} brings no split; use hash")
    written, shape, digest, labels, counted = _write(
        opened, config, folder, progress, group=group_of if kind == "source" else lambda name: 0
    )
    division = divide(_filled(split, kind, opened), documents=counted, total_bytes=0, boundary=lambda at: at)
    reports, dropped = _copies(folder, len(written), division, drop=config.drop == "duplicates")
    header = {
        "kind": "image" if shape.grid else "table",
        "alphabet": shape.levels,
        "bos": shape.levels,
        "record": shape.record,
        "grid": None if shape.grid is None else list(shape.grid),
        "labels": labels,
        "tokenizer": None,
        "split": division.json(),
        "source": {"kind": config.source.kind, "sha256": digest},
        "block_bytes": config.block_bytes,
        **({} if known is None else {"known": known}),
        **reports,
    }
    finish(folder, header=header, blocks=written, dropped=dropped)


def _splits(opened: Opened) -> bool:
    """Whether a source brings a split with train and something held out."""
    return "train" in opened.brings and len(opened.brings) > 1


def _filled(split: SplitConfig, kind: str, opened: Opened) -> SplitConfig:
    """The split with the fractions that records have when none are given."""
    if split.folds is not None:
        return split
    given: dict[str, Any] = {"kind": kind}
    if kind == "source" and "valid" not in opened.brings and split.valid is None:
        given["valid"] = HELD_OUT
    if kind == "hash":
        given["valid"] = HELD_OUT if split.valid is None else split.valid
        given["test"] = split.test if split.test is not None or split.valid is not None else HELD_OUT
    return split.model_copy(update=given)


def _write(
    opened: Opened, config: PrepareConfig, folder: Path, progress: Progress, *, group: Callable[[str | None], int]
) -> tuple[list[dict[str, Any]], Shape, str, int, Counter[int]]:
    """(blocks, shape, sha256 of the records, number of classes, records of each group that the source names)."""
    digest = hashlib.sha256()
    written: list[dict[str, Any]] = []
    held: list[tuple[bytes, np.ndarray, int, int]] = []
    held_labels: list[int] = []
    counted: Counter[int] = Counter()
    shape: Shape | None = None
    done = top = 0

    def flush() -> None:
        assert shape is not None
        written.append(write_block(folder, len(written), held, dtype=shape.dtype, labels=held_labels or None))
        held.clear()
        held_labels.clear()

    for piece, shape in _shaped(opened, config):
        x_ND = _symbols(piece.x, shape, config.source.kind, first=sum(counted.values()))
        of = group(piece.split)
        counted[of if of else group_of(piece.split)] += len(x_ND)
        digest.update(x_ND.data.cast("B") if x_ND.size else b"")
        if piece.label_N is not None:
            digest.update(piece.label_N.astype("<i8").tobytes())
            top = max(top, int(piece.label_N.max(initial=-1)) + 1)
        for at, row in enumerate(x_ND):
            held.append((row.tobytes(), row, of, 0))
            if piece.label_N is not None:
                held_labels.append(int(piece.label_N[at]))
            if len(held) * row.nbytes >= config.block_bytes:
                flush()
        done += x_ND.nbytes
        progress("records", done, None)
    if shape is None:
        raise CorpusError(f"the source {config.source.kind} gave no records; there is nothing to prepare")
    if held:
        flush()
    return written, shape, digest.hexdigest(), top, counted


def _shaped(opened: Opened, config: PrepareConfig) -> Iterator[tuple[Piece, Shape]]:
    """Every piece with the shape of all; CorpusError when one differs."""
    assert not isinstance(config.source, SourceConfig)
    shape: Shape | None = None
    for piece in opened.pieces:
        if not len(piece.x):
            continue
        mine = _shape(piece, opened.levels, config.source)
        shape = shape or mine
        if mine != shape:
            raise CorpusError(
                f"the source {config.source.kind} gives records of different shapes: {shape} and, in split "
                f"{piece.split or 'all'}, {mine}"
            )
        yield piece, shape


def _shape(piece: Piece, levels: int | None, source: RecordSource | KnownSource) -> Shape:
    x = piece.x
    size = int(np.prod(x.shape[1:], dtype=np.int64))
    grid = source.grid
    if grid is None and x.ndim in (3, 4):
        grid = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]) if x.ndim == 4 else 1)
    if grid is not None and grid[0] * grid[1] * grid[2] != size:
        raise ConfigError(f"prepare.source.grid = {list(grid)} has other than the {size} symbols of a record")
    if not size:
        raise CorpusError(f"the source {source.kind} gives records without a symbol (an array of shape {x.shape})")
    if levels is None:
        known = {"b": 2, "f": 0} | ({"u": 256} if x.dtype == np.uint8 else {})
        if x.dtype.kind not in known:
            raise ConfigError(
                f"the source {source.kind} gives {x.dtype}, which does not tell how many values there are; set "
                "prepare.source.levels (0: real numbers)"
            )
        levels = known[x.dtype.kind]
    if levels == 1:
        raise ConfigError("prepare.source.levels = 1: nothing can be told apart; give 2 or more, or 0 for real numbers")
    return Shape(size, levels, grid, piece.label_N is not None)


def _symbols(x: np.ndarray, shape: Shape, kind: str, *, first: int) -> np.ndarray:
    """[N, D] as they are stored; CorpusError names the record that cannot be. first: number of record 0."""
    x_ND = np.ascontiguousarray(x.reshape(len(x), shape.record))
    if shape.levels:
        wrong_ND = (x_ND < 0) | (x_ND >= shape.levels)
        if x_ND.dtype.kind == "f":
            wrong_ND |= x_ND != np.floor(x_ND)  # also what is no number
        wanted = f"whole numbers from 0 to {shape.levels - 1}"
    else:
        x_ND = x_ND.astype(REALS) + REALS.type(0)  # -0.0 is 0.0
        wrong_ND = ~np.isfinite(x_ND)
        wanted = "finite float32 numbers"
    if wrong_ND.any():
        n, d = np.argwhere(wrong_ND)[0]
        raise CorpusError(
            f"the source {kind}, record {first + n}, symbol {d} is {x_ND[n, d]}; wanted {wanted}: mend it, or set "
            "prepare.source.levels"
        )
    return np.ascontiguousarray(x_ND.astype(shape.dtype))


def _copies(folder: Path, blocks: int, division: Division, *, drop: bool) -> tuple[dict[str, Any], list[str]]:
    """(report of exact duplicates, "block:row" of those to be dropped)."""
    tables = [read_documents(folder, number) for number in range(blocks)]
    rows = np.concatenate(tables)
    split_D = division.table()[rows["group"], rows["bucket"]]
    same = duplicates(np.stack([rows["hash"], rows["hash2"]], axis=1), split_D, division.names)
    dropped = []
    if drop:
        block_D = np.repeat(np.arange(blocks), [len(table) for table in tables])
        row_D = np.concatenate([np.arange(len(table)) for table in tables])
        dropped = [f"{block_D[at]}:{row_D[at]}" for at in np.flatnonzero(same.drop_D).tolist()]
    reports = {
        "duplicates": {"within": same.within, "across": same.across},
        "leakage": None,
        "drop": {"kind": "duplicates" if drop else "none", "duplicates": len(dropped), "leakage": 0},
    }
    return reports, dropped
