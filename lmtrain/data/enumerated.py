"""A space of records as a corpus: every record once, with weight p(x). The evaluator's score of it is an expectation.

With weights that sum to 1, nats are E_p[-ln q(x)], the cross-entropy itself and no estimate of it.

Shapes in names: X records of the space, D symbols of a record, V symbols of the alphabet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lmtrain.data.memory_records import RecordCorpus, RecordSplit
from lmtrain.errors import CorpusError
from lmtrain.meaning import Known, Measure
from lmtrain.protocol import Split


class Enumerated(RecordCorpus):
    """A corpus (protocol.Corpus) of one split, `space`: the records x_XD in order, weighted by exp(logp_X).

    Records whose weight is 0 in float32 are left out. bos: the reserved start, = V. known, meaning: as of a corpus.
    """

    kind = "table"
    labels = 0
    unit = "record"
    measure = Measure()

    def __init__(self, x_XD: np.ndarray, logp_X: np.ndarray, *, bos: int, known: Known | None, meaning: str) -> None:
        weight_X = np.exp(logp_X).astype(np.float32)
        self._x_XD, self._weight_X = x_XD[weight_X > 0].astype(np.int64), weight_X[weight_X > 0]
        self.path = Path("enumerated")
        self.fingerprint, self.meaning, self.known = "enumerated", meaning, known
        self.alphabet = self.bos = bos
        self.record: int | None = x_XD.shape[1]
        self.grid: tuple[int, int, int] | None = None
        self.manifest: Mapping[str, Any] = {"kind": self.kind, "tokenizer": None}
        self.symbol_dims = 1

    def split(self, name: str = "space") -> Split:
        """The one split."""
        if name != "space":
            raise CorpusError(f"an enumerated space has no split {name!r}; it has one, 'space'")
        return RecordSplit("space", self._x_XD, bos=self.bos, weight_N=self._weight_X)
