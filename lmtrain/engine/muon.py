"""Muon: Nesterov momentum whose update is orthogonalised, matrix by matrix; AdamW for all that is no matrix.

K. Jordan and others, "Muon: an optimizer for hidden layers in neural networks", 2024 [1]; the quintic
Newton-Schulz iteration and its coefficients are theirs. AdamW: Loshchilov and Hutter, arXiv 1711.05101.

Why not DeepSpeed's: it orthogonalises the gradient before it clips, so clipping scales the update, and its momentum
has another layout at every stage. Here the optimizer sees clipped gradients, momentum is laid out as the weights are,
and whole matrices are put together only while they are orthogonalised. So every ZeRO stage gives the same numbers.

NOTE the iteration runs in float32 on a CPU, where bfloat16 products are slow, and in bfloat16 on a GPU, as in [1].
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.adamw import adamw

from lmtrain.engine.communication import CLOCK

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(x_MN: Tensor, *, steps: int) -> Tensor:
    """Nearly U V^T for x = U S V^T (singular values within about 0.7 to 1.2), in x's dtype."""
    a, b, c = COEFFICIENTS
    y = x_MN.bfloat16() if x_MN.is_cuda else x_MN.float()
    tall = y.size(0) > y.size(1)
    if tall:
        y = y.T
    y = y / (y.norm() + 1e-7)
    for _ in range(steps):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.T if tall else y).to(x_MN.dtype)


def scale(rows: int, columns: int) -> float:
    """Makes the update's root mean square the same for tall matrices as for square ones."""
    return math.sqrt(max(1.0, rows / columns))


@dataclass(frozen=True, slots=True)
class Matrix:
    """One matrix among the ranks. spans[r] = (start, numel) of the flattened matrix on rank r.

    offset: where this rank's span lies in its flat tensor. owner: the rank that orthogonalises it.
    """

    rows: int
    columns: int
    spans: tuple[tuple[int, int], ...]
    offset: int
    owner: int


