"""The categorical output: log-probabilities of given symbols without the [B, T, V] array, and the distribution itself.

N positions (rows times symbols), D width, V symbols of the alphabet, R >= V rows of the output matrix.
Everything after the product with the output matrix is float32 (float64 for float64), also for bf16 and fp16 models.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmtrain.nn.precision import at_least_float32
from lmtrain.protocol import Distribution

CHUNK = 2**24
"""Logits held at a time, in elements (64 MiB of float32)."""


def _operands(h_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Both of one dtype; on the CPU, where half-precision products are slow, a wide one."""
    if h_ND.dtype == weight_VD.dtype and (h_ND.is_cuda or h_ND.dtype == at_least_float32(h_ND.dtype)):
        return h_ND, weight_VD
    wide = at_least_float32(torch.promote_types(h_ND.dtype, weight_VD.dtype))
    return h_ND.to(wide), weight_VD.to(wide)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two equal dtypes, accumulated and returned in float32 or wider."""
    if a.dtype == at_least_float32(a.dtype):
        return a @ b
    return torch.mm(a, b, out_dtype=torch.float32)  # CUDA: the sums are float32 anyway, this keeps them


def logits(h: Tensor, weight_RD: Tensor, *, alphabet: int) -> Tensor:
    """[..., V] unnormalised log-probabilities, float32 or wider, of `h` [..., D]."""
    wide = at_least_float32(torch.promote_types(h.dtype, weight_RD.dtype))
    with torch.autocast(h.device.type, enabled=False):
        return torch.nn.functional.linear(h.to(wide), weight_RD[:alphabet].to(wide))


def log_prob(h: Tensor, weight_RD: Tensor, x: Tensor, *, alphabet: int, chunk: int = CHUNK) -> Tensor:
    """log softmax(h W^T)[x] in nats: [...] float32 for h [..., D] and int64 x [...].

    At most about `chunk` logits exist at a time. When all of them are fewer than that, their softmax is kept for the
    backward pass; otherwise the backward pass computes the logits a second time, chunk by chunk.
    """
    rows = max(1, chunk // alphabet)
    flat_ND = h.reshape(-1, h.shape[-1])
    out_N: Tensor = _LogProb.apply(flat_ND, weight_RD, x.reshape(-1), alphabet, rows)  # type: ignore[no-untyped-call]
    return out_N.view(x.shape)


class _LogProb(torch.autograd.Function):
    """d log p(x) / d logits = onehot(x) - softmax."""

    @staticmethod
    def forward(ctx: Any, h_ND: Tensor, weight_RD: Tensor, x_N: Tensor, alphabet: int, rows: int) -> Tensor:
        N = h_ND.shape[0]
        keep = rows >= N and any(ctx.needs_input_grad[:2])
        with torch.autocast(h_ND.device.type, enabled=False):
            a_ND, w_VD = _operands(h_ND, weight_RD[:alphabet])
            out_N = torch.empty(N, dtype=at_least_float32(a_ND.dtype), device=h_ND.device)
            top_N, total_N = torch.empty_like(out_N), torch.empty_like(out_N)
            kept_NV = None
            for at in range(0, N, rows):
                piece = slice(at, at + rows)
                logit_nV = _product(a_ND[piece], w_VD.t())
                top_n = logit_nV.amax(dim=1)
                given_n = logit_nV.gather(1, x_N[piece, None])[:, 0]
                kept_NV = logit_nV.sub_(top_n[:, None]).exp_()
                total_n = kept_NV.sum(dim=1)
                out_N[piece] = (given_n - top_n) - total_n.log()
                top_N[piece], total_N[piece] = top_n, total_n
        # The whole matrix is saved, not a slice of it: the engine may free and gather it between the passes.
        ctx.save_for_backward(h_ND, weight_RD, x_N, top_N, total_N, kept_NV if keep else None)
        ctx.alphabet, ctx.rows = alphabet, rows
        return out_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        h_ND, weight_RD, x_N, top_N, total_N, kept_NV = ctx.saved_tensors
        N, alphabet, rows = h_ND.shape[0], ctx.alphabet, ctx.rows
        with torch.autocast(h_ND.device.type, enabled=False):
            a_ND, w_VD = _operands(h_ND, weight_RD[:alphabet])
            dh_ND = torch.empty_like(a_ND)
            dw_RD = torch.zeros(weight_RD.shape, dtype=at_least_float32(a_ND.dtype), device=h_ND.device)
            for at in range(0, N, rows):
                piece = slice(at, at + rows)
                g_n1 = grad_N[piece, None]
                scale_n1 = -g_n1 / total_N[piece, None]
                if kept_NV is None:
                    d_nV = _product(a_ND[piece], w_VD.t()).sub_(top_N[piece, None]).exp_().mul_(scale_n1)
                else:
                    d_nV = kept_NV * scale_n1
                d_nV.scatter_add_(1, x_N[piece, None], g_n1)
                d_nV = d_nV.to(a_ND.dtype)
                dh_ND[piece] = d_nV @ w_VD
                if d_nV.dtype == dw_RD.dtype:
                    dw_RD[:alphabet].addmm_(d_nV.t(), a_ND[piece])
                else:
                    dw_RD[:alphabet] += _product(d_nV.t(), a_ND[piece])
        return dh_ND.to(h_ND.dtype), dw_RD.to(weight_RD.dtype), None, None, None


class Categorical(Distribution):
    """The next symbol's distribution from its unnormalised log-probabilities [B, V]."""

    def __init__(self, logits_BV: Tensor) -> None:
        self._logits_BV = logits_BV.detach()

    def log_pmf(self) -> Tensor:
        """float32 [B, V]: exact log-probability of every symbol."""
        return torch.log_softmax(self._logits_BV.float(), dim=1)

    def log_prob(self, x_B: Tensor) -> Tensor:
        """float32 [B] log p(x_B) in nats."""
        return self.log_pmf().gather(1, x_B[:, None])[:, 0]

    def sample(self, noise_B: Tensor) -> Tensor:
        """int64 [B]: the smallest symbol whose cumulative probability, in float64, exceeds `noise_B` (in [0, 1))."""
        cumulative_BV = torch.softmax(self._logits_BV.double(), dim=1).cumsum(dim=1)
        cut_B1 = noise_B.to(cumulative_BV)[:, None] * cumulative_BV[:, -1:]
        x_B1 = torch.searchsorted(cumulative_BV, cut_B1, right=True)
        # Rounding in the product may reach the total itself: then the last symbol that has any probability.
        last_B1 = (cumulative_BV < cumulative_BV[:, -1:]).sum(dim=1, keepdim=True)
        return torch.minimum(x_B1, last_B1)[:, 0]
