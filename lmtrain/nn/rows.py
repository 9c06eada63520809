"""How a row of symbols becomes the inputs of a network, and what a document's start means there.

B rows, T symbols of a row, S segments: runs of a row that belong to one document.

Input t is the symbol before symbol t: the start symbol for t = 0, BOS where symbol t begins a document. So input t
belongs to the document of symbol t, and the end symbol of a document, which is BOS, opens the next one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmtrain.errors import ConfigError
from lmtrain.protocol import Cond, Spec


def need_symbols(spec: Spec, *, kind: str) -> None:
    """ConfigError when rows are real numbers, which a model of discrete symbols cannot read."""
    if not spec.alphabet:
        raise ConfigError(
            f"model.kind = {kind} reads symbols, and the corpus gives real numbers; "
            "take rnade, or prepare a discrete corpus"
        )


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
class Part:
    """Segments of similar length, side by side.

    place_SL: int64 [S, L], where step l of each segment stands in the flattened rows; a shorter segment repeats its
    last place. row_S: the row of each segment. opens_S: it continues what came before the row. closes_S: it ends it.
    """

    place_SL: Tensor
    row_S: Tensor
    opens_S: Tensor
    closes_S: Tensor


@dataclass(frozen=True, slots=True)
class Recut:
    """Rows cut where documents begin, every segment in exactly one part, padded to less than twice its length.

    inverse_N: int64 [B * T], where each place of the flattened rows stands in the parts' flattened, joined steps.
    segment_N: int64 [B * T], the segment of each place. segments: how many there are.
    """

    parts: list[Part]
    inverse_N: Tensor
    segment_N: Tensor
    segments: int


def recut(first_BT: Tensor, *, ends: bool = False) -> Recut:
    """Cut rows where `first_BT` is True. With `ends`, segments that close a row stand beside equally long ones only.

    (So their last step is the last of their part, and a recurrent layer's final state is theirs.)
    """
    B, T = first_BT.shape
    cut_BT = first_BT.clone()
    cut_BT[:, 0] = True
    cut_N = cut_BT.flatten()
    start_S = cut_N.nonzero()[:, 0]
    length_S = torch.diff(start_S, append=start_S.new_tensor([B * T]))
    closes_S = (start_S + length_S) % T == 0
    opens_S = (start_S % T == 0) & ~first_BT.flatten()[start_S]
    kind_S = torch.log2(length_S.double()).ceil().long()
    if ends:
        kind_S = torch.where(closes_S, -length_S, kind_S)
    inverse_N = torch.empty_like(cut_N, dtype=torch.int64)
    parts, before = [], 0
    for kind in sorted(set(kind_S.tolist())):
        of_S = (kind_S == kind).nonzero()[:, 0]
        length_S1 = length_S[of_S, None]
        step_L = torch.arange(int(length_S1.max()), device=first_BT.device)
        place_SL = start_S[of_S, None] + torch.minimum(step_L, length_S1 - 1)
        real_SL = step_L < length_S1
        inverse_N[place_SL[real_SL]] = before + real_SL.flatten().nonzero()[:, 0]
        before += place_SL.numel()
        parts.append(Part(place_SL, start_S[of_S] // T, opens_S[of_S], closes_S[of_S]))
    return Recut(parts, inverse_N, cut_N.cumsum(0) - 1, start_S.numel())
