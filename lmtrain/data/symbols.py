"""What a tokenizer is, and the two that need no library: bytes and characters.

Every symbol stands for a constant run of raw bytes. So decoding is concatenation, raw bytes are counted by a table
look-up, and `decode(encode(raw)) == raw` holds for any bytes, valid UTF-8 or not.

Names: V symbols of the alphabet, N symbols or characters of a document.
"""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, final

import numpy as np

from lmtrain.errors import TokenizerError

RECIPE = "recipe.json"
GROUP_BYTES = 1 << 20
"""Documents are encoded in groups of about this many raw bytes, one group a thread at a time."""


class Tokenizer(ABC):
    """Raw bytes to symbols and back. Immutable, safe to share among threads.

    kind: its configuration name. vocab: V, the end symbol included. end: id of the end symbol, which `encode` never
    gives and which stands for no bytes. sha256: of `content`, the file that defines it; a corpus records it.
    recipe: how it came about, JSON values (see `save`).
    """

    kind: str
    file: ClassVar[str]

    def __init__(self, *, pieces: Sequence[bytes], end: int, content: bytes, recipe: Mapping[str, Any]) -> None:
        self.vocab = len(pieces)
        self.end = end
        self.content = content
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.recipe: dict[str, Any] = {**recipe, "kind": self.kind, "vocab": self.vocab, "end": end}
        self.recipe |= {"file": self.file, "sha256": self.sha256}
        self._pieces = list(pieces)
        self._symbol_bytes_V = np.array([len(piece) for piece in pieces], dtype=np.int64)
        self._symbol_bytes_V.setflags(write=False)
        assert not pieces[end]

    @abstractmethod
    def _encode(self, raws: Sequence[bytes]) -> list[np.ndarray]:
        """int64 [N] symbols of each document."""

    @final
    def encode(self, raw: bytes) -> np.ndarray:
        """int64 [N] symbols of one document, without the end symbol. TokenizerError when it cannot be written."""
        return self.encode_many([raw])[0]

    @final
    def encode_many(self, raws: Iterable[bytes], *, threads: int = 1) -> list[np.ndarray]:
        """`encode` of every document; `threads` of them work on whole documents at a time. Same result for any number.

        Raises TokenizerError when a document cannot be written, or when an imported SentencePiece model loses bytes.
        """
        groups = _groups(raws)
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                return [ids_N for group in pool.map(self._checked, groups) for ids_N in group]
        return [ids_N for group in groups for ids_N in self._checked(group)]

    def _checked(self, raws: Sequence[bytes]) -> list[np.ndarray]:
        out = self._encode(raws)
        for raw, ids_N in zip(raws, out, strict=True):
            # One look-up a symbol; it is what bits per byte stands on, so it is made for every document.
            if int(self._symbol_bytes_V[ids_N].sum()) != len(raw):
                raise TokenizerError(
                    f"the {self.kind} tokenizer {self.sha256[:12]} does not keep the bytes of a document that begins "
                    f"with {raw[:40]!r}; train one with `lmtrain tokenizer train`"
                )
        return out

    @final
    def decode(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """The raw bytes of symbols (the end symbol gives none). TokenizerError when an id is not below V."""
        ids_N = np.asarray(ids, dtype=np.int64).reshape(-1)
        if ids_N.size and not (ids_N.min() >= 0 and ids_N.max() < self.vocab):
            wrong = int(ids_N.min()) if ids_N.min() < 0 else int(ids_N.max())
            raise TokenizerError(f"symbol {wrong} is not one of the tokenizer's 0 .. {self.vocab - 1}")
        pieces = self._pieces
        return b"".join([pieces[i] for i in ids_N.tolist()])

    @final
    def symbol_bytes(self) -> np.ndarray:
        """int64 [V], read-only: raw bytes of each symbol; len(decode(ids)) == symbol_bytes()[ids].sum()."""
        return self._symbol_bytes_V

    @final
    def save(self, folder: Path | str) -> None:
        """Write the tokenizer's file and `recipe.json` into a folder, each aside and then renamed.

        The recipe is {kind, vocab, end, file, sha256, config, trained_on: {documents, bytes, ...}, sentencepiece}.
        """
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(folder / self.file, self.content)
            _write(folder / RECIPE, canonical_json(self.recipe))
        except OSError as error:
            raise TokenizerError(f"the tokenizer cannot be saved in {folder}: {error}") from None


def _groups(raws: Iterable[bytes]) -> Iterator[list[bytes]]:
    group: list[bytes] = []
    size = 0
    for raw in raws:
        group.append(raw)
        size += len(raw)
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def canonical_json(value: Any) -> bytes:
    """JSON with one spelling, so that equal values have equal hashes."""
    return (json.dumps(value, indent=1, sort_keys=True, ensure_ascii=True) + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    aside = path.with_name(path.name + ".part")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


@final
class Bytes(Tokenizer):
    """Symbol = byte; 256 is the end symbol. V = 257."""

    kind = "bytes"
    file = "tokenizer.json"

    def __init__(self, *, recipe: Mapping[str, Any]) -> None:
        pieces = [bytes([b]) for b in range(256)] + [b""]
        super().__init__(pieces=pieces, end=256, content=canonical_json({"kind": self.kind}), recipe=recipe)

    def _encode(self, raws: Sequence[bytes]) -> list[np.ndarray]:
        return [np.frombuffer(raw, dtype=np.uint8).astype(np.int64) for raw in raws]


@final
class Characters(Tokenizer):
    """Symbol = Unicode character seen in training, in code-point order; then 256 bytes if `byte_fallback`; then end.

    With the fallback an unseen character is written as its UTF-8 bytes, as is whatever is not valid UTF-8. Without it
    they are a TokenizerError.
    """

    kind = "characters"
    file = "tokenizer.json"

    def __init__(self, *, code_points: Iterable[int], byte_fallback: bool, recipe: Mapping[str, Any]) -> None:
        points = sorted(set(code_points))
        self._characters = len(points)
        self._fallback = byte_fallback
        # id of every code point up to the largest one seen; -1 = unseen.
        self._table = np.full((points[-1] if points else 0) + 1, -1, dtype=np.int64)
        self._table[points] = np.arange(len(points))
        pieces = [chr(point).encode() for point in points]
        if byte_fallback:
            pieces += [bytes([b]) for b in range(256)]
        content = canonical_json({"kind": self.kind, "code_points": points, "byte_fallback": byte_fallback})
        super().__init__(pieces=[*pieces, b""], end=len(pieces), content=content, recipe=recipe)

    def _encode(self, raws: Sequence[bytes]) -> list[np.ndarray]:
        return [self._encode_one(raw) for raw in raws]

    def _encode_one(self, raw: bytes) -> np.ndarray:
        points_N = code_points(raw)
        inside_N = points_N < len(self._table)
        ids_N: np.ndarray = np.where(inside_N, self._table[np.where(inside_N, points_N, 0)], -1)
        unseen_N = ids_N < 0
        if not unseen_N.any():
            return ids_N
        bytes_N = utf8_lengths(points_N)
        if not self._fallback:
            first = int(unseen_N.argmax())
            self._refuse(int(points_N[first]), at=int(bytes_N[:first].sum()))
        # An unseen character takes as many symbols as it has bytes; those bytes are read from the raw document.
        out = np.repeat(ids_N, np.where(unseen_N, bytes_N, 1))
        fallback = np.frombuffer(raw, dtype=np.uint8)[np.repeat(unseen_N, bytes_N)]
        out[out < 0] = self._characters + fallback.astype(np.int64)
        return out

    def _refuse(self, point: int, *, at: int) -> None:
        if 0xDC80 <= point <= 0xDCFF:
            what = f"the byte 0x{point - 0xDC00:02X} at offset {at} is not valid UTF-8 and"
        else:
            what = f"the character {chr(point)!r} (U+{point:04X}) at byte {at}"
        raise TokenizerError(
            f"{what} is not among the {self._characters} characters of this tokenizer; "
            "train it with `byte_fallback: true`, or on text that has it"
        )


def code_points(raw: bytes) -> np.ndarray:
    """uint32 [N] code points of raw bytes; a byte b that is not valid UTF-8 is 0xDC00 + b (a lone surrogate)."""
    text = raw.decode("utf-8", "surrogateescape")
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def utf8_lengths(points_N: np.ndarray) -> np.ndarray:
    """int64 [N]: raw bytes of each code point of `code_points`."""
    steps = (points_N >= 0x80).astype(np.int64) + (points_N >= 0x800) + (points_N >= 0x10000)
    escaped_N = (points_N >= 0xDC80) & (points_N <= 0xDCFF)
    out: np.ndarray = np.where(escaped_N, 1, 1 + steps)
    return out
