"""What log-probabilities are about: the numbers that they are of, and the true distribution where it is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class Measure:
    """What the log-probabilities of a corpus's records are about.

    kind: exact (probabilities of symbols), bound (densities of dequantised symbols: with the offset a lower bound on
    the log-probability, on average over the noise), density (of real numbers, of which there are no bits).
    offset: nats to be added to a record's nats for the units of the data; not 0 where numbers are scaled on the way.
    view: how the symbols differ from those that were prepared, in a few words; "" where they do not.
    """

    kind: Literal["exact", "bound", "density"] = "exact"
    offset: float = 0.0
    view: str = ""


class Known(Protocol):
    """A distribution of records that is known, such as the source that a corpus was drawn from.

    record: D, the symbols of a record. levels: size of the alphabet, 0 for real numbers. entropy: of a record, in nats
    (of reals: differential); None where it has no exact value. rate: entropy of one more symbol, of a stationary chain.
    """

    record: int
    levels: int
    entropy: float | None
    rate: float | None

    def log_prob(self, x_ND: np.ndarray) -> np.ndarray:
        """float64 [N]: ln p of each record."""
        ...

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """int64 or float32 [count, D]: independent records."""
        ...
