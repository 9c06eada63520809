"""Block-local attention against dense masks that are written down from the definition; what a stream must remember."""

import math

import pytest
import torch

from lmtrain.nn.local import Blocks, LocalAttention, LocalCache, in_line, in_plane, whole

F64 = torch.float64


def line_sees(T, *, query, memory):
    """bool [T, T]: t may see s."""
    out = torch.zeros(T, T, dtype=torch.bool)
    for t in range(T):
        start = t // query * query
        out[t, max(0, start - memory) : t + 1] = True
    return out


def plane_order(grid, *, query):
    H, W, C = grid
    rectangle = lambda p: (p // C // W // query[0], p // C % W // query[1])  # noqa: E731
    return sorted(range(H * W * C), key=lambda p: (*rectangle(p), p))


def plane_sees(grid, *, query, memory):
    """bool [T, T] in the order of rectangles: u may see v."""
    _, W, C = grid
    order = plane_order(grid, query=query)
    out = torch.zeros(len(order), len(order), dtype=torch.bool)
    for u, p in enumerate(order):
        top, left = p // C // W // query[0] * query[0], p // C % W // query[1] * query[1]
        for v, q in enumerate(order[: u + 1]):
            row, column = q // C // W, q // C % W
            out[u, v] = top - memory[0] <= row and left - memory[1] <= column < left + query[1] + memory[1]
    return out


LINES = [(24, 5, 7), (24, 6, 6), (24, 4, 0), (24, 4, 100), (24, 24, 3), (24, 30, 3), (24, 1, 2), (7, 3, 1)]
PLANES = [
    ((4, 6, 1), (2, 2), (1, 1)),
    ((4, 6, 3), (2, 3), (4, 6)),
    ((4, 6, 1), (2, 6), (2, 0)),
    ((4, 4, 2), (4, 2), (0, 1)),
    ((4, 4, 1), (1, 1), (2, 1)),
    ((2, 6, 1), (2, 2), (1, 0)),
]
CASES: list[tuple[Blocks, torch.Tensor]] = [
    *[(in_line(T, query=q, memory=m), line_sees(T, query=q, memory=m)) for T, q, m in LINES],
    *[(in_plane(g, query=q, memory=m), plane_sees(g, query=q, memory=m)) for g, q, m in PLANES],
    (whole(9), torch.ones(9, 9, dtype=torch.bool).tril()),
]
NAMES = [*[f"line-{c}" for c in LINES], *[f"plane-{c}" for c in PLANES], "whole"]
every = pytest.mark.parametrize(("blocks", "sees_TT"), CASES, ids=NAMES)


def attention(blocks, *, width=8, heads=2):
    torch.manual_seed(0)
    layer = LocalAttention(width, heads=heads, blocks=blocks, bias=True, std=0.5, out_std=0.5).double()
    with torch.no_grad():
        layer.qkv.bias.copy_(torch.randn(3 * width, dtype=F64))
    return layer


def dense(layer, h_BTD, sees_TT):
    """softmax(q k / sqrt(d)) v, a head and a position at a time."""
    B, T, D = h_BTD.shape
    d = D // layer.heads
    q, k, v = (h_BTD @ layer.qkv.weight.T + layer.qkv.bias).split(D, dim=-1)
    out = torch.zeros(B, T, D, dtype=F64)
    for head in range(layer.heads):
        part = slice(head * d, (head + 1) * d)
        for t in range(T):
            s = sees_TT[t].nonzero()[:, 0]
            score_Bs = (k[:, s, part] @ q[:, t, part, None])[..., 0] / math.sqrt(d)
            out[:, t, part] = (score_Bs.softmax(-1)[:, None] @ v[:, s, part])[:, 0]
    return out @ layer.out.weight.T + layer.out.bias


@every
def test_it_is_dense_attention_under_a_mask(blocks, sees_TT):
    layer = attention(blocks)
    h_BTD = torch.randn(2, blocks.length, 8, dtype=F64, generator=torch.Generator().manual_seed(1))
    want = dense(layer, h_BTD, sees_TT)
    got = layer(h_BTD, tables=blocks.tables(), cache=None, layer=0)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    if blocks.order is None:  # and of rows that are not finished
        for T in (1, blocks.length // 2, blocks.length - 1):
            short = layer(h_BTD[:, :T], tables=blocks.tables(), cache=None, layer=0)
            torch.testing.assert_close(short, want[:, :T], atol=1e-12, rtol=0)


@every
def test_a_cache_remembers_what_is_seen_later_and_no_more(blocks, sees_TT):
    layer = attention(blocks)
    h_BTD = torch.randn(2, blocks.length, 8, dtype=F64, generator=torch.Generator().manual_seed(1))
    want = layer(h_BTD, tables=blocks.tables(), cache=None, layer=0)
    for step in (1, 3, blocks.length):
        cache, t = LocalCache(blocks, 1), 0
        while t < blocks.length:
            n = min(step, cache.left(), blocks.length - t)
            cache.begin(h_BTD.device)
            got = layer(h_BTD[:, t : t + n], tables=blocks.tables(), cache=cache, layer=0)
            cache.advance(n)
            torch.testing.assert_close(got, want[:, t : t + n], atol=1e-12, rtol=0)
            t += n
    # Before a block is read, nothing older is needed than what it or a later one sees.
    needed = [int(sees_TT[t:].any(0).nonzero()[0]) for t in range(0, blocks.length, blocks.size)]
    assert list(blocks.keep) == needed
    ends = [min(t + blocks.size, blocks.length) for t in range(0, blocks.length, blocks.size)]
    assert blocks.room == max(end - first for end, first in zip(ends, needed, strict=True))


@every
def test_pairs_are_counted(blocks, sees_TT):
    assert blocks.pairs() == int(sees_TT.sum())


def test_rectangles_are_taken_one_after_another():
    for grid, query, memory in PLANES:
        order = plane_order(grid, query=query)
        straight = order == sorted(order)
        assert in_plane(grid, query=query, memory=memory).order == (None if straight else tuple(order))
        assert straight == (query[1] == grid[1] or query[0] == 1)
    assert in_line(24, query=5, memory=7).order is None
    # A line's memory is bounded: the cache of a long one is no larger than its blocks.
    assert in_line(3072, query=256, memory=256).room == 512
