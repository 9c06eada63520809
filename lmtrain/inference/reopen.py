"""What a bounded model reads when a text is longer than its context: one rule for evaluation, sampling, compression.

Shapes in names: B rows, T symbols of a row, N symbols of a text.

A model of context C reads C inputs, the start symbol included, and so answers for C symbols. When a stream has read C
inputs, a new one is opened on the last k = C - S + 1 symbols: the first of them is its start symbol, the others are
pushed. After that S symbols are answered before the next opening. S = C (k = 1) is `window`: every C symbols begin
afresh from the symbol before them; a small S is `sliding`: every symbol after the first C sees C - S + 1 inputs or
more.

Seen from above, opening j reads from position j * S of the text, which is how rows are cut when all symbols are known
beforehand. `Plan` holds that arithmetic and nothing else does.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lmtrain.errors import ConfigError
from lmtrain.protocol import Cond, Distribution, Model, Stream


@dataclass(frozen=True, slots=True)
class Plan:
    """Where streams are opened. context: C, inputs of a stream. stride: S, symbols that all but the first answer."""

    context: int
    stride: int

    def __post_init__(self) -> None:
        if self.context < 1:
            raise ConfigError(f"a context of {self.context} symbols cannot be read; give at least 1")
        if not 1 <= self.stride <= self.context:
            raise ConfigError(
                f"stride {self.stride} does not fit the context {self.context}; wanted 1 to {self.context} "
                f"(= context: windows that do not overlap)"
            )

    @property
    def reread(self) -> int:
        """k, how many symbols a new stream is given again (the first as its start symbol)."""
        return self.context - self.stride + 1

    def rows(self, symbols: int) -> int:
        """How many openings answer for a text of so many symbols."""
        return 0 if symbols <= 0 else 1 + max(0, -(-(symbols - self.context) // self.stride))

    def spans(self, row_N: np.ndarray, symbols: int) -> tuple[np.ndarray, np.ndarray]:
        """int64 [N] each: the positions [from, to) that these openings answer for, in a text of so many symbols."""
        row_N = np.asarray(row_N, dtype=np.int64)
        from_N = np.where(row_N == 0, 0, self.context + (row_N - 1) * self.stride)
        to_N = row_N * self.stride + self.context
        return np.minimum(from_N, symbols), np.minimum(to_N, symbols)

    def row_of(self, position: int) -> int:
        """The opening that answers for the symbol at `position`."""
        return 0 if position < self.context else (position - self.context) // self.stride + 1


class Reopened:
    """A stream (protocol.Stream) of any length over a model of bounded context: opens new streams as the plan says.

    plan None: the model carries its state without bound, and its stream is never opened anew.
    """

    def __init__(self, model: Model, *, start_B: Tensor, plan: Plan | None, label_B: Tensor | None = None) -> None:
        """start_B: int64 [B], the symbol before the text, on the device of the model."""
        self._model = model
        self._plan = plan
        self._label_B = label_B
        self._recent: deque[Tensor] = deque([start_B], maxlen=1 if plan is None else plan.reread)
        self._stream = self._open(start_B)
        self._read = 1

    def _open(self, start_B: Tensor) -> Stream:
        return self._model.stream(len(start_B), cond=Cond(start_B, None, self._label_B))

    def distribution(self) -> Distribution:
        """Of the next symbol."""
        return self._stream.distribution()

    def push(self, x_B: Tensor) -> None:
        """int64 [B]: the symbols that came."""
        self._recent.append(x_B)
        if self._plan is None or self._read < self._plan.context:
            self._stream.push(x_B)
            self._read += 1
            return
        start_B, *again = self._recent
        self._stream = self._open(start_B)
        for y_B in again:
            self._stream.push(y_B)
        self._read = len(self._recent)

    def read(self, x_BT: Tensor) -> None:
        """Push a whole known text int64 [B, T] (only before anything else was pushed).

        Streams whose every symbol will be forgotten by a later opening are not run: the answer is the same.
        """
        assert self._read == 1, "read() is for the text that comes first"
        length = x_BT.shape[1]
        first = 0 if self._plan is None else self._plan.row_of(length) * self._plan.stride
        if first:
            # The next opening begins at first + stride: nothing before this start symbol is asked for again.
            start_B = x_BT[:, first - 1]
            self._recent.append(start_B)
            self._stream = self._open(start_B)
        for t in range(first, length):
            self.push(x_BT[:, t])


@torch.no_grad()
def log_probs(
    model: Model, x_BT: Tensor, *, start_B: Tensor, plan: Plan | None, label_B: Tensor | None = None
) -> Tensor:
    """float32 [B, T]: log p of each symbol in nats, read through streams: the slow twin of scoring whole rows.

    The same to 1e-4 as `Model.forward` on the rows of the plan; compression codes with these very numbers.
    """
    stream = Reopened(model, start_B=start_B, plan=plan, label_B=label_B)
    columns = []
    for t in range(x_BT.shape[1]):
        columns.append(stream.distribution().log_prob(x_BT[:, t]).float())
        if t + 1 < x_BT.shape[1]:
            stream.push(x_BT[:, t])
    if not columns:
        return torch.zeros(x_BT.shape, dtype=torch.float32, device=x_BT.device)
    return torch.stack(columns, dim=1)
