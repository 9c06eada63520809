"""The matrix of symbols: input vectors, and the output matrix of the categorical head (the same one, when tied).

B rows, T positions, D width, V symbols of the alphabet, R rows of the matrix (V, or more with a reserved start).
A weight is read only inside the forward of the module that owns it, so a tied head is a second mode of the embedding.
[1] Press, Wolf: Using the Output Embedding to Improve Language Models, 2017.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.nn.head import CHUNK, log_prob, logits
from lmtrain.nn.initial import normal_

Mode = Literal["vectors", "logits", "logp"]


class SymbolMatrix(nn.Module):
    """[R, D], read in three ways: vectors of ids; logits of hidden states; log-probabilities of given symbols."""

    def __init__(self, rows: int, width: int, *, alphabet: int, std: float, chunk: int = CHUNK) -> None:
        super().__init__()
        assert rows >= alphabet
        self.weight = nn.Parameter(torch.empty(rows, width))
        self.alphabet = alphabet
        self.chunk = chunk
        normal_(self.weight, std=std)

    def forward(self, value: Tensor, x_BT: Tensor | None = None, *, mode: Mode = "vectors") -> Tensor:
        """`vectors`: int64 ids -> [..., D]. `logits`: [..., D] -> float32 [..., V]. `logp`: + x -> float32 [...]."""
        if mode == "vectors":
            return F.embedding(value, self.weight)
        if mode == "logits":
            return logits(value, self.weight, alphabet=self.alphabet)
        assert x_BT is not None, "log-probabilities need the symbols"
        return log_prob(value, self.weight, x_BT, alphabet=self.alphabet, chunk=self.chunk)


def read_out(head: SymbolMatrix, h_BTD: Tensor, x_BT: Tensor, *, want: Literal["logp", "logits", "next"]) -> Tensor:
    """`logp`: of the symbols x, float32 [B, T]. `logits`: [B, T, V]. `next`: [B, V], those of the last position."""
    out: Tensor
    if want == "logp":
        out = head(h_BTD, x_BT, mode="logp")
    elif want == "logits":
        out = head(h_BTD, mode="logits")
    else:
        out = head(h_BTD[:, -1:], mode="logits")[:, 0]
    return out
