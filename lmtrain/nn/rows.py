"""How a row of symbols becomes the inputs of a network, and what a document's start means there.

B rows, T symbols of a row, S segments: runs of a row that belong to one document.

Input t is the symbol before symbol t: the start symbol for t = 0, BOS where symbol t begins a document. So input t
belongs to the document of symbol t, and the end symbol of a document, which is BOS, opens the next one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmtrain.protocol import Cond


def shift(x_BT: Tensor, *, cond: Cond, bos: int) -> Tensor:
    """int64 [B, T] inputs: [start, x_0 .. x_{T-2}], with BOS at every document's start that `cond.first_BT` marks."""
    assert x_BT.ndim == 2, "x is [B, T]"
    assert cond.start_B.shape == x_BT.shape[:1], "start is [B]"
    in_BT = torch.cat([cond.start_B[:, None], x_BT[:, :-1]], dim=1)
    if cond.first_BT is not None:
        assert cond.first_BT.shape == x_BT.shape, "first is [B, T] like x"
        in_BT = in_BT.masked_fill(cond.first_BT, bos)
    return in_BT


def document_mask(first_BT: Tensor) -> Tensor:
    """bool [B, 1, T, T]: whether position t may attend to s: s <= t, of the same document."""
    document_BT = first_BT.cumsum(dim=1)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    return same_BTT.tril_()[:, None]


def document_positions(first_BT: Tensor) -> Tensor:
    """int64 [B, T]: how many symbols of its document stand before symbol t in the row."""
    t_T = torch.arange(first_BT.shape[1], device=first_BT.device)
    begin_BT = torch.where(first_BT, t_T, 0).cummax(dim=1).values
    return t_T - begin_BT


@dataclass(frozen=True, slots=True)
class Packing:
    """Rows re-cut at document starts and laid out for a packed recurrent pass, longest segment first, without padding.

    order_N: int64 [B * T]: which position of the flattened rows stands at each packed place; inverse_N undoes it.
    sizes_L: int64 [L] on the CPU: segments still running at each of the L steps.
    segment_N: int64 [B * T]: the segment (numbered by descending length) of each packed place.
    open_B, last_B: int64 [B]: the first and the last segment of each row.
    fresh_B: bool [B]: the row's first symbol begins a document.
    segments: how many there are.
    """

    order_N: Tensor
    inverse_N: Tensor
    sizes_L: Tensor
    segment_N: Tensor
    open_B: Tensor
    last_B: Tensor
    fresh_B: Tensor
    segments: int


def pack(first_BT: Tensor) -> Packing:
    """The packing of rows whose documents begin where `first_BT` is True."""
    B, T = first_BT.shape
    cut_BT = first_BT.clone()
    cut_BT[:, 0] = True
    segment_N = cut_BT.flatten().cumsum(0) - 1
    length_S = torch.bincount(segment_N)
    S = length_S.numel()
    by_length_S = torch.argsort(length_S, descending=True, stable=True)
    rank_S = torch.empty_like(by_length_S)
    rank_S[by_length_S] = torch.arange(S, device=first_BT.device)
    step_N = document_positions(cut_BT).flatten()
    ranked_N = rank_S[segment_N]
    order_N = torch.argsort(step_N * S + ranked_N)
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(B * T, device=first_BT.device)
    ranked_BT = ranked_N.view(B, T)
    return Packing(
        order_N=order_N,
        inverse_N=inverse_N,
        sizes_L=torch.bincount(step_N).cpu(),
        segment_N=ranked_N[order_N],
        open_B=ranked_BT[:, 0],
        last_B=ranked_BT[:, -1],
        fresh_B=first_BT[:, 0],
        segments=S,
    )
