"""Rows, documents and their parts against loops written from their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.nn.rows import document_mask, document_positions, recut, shift
from lmtrain.protocol import Cond


@st.composite
def firsts(draw):
    B, T = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    bits = draw(st.lists(st.booleans(), min_size=B * T, max_size=B * T))
    return torch.tensor(bits).view(B, T)


def documents(first_BT):
    """doc[b][t]: number of the document that symbol t of row b belongs to."""
    out = np.zeros(first_BT.shape, dtype=int)
    for b, row in enumerate(first_BT.tolist()):
        at = 0
        for t, first in enumerate(row):
            at += first
            out[b, t] = at
    return out


def test_shift_puts_the_start_before_the_row():
    x = torch.tensor([[4, 5, 6], [7, 8, 9]])
    assert shift(x, cond=Cond(torch.tensor([1, 2])), bos=0).tolist() == [[1, 4, 5], [2, 7, 8]]
    first = torch.tensor([[False, False, True], [True, False, False]])
    assert shift(x, cond=Cond(torch.tensor([1, 2]), first), bos=0).tolist() == [[1, 4, 0], [0, 7, 8]]
    with pytest.raises(AssertionError):
        shift(x, cond=Cond(torch.tensor([1, 2, 3])), bos=0)


@settings(max_examples=60, deadline=None)
@given(firsts())
def test_mask_and_positions(first_BT):
    B, T = first_BT.shape
    doc = documents(first_BT)
    mask, position = document_mask(first_BT), document_positions(first_BT)
    assert mask.shape == (B, 1, T, T)
    for b in range(B):
        for t in range(T):
            assert position[b, t] == sum(doc[b, s] == doc[b, t] for s in range(t))
            for s in range(T):
                assert bool(mask[b, 0, t, s]) == (s <= t and doc[b, s] == doc[b, t])


@settings(max_examples=100, deadline=None)
@given(firsts(), st.booleans())
def test_recut_by_hand(first_BT, ends):
    B, T = first_BT.shape
    doc = documents(first_BT)
    segments = {}  # (row, document) -> its places
    for b in range(B):
        for t in range(T):
            segments.setdefault((b, int(doc[b, t])), []).append(b * T + t)
    got = recut(first_BT, ends=ends)
    assert got.segments == len(segments)
    owner = {place: list(segments).index(key) for key, places in segments.items() for place in places}
    assert got.segment_N.tolist() == [owner[n] for n in range(B * T)]
    joined = torch.cat([part.place_SL.flatten() for part in got.parts])
    assert torch.equal(joined[got.inverse_N], torch.arange(B * T))
    seen = []
    for part in got.parts:
        for places, row, opens, closes in zip(
            part.place_SL.tolist(), part.row_S.tolist(), part.opens_S.tolist(), part.closes_S.tolist(), strict=True
        ):
            (key,) = [key for key, own in segments.items() if own[0] == places[0]]
            own = segments[key]
            assert places[: len(own)] == own
            assert set(places[len(own) :]) <= {own[-1]}  # only repetitions of its last place follow
            assert len(places) < 2 * len(own)
            assert row == key[0]
            assert opens == (own[0] % T == 0 and not first_BT[row, 0])
            assert closes == (own[-1] % T == T - 1)
            if ends and closes:
                assert len(places) == len(own)
            seen.append(key)
    assert sorted(seen) == sorted(segments)
    assert len(got.parts) <= T.bit_length() + 1 + (B if ends else 0)
