"""Block-local causal self-attention: each block of queries sees itself and a bounded memory of what came before.

B rows, T positions in the order in which they are taken, D width, H heads, d channels of a head, N query blocks of L
positions, M positions of a memory block, n positions read at once.

[1] Parmar et al.: Image Transformer, 2018, section 3.3: blocks of the flattened image (1D local), or rectangles of it,
taken one after another (2D local).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmtrain.nn.linear import Linear
from lmtrain.nn.raster import Grid


@dataclass(frozen=True)
class Blocks:
    """Which positions a block of queries may see besides those of its own that came before. Positions count in `order`.

    order: the positions of the row in the order in which they are taken; None = as they stand. length: T. size: L; the
    last block may be shorter. memory: for each block ascending earlier positions. keep: the first position that
    a block or any later one sees.
    """

    order: tuple[int, ...] | None
    length: int
    size: int
    memory: tuple[np.ndarray, ...]

    @property
    def keep(self) -> tuple[int, ...]:
        """For each block the first position that it or a later block sees."""
        first = [min([n * self.size, *memory[:1].tolist()]) for n, memory in enumerate(self.memory)]
        return tuple(int(least) for least in np.minimum.accumulate(first[::-1])[::-1])

    @property
    def room(self) -> int:
        """The most positions that must be remembered at a time."""
        return max(min((n + 1) * self.size, self.length) - first for n, first in enumerate(self.keep))

    def tables(self) -> tuple[Tensor, Tensor]:
        """int64 [N, M] memory, padded with 0, and bool [N, 1, L, M + L]: what each query of a block may see of it."""
        N, M = len(self.memory), max(len(memory) for memory in self.memory)
        memory_NM = np.zeros((N, M), dtype=np.int64)
        seen_NLK = np.zeros((N, self.size, M + self.size), dtype=bool)
        seen_NLK[:, :, M:] = np.tril(np.ones((self.size, self.size), dtype=bool))
        for n, memory in enumerate(self.memory):
            memory_NM[n, : len(memory)] = memory
            seen_NLK[n, :, : len(memory)] = True
        return torch.from_numpy(memory_NM), torch.from_numpy(seen_NLK[:, None])

    def pairs(self) -> float:
        """How many (query, key) pairs there are, a position with itself included."""
        sizes = [min(self.size, self.length - n * self.size) for n in range(len(self.memory))]
        return float(sum(L * len(memory) + L * (L + 1) // 2 for L, memory in zip(sizes, self.memory, strict=True)))


def whole(length: int) -> Blocks:
    """One block: full attention over the past."""
    return Blocks(None, length, length, (np.empty(0, dtype=np.int64),))


def in_line(length: int, *, query: int, memory: int) -> Blocks:
    """[1], 1D local: blocks of `query` positions, each with the `memory` positions before it."""
    query = min(query, length)
    starts = range(0, length, query)
    return Blocks(None, length, query, tuple(np.arange(max(0, s - memory), s) for s in starts))


def in_plane(grid: Grid, *, query: tuple[int, int], memory: tuple[int, int]) -> Blocks:
    """[1], 2D local: rectangles of `query` pixels, in raster order, each taken in raster order inside.

    Its memory is the rectangle that reaches `memory` = (rows, columns) further up, and to the left and to the right,
    as far as it was taken before. `query` divides the grid.
    """
    height, width, channels = grid
    high, wide = query
    assert height % high == 0, "blocks divide the rows"
    assert width % wide == 0, "blocks divide the columns"
    place_HWC = np.arange(height * width * channels).reshape(grid)
    corners = [(i, j) for i in range(0, height, high) for j in range(0, width, wide)]
    order_T = np.concatenate([place_HWC[i : i + high, j : j + wide].reshape(-1) for i, j in corners])
    when_T = np.empty_like(order_T)
    when_T[order_T] = np.arange(order_T.size)
    size = high * wide * channels
    seen = []
    for n, (i, j) in enumerate(corners):
        near = place_HWC[max(0, i - memory[0]) : i + high, max(0, j - memory[1]) : j + wide + memory[1]]
        when = np.sort(when_T[near.reshape(-1)])
        seen.append(when[when < n * size])
    straight = bool((order_T == np.arange(order_T.size)).all())
    return Blocks(None if straight else tuple(order_T.tolist()), order_T.size, size, tuple(seen))


class LocalCache:
    """Keys and values of what later queries can still see, layer by layer: at most `blocks.room` positions."""

    def __init__(self, blocks: Blocks, layers: int) -> None:
        self.blocks = blocks
        self.length = 0
        self._begin = 0
        self._keep = blocks.keep
        self._room: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self._memory: Tensor | slice = slice(0, 0)

    def left(self) -> int:
        """How many more positions the block that is being read has."""
        return self.blocks.size - self.length % self.blocks.size

    def begin(self, device: torch.device) -> None:
        """Before a read: at a new block, forget what no query can see any more."""
        if self.length % self.blocks.size:
            return
        n = self.length // self.blocks.size
        drop, held = self._keep[n] - self._begin, self.length - self._keep[n]
        for room in self._room:
            for kept in room or ():
                kept[:, :, :held] = kept[:, :, drop : drop + held].clone()
        self._begin = self._keep[n]
        where = self.blocks.memory[n] - self._begin
        if len(where) and where[-1] - where[0] == len(where) - 1:
            self._memory = slice(int(where[0]), int(where[-1]) + 1)
        else:
            self._memory = torch.from_numpy(where).to(device)

    def extend(self, layer: int, k_BHnd: Tensor, v_BHnd: Tensor) -> tuple[Tensor, Tensor]:
        """Append n positions of the block; (keys, values) of its memory and of the block so far."""
        B, H, n, d = k_BHnd.shape
        room = self._room[layer]
        if room is None:
            shape = (B, H, self.blocks.room, d)
            self._room[layer] = room = (k_BHnd.new_empty(shape), v_BHnd.new_empty(shape))
        at, first = self.length - self._begin, self.length - self.length % self.blocks.size - self._begin
        out = []
        for kept, new in zip(room, (k_BHnd, v_BHnd), strict=True):
            kept[:, :, at : at + n] = new
            out.append(torch.cat([kept[:, :, self._memory], kept[:, :, first : at + n]], dim=2))
        return out[0], out[1]

    def advance(self, inputs: int) -> None:
        """All layers have read `inputs` more positions."""
        self.length += inputs


class LocalAttention(nn.Module):
    """softmax(q k / sqrt(d)) v over what `blocks` lets a query see, then the output map."""

    def __init__(self, width: int, *, heads: int, blocks: Blocks, bias: bool, std: float, out_std: float) -> None:
        super().__init__()
        assert width % heads == 0, "heads divide the width"
        self.heads, self.blocks = heads, blocks
        self.qkv = Linear(width, 3 * width, bias=bias, std=std)
        self.out = Linear(width, width, bias=bias, std=out_std)

    def forward(self, h_BTD: Tensor, *, tables: tuple[Tensor, Tensor], cache: LocalCache | None, layer: int) -> Tensor:
        """[B, T, D] of positions from the first on, or of positions that follow the cached ones in their block."""
        B, T, D = h_BTD.shape
        q, k, v = self.qkv(h_BTD).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
            past = k.shape[2] - T
            mask = None
            if past and T > 1:
                mask = torch.ones(T, past + T, dtype=torch.bool, device=q.device).tril_(past)
            a_BHTd = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=past == 0 and T > 1)
        elif self.blocks.size >= T:
            a_BHTd = F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)
        else:
            a_BHTd = self._blocked(q, k, v, *tables)
        out_BTD: Tensor = self.out(a_BHTd.transpose(1, 2).reshape(B, T, D))
        return out_BTD

    def _blocked(self, q: Tensor, k: Tensor, v: Tensor, memory_NM: Tensor, seen_N1LK: Tensor) -> Tensor:
        B, H, T, d = q.shape
        L = self.blocks.size
        N = -(-T // L)
        memory_NM = memory_NM[:N]
        if N * L > T:  # queries that fill up the last block are dropped again, and nobody sees their keys
            q, k, v = (F.pad(part, (0, 0, 0, N * L - T)) for part in (q, k, v))

        def cut(part: Tensor) -> Tensor:
            return part.reshape(B, H, N, L, d)

        def with_memory(part: Tensor) -> Tensor:
            remembered = part.index_select(2, memory_NM.flatten()).view(B, H, N, -1, d)
            return torch.cat([remembered, cut(part)], dim=3).transpose(1, 2).flatten(0, 1)

        mask = seen_N1LK[:N].expand(B, -1, -1, -1, -1).flatten(0, 1)
        a_SHLd = F.scaled_dot_product_attention(
            cut(q).transpose(1, 2).flatten(0, 1), with_memory(k), with_memory(v), attn_mask=mask
        )
        return a_SHLd.view(B, N, H, L, d).transpose(1, 2).reshape(B, H, N * L, d)[:, :, :T]
