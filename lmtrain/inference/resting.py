"""How a model is held while numbers are taken from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lmtrain.protocol import Model


def device_of(model: Model) -> torch.device:
    """That of the model's first parameter; the CPU when it has none."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def resting(model: Model) -> Iterator[None]:
    """Without dropout and gradients; afterwards the model trains again if it did before."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
