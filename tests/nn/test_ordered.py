"""Degrees and masks: what is connected with what, under every mask, and that weights stay as they are."""

import numpy as np
import pytest
import torch

from lmtrain.nn.ordered import OrderedLinear, degrees, numbers


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("own", [False, True])
def test_degrees_are_as_the_paper_draws_them(shuffled, own):
    D, M = 9, 40
    symbols_MD, (first_MH, second_MH) = degrees(D, hidden=[200, 50], masks=M, seed=3, shuffled=shuffled, own=own)
    assert (np.sort(symbols_MD, axis=1) == np.arange(1, D + 1)).all(), "an ordering"
    assert (len(np.unique(symbols_MD, axis=0)) > 30) == (shuffled and own)
    assert (symbols_MD[0] == np.arange(1, D + 1)).all() == (not shuffled)
    assert set(np.unique(first_MH)) == set(range(1, D))
    for m in range(M):
        assert second_MH[m].min() >= first_MH[m].min()
        assert second_MH[m].max() < D
    # Uniform over 1 .. D - 1: 1,000 of each expected.
    counts = np.bincount(first_MH.ravel(), minlength=D)[1:]
    assert abs(counts - 1000).max() < 5 * 1000**0.5
    assert len(np.unique(first_MH, axis=0)) == M
    narrow, _ = degrees(1, hidden=[4], masks=1, seed=0, shuffled=False, own=False)
    assert narrow.tolist() == [[1]]


def test_numbers_are_those_of_philox():
    """Fixed for good: an ordering is not saved, and must be the same tomorrow. Against Philox 4x64 done by hand."""
    key, counter = [7, 5 * 64 + 2], [1, 0, 0, 0]
    mask = 2**64 - 1
    for step in range(10):
        if step:
            key = [(key[0] + 0x9E3779B97F4A7C15) & mask, (key[1] + 0xBB67AE8584CAA73B) & mask]
        a, b = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [(b >> 64) ^ counter[1] ^ key[0], b & mask, (a >> 64) ^ counter[3] ^ key[1], a & mask]
    assert numbers(7, mask=5, layer=2, count=4).tolist() == counter


def layers(M=3):
    torch.manual_seed(0)
    inputs = np.array([[1, 2, 3, 4], [4, 2, 1, 3], [2, 1, 4, 3]])[:M]
    outputs = np.array([[1, 3, 2], [3, 2, 2], [2, 3, 1]])[:M]
    return OrderedLinear(inputs, outputs, strict=False, std=1.0), inputs, outputs


@pytest.mark.parametrize("strict", [False, True])
def test_a_mask_connects_by_degree(strict):
    _, inputs, outputs = layers()
    layer = OrderedLinear(inputs, outputs, strict=strict, std=1.0)
    x = torch.randn(6, 4)
    for m in range(3):
        want = layer.bias.detach().repeat(6, 1)
        for o in range(3):
            for i in range(4):
                if inputs[m, i] < outputs[m, o] or (not strict and inputs[m, i] == outputs[m, o]):
                    want[:, o] += layer.weight[o, i].detach() * x[:, i]
        got = layer(x, member=m)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
        torch.testing.assert_close(layer(x, member=m, outputs=slice(1, 3)), want[:, 1:], atol=1e-6, rtol=0)
        columns = sum(layer(x[:, i : i + 1], member=m, inputs=slice(i, i + 1)) for i in range(4))
        torch.testing.assert_close(columns + layer.bias, want, atol=1e-6, rtol=0)
    member_B = torch.tensor([2, 0, 1, 1, 0, 2])
    each = layer(x, member=member_B)
    for b in range(6):
        torch.testing.assert_close(each[b], layer(x, member=int(member_B[b]))[b], atol=1e-6, rtol=0)


def test_masks_are_not_saved():
    assert set(layers()[0].state_dict()) == {"weight", "bias"}
