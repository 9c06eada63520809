"""Hidden units that read one symbol more at each place, with tied weights: O(H D) a row, in forward and in a stream.

B rows, D symbols of a record, H hidden units, O outputs a symbol, n symbols of a chunk.

    a_1 = first,  a_{d+1} = a_d + x_d W_d,  h_d = g(rho_d a_d),  y_d = V_d h_d + b_d

The running sums are cumulative sums over chunks of symbols. Of the [B, D, H] hidden units one chunk exists at a time:
each chunk's first sum is kept, and the backward pass computes the chunk's units again.

[1] Larochelle, Murray: The Neural Autoregressive Distribution Estimator, 2011.
[2] Uria, Murray, Larochelle: RNADE: The real-valued neural autoregressive density-estimator, 2013.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lmtrain.nn.initial import normal_
from lmtrain.nn.precision import at_least_float32

CHUNK = 2**22
"""Hidden units held at a time, in elements (16 MiB of float32)."""

Activation = Literal["sigmoid", "relu"]


def _units(z: Tensor, activation: Activation) -> Tensor:
    return torch.sigmoid(z) if activation == "sigmoid" else torch.relu(z)


def _slope(h: Tensor, activation: Activation) -> Tensor:
    """g'(z) of h = g(z); at the bend of relu it is 0."""
    return h * (1 - h) if activation == "sigmoid" else (h > 0).to(h.dtype)


