"""LSTM and GRU layers over packed steps, and the dropout that keeps its mask along a sequence.

D inputs, H hidden units, N packed places, S sequences.
[1] Hochreiter, Schmidhuber: Long Short-Term Memory, 1997. [2] Cho et al.: the GRU, 2014.
[3] Jozefowicz, Zaremba, Sutskever, 2015: the forget gate's bias starts at 1.
[4] Gal, Ghahramani: A Theoretically Grounded Application of Dropout in Recurrent Neural Networks, 2016.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lmtrain.nn.initial import uniform_


class LSTM(nn.LSTM):
    """One layer [1]. Weights start as U(-1/sqrt(H), 1/sqrt(H)), biases at zero, the forget gate's at 1 [3]."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__(inputs, hidden, batch_first=True)
        _start(self)
        bias = self.bias_ih_l0
        assert isinstance(bias, Tensor)
        with torch.no_grad():
            bias[hidden : 2 * hidden] = 1.0

    def reset_parameters(self) -> None:
        """Nothing: torch's own first values would be drawn only to be overwritten."""


class GRU(nn.GRU):
    """One layer [2], in the form of torch (reset gate after the product). Weights start as U(-1/sqrt(H), 1/sqrt(H))."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__(inputs, hidden, batch_first=True)
        _start(self)

    def reset_parameters(self) -> None:
        """Nothing: torch's own first values would be drawn only to be overwritten."""


def _start(layer: nn.RNNBase) -> None:
    bound = 1.0 / math.sqrt(layer.hidden_size)
    for weight in layer.parameters():
        if weight.ndim == 2:
            uniform_(weight, bound=bound)
        else:
            with torch.no_grad():
                weight.zero_()


def locked_mask(sequences: int, width: int, *, dropout: float, like: Tensor) -> Tensor:
    """[S, width]: 0 with probability `dropout`, else 1 / (1 - dropout); one draw for all steps of a sequence [4]."""
    keep = torch.rand(sequences, width, device=like.device) >= dropout
    return keep.to(like.dtype) / (1.0 - dropout)
