"""Causal self-attention with grouped keys, optional QK-norm and rotary positions, and a key-value cache.

B rows, T positions, D width, H query heads, K key-value heads, d channels of a head.
[1] Vaswani et al., 2017. [2] Shazeer: Fast Transformer Decoding (multi-query), 2019; Ainslie et al.: GQA, 2023.
[3] Henry et al.: Query-Key Normalization, 2020 (here RMS-normalised with a learned gain for each channel of a head).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.nn.linear import Linear
from lmtrain.nn.norms import rms_norm
from lmtrain.nn.rotary import rotate


class KeyValueCache:
    """Keys and values of the inputs read so far, layer by layer; room doubles when it runs out."""

    def __init__(self, layers: int) -> None:
        self.length = 0
        self._room: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def extend(self, layer: int, k_BKTd: Tensor, v_BKTd: Tensor) -> tuple[Tensor, Tensor]:
        """Append to a layer; (all keys, all values) [B, K, length + T, d]. `advance` once all layers have done so."""
        B, K, T, d = k_BKTd.shape
        need = self.length + T
        room = self._room[layer]
        if room is None or room[0].shape[2] < need:
            size = max(need, 16, 2 * self.length)
            grown = (k_BKTd.new_empty(B, K, size, d), v_BKTd.new_empty(B, K, size, d))
            if room is not None:
                for new, old in zip(grown, room, strict=True):
                    new[:, :, : self.length] = old[:, :, : self.length]
            self._room[layer] = room = grown
        keys, values = room
        keys[:, :, self.length : need] = k_BKTd
        values[:, :, self.length : need] = v_BKTd
        return keys[:, :, :need], values[:, :, :need]

    def advance(self, inputs: int) -> None:
        """All layers have read `inputs` more positions."""
        self.length += inputs


class QKNorm(nn.Module):
    """RMS norm of every query and key, with one gain a channel for queries and one for keys [3], in one pass."""

    def __init__(self, head: int, *, heads: int, kv_heads: int, eps: float) -> None:
        super().__init__()
        self.q_weight = nn.Parameter(torch.ones(head))
        self.k_weight = nn.Parameter(torch.ones(head))
        self.heads, self.kv_heads, self.eps = heads, kv_heads, eps

    def forward(self, qk_BTHd: Tensor) -> Tensor:
        """[B, T, heads + kv_heads, d], queries first."""
        weight_Hd = torch.cat([self.q_weight.expand(self.heads, -1), self.k_weight.expand(self.kv_heads, -1)])
        return rms_norm(qk_BTHd, weight_Hd, eps=self.eps)


class Attention(nn.Module):
    """softmax(q k / sqrt(d)) v over the past, then the output map; queries, keys and values are one product."""

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int,
        bias: bool,
        qk_norm: bool,
        dropout: float,
        eps: float,
        std: float,
        out_std: float,
    ) -> None:
        super().__init__()
        assert width % heads == 0, "heads divide the width"
        assert heads % kv_heads == 0, "kv_heads divide heads"
        self.heads, self.kv_heads, self.head = heads, kv_heads, width // heads
        self.dropout = dropout
        self.qkv = Linear(width, (heads + 2 * kv_heads) * self.head, bias=bias, std=std)
        self.qk_norm = QKNorm(self.head, heads=heads, kv_heads=kv_heads, eps=eps) if qk_norm else None
        self.out = Linear(width, width, bias=bias, std=out_std)

    def forward(
        self,
        h_BTD: Tensor,
        *,
        turn: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """[B, T, D]. `turn`: rotary turns of the T positions. `mask`: bool [B, 1, T, T], else plainly causal.

        With a cache the T positions follow the cached ones.
        """
        B, T, D = h_BTD.shape
        qkv_BTHd = self.qkv(h_BTD).view(B, T, -1, self.head)
        qk_BTHd, v = qkv_BTHd.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        if self.qk_norm is not None:
            qk_BTHd = self.qk_norm(qk_BTHd)
        if turn is not None:
            qk_BTHd = rotate(qk_BTHd, turn)
        q, k = qk_BTHd.split([self.heads, self.kv_heads], dim=2)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if cache is not None:
            past = cache.length
            k, v = cache.extend(layer, k, v)
            if past and T > 1:
                mask = torch.ones(T, past + T, dtype=torch.bool, device=q.device).tril_(past)
        if self.kv_heads != self.heads:
            k, v = self._share(k), self._share(v)
        causal = mask is None and k.shape[2] == T
        dropout = self.dropout if self.training else 0.0
        a_BHTd = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal and T > 1)
        out_BTD: Tensor = self.out(a_BHTd.transpose(1, 2).reshape(B, T, D))
        return out_BTD

    def _share(self, k_BKTd: Tensor) -> Tensor:
        """[B, H, T, d]: each key-value head for its group of queries [2]."""
        B, K, T, d = k_BKTd.shape
        return k_BKTd[:, :, None].expand(B, K, self.heads // K, T, d).reshape(B, self.heads, T, d)
