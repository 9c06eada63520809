"""Masked and shifted convolutions against loops over pixels; the raster; rows kept by a stream."""

import numpy as np
import pytest
import torch

from lmtrain.errors import ConfigError, InputError
from lmtrain.nn.masked import CausalConv, MaskedConv, RowCache, down, groups, right
from lmtrain.nn.raster import image_grid, places, planes, scaled, to_grid, to_row
from lmtrain.protocol import Spec

# --- the raster


def test_the_raster_is_row_column_channel():
    x_BT = torch.arange(2 * 24).view(2, 24)
    x_BHWC = to_grid(x_BT, (4, 3, 2))
    row_T, column_T, channel_T = places((4, 3, 2))
    for t in range(24):
        r, c, k = int(row_T[t]), int(column_T[t]), int(channel_T[t])
        assert t == (r * 3 + c) * 2 + k
        assert x_BHWC[1, r, c, k] == planes(x_BT, (4, 3, 2))[1, k, r, c] == 24 + t
    assert torch.equal(to_row(x_BHWC), x_BT)
    assert scaled(torch.tensor([0, 1, 2]), levels=3).tolist() == [-1.0, 0.0, 1.0]
    with pytest.raises(InputError, match=r"\(2, 23\).*4 x 3 x 2 = 24"):
        to_grid(x_BT[:, :23], (4, 3, 2))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"grid": None}, "no grid"),
        ({"alphabet": 0}, "real numbers"),
        ({"alphabet": 1}, "alphabet of 1"),
        ({"context": 23}, "data.context = 23 is not a whole image of 4 x 3 x 2 = 24"),
    ],
)
def test_what_is_no_image_is_refused(change, says):
    given = {"alphabet": 5, "context": 24, "bos": 5, "grid": (4, 3, 2)}
    assert image_grid(Spec(**given), kind="pixelcnn") == (4, 3, 2)
    with pytest.raises(ConfigError, match=says):
        image_grid(Spec(**{**given, **change}), kind="pixelcnn")


# --- the convolutions


def by_loops(weight, bias, h, *, left, may):
    """The definition, one product at a time: output (r, c) of map o, from inputs that `may(o, i, dr, dc)` be read."""
    outputs, inputs, kh, kw = weight.shape
    B, _, H, W = h.shape
    out = np.zeros((B, outputs, H, W))
    for b, o, r, c in np.ndindex(B, outputs, H, W):
        out[b, o, r, c] = bias[o]
        for i, a, d in np.ndindex(inputs, kh, kw):
            y, x = r - kh + 1 + a, c - left + d
            if y >= 0 and 0 <= x < W and may(o, i, y - r, x - c):
                out[b, o, r, c] += weight[o, i, a, d] * h[b, i, y, x]
    return out


