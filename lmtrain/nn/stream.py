"""Reading one symbol at a time: the cached stream that a model feeds, and the recomputing one that checks it.

B rows, n inputs read at once, V symbols of the alphabet.

A stream whose context is C answers C times (before the first push and after each of the next C - 1). The push after the
C-th answer is accepted, since nobody will read it; asking again, or pushing more, is an error: the caller opens a new
stream and pushes the last symbols again.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from lmtrain.errors import InputError
from lmtrain.protocol import Cond, Distribution, Model, Stream


class _Reading(Stream):
    """Counts inputs, keeps what was not read yet, and remembers the answer until the next push."""

    def __init__(self, batch: int, *, cond: Cond, context: int | None) -> None:
        if cond.first_BT is not None:
            raise InputError(
                "a stream reads one document or one continuing row: open a new one where a document begins"
            )
        if cond.start_B.shape != (batch,):
            raise InputError(f"a stream of {batch} rows was given start symbols of shape {tuple(cond.start_B.shape)}")
        self._context = context
        self._unread: list[Tensor] = [cond.start_B]
        self._inputs = 1
        self._answer: Distribution | None = None

    @property
    def room(self) -> int | None:
        """How many more symbols can be pushed before another answer is refused; None without a limit."""
        return None if self._context is None else max(0, self._context - self._inputs)

    def distribution(self) -> Distribution:
        """Of the next symbol; InputError when the context is full."""
        if self._answer is None:
            if self._context is not None and self._inputs > self._context:
                raise self._full()
            with torch.no_grad():
                like = self._unread[-1].dtype  # reals may follow a start symbol, which is a number of the alphabet
                self._answer = self._read(torch.stack([x_B.to(like) for x_B in self._unread], dim=1))
            self._unread = []
        return self._answer

    def push(self, x_B: Tensor) -> None:
        """int64 [B]: the symbols that came; read at the next `distribution`. InputError when the context is full."""
        if self._context is not None and self._inputs > self._context:
            raise self._full()
        self._inputs += 1
        self._unread.append(x_B)
        self._answer = None

    def _full(self) -> InputError:
        return InputError(
            f"this stream has read its {self._context} inputs (the model's context); "
            "open a new one and push the last symbols again"
        )

    @abstractmethod
    def _read(self, in_Bn: Tensor) -> Distribution:
        """The next symbol's distribution after the inputs that were not read yet."""


class CachedStream(_Reading):
    """A stream over a network that remembers: `read` gets the inputs not read yet and answers for the next symbol.

    Several pushes in a row are read at once when the next answer is wanted, so a prompt is one call.
    """

    def __init__(self, read: Callable[[Tensor], Distribution], batch: int, *, cond: Cond, context: int | None) -> None:
        super().__init__(batch, cond=cond, context=context)
        self._reader = read

    def _read(self, in_Bn: Tensor) -> Distribution:
        return self._reader(in_Bn)


class RecomputingStream(_Reading):
    """A stream for any model with `predict`: reads the whole prefix again each time. Slow, right, the oracle.

    length: T, for a model that reads whole rows alone (what is not known yet is 0 there); symbols are pushed in
    `model.order`. None: the prefix is read as it grows.
    """

    def __init__(self, model: Model, batch: int, *, cond: Cond, length: int | None = None) -> None:
        super().__init__(batch, cond=cond, context=model.context)
        self._model, self._cond = model, cond
        self._prefix: list[Tensor] = []
        self._length = length

    def _read(self, in_Bn: Tensor) -> Distribution:
        self._prefix.extend(in_Bn.unbind(dim=1))
        known = self._prefix[1:]  # without the start symbol, which is in `cond`
        # Parameters at t depend on x_<t alone, so what stands at t and later does not matter.
        count = len(known) + 1 if self._length is None else self._length
        first = known[0] if known else self._prefix[0]
        x_BT = torch.zeros(len(first), count, dtype=first.dtype, device=first.device)
        order = self._model.order or range(count)
        for place, x_B in zip(order, known, strict=False):
            x_BT[:, place] = x_B
        return self._model.distribution(self._model.predict(x_BT, cond=self._cond)[:, order[len(known)]])