class _Running(torch.autograd.Function):
    """y [B, D, O] of the equations above; x has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, x_BD: Tensor, first_BH: Tensor, w_DH: Tensor, v_DOH: Tensor, b_DO: Tensor, rho_D: Tensor | None,
        activation: Activation, n: int,
    ) -> Tensor:  # fmt: skip
        wide = at_least_float32(w_DH.dtype)
        a_BH, sums, out = first_BH.to(wide), [], []
        for at in range(0, x_BD.shape[1], n):
            sums.append(a_BH)
            part = slice(at, at + n)
            a_BnH, a_BH = _sums(x_BD[:, part].to(wide), a_BH, w_DH[part].to(wide))
            z_BnH = a_BnH if rho_D is None else a_BnH * rho_D[part, None].to(wide)
            y_BnO = torch.einsum("bnh,noh->bno", _units(z_BnH, activation), v_DOH[part].to(wide))
            out.append(y_BnO + b_DO[part].to(wide))
        # The whole matrices are saved, not slices of them: the engine may free and gather them between the passes.
        ctx.save_for_backward(x_BD, w_DH, v_DOH, rho_D, *sums)
        ctx.activation, ctx.n, ctx.first_dtype, ctx.b_dtype = activation, n, first_BH.dtype, b_DO.dtype
        return torch.cat(out, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BDO: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, w_DH, v_DOH, rho_D, *sums = ctx.saved_tensors
        wide, n = g_BDO.dtype, ctx.n
        dw_DH, dv_DOH = torch.empty_like(w_DH, dtype=wide), torch.empty_like(v_DOH, dtype=wide)
        drho_D = None if rho_D is None else torch.empty_like(rho_D, dtype=wide)
        later_BH = torch.zeros_like(sums[0])  # the gradient of all sums behind this chunk
        for at, a_BH in reversed(list(zip(range(0, x_BD.shape[1], n), sums, strict=True))):
            part = slice(at, at + n)
            x_Bn, g_BnO = x_BD[:, part].to(wide), g_BDO[:, part]
            a_BnH, _ = _sums(x_Bn, a_BH, w_DH[part].to(wide))
            rho_n1 = None if rho_D is None else rho_D[part, None].to(wide)
            h_BnH = _units(a_BnH if rho_n1 is None else a_BnH * rho_n1, ctx.activation)
            dv_DOH[part] = torch.einsum("bno,bnh->noh", g_BnO, h_BnH)
            da_BnH = torch.einsum("bno,noh->bnh", g_BnO, v_DOH[part].to(wide)) * _slope(h_BnH, ctx.activation)
            if rho_n1 is not None and drho_D is not None:
                drho_D[part] = (da_BnH * a_BnH).sum(dim=(0, 2))
                da_BnH = da_BnH * rho_n1
            reached_BnH = da_BnH.cumsum(dim=1)
            later_BH = later_BH + reached_BnH[:, -1]
            dw_DH[part] = torch.einsum("bn,bnh->nh", x_Bn, later_BH[:, None] - reached_BnH)
        return (
            None,
            later_BH.to(ctx.first_dtype),
            dw_DH.to(w_DH.dtype),
            dv_DOH.to(v_DOH.dtype),
            g_BDO.sum(dim=0).to(ctx.b_dtype),
            None if drho_D is None else drho_D.to(rho_D.dtype),
            None,
            None,
        )


def _sums(x_Bn: Tensor, a_BH: Tensor, w_nH: Tensor) -> tuple[Tensor, Tensor]:
    """[B, n, H] the sums before each symbol of a chunk, and [B, H] the one behind it."""
    behind_BnH = a_BH[:, None] + (x_Bn[:, :, None] * w_nH).cumsum(dim=1)
    return torch.cat([a_BH[:, None], behind_BnH[:, :-1]], dim=1), behind_BnH[:, -1]


class RunningHidden(nn.Module):
    """The hidden units over D symbols and their O outputs a symbol. Float32 inside.

    scaled: with rho_d, which starts at 1 [2]; without, it is 1 [1]. W and V start as N(0, std^2), b_d as `first_O`.
    """

    def __init__(
        self, symbols: int, hidden: int, *, first_O: list[float], activation: Activation, scaled: bool, std: float,
        chunk: int = CHUNK,
    ) -> None:  # fmt: skip
        super().__init__()
        self.weight = nn.Parameter(torch.empty(symbols, hidden))
        self.bias = nn.Parameter(torch.zeros(hidden))
        self.out_weight = nn.Parameter(torch.empty(symbols, len(first_O), hidden))
        self.out_bias = nn.Parameter(torch.tensor(first_O).repeat(symbols))
        self.scale = nn.Parameter(torch.ones(symbols)) if scaled else None
        normal_(self.weight, std=std)
        normal_(self.out_weight, std=std)
        self.activation, self.chunk = activation, chunk

    def forward(
        self, x_Bn: Tensor, *, shift_BH: Tensor | None = None, sums_BH: Tensor | None = None, place: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[B, D, O] of whole records x [B, D]; `shift_BH` is added to the first sum.

        With `place` one step of a stream: x are the n symbols before it, read after `sums_BH` (None: nothing was read).
        The answer is (the sums behind them, [B, O] the outputs at `place`).
        """
        wide = at_least_float32(self.weight.dtype)
        first_BH = self.bias.to(wide) if shift_BH is None else self.bias.to(wide) + shift_BH.to(wide)
        first_BH = first_BH.expand(len(x_Bn), -1)
        b_DO = self.out_bias.view(len(self.out_weight), -1)
        if place is None:
            n = max(1, min(x_Bn.shape[1], self.chunk // max(1, first_BH.numel())))
            out_BDO: Tensor = _Running.apply(  # type: ignore[no-untyped-call]
                x_Bn, first_BH, self.weight, self.out_weight, b_DO, self.scale, self.activation, n
            )
            return out_BDO
        a_BH = first_BH if sums_BH is None else sums_BH
        if x_Bn.shape[1]:
            _, a_BH = _sums(x_Bn.to(wide), a_BH, self.weight[place - x_Bn.shape[1] : place].to(wide))
        z_BH = a_BH if self.scale is None else a_BH * self.scale[place].to(wide)
        y_BO = _units(z_BH, self.activation) @ self.out_weight[place].to(wide).t() + b_DO[place].to(wide)
        return a_BH, y_BO
