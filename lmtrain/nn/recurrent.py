"""LSTM and GRU layers over rows that may be cut into documents, and the dropout that keeps its mask along a sequence.

B rows, T steps, D inputs, H hidden units, N = B * T places of the flattened rows, S segments, L steps of a part.
[1] Hochreiter, Schmidhuber: Long Short-Term Memory, 1997. [2] Cho et al.: the GRU, 2014.
[3] Jozefowicz, Zaremba, Sutskever, 2015: the forget gate's bias starts at 1.
[4] Gal, Ghahramani: A Theoretically Grounded Application of Dropout in Recurrent Neural Networks, 2016.

Documents run as a few batches of segments of similar length, not as one PackedSequence: on the CPU torch's layers take
3 to 7 times as long forwards and backwards when the number of running sequences changes from step to step. All batches
run in one call of the layer, however many there are, since ranks must make equally many calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lmtrain.nn.initial import uniform_
from lmtrain.nn.rows import Part, Recut

Hidden = tuple[Tensor, ...]
"""(h, c) of an LSTM layer, (h,) of a GRU layer; each [B, H]."""


class LSTM(nn.LSTM):
    """One layer [1]. Weights start as U(-1/sqrt(H), 1/sqrt(H)), biases at zero, the forget gate's at 1 [3]."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__(inputs, hidden, batch_first=True)
        _start(self)
        bias = self.bias_ih_l0
        assert isinstance(bias, Tensor)
        with torch.no_grad():
            bias[hidden : 2 * hidden] = 1.0

    def forward(  # type: ignore[override]
        self, h_BTD: Tensor, cut: Recut | None = None, begin: Hidden | None = None
    ) -> tuple[Tensor, Hidden]:
        """([B, T, H], last (h, c) of each row), from `begin` or zero; from zero again in every document of `cut`.

        With `cut`, the last state is that of the row's end only if rows were recut with `ends`.
        """

        def run(h_SLD: Tensor, start: Hidden | None) -> tuple[Tensor, Hidden]:
            given = None if start is None else (start[0][None], start[1][None])
            out_SLH, (h, c) = nn.LSTM.forward(self, h_SLD, given)
            return out_SLH, (h[0], c[0])

        return run(h_BTD, begin) if cut is None else _in_parts(run, h_BTD, cut, begin)

    def reset_parameters(self) -> None:
        """Nothing: torch's own first values would be drawn only to be overwritten."""


class GRU(nn.GRU):
    """One layer [2], in the form of torch (reset gate after the product). Weights start as U(-1/sqrt(H), 1/sqrt(H))."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__(inputs, hidden, batch_first=True)
        _start(self)

    def forward(  # type: ignore[override]
        self, h_BTD: Tensor, cut: Recut | None = None, begin: Hidden | None = None
    ) -> tuple[Tensor, Hidden]:
        """([B, T, H], last (h,) of each row); as for the LSTM."""

        def run(h_SLD: Tensor, start: Hidden | None) -> tuple[Tensor, Hidden]:
            out_SLH, h = nn.GRU.forward(self, h_SLD, None if start is None else start[0][None])
            return out_SLH, (h[0],)

        return run(h_BTD, begin) if cut is None else _in_parts(run, h_BTD, cut, begin)

    def reset_parameters(self) -> None:
        """Nothing: torch's own first values would be drawn only to be overwritten."""


def _in_parts(
    run: Callable[[Tensor, Hidden | None], tuple[Tensor, Hidden]], h_BTD: Tensor, cut: Recut, begin: Hidden | None
) -> tuple[Tensor, Hidden]:
    B, T, D = h_BTD.shape
    h_ND = h_BTD.reshape(B * T, D)
    outs: list[Tensor] = []
    ends: list[Hidden] = []
    for part in cut.parts:
        h_SLD = h_ND.index_select(0, part.place_SL.flatten()).view(*part.place_SL.shape, D)
        out_SLH, last = run(h_SLD, None if begin is None else _opening(part, begin))
        outs.append(out_SLH.flatten(0, 1))
        ends.append(tuple(state_SH[part.closes_S] for state_SH in last))
    h_BTH = torch.cat(outs).index_select(0, cut.inverse_N).view(B, T, -1)
    row_B = torch.cat([part.row_S[part.closes_S] for part in cut.parts]).argsort()
    return h_BTH, tuple(torch.cat(pieces)[row_B] for pieces in zip(*ends, strict=True))


def _opening(part: Part, begin: Hidden) -> Hidden:
    """[S, H] each: the row's state for segments that continue it, zero for the others."""
    return tuple(state_BH[part.row_S].masked_fill(~part.opens_S[:, None], 0.0) for state_BH in begin)


def _start(layer: nn.RNNBase) -> None:
    bound = 1.0 / math.sqrt(layer.hidden_size)
    for weight in layer.parameters():
        if weight.ndim == 2:
            uniform_(weight, bound=bound)
        else:
            with torch.no_grad():
                weight.zero_()


def locked_dropout(h_BTH: Tensor, *, dropout: float, cut: Recut | None) -> Tensor:
    """Channels are dropped with one draw for all steps of a sequence [4]: a row, or each document's part of it."""
    B, T, H = h_BTH.shape
    sequences = B if cut is None else cut.segments
    keep_SH = torch.rand(sequences, H, device=h_BTH.device) >= dropout
    mask_SH = keep_SH.to(h_BTH.dtype) / (1.0 - dropout)
    return h_BTH * (mask_SH[:, None] if cut is None else mask_SH[cut.segment_N].view(B, T, H))
