"""Tokenizers: SentencePiece BPE and unigram (the only import of sentencepiece), bytes, characters.

References
  Sennrich et al. 2016, "Neural machine translation of rare words with subword units" (BPE).
  Kudo 2018, "Subword regularization" (unigram).
  Kudo & Richardson 2018, "SentencePiece".

SentencePiece models here have id 0 `<unk>` (never produced: every byte has a symbol), id 1 `</s>` (the end symbol,
never produced from text, not even from the literal "</s>"), ids 2 .. 257 the bytes, then the pieces. There is no
normalization and no dummy prefix. No piece holds a line break: "\\n" is always the one symbol of its byte.

NOTE: SentencePiece alone turns a literal U+2581 into a space and invalid UTF-8 into U+FFFD. Those bytes are written as
byte symbols, and symbols are decoded piece by piece into bytes.
NOTE: the segmentation is that of chunks (`sample.chunks`), not of the whole document; it is a function of the bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, final

import numpy as np
import sentencepiece
from pydantic import Field, model_validator

from lmtrain.config import Config
from lmtrain.data.sample import Sample, chunks
from lmtrain.data.symbols import RECIPE, Bytes, Characters, Tokenizer, code_points
from lmtrain.errors import TokenizerError

__all__ = ["Bytes", "Characters", "SentencePiece", "Tokenizer", "TokenizerConfig", "load", "train"]

_SPECIAL = re.compile("[\u2581\udc80-\udcff]+")
_PROBE = "  Aa  \u00e9e\u0301 \ufb01\u00a0\u3000\uff21\n\n x\ty "
"""Two spaces, composed and decomposed accents, a ligature, odd spaces, a full-width letter: what normalizers change."""

Kind = Literal["sentencepiece-unigram", "sentencepiece-bpe", "bytes", "characters"]


class TokenizerConfig(Config):
    """Which tokenizer a corpus is written with: an existing one (`path`), or one to be trained."""

    kind: Kind | None = Field(None, description="default sentencepiece-unigram; with `path`, what it must be")
    path: str | None = Field(None, description="folder (or model file) of an existing tokenizer; nothing is trained")
    vocab: int | None = Field(
        None, ge=3, description="number of symbols V of a SentencePiece model, 258 + characters up"
    )
    sample_bytes: int = Field(32 << 20, ge=1, description="SentencePiece is trained on at most so many raw bytes")
    coverage: float = Field(
        0.9995, gt=0.9, le=1.0, description="share of characters that get a piece; others are bytes"
    )
    byte_fallback: bool = Field(True, description="characters: write unseen ones as bytes; false: they are an error")

    @model_validator(mode="after")
    def _complete(self) -> TokenizerConfig:
        if self.kind is None and self.path is None:
            object.__setattr__(self, "kind", "sentencepiece-unigram")
        if self.path is not None:
            return self
        pieces = self.kind in ("sentencepiece-unigram", "sentencepiece-bpe")
        if pieces and self.vocab is None:
            object.__setattr__(self, "vocab", 4096)
        if not pieces and self.vocab is not None:
            raise ValueError(f"vocab = {self.vocab}: {self.kind} has as many symbols as it has; leave vocab out")
        if pieces and not self.byte_fallback:
            raise ValueError(f"byte_fallback = false: {self.kind} is always lossless; leave byte_fallback out")
        return self


@final
class SentencePiece(Tokenizer):
    """A SentencePiece model that loses nothing. `content` is the serialized model, the .model file itself."""

    file = "tokenizer.model"

    def __init__(self, content: bytes, *, kind: str, recipe: Mapping[str, Any], where: str) -> None:
        self.kind = kind
        try:
            if not content:
                raise ValueError("it is empty")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
            pieces, self._byte_ids_256 = self._tables(where)
        except (RuntimeError, ValueError, IndexError) as error:  # also the UnicodeDecodeError of a piece
            raise TokenizerError(f"{where} is not a SentencePiece model ({error}); it may be damaged") from None
        super().__init__(pieces=pieces, end=self._model.eos_id(), content=content, recipe=recipe)
        if self.decode(np.asarray(self._model.encode(_PROBE), dtype=np.int64)) != _PROBE.encode():
            raise TokenizerError(
                f"{where} changes text before it is cut (normalization, dummy prefix or removed spaces); "
                "train one with `lmtrain tokenizer train`"
            )

    def _tables(self, where: str) -> tuple[list[bytes], np.ndarray]:
        """(raw bytes of each symbol, id of each byte)."""
        model = self._model
        pieces: list[bytes] = []
        byte_ids_256 = np.full(256, -1, dtype=np.int64)
        for i in range(model.get_piece_size()):
            if model.is_byte(i):
                byte = int(model.id_to_piece(i)[3:5], 16)  # "<0x41>"
                byte_ids_256[byte] = i
                pieces.append(bytes([byte]))
            elif model.is_control(i) or model.is_unknown(i) or model.is_unused(i):
                pieces.append(b"")
            else:
                pieces.append(model.id_to_piece(i).replace("\u2581", " ").encode())
        if (byte_ids_256 < 0).any():
            raise TokenizerError(f"{where} has no symbols for bytes; train one with `lmtrain tokenizer train`")
        if model.eos_id() < 0:
            raise TokenizerError(f"{where} has no </s>, which ends a document; train with eos_id=1")
        return pieces, byte_ids_256

    def _encode(self, raws: Sequence[bytes]) -> list[np.ndarray]:
        parts_by_document = [_parts(raw) for raw in raws]
        # Each distinct text once: between the invalid bytes of a binary document the same few letters recur.
        texts = list({part: None for parts in parts_by_document for part in parts if isinstance(part, str)})
        encoded = self._model.encode(texts, return_type="numpy", num_threads=1) if texts else []
        ids_by_text = dict(zip(texts, encoded, strict=True))
        out: list[np.ndarray] = []
        for parts in parts_by_document:
            arrays = [
                ids_by_text[part] if isinstance(part, str) else self._byte_ids_256[np.frombuffer(part, dtype=np.uint8)]
                for part in parts
            ]
            out.append(np.concatenate(arrays).astype(np.int64) if arrays else np.zeros(0, dtype=np.int64))
        return out


def _parts(raw: bytes) -> list[str | bytes]:
    """A document as chunks of text that SentencePiece keeps (str) and runs that it would change (bytes), in order."""
    try:
        text = raw.decode("utf-8")
        special = "\u2581" in text
    except UnicodeDecodeError:
        text = raw.decode("utf-8", "surrogateescape")
        special = True
    if not special:
        return list(chunks(text))
    parts: list[str | bytes] = []
    at = 0
    for match in _SPECIAL.finditer(text):
        parts.extend(chunks(text[at : match.start()]))
        parts.append(match.group().encode("utf-8", "surrogateescape"))
        at = match.end()
    parts.extend(chunks(text[at:]))
    return parts


def train(config: TokenizerConfig, documents: Iterable[bytes], *, recipe: Mapping[str, Any]) -> Tokenizer:
    """Train on documents (raw bytes; of the train split only). They are read once; `bytes` reads none.

    recipe: what the caller knows of the documents ({source, split, buckets, ...}, JSON values); counts are added.
    The same documents in any order give the same tokenizer, byte for byte, for the same sentencepiece and C library.
    Raises TokenizerError when there is no text, or too little (or too much) of it for `config.vocab`.
    """
    if config.path is not None:
        raise TokenizerError(f"tokenizer.path = {config.path} is an existing tokenizer; leave path out to train one")
    facts: dict[str, Any] = {"config": config.model_dump(mode="json")}
    if config.kind == "bytes":
        return Bytes(recipe=facts)
    if config.kind == "characters":
        seen: set[int] = set()
        count = size = 0
        for raw in documents:
            seen.update(np.unique(code_points(raw)).tolist())
            count += 1
            size += len(raw)
        seen = {point for point in seen if not 0xDC80 <= point <= 0xDCFF}
        if not seen:
            raise TokenizerError(f"no text to train a tokenizer on: {count} documents, {size} bytes")
        facts["trained_on"] = {**recipe, "documents": count, "bytes": size}
        return Characters(code_points=seen, byte_fallback=config.byte_fallback, recipe=facts)
    assert config.kind is not None
    sample = Sample(config.sample_bytes)
    for raw in documents:
        sample.add(raw)
    lines, sampled = sample.lines()
    counts = {"documents": sample.documents, "bytes": sample.bytes, "sampled_bytes": sampled}
    if not lines:
        raise TokenizerError(
            f"no text to train a tokenizer on: {sample.documents} documents, {sample.bytes} bytes, of which "
            f"tokenizer.sample_bytes = {config.sample_bytes} keeps {sampled}"
        )
    facts |= {"trained_on": {**recipe, **counts}, "sentencepiece": sentencepiece.__version__}
    content = _train_sentencepiece(config, lines)
    return SentencePiece(content, kind=config.kind, recipe=facts, where="the trained model")


def _train_sentencepiece(config: TokenizerConfig, lines: list[str]) -> bytes:
    assert config.kind is not None
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=config.kind.removeprefix("sentencepiece-"),
            vocab_size=config.vocab,
            character_coverage=config.coverage,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            byte_fallback=True,
            unk_id=0,
            eos_id=1,
            bos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 20,
            # Partial sums are made per thread: their number is part of the result, so it is the same on every machine.
            num_threads=4,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise TokenizerError(_explain(str(error), config)) from None
    return model.getvalue()


def _explain(message: str, config: TokenizerConfig) -> str:
    given = f"tokenizer.vocab = {config.vocab}"
    if most := re.search(r"Vocabulary size too high.*<= (\d+)", message):
        return f"{given} is too large for this text: the largest possible for {config.kind} is {most[1]}"
    if least := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return f"{given} is too small for this text: 256 bytes, 2 marks and its characters take {least[1]}"
    return f"SentencePiece could not train a {config.kind} of {given}: {' '.join(message.split())}"


def load(path: Path | str, *, sha256: str | None = None) -> Tokenizer:
    """A saved tokenizer: its folder, or its file alone (a SentencePiece .model needs no recipe).

    sha256: the one that a corpus or checkpoint was made with. TokenizerError when the file is missing, damaged, not
    the one of its recipe, or not of that sha256.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    recipe = _read_recipe(folder / RECIPE)
    if path.is_dir():
        if recipe is None:
            raise TokenizerError(f"{path} holds no {RECIPE}, so it is no tokenizer; give a folder that has one")
        path = folder / str(recipe["file"])
    elif recipe is None or recipe["file"] != path.name:
        recipe = None
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise TokenizerError(f"no tokenizer {path}; tokenizers/ holds ready ones") from None
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from None
    found = hashlib.sha256(content).hexdigest()
    # Before anything is parsed: a damaged model may well parse.
    if recipe is not None and found != recipe["sha256"]:
        raise TokenizerError(
            f"{path} has sha256 {found[:12]}..., its recipe says {str(recipe['sha256'])[:12]}...: "
            "it is damaged or not the one of the recipe"
        )
    tokenizer = _parse(content, recipe=recipe, path=path)
    if tokenizer.sha256 != found:
        raise TokenizerError(f"{path} is not as it was saved: it was edited or damaged")
    if sha256 is not None and tokenizer.sha256 != sha256:
        raise TokenizerError(
            f"{path} has sha256 {tokenizer.sha256[:12]}..., wanted {sha256[:12]}...: "
            "give the tokenizer that was used then"
        )
    return tokenizer


