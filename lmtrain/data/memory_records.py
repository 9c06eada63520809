"""Records in memory: arrays that were never prepared, read like any split on disk.

Shapes in names: B rows, N records, D symbols of a record.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from lmtrain.errors import CorpusError, InputError
from lmtrain.meaning import Known, Measure
from lmtrain.protocol import Batch, Cond, Corpus


class RecordSplit:
    """A split (protocol.Split) over an array of records; weight_N: float32, what each record's symbols count (1)."""

    words = 0
    bytes = 0

    def __init__(
        self,
        name: str,
        x_ND: np.ndarray,
        *,
        bos: int,
        label_N: np.ndarray | None = None,
        weight_N: np.ndarray | None = None,
    ) -> None:
        self.name = name
        self._x_ND, self._bos, self._label_N, self._weight_N = x_ND, bos, label_N, weight_N
        self.documents, self._size = len(x_ND), int(x_ND.shape[1])
        self.symbols = int(x_ND.size)

    def rows(self, context: int) -> int:
        """How many records; InputError when they have another length."""
        if context != self._size:
            raise InputError(f"rows of {context} symbols were asked of records of {self._size}")
        return self.documents

    def row_symbols(self, index_N: np.ndarray, context: int) -> np.ndarray:
        """int64 [N]: scored symbols of each row."""
        return np.where(np.asarray(index_N, np.int64) < 0, 0, context)

    def fetch(self, index_B: np.ndarray, context: int, *, masking: bool = False) -> Batch:
        """The records `index_B`; -1 is a padding row."""
        index_B = np.asarray(index_B, dtype=np.int64)
        real_B1 = (index_B >= 0)[:, None]
        x_BT = np.where(real_B1, self._x_ND[index_B], self._x_ND.dtype.type(0))
        weight_B1 = real_B1 if self._weight_N is None else real_B1 * self._weight_N[index_B][:, None]
        weight_BT = np.repeat(weight_B1, context, axis=1).astype(np.float32)
        label_B = None if self._label_N is None else torch.from_numpy(np.where(index_B < 0, 0, self._label_N[index_B]))
        cond = Cond(torch.full((len(index_B),), self._bos, dtype=torch.int64), None, label_B)
        position_B = torch.from_numpy(np.where(index_B < 0, -1, index_B * context))
        return Batch(torch.from_numpy(x_BT), torch.from_numpy(weight_BT), cond, position_B=position_B)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Symbols of [start, stop) of the concatenation."""
        return np.asarray(self._x_ND.reshape(-1)[start:stop])

    def start_symbol(self, position: int) -> int:
        """The reserved start before a record, and inside one the symbol before."""
        return self._bos if position % self._size == 0 else int(self._x_ND.reshape(-1)[position - 1])

    def document_ends(self) -> np.ndarray:
        """int64 [D], ascending."""
        return np.arange(1, self.documents + 1, dtype=np.int64) * self._size


class RecordCorpus:
    """What a corpus of records in memory answers to questions about text."""

    path: PurePath
    alphabet: int

    @property
    def symbol_bytes_V(self) -> np.ndarray:
        """int64 [V] zeros: records do not stand for bytes."""
        return np.zeros(self.alphabet, np.int64)

    def pieces(self) -> list[bytes]:
        """None: records do not stand for bytes."""
        return []

    def decode(self, symbols: Sequence[int]) -> bytes:
        """InputError: records are not text."""
        raise InputError(f"{self.path} holds records, which cannot be decoded to text")

    def encode(self, raw: bytes) -> np.ndarray:
        """InputError: records are not text."""
        raise InputError(f"{self.path} holds records, which text cannot be encoded to")


class MemoryRecords(RecordCorpus):
    """A corpus (protocol.Corpus) of one split, `data`: records of the same shape and symbols as those of `like`."""

    known: Known | None = None  # whoever made them, they were not drawn from the source of `like`

    def __init__(
        self, like: Corpus, x_ND: np.ndarray, *, name: str = "data", label_N: np.ndarray | None = None
    ) -> None:
        """x_ND: whole numbers below the alphabet of `like`, or reals where it has none. label_N: int64 classes.

        Raises InputError: no record, another length, symbols outside of the alphabet, numbers that are not finite.
        """
        x_ND = np.asarray(x_ND)
        if x_ND.ndim != 2 or not len(x_ND) or x_ND.shape[1] != like.record:
            shape = "x".join(map(str, like.grid or (like.record,)))
            raise InputError(f"{name}: records of shape {list(x_ND.shape)}; wanted one or more {like.unit}s of {shape}")
        if like.alphabet:
            if x_ND.dtype.kind not in "uib":
                raise InputError(f"{name} holds {x_ND.dtype}; wanted whole numbers 0 to {like.alphabet - 1}")
            if x_ND.min() < 0 or x_ND.max() >= like.alphabet:
                raise InputError(
                    f"{name} has the symbols {x_ND.min()} to {x_ND.max()}; the run reads 0 to {like.alphabet - 1}"
                )
            x_ND = x_ND.astype(np.int64)
        else:
            x_ND = x_ND.astype(np.float32)
            if not np.isfinite(x_ND).all():
                raise InputError(f"{name} has numbers that are not finite")
        self.path = Path(name)
        self.kind, self.alphabet, self.bos = like.kind, like.alphabet, like.bos
        self.grid, self.record, self.unit = like.grid, like.record, like.unit
        self.labels = like.labels
        self._meaning, self.symbol_dims = like.meaning, like.symbol_dims
        self.measure: Measure = like.measure
        digest = hashlib.sha256(like.meaning.encode() + np.ascontiguousarray(x_ND).tobytes())
        self.fingerprint = digest.hexdigest()
        self._split = RecordSplit("data", x_ND, bos=self.bos, label_N=label_N)
        counts = {"documents": self._split.documents, "symbols": self._split.symbols, "bytes": 0, "words": 0}
        self.manifest: Mapping[str, Any] = {"kind": self.kind, "counts": {"data": counts}}

    @property
    def meaning(self) -> str:
        """That of the corpus whose records they are like."""
        return self._meaning

    def split(self, name: str = "data") -> RecordSplit:
        """The one split, called `data`."""
        if name != "data":
            raise CorpusError(f"{self.path} was not prepared and has no split {name!r}; it has one, 'data'")
        return self._split
