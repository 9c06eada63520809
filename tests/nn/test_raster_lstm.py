"""LSTM layers over pixels against loops over pixels, in float64."""

import numpy as np
import pytest
import torch

from lmtrain.nn.masked import groups
from lmtrain.nn.raster_lstm import DiagonalBiLSTM, RowLSTM, skew, unskew

F64 = torch.float64
GRIDS = [(4, 5), (5, 3), (1, 4), (4, 1), (3, 3)]


@pytest.mark.parametrize(("H", "W"), GRIDS)
def test_skewing_moves_row_i_by_i_and_back(H, W):
    h = torch.arange(1.0, 2 * 3 * H * W + 1).view(2, 3, H, W)
    wide = skew(h)
    assert wide.shape == (2, 3, H, W + H - 1)
    for i, d in np.ndindex(H, W + H - 1):
        inside = 0 <= d - i < W
        assert torch.equal(wide[:, :, i, d], h[:, :, i, d - i] if inside else torch.zeros(2, 3))
    assert torch.equal(unskew(wide), h)
    # What stands outside of the image does not come back; gradients go where values came from.
    wide = wide + (wide == 0) * 7.0
    assert torch.equal(unskew(wide), h)
    h.requires_grad_()
    (skew(h) * wide).sum().backward()
    assert torch.equal(h.grad, h.detach())


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def step(gates, c, h):
    """One pixel: gates [4 h] in the order i, f, o, g."""
    i, f, o, g = gates[:h], gates[h : 2 * h], gates[2 * h : 3 * h], gates[3 * h :]
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def own_pixel(weight, x, *, inputs, hidden, channels):
    """What mask B lets through at a pixel: an output map reads maps of its own channel and of earlier ones."""
    of_in, of_out = groups(inputs, channels).tolist(), groups(hidden, channels).tolist() * 4
    out = np.zeros(4 * hidden)
    for o, i in np.ndindex(4 * hidden, inputs):
        if of_in[i] <= of_out[o]:
            out[o] += weight[o, i] * x[i]
    return out


def numbers(module):
    return {name: p.detach().numpy() for name, p in module.named_parameters()}


def push(module):
    torch.manual_seed(0)
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, dtype=F64) * 0.5)
    return module


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("H", "W"), GRIDS)
def test_row_lstm_is_its_equations(H, W, channels):
    inputs, hidden = 4, 3
    layer = push(RowLSTM(inputs, hidden, channels=channels))
    x = torch.randn(2, inputs, H, W, dtype=F64, generator=torch.Generator().manual_seed(1))
    p, image, want = numbers(layer), x.numpy(), np.zeros((2, hidden, H, W))
    for b in range(2):
        state, cell = np.zeros((H, W, hidden)), np.zeros((H, W, hidden))
        for i, j in np.ndindex(H, W):
            gates = p["given.bias"] + own_pixel(
                p["given.weight"][:, :, 0, 1], image[b, :, i, j], inputs=inputs, hidden=hidden, channels=channels
            )
            if j:
                gates = gates + p["given.weight"][:, :, 0, 0] @ image[b, :, i, j - 1]
            for k in (-1, 0, 1):
                if i and 0 <= j + k < W:
                    gates = gates + p["state"][:, :, k + 1] @ state[i - 1, j + k]
            state[i, j], cell[i, j] = step(gates, cell[i - 1, j] if i else np.zeros(hidden), hidden)
            want[b, :, i, j] = state[i, j]
    np.testing.assert_allclose(layer(x).detach().numpy(), want, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("H", "W"), GRIDS)
def test_diagonal_bilstm_is_its_equations(H, W, channels):
    inputs, hidden = 4, 3
    layer = push(DiagonalBiLSTM(inputs, hidden, channels=channels))
    x = torch.randn(2, inputs, H, W, dtype=F64, generator=torch.Generator().manual_seed(1))
    p, image, want = numbers(layer), x.numpy(), np.zeros((2, hidden, H, W))
    for b, direction in np.ndindex(2, 2):
        state, cell = np.zeros((H, W, hidden)), np.zeros((H, W, hidden))
        towards = range(W) if direction == 0 else range(W - 1, -1, -1)
        back = -1 if direction == 0 else 1
        for i in range(H):
            for j in towards:
                gates = p[f"given.{direction}.bias"] + own_pixel(
                    p[f"given.{direction}.weight"][:, :, 0, 0], image[b, :, i, j],
                    inputs=inputs, hidden=hidden, channels=channels,
                )  # fmt: skip
                before = np.zeros(hidden)
                if 0 <= j + back < W:
                    gates = gates + state[i, j + back] @ p["state"][direction, :hidden]
                    before = cell[i, j + back]
                if i:
                    gates = gates + state[i - 1, j] @ p["state"][direction, hidden:]
                state[i, j], cell[i, j] = step(gates, before, hidden)
                row = i + direction  # the mirrored map stands one row lower
                if row < H:
                    want[b, :, row, j] += state[i, j]
    np.testing.assert_allclose(layer(x).detach().numpy(), want, atol=1e-12)


@pytest.mark.parametrize("layer", [RowLSTM, DiagonalBiLSTM])
def test_gradients(layer):
    module = push(layer(2, 2, channels=1))
    x = torch.randn(1, 2, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.autograd.gradcheck(module, (x,))
