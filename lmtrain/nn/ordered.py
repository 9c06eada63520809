"""Affine maps that respect an order: a unit sees the units of smaller degree, so that no symbol reaches itself.

B rows, I inputs, O outputs, M masks (an ordering and the degrees of the hidden units each). A mask is computed from
degrees where it is used and multiplied with the weights there; the weights themselves are never masked.

[1] Germain, Gregor, Murray, Larochelle: MADE, ICML 2015.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.nn.initial import normal_


def numbers(seed: int, *, mask: int, layer: int, count: int) -> np.ndarray:
    """uint64 [count], a function of the arguments, the same in every version of numpy (raw Philox)."""
    key = np.array([seed, mask * 64 + layer], dtype=np.uint64)
    return np.asarray(np.random.Philox(key=key).random_raw(count))


def degrees(
    length: int, *, hidden: list[int], masks: int, seed: int, shuffled: bool, own: bool
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Degrees of the symbols, int64 [M, D], and of each hidden layer, int64 [M, H] [1].

    A symbol's degree is its place in the ordering, 1 to D: as they stand, or drawn where `shuffled`, for each mask anew
    where `own`. A hidden unit's is uniform from the smallest one of the layer before to D - 1.
    """
    order_MD, layers_MH = [], [[] for _ in hidden]  # type: tuple[list[np.ndarray], list[list[np.ndarray]]]
    for m in range(masks):
        order_D = np.arange(length)
        if shuffled:
            order_D = np.argsort(numbers(seed, mask=m if own else 0, layer=0, count=length), kind="stable")
        degree_D = np.empty(length, dtype=np.int64)
        degree_D[order_D] = np.arange(1, length + 1)
        order_MD.append(degree_D)
        low = 1
        for layer, units in enumerate(hidden):
            span = np.uint64(max(1, length - low))
            drawn_H = numbers(seed, mask=m, layer=layer + 1, count=units) % span
            layers_MH[layer].append(low + drawn_H.astype(np.int64))
            low = int(layers_MH[layer][-1].min())
    return np.stack(order_MD), [np.stack(layer) for layer in layers_MH]


class OrderedLinear(nn.Module):
    """y = (weight * mask) x + bias, where an output sees the inputs of smaller (`strict`), or no larger, degree.

    inputs_MI, outputs_MO: degrees under each of the masks. Weights start as N(0, std^2), the bias at zero.
    """

    into_MO: Tensor
    from_MI: Tensor

    def __init__(
        self, inputs_MI: np.ndarray, outputs_MO: np.ndarray, *, strict: bool, std: float, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs_MO.shape[1], inputs_MI.shape[1]))
        normal_(self.weight, std=std)
        self.bias = nn.Parameter(torch.zeros(outputs_MO.shape[1])) if bias else None
        # Integers, so that "no larger" is "smaller by one"; not saved, since the configuration tells them.
        self.register_buffer("from_MI", torch.from_numpy(inputs_MI.astype(np.int32)), persistent=False)
        into_MO = outputs_MO.astype(np.int32) + (0 if strict else 1)
        self.register_buffer("into_MO", torch.from_numpy(into_MO), persistent=False)

    def forward(
        self, x_BI: Tensor, *, member: int | Tensor = 0, inputs: slice | None = None, outputs: slice | None = None
    ) -> Tensor:
        """[B, O] under mask `member`, which may be int64 [B], one for each row.

        inputs: x holds these alone, and the sum is over them, without the bias. outputs: only these are wanted.
        """
        rows, columns = outputs or slice(None), inputs or slice(None)
        weight, x_BI = self.weight[rows, columns], x_BI.to(self.weight.dtype)
        bias = None if self.bias is None or inputs is not None else self.bias[rows]

        def under(m: int, x_nI: Tensor) -> Tensor:
            mask = self.into_MO[m, rows, None] > self.from_MI[m, None, columns]
            return F.linear(x_nI, weight * mask, bias)

        if isinstance(member, int):
            return under(member, x_BI)
        out_BO = x_BI.new_zeros(len(x_BI), len(weight))
        for m in sorted(set(member.tolist())):
            of_it_B = member == m
            out_BO[of_it_B] = under(m, x_BI[of_it_B])
        return out_BO
