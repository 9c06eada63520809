"""What a model says of each unit of a set (document, image, row): its nats, and those of its symbols if asked for.

Shapes in names: U units (documents) of a set, B rows, T symbols of a row, N symbols, G groups of units.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from lmtrain.errors import DivergenceError
from lmtrain.inference import score
from lmtrain.inference.result import Result
from lmtrain.likelihood.sets import Set
from lmtrain.protocol import LN2, Batch
from lmtrain.use import Opened


@dataclass(frozen=True, slots=True)
class Scored:
    """A set under a model. number_U: int64, the documents of the split that were scored, ascending.

    nats_U: float64, minus the sum of ln p over a unit's symbols. symbols_U, bytes_U: what they are (bytes 0 for
    records). groups_GJ: float64, the nats, symbols and bytes of each group of units that intervals are drawn from.
    x_N, nats_N: symbols and their nats, unit after unit, where they were kept; begin_U: where each begins.
    """

    set: Set
    result: Result
    number_U: np.ndarray
    nats_U: np.ndarray
    symbols_U: np.ndarray
    bytes_U: np.ndarray
    groups_GJ: np.ndarray
    x_N: np.ndarray | None = None
    nats_N: np.ndarray | None = None
    begin_U: np.ndarray | None = None

    @property
    def measure(self) -> str:
        """In what units of the set are compared, as far as the model and the corpus have them."""
        return measure_of(self.result)

    @property
    def value_U(self) -> np.ndarray:
        """float64: each unit's own figure, in `measure`."""
        offset = self.set.corpus.measure.offset
        if self.measure == "bits per dim":
            return np.asarray((self.nats_U + offset) / (LN2 * self.symbols_U))
        if self.measure == "nats per record":
            return self.nats_U
        if self.measure == "bits per byte" and self.bytes_U.all():
            return np.asarray(self.nats_U / (LN2 * self.bytes_U))
        return np.asarray(self.nats_U / self.symbols_U)


def measure_of(result: Result) -> str:
    """bits per dim of records of symbols, nats per record of real numbers, bits per byte of text."""
    if result.records is not None:
        return "nats per record" if result.score.bits_per_dim is None else "bits per dim"
    return "bits per byte" if result.score.bytes else "nats per symbol"


def score_set(
    opened: Opened,
    held: Set,
    *,
    alone: bool = False,
    per_symbol: bool = False,
    temperature: float = 1.0,
    batch: int | None = None,
) -> Scored:
    """Every unit of a set under a run's model, cut as the run's `eval` settings say, or each `alone`.

    Raises what inference/score.py raises, and DivergenceError when the model's probabilities are not numbers.
    """
    config = opened.config
    settings = config.eval if batch is None else config.eval.model_copy(update={"batch": batch})
    collect = _Collect(held, per_symbol=per_symbol)
    result = score.evaluate(
        opened.model,
        held.split,
        held.corpus,
        config=settings.model_copy(update={"max_symbols": None}),
        context=config.data.row_length(held.corpus),
        name=held.name,
        masking=config.data.document_masking,
        temperature=temperature,
        documents_N=held.documents_N,
        alone=alone or held.documents_N is not None,
        observe=collect.add,
        tell_groups=collect.groups.append,
    )
    if np.isnan(collect.nats_D).any():
        raise DivergenceError(f"{held.name}: the model's probabilities are not numbers; its weights have diverged")
    return collect.scored(result)


class _Collect:
    """Sums for each document of the split, and the symbols' own numbers by their position."""

    def __init__(self, held: Set, *, per_symbol: bool) -> None:
        self.held = held
        self.end_D = held.split.document_ends()
        count = len(self.end_D)
        self.nats_D, self.symbols_D, self.bytes_D = np.zeros(count), np.zeros(count, np.int64), np.zeros(count)
        bytes_V = np.asarray(held.corpus.symbol_bytes_V, np.float64) if held.corpus.record is None else None
        self.bytes_V = bytes_V
        self.groups: list[np.ndarray] = []
        self.kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] | None = [] if per_symbol else None

    def add(self, batch: Batch, logp_BT: Tensor) -> None:
        """Told of a call's rows."""
        assert batch.position_B is not None
        b_N, t_N = np.nonzero(batch.weight_BT.numpy())
        if not len(b_N):
            return
        nats_N = -logp_BT.float().cpu().numpy()[b_N, t_N].astype(np.float64)
        x_N = batch.x_BT.numpy()[b_N, t_N]
        position_N = batch.position_B.numpy()[b_N] + t_N
        document_N = np.searchsorted(self.end_D, position_N, "right")
        np.add.at(self.nats_D, document_N, nats_N)
        np.add.at(self.symbols_D, document_N, 1)
        if self.bytes_V is not None:
            np.add.at(self.bytes_D, document_N, self.bytes_V[x_N])
        if self.kept is not None:
            self.kept.append((position_N, x_N, nats_N))

    def scored(self, result: Result) -> Scored:
        """What came together."""
        number_U = np.flatnonzero(self.symbols_D)
        found = Scored(
            set=self.held,
            result=result,
            number_U=number_U,
            nats_U=self.nats_D[number_U],
            symbols_U=self.symbols_D[number_U],
            bytes_U=self.bytes_D[number_U],
            groups_GJ=self.groups[0][:, :3],
        )
        if self.kept is None:
            return found
        position_N, x_N, nats_N = (np.concatenate(part) for part in zip(*self.kept, strict=True))
        order = np.argsort(position_N, kind="stable")
        begin_U = np.cumsum(found.symbols_U) - found.symbols_U
        return replace(found, x_N=x_N[order], nats_N=nats_N[order], begin_U=begin_U)
