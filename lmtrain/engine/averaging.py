"""The exponential moving average of the weights: average <- d * average + (1 - d) * weights after each applied step.

Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992; in this exponential form PixelCNN++
(arXiv 1701.05517) is evaluated with it. The average begins at the weights that there are when it begins.

Every rank averages the fp32 master weights that it owns, in tensors that lie as those do: no stage communicates for it.
To be used, the average takes the place of the master weights, which the engine then publishes to the model.

NOTE there is no correction of the bias towards the first weights. `optimizer.ema_warmup` is off unless asked for; then
step t (from 1) uses min(d, (1 + t) / (10 + t)), as TensorFlow's ExponentialMovingAverage with `num_updates` does.
NOTE trained parameters alone are averaged: a frozen one is its own average, and buffers are taken as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from lmtrain.engine.optimizer import OptimizerConfig
from lmtrain.engine.pieces import Averaged, Piece
from lmtrain.errors import ConfigError
from lmtrain.protocol import Weights

UPDATES = "ema_steps"
"""The engine's scalar that a checkpoint with averaged weights has."""
AT_ONCE = 4 * 2**20
"""Elements that change places at a time (16 MiB): weights and average are never in memory a third time."""


def decay(config: OptimizerConfig, update: int) -> float:
    """What update number `update` (from 1) keeps of the average."""
    assert config.ema is not None
    return min(config.ema, (1 + update) / (10 + update)) if config.ema_warmup else config.ema


def make(config: OptimizerConfig, pieces: Sequence[Piece]) -> Average | None:
    """The average that `optimizer.ema` asks for, or None."""
    return None if config.ema is None else Average(config, pieces)


def using(
    weights: Weights, average: Average | None, publish: Callable[[], None], *, alone: bool
) -> AbstractContextManager[None]:
    """Inside, the model has these weights; see `Average.in_place`. ConfigError when there is no average."""
    if weights == "raw":
        return nullcontext()
    if average is None:
        raise ConfigError("averaged weights were asked for, and optimizer.ema is null; set it, or use eval.weights=raw")
    return average.in_place(publish, alone=alone)


class Average:
    """The average of what this rank owns. `updates`: how many steps are in it."""

    def __init__(self, config: OptimizerConfig, pieces: Sequence[Piece]) -> None:
        self.config = config
        self.updates = 0
        homes = {id(piece.home): piece.home.detach() for piece in pieces if piece.moments}
        self._homes = list(homes.values())
        self._averages = [home.clone() for home in self._homes]
        self._of = dict(zip(homes, self._averages, strict=True))

    def of(self, home: Tensor) -> Tensor | None:
        """What is averaged of a tensor of master weights, laid out as it is; None for a frozen one."""
        return self._of.get(id(home))

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights of a step that was applied."""
        self.updates += 1
        torch._foreach_lerp_(self._averages, self._homes, 1.0 - decay(self.config, self.updates))

    def reads(self, scalars: Mapping[str, Any]) -> Averaged | None:
        """Where a checkpoint's average goes; None when its `scalars` say that it has none."""
        return self.of if UPDATES in scalars else None

    @torch.no_grad()
    def restored(self, scalars: Mapping[str, Any]) -> None:
        """After the weights were read: go on as the checkpoint's average or, when it has none, begin at its weights."""
        self.updates = int(scalars.get(UPDATES, 0))
        if UPDATES not in scalars:
            torch._foreach_copy_(self._averages, self._homes)

    @contextmanager
    def in_place(self, publish: Callable[[], None], *, alone: bool) -> Iterator[None]:
        """Inside, the master weights are the average, and published; afterwards they are what they were, bit for bit.

        Collective where `publish` is. After an error the weights are back but, unless `alone`, not published: a rank
        that failed by itself would wait for the others there.
        """
        self._exchange()
        publish()
        try:
            yield
        except BaseException:
            self._exchange()
            if alone:
                publish()
            raise
        self._exchange()
        publish()

    @torch.no_grad()
    def _exchange(self) -> None:
        for home, average in zip(self._homes, self._averages, strict=True):
            a, b = home.view(-1), average.view(-1)
            for at in range(0, a.numel(), AT_ONCE):
                mine, other = a[at : at + AT_ONCE], b[at : at + AT_ONCE]
                held = mine.clone()
                mine.copy_(other)
                other.copy_(held)