class Layout:
    """Matrices whose elements are divided among ranks in one flat tensor a rank (ZeRO's partitions)."""

    def __init__(
        self,
        shapes: Sequence[tuple[int, ...]],
        spans: Sequence[Sequence[tuple[int, int]]],
        offsets: Sequence[int],
        *,
        rank: int,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.rank, self.group = rank, group
        self.matrices: list[Matrix] = []
        world = len(spans[0]) if spans else 1
        load = [0.0] * world
        for shape, span, offset in zip(shapes, spans, offsets, strict=True):
            rows, columns = shape[0], _numel(shape[1:])
            largest = max(numel for _, numel in span)
            # The rank that has most of a matrix gets the rest of it; where all have the same (stage 3), take turns.
            owner = min((r for r in range(world) if span[r][1] == largest), key=lambda r: load[r])
            load[owner] += rows * columns * min(rows, columns)
            self.matrices.append(Matrix(rows, columns, tuple(span), offset, owner))
        self.divided = any(m.spans[m.owner][1] != m.rows * m.columns for m in self.matrices)
        """Whether any rank of the group holds only a part of a matrix: then all of them take part in the exchange."""

    def update(self, flat: Tensor, *, steps: int) -> Tensor:
        """The orthogonalised update in the layout of `flat` (padding: zero). Collective where matrices are divided."""
        out = torch.zeros_like(flat)
        whole = self._gather(flat) if self.divided else {}
        mine: dict[int, Tensor] = {}
        for i, m in enumerate(self.matrices):
            if m.owner == self.rank:
                x = whole[i] if i in whole else flat.narrow(0, m.offset, m.rows * m.columns)
                x_MN = orthogonalise(x.view(m.rows, m.columns), steps=steps)
                mine[i] = (x_MN * scale(m.rows, m.columns)).reshape(-1)
        if self.divided:
            self._scatter(mine, out)
        for i, x in mine.items():
            start, numel = self.matrices[i].spans[self.rank]
            out.narrow(0, self.matrices[i].offset, numel).copy_(x.narrow(0, start, numel))
        return out

    def _moved(self, sender: int, owner: int) -> list[tuple[int, int, int]]:
        """(matrix, start, numel) of what `sender` holds of `owner`'s matrices, in the order in which it is sent."""
        if sender == owner:
            return []
        return [(i, *m.spans[sender]) for i, m in enumerate(self.matrices) if m.owner == owner and m.spans[sender][1]]

    def _world(self) -> range:
        return range(len(self.matrices[0].spans))

    def _exchange(self, send: list[Tensor], sizes: list[int], like: Tensor) -> Tensor:
        lengths = [int(x.numel()) for x in send]
        received = like.new_empty(sum(sizes))
        with CLOCK.running():
            dist.all_to_all_single(received, torch.cat(send), sizes, lengths, group=self.group)
        return received

    def _gather(self, flat: Tensor) -> dict[int, Tensor]:
        """Every matrix that this rank owns and holds only in part, whole."""
        send = [
            torch.cat(
                [flat.narrow(0, self.matrices[i].offset, n) for i, _, n in self._moved(self.rank, r)] or [flat[:0]]
            )
            for r in self._world()
        ]
        received = self._exchange(send, [sum(n for *_, n in self._moved(r, self.rank)) for r in self._world()], flat)
        whole: dict[int, Tensor] = {}
        at = 0
        for r in self._world():
            for i, start, numel in self._moved(r, self.rank):
                m = self.matrices[i]
                if i not in whole:
                    whole[i] = flat.new_empty(m.rows * m.columns)
                    own, count = m.spans[self.rank]
                    whole[i].narrow(0, own, count).copy_(flat.narrow(0, m.offset, count))
                whole[i].narrow(0, start, numel).copy_(received.narrow(0, at, numel))
                at += numel
        return whole

    def _scatter(self, mine: dict[int, Tensor], out: Tensor) -> None:
        """Give the other ranks their spans of the matrices in `mine`, and take ours of theirs into `out`."""
        send = [
            torch.cat([mine[i].narrow(0, start, n) for i, start, n in self._moved(r, self.rank)] or [out[:0]])
            for r in self._world()
        ]
        received = self._exchange(send, [sum(n for *_, n in self._moved(self.rank, r)) for r in self._world()], out)
        at = 0
        for r in self._world():
            for i, _, numel in self._moved(self.rank, r):
                out.narrow(0, self.matrices[i].offset, numel).copy_(received.narrow(0, at, numel))
                at += numel


class Muon(torch.optim.Optimizer):
    """Groups with `muon` true: momentum, orthogonalised. The others: AdamW with fused kernels.

    A parameter is a whole one, or a flat partition of several; then `layouts[parameter]` says what lies where.
    """

    def __init__(
        self, grouped: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, newton_schulz: int
    ) -> None:
        self.layouts: dict[Tensor, Layout] = {}
        defaults = {"lr": lr, "betas": betas, "eps": eps, "newton_schulz": newton_schulz, "momentum": 0.95}
        super().__init__(grouped, defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient. Collective when a layout is divided among ranks."""
        assert closure is None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and group["muon"]:
                    self._muon(p, group)
            if not group["muon"]:
                self._adamw([p for p in group["params"] if p.grad is not None], group)

    def _muon(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        beta = group["momentum"]
        state["momentum"].lerp_(p.grad, 1 - beta)
        ahead = p.grad.lerp(state["momentum"], beta)
        layout = self.layouts.get(p)
        if layout is not None:
            update = layout.update(ahead, steps=group["newton_schulz"])
        else:
            rows, columns = p.size(0), _numel(p.shape[1:])
            x_MN = orthogonalise(ahead.view(rows, columns), steps=group["newton_schulz"])
            update = (x_MN * scale(rows, columns)).view_as(p)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.add_(update, alpha=-group["lr"])

    def _adamw(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if not params:
            return
        for p in params:
            if not self.state[p]:
                self.state[p].update(
                    step=torch.zeros((), dtype=torch.float32, device=p.device),
                    exp_avg=torch.zeros_like(p),
                    exp_avg_sq=torch.zeros_like(p),
                )
        states = [self.state[p] for p in params]
        adamw(
            params,
            [p.grad for p in params if p.grad is not None],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _numel(shape: Sequence[int]) -> int:
    n = 1
    for size in shape:
        n *= size
    return n
