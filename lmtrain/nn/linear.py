"""The affine map, with its first values chosen by the one who builds it."""

from __future__ import annotations

import torch
from torch import nn

from lmtrain.nn.initial import normal_


class Linear(nn.Linear):
    """`nn.Linear` whose weight starts as N(0, std^2) (zeros for std = 0) and whose bias starts at zero."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool, std: float) -> None:
        super().__init__(inputs, outputs, bias=bias)
        normal_(self.weight, std=std)
        if self.bias is not None:
            with torch.no_grad():
                self.bias.zero_()

    def reset_parameters(self) -> None:
        """Nothing: torch's own first values would be drawn only to be overwritten."""
