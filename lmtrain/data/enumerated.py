"""A space of records as a corpus: every record once, with weight p(x). The evaluator's score of it is an expectation.

With weights that sum to 1, nats are E_p[-ln q(x)], the cross-entropy itself and no estimate of it.

Shapes in names: B rows, X records of the space, D symbols of a record, V symbols of the alphabet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from lmtrain.errors import CorpusError, InputError
from lmtrain.meaning import Known, Measure
from lmtrain.protocol import Batch, Cond, Split


class Enumerated:
    """A corpus (protocol.Corpus) of one split, `space`: the records x_XD in order, weighted by exp(logp_X).

    Records whose weight is 0 in float32 are left out. bos: the reserved start, = V. known, meaning: as of a corpus.
    """

    kind = "table"
    labels = 0
    unit = "record"
    measure = Measure()

    def __init__(self, x_XD: np.ndarray, logp_X: np.ndarray, *, bos: int, known: Known | None, meaning: str) -> None:
        weight_X = np.exp(logp_X).astype(np.float32)
        self._x_XD, self._weight_X = x_XD[weight_X > 0], weight_X[weight_X > 0]
        self.path: PurePath = Path("enumerated")
        self.fingerprint, self.meaning, self.known = "enumerated", meaning, known
        self.alphabet = self.bos = bos
        self.record: int | None = x_XD.shape[1]
        self.grid: tuple[int, int, int] | None = None
        self.manifest: Mapping[str, Any] = {"kind": self.kind, "tokenizer": None}
        self.symbol_dims = 1

    @property
    def symbol_bytes_V(self) -> np.ndarray:
        """int64 [V] zeros: records do not stand for bytes."""
        return np.zeros(self.alphabet, np.int64)

    def pieces(self) -> list[bytes]:
        """None: records do not stand for bytes."""
        return []

    def split(self, name: str = "space") -> Split:
        """The one split."""
        if name != "space":
            raise CorpusError(f"an enumerated space has no split {name!r}; it has one, 'space'")
        return _Space(self._x_XD, self._weight_X, self.bos)

    def decode(self, symbols: Sequence[int]) -> bytes:
        """InputError: records are not text."""
        raise InputError("records cannot be decoded to text")

    def encode(self, raw: bytes) -> np.ndarray:
        """InputError: records are not text."""
        raise InputError("text cannot be encoded to records")


class _Space:
    """The split."""

    name = "space"
    words = bytes = 0

    def __init__(self, x_XD: np.ndarray, weight_X: np.ndarray, bos: int) -> None:
        self._x_XD, self._weight_X, self._bos = x_XD, weight_X, bos
        self.documents, self._record = x_XD.shape
        self.symbols = x_XD.size

    def rows(self, context: int) -> int:
        """Records; InputError when they have another length."""
        if context != self._record:
            raise InputError(f"rows of {context} symbols were asked of records of {self._record}")
        return int(self.documents)

    def row_symbols(self, index_N: np.ndarray, context: int) -> np.ndarray:
        """int64 [N]: symbols of each row."""
        return np.where(np.asarray(index_N) < 0, 0, context).astype(np.int64)

    def fetch(self, index_B: np.ndarray, context: int, *, masking: bool = False) -> Batch:
        """The rows `index_B`, every symbol with the weight of its record; -1 = a padding row of weight 0."""
        index_B = np.asarray(index_B, np.int64)
        weight_B = np.where(index_B < 0, np.float32(0), self._weight_X[index_B])
        weight_BT = np.repeat(weight_B[:, None], context, axis=1)
        start_B = torch.full((len(index_B),), self._bos, dtype=torch.int64)
        position_B = np.where(index_B < 0, -1, index_B * context)
        x_BT = torch.from_numpy(self._x_XD[index_B].astype(np.int64))
        return Batch(x_BT, torch.from_numpy(weight_BT), Cond(start_B), position_B=torch.from_numpy(position_B))

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64 symbols of [start, stop)."""
        return self._x_XD.reshape(-1)[start:stop].astype(np.int64)

    def start_symbol(self, position: int) -> int:
        """The reserved start before a record, and inside one the symbol before."""
        return int(self._bos if position % self._record == 0 else self._x_XD.reshape(-1)[position - 1])

    def document_ends(self) -> np.ndarray:
        """int64 [X], ascending."""
        return np.asarray(np.arange(1, self.documents + 1) * self._record)
