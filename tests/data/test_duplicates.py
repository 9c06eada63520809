"""13-grams and exact duplicates against brute force in plain Python."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest

from lmtrain.data import duplicates

SPACES = b" \t\n\r\x0b\x0c"


def odd_documents(seed: int, count: int = 60) -> list[bytes]:
    """Bytes of all kinds: every white space, NUL, no-break spaces of two encodings, empty documents, long words."""
    rng = random.Random(seed)
    letters = [
        *(bytes([b]) for b in SPACES),
        b" ",
        b" ",
        b"a",
        b"b",
        b"\x00",
        b"\x85",
        b"\xa0",
        "\u3000".encode(),
        b"\xff",
    ]
    out = [b"".join(rng.choices(letters, k=rng.randrange(200))) for _ in range(count)]
    return [*out, b"", b" \n ", b"x" * 1000, b"y" * 37 + b"\n"]


def talk(seed: int, documents: int, *, sentences: int = 12) -> list[bytes]:
    """Documents made of whole sentences of 6 to 20 words out of one pool, so that n-grams recur, also over seams."""
    rng = random.Random(seed)
    words = [f"w{i}" for i in range(40)]
    pool = [" ".join(rng.choices(words, k=rng.randrange(6, 20))) for _ in range(60)]
    return [
        rng.choice([" ", "\n", " \n\t"]).join(rng.choices(pool, k=rng.randrange(sentences))).encode()
        for _ in range(documents)
    ]


def ngrams_of(raw: bytes, n: int) -> list[tuple[bytes, ...]]:
    words = raw.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 1 << 18])
def test_words_are_those_of_split_wherever_chunks_end(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    documents = odd_documents(0)
    whole = duplicates.words(documents)
    monkeypatch.setattr(duplicates, "_CHUNK", chunk)
    found = duplicates.words(documents)
    assert found.count_D.tolist() == [len(raw.split()) for raw in documents]
    assert np.array_equal(found.hash_W, whole.hash_W)  # a hash does not depend on where chunks end
    hashes: dict[bytes, int] = {}
    for word, value in zip([word for raw in documents for word in raw.split()], found.hash_W.tolist(), strict=True):
        assert hashes.setdefault(word, value) == value
    assert len(set(hashes.values())) == len(hashes)
    assert [duplicates.count_words(raw) for raw in documents] == [len(raw.split()) for raw in documents]


def test_words_that_differ_in_one_byte_or_in_order_have_other_hashes() -> None:
    words = [bytes([a, b, c]) for a in range(33, 73) for b in range(33, 73) for c in range(33, 73)]
    found = duplicates.words([b" ".join(words)])
    assert len(np.unique(found.hash_W)) == len(words) == 64000


@pytest.mark.parametrize(("n", "piece"), [(1, 1 << 20), (3, 5), (13, 1), (13, 17), (13, 1 << 20)])
def test_ngrams_are_those_of_a_sliding_window(monkeypatch: pytest.MonkeyPatch, n: int, piece: int) -> None:
    monkeypatch.setattr(duplicates, "_SLICE", piece)
    documents = [*talk(1, 30), b"", b"one two", *talk(2, 10), b" ".join([b"w"] * 13), b" ".join([b"w"] * 12)]
    parts = list(duplicates.ngrams(duplicates.words(documents), n=n))
    hashes = [value for hash_N, _ in parts for value in hash_N.tolist()]
    where = [value for _, document_N in parts for value in document_N.tolist()]
    wanted = [(gram, d) for d, raw in enumerate(documents) for gram in ngrams_of(raw, n)]
    assert where == [d for _, d in wanted]
    # Equal n-grams, equal hashes; different ones, different hashes; and some must recur for this to mean anything.
    pairs = set(zip(hashes, [gram for gram, _ in wanted], strict=True))
    assert len(pairs) == len({h for h, _ in pairs}) == len({g for _, g in pairs}) < len(wanted)


def test_find_agrees_with_a_set() -> None:
    rng = np.random.default_rng(0)
    held = np.unique(rng.integers(0, 1 << 64, 5000, dtype=np.uint64))
    asked = np.concatenate([rng.choice(held, 3000), rng.integers(0, 1 << 64, 20000, dtype=np.uint64), held[[0, -1]]])
    asked = np.concatenate([asked, held[:100] + np.uint64(1), np.array([0, 2**64 - 1], np.uint64)])
    which, position = duplicates.HeldOut(held).find(asked)
    known = set(held.tolist())
    assert which.tolist() == [i for i, value in enumerate(asked.tolist()) if value in known]
    assert np.array_equal(held[position], asked[which])
    nothing = duplicates.HeldOut(held[:0]).find(asked)
    assert nothing[0].size == nothing[1].size == 0


@pytest.mark.parametrize("seed", range(5))
def test_duplicates_against_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    names = ["train", "valid", "test"]
    raws = [b"%d" % rng.randrange(40) for _ in range(100)]
    split = [rng.choice([0, 0, 0, 1, 2]) for _ in raws]
    digests = [hashlib.sha256(raw).digest() for raw in raws]
    hash_D2 = np.array([[int.from_bytes(d[i : i + 8], "little") for i in (0, 8)] for d in digests], np.uint64)
    found = duplicates.duplicates(hash_D2, np.array(split, np.uint8), names)

    members = [[raw for raw, its in zip(raws, split, strict=True) if its == i] for i in range(3)]
    assert found.within == {name: len(members[i]) - len(set(members[i])) for i, name in enumerate(names)}
    pairs = ((0, 1), (0, 2), (1, 2))
    assert found.across == {f"{names[i]}/{names[j]}": len(set(members[i]) & set(members[j])) for i, j in pairs}
    held, seen, drop = set(members[1]) | set(members[2]), set(), []
    for raw, its in zip(raws, split, strict=True):
        drop.append(its == 0 and (raw in seen or raw in held))
        if its == 0:
            seen.add(raw)
    assert found.drop_D.tolist() == drop
    left = [raw for raw, out, its in zip(raws, drop, split, strict=True) if its == 0 and not out]
    assert len(left) == len(set(left)) > 0
    assert not set(left) & held
