"""Local files: every document, in order, from text, JSON lines and parquet; and what is wrong is named."""

from __future__ import annotations

import gzip
import json
import random
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmtrain.config import build
from lmtrain.data import files
from lmtrain.data.sources import Document, SourceConfig, documents
from lmtrain.errors import CorpusError


def source(**keys: Any) -> SourceConfig:
    return build(SourceConfig, keys, where="source")


def raws(**keys: Any) -> list[bytes]:
    return [document.raw for document in documents(source(**keys))]


# names


def test_paths_folders_and_globs_are_sorted_and_taken_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("b.txt", "a.txt", "sub/d.txt", "sub/c.txt", "sub/deep/e.txt", "sub/picture.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(name.encode())
    assert raws(kind="files", paths="*.txt") == [b"a.txt", b"b.txt"]
    assert raws(kind="files", paths="**/*.txt") == [b"a.txt", b"b.txt", b"sub/c.txt", b"sub/d.txt", b"sub/deep/e.txt"]
    assert raws(kind="files", paths="sub") == [b"sub/c.txt", b"sub/d.txt", b"sub/deep/e.txt"]
    assert raws(kind="files", paths=["sub/d.txt", "b.txt", "*.txt", "sub"]) == [
        b"sub/d.txt", b"b.txt", b"a.txt", b"sub/c.txt", b"sub/deep/e.txt",
    ]  # fmt: skip
    assert raws(kind="files", paths="sub", format="txt")[-1] == b"sub/picture.png"
    found = list(documents(source(kind="files", paths={"test": "b.txt", "train": ["sub"]})))
    assert [(document.split, document.name) for document in found] == [
        ("train", "sub/c.txt"), ("train", "sub/d.txt"), ("train", "sub/deep/e.txt"), ("test", "b.txt"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ("nothing.txt", r"no such file: nothing\.txt"),
        ("*.jsonl", r"no file matches '\*\.jsonl'"),
        ("empty", "the folder empty holds no .txt"),
        ("picture.png", r"picture\.png: the ending does not tell .* source\.format"),
        ("x.parquet.gz", r"x\.parquet\.gz: parquet is compressed inside"),
        ({"train": "a.txt", "valid": "gone.txt"}, r"no such file: gone\.txt"),
    ],
)
def test_files_that_are_not_there(paths: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.txt", "picture.png", "x.parquet.gz"):
        Path(name).write_bytes(b"x")
    Path("empty").mkdir()
    with pytest.raises(CorpusError, match=message):
        next(documents(source(kind="files", paths=paths)))


def test_the_order_is_the_same_every_time(tmp_path: Path) -> None:
    draw = random.Random(6)
    names = [f"{draw.random()}.txt" for _ in range(40)]
    for name in names:
        (tmp_path / name).write_text(name)
    found = raws(kind="files", paths=str(tmp_path))
    assert found == [name.encode() for name in sorted(names)]
    assert raws(kind="files", paths=str(tmp_path / "*")) == found


# text


def pack(content: bytes, packing: str) -> bytes:
    if packing == ".gz":
        return gzip.compress(content, mtime=0)
    if packing == ".zst":
        return zstandard.compress(content)
    if packing == ".zst frames":  # several frames, an empty one among them
        half = len(content) // 2
        return b"".join(zstandard.compress(part) for part in (content[:half], b"", content[half:]))
    return content


PACKINGS = ["", ".gz", ".zst", ".zst frames"]


@pytest.mark.parametrize("packing", PACKINGS)
def test_documents_of_a_text_file(packing: str, tmp_path: Path) -> None:
    content = b"one\r\ntwo \xff\n\n  \n\x00three\n\n\nfour <|end|>\nfive<|end|><|end|>\n\n six\n<|end"
    path = tmp_path / ("a.txt" + packing.split()[0] if packing else "a.txt")
    path.write_bytes(pack(content, packing))

    def units(**keys: Any) -> list[bytes]:
        return raws(kind="files", paths=str(path), **keys)

    assert units() == [content]
    assert units(document="line") == [
        b"one", b"two \xff", b"  ", b"\x00three", b"four <|end|>", b"five<|end|><|end|>", b" six", b"<|end",
    ]  # fmt: skip
    assert units(document="blank_line") == [
        b"one\r\ntwo \xff", b"\x00three", b"four <|end|>\nfive<|end|><|end|>", b" six\n<|end",
    ]  # fmt: skip
    assert units(document="separator", separator="<|end|>") == [
        b"one\r\ntwo \xff\n\n  \n\x00three\n\n\nfour ", b"five", b" six\n<|end",
    ]  # fmt: skip
    assert [d.name for d in documents(source(kind="files", paths=str(path), document="line"))][:4] == [
        f"{path}:{line}" for line in (1, 2, 4, 5)
    ]


REUSED = [HealthCheck.function_scoped_fixture]


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=REUSED)
@given(
    parts=st.lists(st.text("ab|<\n", max_size=9), max_size=30),
    block=st.integers(1, 12),
    separator=st.text("ab|<", min_size=1, max_size=4),
)
def test_separators_across_blocks(
    parts: list[str], block: int, separator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_READ", block)
    text = separator.join(parts)
    (tmp_path / "a.txt").write_text(text, newline="")
    wanted = [piece.strip("\r\n").encode() for piece in text.split(separator)]
    found = raws(kind="files", paths=str(tmp_path / "a.txt"), document="separator", separator=separator)
    assert found == [piece for piece in wanted if piece]


def test_empty_file_is_an_empty_document(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"")
    assert raws(kind="files", paths=str(tmp_path)) == [b""]  # prepare counts and leaves out
    assert raws(kind="files", paths=str(tmp_path), document="line") == []


@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_files_of_any_size_are_whole(packing: str, tmp_path: Path) -> None:
    draw = random.Random(2)
    content = b"".join(draw.randbytes(500).hex().encode() + b"\n" for _ in range(3000))  # 3 MB: several reads
    path = tmp_path / ("a.txt" + packing.split()[0] if packing else "a.txt")
    path.write_bytes(pack(content, packing))
    assert raws(kind="files", paths=str(path)) == [content]
    assert raws(kind="files", paths=str(path), document="line") == content.splitlines()


@pytest.mark.parametrize("packing", PACKINGS[1:])
@pytest.mark.parametrize("unit", ["file", "line"])
def test_cut_or_damaged_packed_files_are_named(packing: str, unit: str, tmp_path: Path) -> None:
    draw = random.Random(4)
    good = pack(b"\n".join(draw.randbytes(40).hex().encode() for _ in range(400)), packing)
    path = tmp_path / ("a.txt" + packing.split()[0])
    message = f"{path} is damaged or cut short"
    for length in sorted({1, 5, len(good) // 3, len(good) // 2 - 3, len(good) - 5, len(good) - 1}):
        path.write_bytes(good[:length])
        with pytest.raises(CorpusError, match=message):
            raws(kind="files", paths=str(path), document=unit)
    path.write_bytes(b"plain text\n" * 30)
    with pytest.raises(CorpusError, match=message):
        raws(kind="files", paths=str(path), document=unit)
    if packing == ".gz":  # has a checksum of the content
        for _ in range(20):
            at = draw.randrange(20, len(good))
            path.write_bytes(good[:at] + bytes([good[at] ^ 1 << draw.randrange(8)]) + good[at + 1 :])
            with pytest.raises(CorpusError, match=message):
                raws(kind="files", paths=str(path), document=unit)


# JSON lines


@pytest.mark.parametrize("packing", PACKINGS)
def test_json_lines(packing: str, tmp_path: Path) -> None:
    texts = ["one\ntwo", "", "é\u2028\U0001f600\x00", " \ud800 lone", "x" * 5000]
    lines = [json.dumps({"id": i, "text": text, "body": i and str(i)}) for i, text in enumerate(texts)]
    lines[1:1] = ["", '{"text": null, "body": null}']
    path = tmp_path / ("a.jsonl" + packing.split()[0] if packing else "a.jsonl")
    path.write_bytes(pack("\n".join(lines).encode(), packing))
    found = list(documents(source(kind="files", paths=str(path))))
    assert [document.raw for document in found] == [
        b"one\ntwo", b"", b"", *(text.encode("utf-8", "surrogatepass") for text in texts[2:]),
    ]  # fmt: skip
    assert found[-1] == Document(b"x" * 5000, None, f"{path}:7")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "line 3: not valid JSON: "),
        (b"hello", "line 3: not valid JSON: "),
        (b'{"text": "\xff"}', "line 3: not UTF-8"),
        (b'["text"]', "line 3: a list, wanted an object with the field 'text'"),
        (b'{"txt": "a", "id": 1}', "line 3: no field 'text'; there are 'txt', 'id'; set source.field"),
        (b'{"text": 5}', "line 3: the field 'text' is a int, wanted text"),
        (b'{"text": ["a"]}', "line 3: the field 'text' is a list, wanted text"),
        (b"[" * 100_000, "line 3: not valid JSON: "),
    ],
)
def test_bad_json_lines_are_named(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    found = documents(source(kind="files", paths=str(path)))
    assert next(found).raw == b"good"
    with pytest.raises(CorpusError, match=f"{path} {message}") as error:
        next(found)
    assert "\n" not in str(error.value)


# parquet


@pytest.mark.parametrize("type_", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet(type_: pa.DataType, tmp_path: Path) -> None:
    texts = ["one", None, "", *(f"é {i}" for i in range(1000)), "last"]
    values = [text if text is None or type_ != pa.binary() else text.encode() for text in texts]
    table = pa.table({"id": range(len(texts)), "body": pa.array(values, type=type_)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    found = list(documents(source(kind="files", paths=str(tmp_path), field="body")))
    assert [document.raw for document in found] == [(text or "").encode() for text in texts]
    assert found[-1].name == f"{tmp_path / 'a.parquet'}#{len(texts)}"


def test_parquet_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"id": range(2000), "words": [["a"]] * 2000, "body": [f"text {i}" for i in range(2000)]})
    pq.write_table(table, path, compression="zstd", row_group_size=500)
    with pytest.raises(
        CorpusError, match=r"a\.parquet: no column 'text'; there are id, words, body; set source\.field"
    ):
        raws(kind="files", paths=str(path))
    for field, type_ in (("id", "int64"), ("words", "list")):
        with pytest.raises(CorpusError, match=f"the column '{field}' is of type {type_}.*, wanted text"):
            raws(kind="files", paths=str(path), field=field)
    good = path.read_bytes()
    for bad in (b"", b"PAR1", good[: len(good) // 2], b"text\n" * 100):
        path.write_bytes(bad)
        with pytest.raises(CorpusError, match=r"a\.parquet cannot be read as parquet after row 0: ") as error:
            raws(kind="files", paths=str(path), field="body")
        assert "\n" not in str(error.value)


def test_memory_is_bounded_by_a_document(tmp_path: Path) -> None:
    """10 MB of lines and JSON pass through in less than five, though packed they are 1 kB."""
    line = "x" * 999
    (tmp_path / "a.txt").write_text(f"{line}\n" * 10_000)
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": line}) + "\n") * 10_000)
    (tmp_path / "a.txt.zst").write_bytes(zstandard.compress((tmp_path / "a.txt").read_bytes()))
    for name in ("a.txt", "a.jsonl", "a.txt.zst"):
        tracemalloc.start()
        count = sum(1 for _ in documents(source(kind="files", paths=str(tmp_path / name), document="line")))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 10_000
        assert peak < 5 << 20, name
