"""Training a tokenizer: a function of the text alone, whatever the text; and the shipped ones."""

from __future__ import annotations

import hashlib
import itertools
import platform
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.config import build
from lmtrain.data.sample import CHUNK_LEAST, CHUNK_MOST, Sample, chunks
from lmtrain.data.sources import SourceConfig, documents
from lmtrain.data.tokenizer import Tokenizer, TokenizerConfig, load, train
from lmtrain.errors import TokenizerError
from tests.data.texts import KINDS, TEXT, VOCAB, check_lossless, trained


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return trained()


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.sampled_from(["a", " ", "\n", "\u00e9", "ab ", "x\n"]), st.integers(1, 2500)), max_size=12)
)
def test_chunks_join_to_the_text(parts: list[tuple[str, int]]) -> None:
    text = "".join(part * times for part, times in parts)
    found = list(chunks(text))
    assert "".join(found) == text
    assert all(0 < len(chunk) <= CHUNK_MOST for chunk in found)
    assert all(len(chunk) >= CHUNK_LEAST for chunk in found[:-1])
    for chunk, after in itertools.pairwise(found):
        assert chunk.endswith("\n") or "\n" not in (chunk + after)[CHUNK_LEAST - 1 : CHUNK_MOST]
        if not chunk.endswith("\n") and " " in (chunk + after)[CHUNK_LEAST:CHUNK_MOST]:
            assert after.startswith(" ")


def naive_sample(documents: list[bytes], budget: int) -> list[bytes]:
    pool = [chunk.encode() for raw in documents for chunk in chunks(raw.decode())]
    pool.sort(key=lambda chunk: hashlib.blake2b(chunk, digest_size=16).digest())
    total, kept = 0, []
    for chunk in pool:
        total += len(chunk)
        if total > budget:
            return [other for other in kept if other != chunk]
        kept.append(chunk)
    return kept


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(["a", "b " * 700, "c\n" * 900, "d" * 5000, "f g\n" * 3000, "é" * 1200]), max_size=14),
    st.integers(1, 60_000),
    st.randoms(use_true_random=False),
)
def test_sample_is_a_function_of_content(texts: list[str], budget: int, draw: random.Random) -> None:
    documents = [text.encode() for text in texts]
    wanted = naive_sample(documents, budget)
    draw.shuffle(documents)
    sample = Sample(budget)
    for raw in documents:
        sample.add(raw)
    lines, size = sample.lines()
    assert size == sum(map(len, wanted)) <= budget
    assert lines == sorted(lines)
    assert max(map(len, lines), default=0) <= 256
    assert Counter("".join(lines)) == Counter(b"".join(wanted).decode().replace("\n", ""))
    assert (sample.documents, sample.bytes) == (len(documents), sum(map(len, documents)))


