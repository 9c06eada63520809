"""A corpus in memory: raw bytes that were never prepared, scored like any split on disk.

Shapes in names: B rows, T symbols of a row, N symbols of the split, D documents, V symbols of the alphabet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from lmtrain.data.symbols import Tokenizer
from lmtrain.errors import CorpusError, InputError
from lmtrain.meaning import Known, Measure
from lmtrain.protocol import Batch, Cond


def begins(end_D: np.ndarray, *, position: int, count: int) -> np.ndarray:
    """bool [count]: whether each symbol from `position` on begins a document; end_D as `Split.document_ends`."""
    out = np.zeros(count, dtype=bool)
    low, high = np.searchsorted(end_D, [position, position + count])
    out[end_D[low:high] - position] = True
    if position == 0 and count:
        out[0] = True
    return out


class MemorySplit:
    """A split (protocol.Split) over documents that are already symbols.

    documents: each ends with its end symbol. bos: the start symbol of the first one.
    """

    def __init__(
        self,
        name: str,
        documents: Sequence[np.ndarray],
        *,
        bos: int,
        alphabet: int,
        bytes: int = 0,
        words: int = 0,
    ) -> None:
        if not len(documents) or not all(len(document) for document in documents):
            raise InputError(f"split {name!r} has an empty document or none; a document has at least its end symbol")
        dtype = np.min_scalar_type(max(alphabet - 1, 0))
        self._symbols_N = np.concatenate([np.asarray(document).astype(dtype) for document in documents])
        self._end_D = np.cumsum([len(document) for document in documents], dtype=np.int64)
        self._bos = bos
        self.name = name
        self.symbols = int(self._end_D[-1])
        self.documents = len(documents)
        self.words = words
        self.bytes = bytes

    def rows(self, context: int) -> int:
        """Rows of `context` symbols; the last one may be padded."""
        return -(-self.symbols // context)

    def row_symbols(self, index_N: np.ndarray, context: int) -> np.ndarray:
        """int64 [N]: scored symbols of each row."""
        index_N = np.asarray(index_N, dtype=np.int64)
        count_N = np.clip(self.symbols - index_N * context, 0, context)
        return np.where(index_N < 0, 0, count_N)

    def fetch(self, index_B: np.ndarray, context: int, *, masking: bool = False) -> Batch:
        """The rows `index_B`; -1 is a padding row."""
        index_B = np.asarray(index_B, dtype=np.int64)
        x_BT = np.zeros((len(index_B), context), dtype=np.int64)
        weight_BT = np.zeros((len(index_B), context), dtype=np.float32)
        first_BT = np.zeros((len(index_B), context), dtype=bool)
        start_B = np.full(len(index_B), self._bos, dtype=np.int64)
        position_B = np.where(index_B < 0, -1, index_B * context)
        for b, position in enumerate(position_B):
            if position < 0:
                continue
            symbols = self.read(int(position), min(int(position) + context, self.symbols))
            x_BT[b, : len(symbols)] = symbols
            weight_BT[b, : len(symbols)] = 1
            start_B[b] = self.start_symbol(int(position))
            first_BT[b, : len(symbols)] = begins(self._end_D, position=int(position), count=len(symbols))
        cond = Cond(torch.from_numpy(start_B), torch.from_numpy(first_BT) if masking else None)
        return Batch(torch.from_numpy(x_BT), torch.from_numpy(weight_BT), cond, position_B=torch.from_numpy(position_B))

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64 symbols of [start, stop)."""
        if not 0 <= start <= stop <= self.symbols:
            raise InputError(f"symbols {start} to {stop} were asked of a split of {self.symbols}")
        return self._symbols_N[start:stop].astype(np.int64)

    def start_symbol(self, position: int) -> int:
        """The symbol before `position`."""
        return self._bos if position == 0 else int(self._symbols_N[position - 1])

    def document_ends(self) -> np.ndarray:
        """int64 [D], ascending."""
        return self._end_D


class MemoryCorpus:
    """A corpus (protocol.Corpus) of one split, made of raw documents and the tokenizer of a run."""

    kind = "text"
    grid: tuple[int, int, int] | None = None
    labels = 0
    record: int | None = None
    unit = "document"
    measure = Measure()
    known: Known | None = None

    def __init__(self, tokenizer: Tokenizer, documents: Iterable[bytes], *, name: str = "data") -> None:
        """Raises InputError when there is nothing to score, TokenizerError for bytes that cannot be encoded."""
        raw = list(documents)
        if not any(raw):
            raise InputError(f"{name}: there is not one byte to score")
        self._tokenizer = tokenizer
        self.path: PurePath = Path(name)
        self.alphabet = tokenizer.vocab
        self.bos = tokenizer.end
        digest = hashlib.sha256(tokenizer.sha256.encode())
        for document in raw:
            digest.update(len(document).to_bytes(8, "little"))
            digest.update(document)
        self.fingerprint = digest.hexdigest()
        self._symbol_bytes_V = np.asarray(tokenizer.symbol_bytes(), dtype=np.int64)
        self._splits = {"data": self._encode(raw)}
        split = self._splits["data"]
        self.manifest: Mapping[str, Any] = {
            "kind": self.kind,
            "tokenizer": {"kind": tokenizer.kind, "sha256": tokenizer.sha256},
            "counts": {
                "data": {
                    "documents": split.documents,
                    "symbols": split.symbols,
                    "bytes": split.bytes,
                    "words": split.words,
                }
            },
        }

    def _encode(self, raw: list[bytes]) -> MemorySplit:
        end = np.array([self._tokenizer.end], dtype=np.int64)
        encoded = self._tokenizer.encode_many(raw)
        return MemorySplit(
            "data",
            [np.concatenate([symbols, end]) for symbols in encoded],
            bos=self.bos,
            alphabet=self.alphabet,
            bytes=sum(len(document) for document in raw),
            words=sum(len(document.split()) for document in raw),
        )

    @property
    def symbol_bytes_V(self) -> np.ndarray:
        """int64 [V]: raw bytes that each symbol stands for."""
        return self._symbol_bytes_V

    @property
    def symbol_dims(self) -> int:
        """0: text has no dimensions."""
        return 0

    @property
    def meaning(self) -> str:
        """The tokenizer's sha256."""
        return f"tokenizer {self._tokenizer.sha256}"

    def pieces(self) -> list[bytes]:
        """The raw bytes of each symbol."""
        return [self.decode([v]) for v in range(self.alphabet)]

    def split(self, name: str = "data") -> MemorySplit:
        """The one split, called `data`."""
        if name not in self._splits:
            raise CorpusError(f"{self.path} was not prepared and has no split {name!r}; it has one, 'data'")
        return self._splits[name]

    def decode(self, symbols: Sequence[int]) -> bytes:
        """The raw bytes of a run of symbols."""
        return self._tokenizer.decode(symbols)

    def encode(self, raw: bytes) -> np.ndarray:
        """int64 symbols without an end symbol."""
        return self._tokenizer.encode(raw)
