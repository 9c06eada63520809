"""LSTM layers over the pixels of an image: row by row, and diagonal by diagonal in both directions.

B rows of a batch, F feature maps, h hidden units, H rows and W columns of an image, S = W + H - 1 diagonals.

[1] van den Oord, Kalchbrenner, Kavukcuoglu: Pixel Recurrent Neural Networks, 2016, sections 3.1 - 3.4.

Gates stand in the order input, forget, output, content (i, f, o, g). What comes from the input is a convolution with
mask B, all pixels at once; what comes from the state is about earlier pixels, so it needs no mask.
NOTE. Left of the image (where [1] skews rows apart) and above it the state is zero; [1] does not say.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.nn.initial import normal_
from lmtrain.nn.masked import MaskedConv, down, groups


def skew(h_BFHW: Tensor) -> Tensor:
    """[B, F, H, S]: row i moved i places to the right, zeros around it; columns are then the diagonals of the image."""
    B, F_, H, W = h_BFHW.shape
    wide = F.pad(h_BFHW, (0, H))  # H zeros behind each row; read again in rows that are one shorter, each row slips
    return wide.reshape(B, F_, H * (W + H))[:, :, : H * (W + H - 1)].view(B, F_, H, W + H - 1)


def unskew(h_BFHS: Tensor) -> Tensor:
    """[B, F, H, W] out of [B, F, H, S]: the inverse of `skew`."""
    B, F_, H, S = h_BFHS.shape
    W = S - H + 1
    return F.pad(h_BFHS.reshape(B, F_, H * S), (0, H)).view(B, F_, H, W + H)[:, :, :, :W]


def _cell(gates: Tensor, c: Tensor, *, dim: int) -> tuple[Tensor, Tensor]:
    """(h, c) of a step: c = f c + i g, h = o tanh(c) ([1], eq. 3)."""
    h = gates.shape[dim] // 4
    i, f, o = torch.sigmoid(gates.narrow(dim, 0, 3 * h)).chunk(3, dim=dim)
    c = f * c + i * torch.tanh(gates.narrow(dim, 3 * h, h))
    return o * torch.tanh(c), c


def _recurrent(*shape: int, inputs: int) -> nn.Parameter:
    weight = nn.Parameter(torch.empty(*shape))
    normal_(weight, std=1.0 / math.sqrt(inputs))
    return weight


class RowLSTM(nn.Module):
    """[1], 3.1: from the top row down. Pixel j of a row sees states j - 1, j, j + 1 of the row above: a triangle."""

    def __init__(self, inputs: int, hidden: int, *, channels: int) -> None:
        super().__init__()
        to_groups = groups(hidden, channels).repeat(4)
        self.hidden = hidden
        self.given = MaskedConv(groups(inputs, channels), to_groups, kind="B", kernel=(1, 3), left=1)
        self.state = _recurrent(4 * hidden, hidden, 3, inputs=3 * hidden)

    def forward(self, x_BFHW: Tensor) -> Tensor:
        """[B, h, H, W]."""
        gates_BGHW = self.given(x_BFHW)
        B, _, _, W = gates_BGHW.shape
        h_BhW = c_BhW = gates_BGHW.new_zeros(B, self.hidden, W)
        rows = []
        for gates_BGW in gates_BGHW.unbind(dim=2):
            h_BhW, c_BhW = _cell(gates_BGW + F.conv1d(h_BhW, self.state, padding=1), c_BhW, dim=1)
            rows.append(h_BhW)
        return torch.stack(rows, dim=2)

    @property
    def products(self) -> int:
        """Multiplications a pixel with the state."""
        return self.state.shape.numel()


class DiagonalBiLSTM(nn.Module):
    """[1], 3.2: pixel j of a row sees the states of its left neighbour and of the pixel above; and mirrored.

    The mirrored map sees all to the right as well, so it is moved down by a row before the two are added.
    """

    def __init__(self, inputs: int, hidden: int, *, channels: int) -> None:
        super().__init__()
        from_groups, to_groups = groups(inputs, channels), groups(hidden, channels).repeat(4)
        self.hidden = hidden
        self.given = nn.ModuleList(MaskedConv(from_groups, to_groups, kind="B") for _ in range(2))
        # For each direction: what the states of the neighbour beside it (first h rows) and above (last h) add to gates.
        self.state = _recurrent(2, 2 * hidden, 4 * hidden, inputs=2 * hidden)

    def forward(self, x_BFHW: Tensor) -> Tensor:
        """[B, h, H, W]."""
        B, _, H, W = x_BFHW.shape
        h = self.hidden
        right, left = self.given
        gates_2BGHS = torch.stack([skew(right(x_BFHW)), skew(left(x_BFHW.flip(3)))])
        gates_S2BHG = gates_2BGHS.permute(4, 0, 1, 3, 2)
        begun_SH1 = torch.ones(W + H - 1, H, dtype=torch.bool, device=x_BFHW.device).tril_()[:, :, None]
        h_2BHh = c_2BHh = gates_S2BHG.new_zeros(2, B, H, h)
        diagonals = []
        for gates_2BHG, begun_H1 in zip(gates_S2BHG, begun_SH1, strict=True):
            seen_2BHh = torch.cat([h_2BHh, F.pad(h_2BHh, (0, 0, 1, -1))], dim=3)
            told_2BHG = torch.bmm(seen_2BHh.view(2, B * H, 2 * h), self.state).view(2, B, H, 4 * h)
            h_2BHh, c_2BHh = (torch.where(begun_H1, new, 0.0) for new in _cell(gates_2BHG + told_2BHG, c_2BHh, dim=3))
            diagonals.append(h_2BHh)
        both_2BhHS = torch.stack(diagonals, dim=4).transpose(2, 3)
        return unskew(both_2BhHS[0]) + down(unskew(both_2BhHS[1]).flip(3))

    @property
    def products(self) -> int:
        """Multiplications a pixel with the states of both directions (those of cells outside of the image left out)."""
        return self.state.shape.numel()