@pytest.mark.parametrize("kind", KINDS)
def test_training_does_not_depend_on_the_order_of_documents(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    config = TokenizerConfig(kind=kind, vocab=VOCAB.get(kind))
    again = train(config, reversed(TEXT), recipe={"source": "test"})
    assert again.content == tokenizers[kind].content
    assert again.recipe == tokenizers[kind].recipe


def test_training_gives_the_same_bytes_in_another_process_and_on_one_core(tokenizers: dict[str, Tokenizer]) -> None:
    code = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
        "from tests.data.texts import KINDS, trained;"
        "print(*(trained()[kind].sha256 for kind in KINDS))"
    )
    root = Path(__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert out.split() == [tokenizers[kind].sha256 for kind in KINDS]


def test_sample_bytes_bound_what_is_seen() -> None:
    config = TokenizerConfig(kind="sentencepiece-bpe", vocab=330, sample_bytes=12_000)
    tokenizer = train(config, TEXT, recipe={"source": "test", "split": "train"})
    facts = tokenizer.recipe["trained_on"]
    assert 4_000 < facts["sampled_bytes"] <= 12_000
    assert facts["bytes"] == sum(map(len, TEXT))
    assert (facts["documents"], facts["source"], facts["split"]) == (len(TEXT), "test", "train")
    check_lossless(tokenizer, TEXT[0])


@pytest.mark.parametrize("kind", KINDS[:2])
def test_awkward_training_text_is_used(kind: str) -> None:
    """SentencePiece would drop long lines and those with U+2585, and fail on others; what is around them counts."""
    draw = random.Random(1)
    for awkward in ("\u2585", "\u2581", "\x00", "\t", "\n", "\udcff", " \u2581 "):
        line = " ".join(draw.choice(["zebra", "quagga", "okapi"]) + awkward for _ in range(3000))
        raw = line.encode("utf-8", "surrogateescape")
        vocab = 273 if kind == "sentencepiece-unigram" else 285  # the least that leaves room for words
        tokenizer = train(TokenizerConfig(kind=kind, vocab=vocab), [raw], recipe={})
        pieces = [tokenizer.decode([i]) for i in range(258, tokenizer.vocab)]
        assert any(word in piece for piece in pieces for word in (b"zebra", b"quagga", b"okapi")), awkward
        assert not any(b"\n" in piece or b"\xe2\x96" in piece or b"\x00" in piece for piece in pieces)
        check_lossless(tokenizer, raw)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_vocabulary_that_cannot_be_had_tells_what_can(kind: str) -> None:
    text = [b"the quick brown fox jumps over the lazy dog\n" * 3 + b"the dog sleeps, the fox does not"]

    def attempt(vocab: int) -> Tokenizer:
        return train(TokenizerConfig(kind=kind, vocab=vocab), text, recipe={})

    with pytest.raises(TokenizerError, match=r"vocab = 5000 is too large .* largest possible for \S+ is \d+$") as error:
        attempt(5000)
    largest = int(str(error.value).split()[-1])
    assert attempt(largest).vocab == largest
    with pytest.raises(TokenizerError, match="too large"):
        attempt(largest + 1)
    with pytest.raises(TokenizerError, match=r"vocab = 261 is too small .* take \d+$") as error:
        attempt(261)
    least = int(str(error.value).split()[-1])
    assert attempt(least).vocab == least
    with pytest.raises(TokenizerError, match="too small"):
        attempt(least - 1)


@pytest.mark.parametrize("kind", KINDS[:2] + KINDS[3:])
@pytest.mark.parametrize("documents", [[], [b""], [b"\xff\xff"]])
def test_no_text_to_train_on(kind: str, documents: list[bytes]) -> None:
    with pytest.raises(TokenizerError, match=rf"no text to train .* {len(documents)} documents"):
        train(TokenizerConfig(kind=kind), documents, recipe={})


SHIPPED = Path(__file__).parents[2] / "tokenizers"


@pytest.mark.parametrize("name", ["sotu-unigram-1024", "sotu-bpe-4096"])
def test_shipped_tokenizers_are_those_of_their_recipes(name: str) -> None:
    assert sorted(path.name for path in SHIPPED.iterdir() if path.is_dir()) == ["sotu-bpe-4096", "sotu-unigram-1024"]
    tokenizer = load(SHIPPED / name)  # compares the sha256 with the recipe's
    assert f"`{name}`" in (SHIPPED / "README.md").read_text()
    assert tokenizer.sha256 in (SHIPPED / "README.md").read_text()
    assert name == f"sotu-{tokenizer.kind.removeprefix('sentencepiece-')}-{tokenizer.vocab}"
    facts = tokenizer.recipe["trained_on"]
    assert (facts["source"], facts["documents"], facts["bytes"]) == ("sotu", 231, 11_465_550)
    held_out = [document.raw for document in documents(SourceConfig()) if document.split == "test"]
    ids = tokenizer.encode_many(held_out)
    assert [tokenizer.decode(found) for found in ids] == held_out
    # Figures of the README, which would change with the segmentation.
    ratio = sum(map(len, held_out)) / sum(map(len, ids))
    assert f"{ratio:.3f}" in (SHIPPED / "README.md").read_text()
    check_lossless(tokenizer, b"\xff\x00<s></s>" + "\u2581 \u2581’".encode())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sotu-unigram-1024", "sotu-bpe-4096"])
def test_shipped_tokenizers_are_trained_again(name: str) -> None:
    """30 s and 3 s of one core. Bytes are compared where floating point is that of the machine they were made on."""
    shipped = load(SHIPPED / name)
    config = build(TokenizerConfig, shipped.recipe["config"], where="recipe")
    text = [document.raw for document in documents(SourceConfig()) if document.split == "train"]
    facts = {key: value for key, value in shipped.recipe["trained_on"].items() if key in ("source", "split")}
    again = train(config, reversed(text), recipe=facts)
    if sentencepiece.__version__ == shipped.recipe["sentencepiece"] and platform.machine() == "x86_64":
        assert again.content == shipped.content
        assert again.recipe == shipped.recipe
    first, second = ({tokenizer.decode([i]) for i in range(tokenizer.vocab)} for tokenizer in (again, shipped))
    assert len(first & second) > 0.99 * len(second)
