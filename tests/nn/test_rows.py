"""Rows, documents and packing against loops written from their definitions."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.nn.rows import document_mask, document_positions, pack, shift
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


@settings(max_examples=60, deadline=None)
@given(firsts())
def test_packing_is_that_of_torch(first_BT):
    """Cut rows into sequences by hand, pack them with torch's own function, and compare."""
    B, T = first_BT.shape
    doc = documents(first_BT)
    value = torch.arange(B * T).view(B, T)
    sequences, owner = [], []
    for b in range(B):
        for d in sorted(set(doc[b].tolist())):
            sequences.append(value[b][torch.from_numpy(doc[b] == d)])
            owner.append((b, d))
    order = sorted(range(len(sequences)), key=lambda s: -len(sequences[s]))  # stable
    reference = torch.nn.utils.rnn.pack_sequence([sequences[s] for s in order])
    got = pack(first_BT)
    assert got.segments == len(sequences)
    assert torch.equal(value.flatten()[got.order_N], reference.data)
    assert torch.equal(got.sizes_L, reference.batch_sizes)
    assert torch.equal(value.flatten()[got.order_N][got.inverse_N], value.flatten())
    for place in range(B * T):
        b, t = divmod(int(got.order_N[place]), T)
        assert owner[order[int(got.segment_N[place])]] == (b, doc[b, t])
    for b in range(B):
        assert owner[order[int(got.open_B[b])]] == (b, doc[b, 0])
        assert owner[order[int(got.last_B[b])]] == (b, doc[b, -1])
        assert bool(got.fresh_B[b]) == bool(first_BT[b, 0])
