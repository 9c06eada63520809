"""Tokenizers lose nothing, count bytes exactly, and are functions of their training text alone."""

from __future__ import annotations

import hashlib
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lmtrain.config import build, dump, parse_yaml
from lmtrain.data import symbols
from lmtrain.data.sample import CHUNK_MOST
from lmtrain.data.tokenizer import SentencePiece, Tokenizer, TokenizerConfig, load, train
from lmtrain.errors import ConfigError, TokenizerError
from tests.data.texts import KINDS, TEXT, check_lossless, trained


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    return trained()


AWKWARD = [
    "\u2581", "\u2581\u2581 \u2581", " ", "  ", "\n", "\r\n", "\t", "\x00", "<s>", "</s>", "<unk>", "<0x41>", "<0x0A>",
    "\u2585", "\u2047", " \u2047 ", "\ufffd", "\ufeff", "e\u0301", "\u00e9", "\ufb01", "\u3000", "\U0001f600",
    "\ud7ff\ue000", "\U0010ffff", "the", "The of", "\u00a0", "\u0085", "\u2028",
]  # fmt: skip
INVALID = [b"\xff", b"\xe2\x96", b"\x81", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2", b"\xf0\x9f\x98"]

raw_bytes = st.one_of(
    st.binary(max_size=60),
    st.text(max_size=60).map(str.encode),
    st.lists(st.sampled_from([text.encode() for text in AWKWARD] + INVALID) | st.binary(max_size=3), max_size=20).map(
        b"".join
    ),
)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(raw=raw_bytes)
def test_lossless_for_any_bytes(tokenizers: dict[str, Tokenizer], raw: bytes) -> None:
    for tokenizer in tokenizers.values():
        check_lossless(tokenizer, raw)


@pytest.mark.parametrize("kind", KINDS)
def test_lossless_for_each_awkward_string(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    for raw in [b"", *(text.encode() for text in AWKWARD), *INVALID]:
        for around in (raw, b"the " + raw, raw + b" of", raw + raw, b"\n" + raw + b"\n"):
            check_lossless(tokenizers[kind], around)


def test_sentencepiece_alone_would_lose_bytes(tokenizers: dict[str, Tokenizer]) -> None:
    """The fault that the tokenizer repairs is there: the tests above can fail."""
    alone = sentencepiece.SentencePieceProcessor(model_proto=tokenizers["sentencepiece-bpe"].content)
    assert alone.decode(alone.encode("a\u2581b")) == "a b"
    assert alone.decode(alone.encode(b"a\xffb")).encode() != b"a\xffb"


@pytest.mark.parametrize("kind", KINDS[:2])
def test_ids_are_sentencepieces_own_on_ordinary_text(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    alone = sentencepiece.SentencePieceProcessor(model_proto=tokenizers[kind].content)
    for raw in [*TEXT, "naïve <s> \u2047\nélan</s> <0x41>\x00".encode()]:
        for line in raw.split(b"\n"):
            assert tokenizers[kind].encode(line).tolist() == alone.encode(line.decode())
    for symbol in range(alone.get_piece_size()):
        if symbol > 257:  # below: <unk>, </s>, bytes
            assert tokenizers[kind].decode([symbol]).decode() == alone.id_to_piece(symbol).replace("\u2581", " ")


@pytest.mark.parametrize("kind", KINDS)
def test_symbol_bytes_are_those_of_each_symbol(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = tokenizers[kind]
    assert tokenizer.symbol_bytes().tolist() == [len(tokenizer.decode([i])) for i in range(tokenizer.vocab)]
    assert tokenizer.symbol_bytes()[tokenizer.end] == 0
    with pytest.raises(ValueError):
        tokenizer.symbol_bytes()[0] = 7
    for wrong in (-1, tokenizer.vocab):
        with pytest.raises(TokenizerError, match=f"symbol {wrong} is not"):
            tokenizer.decode([0, wrong])


@pytest.mark.parametrize("kind", KINDS)
def test_many_documents_and_threads_give_what_one_gives(
    tokenizers: dict[str, Tokenizer], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers[kind]
    documents = [*TEXT, b"", b"\xff\xfe", "a\u2581b".encode(), *TEXT[:3], b""]
    wanted = [tokenizer.encode(raw).tolist() for raw in documents]
    for size in (1, 5000, 1 << 20):
        monkeypatch.setattr(symbols, "GROUP_BYTES", size)
        for threads in (1, 3):
            found = tokenizer.encode_many(iter(documents), threads=threads)
            assert [ids.tolist() for ids in found] == wanted
    assert tokenizer.encode_many([]) == []


@pytest.mark.parametrize("kind", KINDS)
def test_long_documents(tokenizers: dict[str, Tokenizer], kind: str) -> None:
    draw = random.Random(5)
    for raw in (
        b"\n".join(TEXT) * 3,  # lines
        b" ".join(TEXT).replace(b"\n", b" "),  # one line of 40 kB
        "é\U0001f600".encode() * 6000,  # nowhere to cut but inside
        b"a" * 9000,
        b"\n" * 9000,
        b"the " + b" " * 9000,
        draw.randbytes(60_000),  # binary
    ):
        check_lossless(tokenizers[kind], raw)


def test_cutting_into_chunks_costs_nothing(tokenizers: dict[str, Tokenizer]) -> None:
    """BPE merges stay within words, so a long document has the very ids of SentencePiece on the whole of it."""
    alone = sentencepiece.SentencePieceProcessor(model_proto=tokenizers["sentencepiece-bpe"].content)
    for raw in (b"\n".join(TEXT), b" ".join(TEXT).replace(b"\n", b" ")):
        assert len(raw) > 4 * CHUNK_MOST
        assert tokenizers["sentencepiece-bpe"].encode(raw).tolist() == alone.encode(raw.decode())


def test_line_breaks_and_indentation_are_cheap(tokenizers: dict[str, Tokenizer]) -> None:
    for kind in KINDS[:2]:
        tokenizer = tokenizers[kind]
        assert len(tokenizer.encode(b"\n")) == 1
        assert len(tokenizer.encode(b"\n\n\n")) == 3
        assert len(tokenizer.encode(b"\r\n")) == 2
    assert len(tokenizers["sentencepiece-bpe"].encode(b"    ")) <= 2  # runs of spaces are pieces


def test_characters_are_in_code_point_order() -> None:
    text = "hello, wörld\n"
    tokenizer = train(TokenizerConfig(kind="characters", byte_fallback=False), [text.encode()], recipe={})
    index = {character: i for i, character in enumerate(sorted(set(text)))}
    assert tokenizer.encode(text.encode()).tolist() == [index[character] for character in text]
    assert tokenizer.vocab == len(index) + 1
    assert tokenizer.end == len(index)
    for raw, message in (
        ("wöZ".encode(), r"character 'Z' \(U\+005A\) at byte 3 .* `byte_fallback: true`"),
        ("wö\U0001f600".encode(), r"\(U\+1F600\) at byte 3"),
        (b"he\xff", r"byte 0xFF at offset 2 is not valid UTF-8"),
    ):
        with pytest.raises(TokenizerError, match=message):
            tokenizer.encode(raw)
    assert tokenizer.encode(b"").tolist() == []


def test_characters_fall_back_on_bytes() -> None:
    tokenizer = train(TokenizerConfig(kind="characters"), ["añ".encode()], recipe={})
    assert tokenizer.vocab == 2 + 256 + 1
    wanted = [0, 2 + 0xC3, 2 + 0xA9, 1, 2 + 0xFF, 2 + 0xF0, 2 + 0x9F, 2 + 0x98, 2 + 0x80, 0]
    assert tokenizer.encode("aéñ".encode() + b"\xff" + "\U0001f600a".encode()).tolist() == wanted


def test_bytes_are_themselves(tokenizers: dict[str, Tokenizer]) -> None:
    raw = bytes(range(256))
    assert tokenizers["bytes"].encode(raw).tolist() == list(raw)
    assert (tokenizers["bytes"].vocab, tokenizers["bytes"].end) == (257, 256)
    never = train(TokenizerConfig(kind="bytes"), iter(lambda: pytest.fail("read a document"), None), recipe={})  # type: ignore[arg-type]
    assert never.sha256 == tokenizers["bytes"].sha256


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(tokenizers: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    tokenizer = tokenizers[kind]
    tokenizer.save(tmp_path / "a" / "b")
    recipe = json.loads((tmp_path / "a/b/recipe.json").read_text())
    assert recipe == tokenizer.recipe
    assert recipe["kind"] == kind
    assert recipe["sha256"] == hashlib.sha256((tmp_path / "a/b" / recipe["file"]).read_bytes()).hexdigest()
    assert sorted(path.name for path in (tmp_path / "a/b").iterdir()) == sorted([recipe["file"], "recipe.json"])
    for path in (tmp_path / "a/b", str(tmp_path / "a/b"), tmp_path / "a/b" / recipe["file"]):
        again = load(path, sha256=tokenizer.sha256)
        assert (again.kind, again.vocab, again.end, again.sha256) == (
            kind,
            tokenizer.vocab,
            tokenizer.end,
            recipe["sha256"],
        )
        assert again.recipe == tokenizer.recipe
        for raw in (*TEXT[:2], b"\xff\x00 \xe2\x96\x81"):
            assert again.encode(raw).tolist() == tokenizer.encode(raw).tolist()
    again.save(tmp_path / "second")
    for path in (tmp_path / "second").iterdir():
        assert path.read_bytes() == (tmp_path / "a/b" / path.name).read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_every_damage_is_refused(tokenizers: dict[str, Tokenizer], kind: str, tmp_path: Path) -> None:
    tokenizers[kind].save(tmp_path)
    path = tmp_path / tokenizers[kind].file
    good = path.read_bytes()
    draw = random.Random(3)
    for _ in range(60):
        at, bit = draw.randrange(len(good)), draw.randrange(8)
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
        with pytest.raises(TokenizerError, match=str(path)):
            load(tmp_path)
    for bad in (b"", good[:-1], good[: len(good) // 2], good + b"\x00", b"hello", b"[]", b"null", b'{"kind": 3}'):
        path.write_bytes(bad)
        with pytest.raises(TokenizerError, match=str(path)):
            load(tmp_path)
    path.unlink()
    with pytest.raises(TokenizerError, match=f"no tokenizer {path}"):
        load(tmp_path)
    path.write_bytes(good)
    assert load(tmp_path).sha256 == tokenizers[kind].sha256
    with pytest.raises(TokenizerError, match="wanted 000000000000"):
        load(tmp_path, sha256="0" * 64)


def test_what_is_no_tokenizer_folder(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no tokenizer"):
        load(tmp_path / "nothing")
    with pytest.raises(TokenizerError, match=r"holds no recipe\.json"):
        load(tmp_path)
    for bad in ("", "{", "[]", '{"kind": "bytes"}', "\xff"):
        (tmp_path / "recipe.json").write_text(bad, encoding="latin-1")
        with pytest.raises(TokenizerError, match="not a tokenizer's recipe"):
            load(tmp_path)
    # One tokenizer's file with another's recipe, of the same name.
    tokenizers["sentencepiece-bpe"].save(tmp_path / "bpe")
    tokenizers["sentencepiece-unigram"].save(tmp_path / "unigram")
    (tmp_path / "bpe/tokenizer.model").replace(tmp_path / "unigram/tokenizer.model")
    with pytest.raises(TokenizerError, match="not the one of the recipe"):
        load(tmp_path / "unigram")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(TokenizerError, match="cannot be saved"):
        tokenizers["bytes"].save(tmp_path / "file")


def outside_model(**options: Any) -> bytes:
    """A SentencePiece model as somebody else may have trained it."""
    model = io.BytesIO()
    lines = [line for raw in TEXT for line in raw.decode().split("\n")]
    settings = {"model_type": "bpe", "vocab_size": 340, "minloglevel": 2, "byte_fallback": True} | options
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **settings)
    return model.getvalue()


LOSSLESS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "changes text"),
        (LOSSLESS | {"normalization_rule_name": "nfkc"}, "changes text"),
        (LOSSLESS | {"add_dummy_prefix": True}, "changes text"),
        (LOSSLESS | {"remove_extra_whitespaces": True}, "changes text"),
        (LOSSLESS | {"byte_fallback": False, "vocab_size": 100}, "no symbols for bytes"),
        (LOSSLESS | {"eos_id": -1}, "no </s>"),
    ],
)
def test_models_from_elsewhere_that_lose_something_are_refused(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "their.model").write_bytes(outside_model(**options))
    with pytest.raises(TokenizerError, match=message):
        load(tmp_path / "their.model")


def test_lossless_models_from_elsewhere_are_taken(tmp_path: Path) -> None:
    content = outside_model(**LOSSLESS, pad_id=3, user_defined_symbols=["<mask>", "\n\n"])
    (tmp_path / "their.model").write_bytes(content)
    tokenizer = load(tmp_path / "their.model")
    assert tokenizer.sha256 == hashlib.sha256(content).hexdigest()
    assert tokenizer.end == 2
    for raw in (*TEXT, b"<mask> \n\n\n \xff<pad></s>"):
        check_lossless(tokenizer, raw)
    tokenizer.save(tmp_path / "ours")
    assert load(tmp_path / "ours").kind == "sentencepiece"


def test_bytes_lost_in_encoding_are_noticed(tokenizers: dict[str, Tokenizer], monkeypatch: pytest.MonkeyPatch) -> None:
    broken = SentencePiece(tokenizers["sentencepiece-bpe"].content, kind="sentencepiece-bpe", recipe={}, where="here")
    monkeypatch.setattr(SentencePiece, "_encode", lambda self, raws: [np.array([5]) for _ in raws])
    with pytest.raises(TokenizerError, match="does not keep the bytes"):
        broken.encode(b"two")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{kind: byts}", "kind = 'byts'"),
        ("{kind: bytes, vocab: 300}", "vocab = 300: bytes has as many"),
        ("{kind: sentencepiece-bpe, byte_fallback: false}", "always lossless"),
        ("{vocab: 2}", "vocab = 2"),
        ("{sample_byte: 1}", "did you mean 'sample_bytes'"),
        ("{coverage: 0}", "coverage = 0"),
    ],
)
def test_configs_that_cannot_be_had(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(TokenizerConfig, parse_yaml(text, where="test"), where="tokenizer")


@pytest.mark.parametrize("text", ["{}", "{kind: bytes}", "{kind: characters, byte_fallback: false}", "{path: a/b}"])
def test_configs_are_complete_and_read_back(text: str) -> None:
    config = build(TokenizerConfig, parse_yaml(text, where="test"), where="tokenizer")
    assert build(TokenizerConfig, parse_yaml(dump(config), where="dump"), where="tokenizer") == config
    if text == "{}":
        assert (config.kind, config.vocab) == ("sentencepiece-unigram", 4096)
    if config.path is not None:
        with pytest.raises(TokenizerError, match="existing tokenizer"):
            train(config, [], recipe={})