def _read_recipe(path: Path) -> dict[str, Any] | None:
    try:
        recipe = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} is not a tokenizer's recipe: {error}") from None
    wanted = {"kind", "file", "sha256"}
    if not isinstance(recipe, dict) or not wanted <= recipe.keys():
        raise TokenizerError(f"{path} is not a tokenizer's recipe: it must have {', '.join(sorted(wanted))}")
    return recipe


def _parse(content: bytes, *, recipe: dict[str, Any] | None, path: Path) -> Tokenizer:
    facts = recipe or {}
    if path.suffix != ".json":
        kind = str(facts.get("kind", "sentencepiece"))
        return SentencePiece(content, kind=kind, recipe=facts, where=str(path))
    try:
        value = json.loads(content)
        if value["kind"] == "bytes":
            return Bytes(recipe=facts)
        if value["kind"] == "characters":
            points = [int(point) for point in value["code_points"]]
            return Characters(code_points=points, byte_fallback=bool(value["byte_fallback"]), recipe=facts)
    except (ValueError, KeyError, TypeError, OverflowError, IndexError) as error:
        raise TokenizerError(f"{path} is not a tokenizer: {type(error).__name__} {error}") from None
    raise TokenizerError(f"{path} is a tokenizer of unknown kind {value['kind']!r}")