def drawn(conv, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in conv.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return conv.double()


@pytest.mark.parametrize("kind", ["A", "B"])
@pytest.mark.parametrize(("kernel", "left"), [((2, 3), 1), ((1, 3), 2), ((1, 1), 0), ((1, 3), 1)])
def test_masked_convolutions_by_their_definition(kind, kernel, left):
    source, target = torch.tensor([0, 1, 2, -1]), groups(5, 3)
    assert target.tolist() == [0, 0, 1, 1, 2]
    conv = drawn(MaskedConv(source, target, kind=kind, kernel=kernel, left=left))
    before = conv.weight.detach().clone()

    def may(o, i, dr, dc):
        if (dr, dc) == (0, 0):
            return source[i] < target[o] if kind == "A" else source[i] <= target[o]
        return dr < 0 or dc < 0

    h = torch.randn(2, 4, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = by_loops(before.numpy(), conv.bias.detach().numpy(), h.numpy(), left=left, may=may)
    out = conv(h)
    assert np.abs(out.detach().numpy() - want).max() < 1e-12
    # The mask is no part of the weights: they keep their values and get no gradient where it is 0.
    out.square().sum().backward()
    assert torch.equal(conv.weight, before)
    blocked = [not may(o, i, a - kernel[0] + 1, d - left) for o, i, a, d in np.ndindex(*before.shape)]
    assert torch.equal(conv.weight.grad.flatten() == 0, torch.tensor(blocked))
    assert sum(blocked) > 0
    assert set(conv.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize(("kernel", "left"), [((2, 3), 1), ((2, 2), 1), ((3, 1), 0)])
def test_shifted_convolutions_by_their_definition(kernel, left):
    conv = drawn(CausalConv(3, 4, kernel=kernel, left=left))
    h = torch.randn(2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    want = by_loops(weight, bias, h.numpy(), left=left, may=lambda *_: True)
    assert np.abs(conv(h).detach().numpy() - want).max() < 1e-12


def test_down_and_right():
    h = torch.arange(1.0, 7.0).view(1, 1, 2, 3)
    assert down(h)[0, 0].tolist() == [[0, 0, 0], [1, 2, 3]]
    assert right(h)[0, 0].tolist() == [[0, 1, 2], [0, 4, 5]]


def test_weight_normalisation():
    conv = drawn(CausalConv(3, 4, kernel=(2, 2), left=1, weight_norm=True))
    plain = CausalConv(3, 4, kernel=(2, 2), left=1).double()
    with torch.no_grad():
        norm = conv.weight.flatten(1).norm(dim=1)
        plain.weight.copy_(conv.weight * (conv.length / norm)[:, None, None, None])
        plain.bias.copy_(conv.bias)
        h = torch.randn(2, 3, 4, 5, dtype=torch.float64)
        torch.testing.assert_close(conv(h), plain(h), atol=1e-10, rtol=0)
    # At first an output of unit inputs has the variance gain^2.
    torch.manual_seed(0)
    out = CausalConv(50, 200, kernel=(3, 3), left=1, weight_norm=True, gain=0.5)(torch.randn(4, 50, 12, 12))
    assert out[:, :, 2:, 1:-1].std().item() == pytest.approx(0.5, rel=0.05)


def test_half_precision_outputs_are_wide():
    conv = MaskedConv(groups(6, 1), groups(4, 1), kind="B", wide=True).bfloat16()
    assert conv(torch.randn(2, 6, 3, 3).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("kernel", [(3, 3), (1, 2), (1, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_pixel_by_pixel_and_row_by_row_are_the_whole(kernel, masked):
    left = kernel[1] // 2
    conv = drawn(
        MaskedConv(groups(4, 2), groups(6, 2), kind="B", kernel=kernel, left=left)
        if masked
        else CausalConv(4, 6, kernel=kernel, left=left)
    )
    h = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        want = conv(h)
        cache = RowCache(6)
        for r in range(5):
            row = conv(h[:, :, r : r + 1], cache.move(r, 0))
            torch.testing.assert_close(row, want[:, :, r : r + 1], atol=1e-12, rtol=0)
        if not masked and kernel[1] > left + 1:
            return  # reads its own row to the right: rows only
        cache = RowCache(6)
        for r in range(5):
            for c in range(6):
                conv(torch.full((2, 4, 1, 1), 9.0, dtype=torch.float64), cache.move(r, c))  # to be read again
                got = conv(h[:, :, r : r + 1, c : c + 1], cache.move(r, c))
                torch.testing.assert_close(got, want[:, :, r : r + 1, c : c + 1], atol=1e-12, rtol=0)


def test_a_cache_may_skip_rows():
    """Nobody asked in them: they are zero."""
    conv = drawn(CausalConv(2, 3, kernel=(3, 1)))
    h = torch.randn(1, 2, 6, 4, dtype=torch.float64)
    h[:, :, 1:5] = 0
    with torch.no_grad():
        cache = RowCache(4)
        conv(h[:, :, :1], cache.move(0, 0))
        torch.testing.assert_close(conv(h[:, :, 5:], cache.move(5, 0)), conv(h)[:, :, 5:], atol=1e-12, rtol=0)
