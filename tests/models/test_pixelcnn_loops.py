"""The PixelCNN family against the papers' k x k kernels, written out by loops, pixel by pixel, channel by channel."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.models.pixelcnn_models import make, rows


def masked(h, conv, *, mask, from_channel, to_channel):
    """k x k masked convolution as [1] defines it, for weights that hold the upper half of k x k kernels."""
    weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    O, I, kh, kw = weight.shape  # noqa: E741
    B, _, H, W = h.shape
    out = np.zeros((B, O, H, W)) + bias[:, None, None]
    for r, c in np.ndindex(H, W):
        for a, d in np.ndindex(kh, kw):
            y, x = r + a - (kh - 1), c + d - conv.left
            if y < 0 or not 0 <= x < W or (y == r and x > c and mask):
                continue
            for o, i in np.ndindex(O, I):
                if (
                    mask
                    and (y, x) == (r, c)
                    and not (from_channel(i) < to_channel(o) if mask == "A" else from_channel(i) <= to_channel(o))
                ):
                    continue
                out[:, o, r, c] += weight[o, i, a, d] * h[:, i, y, x]
    return out


def thirds(width, channels):
    """Channel of each of `width` maps, by counting."""
    return lambda i: max(k for k in range(channels) if i * channels >= k * width)


def inputs(x_BT, grid, alphabet):
    H, W, C = grid
    x = x_BT.numpy().reshape(-1, H, W, C).transpose(0, 3, 1, 2) / (alphabet - 1) * 2 - 1
    return np.concatenate([x, np.ones_like(x[:, :1])], axis=1)


def relu(a):
    return np.maximum(a, 0)


def assert_logits(model, x_BT, cond, maps, grid):
    B, (H, W, C) = len(x_BT), grid
    want = maps.reshape(B, C, -1, H, W).transpose(0, 3, 4, 1, 2).reshape(B, H * W * C, -1)
    with torch.no_grad():
        got = model.predict(x_BT, cond=cond)
        assert np.abs(got.numpy() - want).max() < 1e-6
        normal = want - np.log(np.exp(want).sum(-1, keepdims=True))
        scored = np.take_along_axis(normal, x_BT.numpy()[..., None], -1)[..., 0]
        assert np.abs(model(x_BT, cond=cond).numpy() - scored).max() < 1e-6


@pytest.mark.parametrize("channels", [1, 3])
def test_pixelcnn_by_loops(channels):
    grid = (3, 4, channels)
    model = make("pixelcnn", grid, width=8, head_width=5, first_kernel=3).double()
    x_BT, cond = rows(grid, 2)
    outer, inner, head = (thirds(n, channels) for n in (8, 4, 5))

    def b(h, conv, source, target):
        return masked(h, conv, mask="B", from_channel=source, to_channel=target)

    h = inputs(x_BT, grid, 4)
    h = masked(h, model.first, mask="A", from_channel=lambda i: i if i < channels else -1, to_channel=outer)
    for block in model.blocks:
        a = b(relu(h), block.reduce, outer, inner)
        a = b(relu(a), block.convolve, inner, inner)
        h = h + b(relu(a), block.expand, inner, outer)
    h = b(relu(h), model.head[0], outer, head)
    h = b(relu(h), model.head[1], head, head)
    assert_logits(model, x_BT, cond, b(relu(h), model.lm_head, head, lambda o: o // 4), grid)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


@pytest.mark.parametrize("channels", [1, 3])
def test_gated_pixelcnn_by_loops(channels):
    grid, p = (3, 4, channels), 5
    model = make("gated_pixelcnn", grid, width=p, head_width=4, first_kernel=3, labels=3, conditional=True).double()
    x_BT, cond = rows(grid, 2, labels=3)
    maps, head = thirds(p, channels), thirds(4, channels)

    def label(layer):
        return layer.label_embed.weight.detach().numpy()[cond.label_B.numpy()][:, :, None, None]

    def gate(a):
        return np.tanh(a[:, :p]) * sigmoid(a[:, p:])

    h = inputs(x_BT, grid, 4)
    v = np.zeros_like(h)
    v[:, :, 1:] = h[:, :, :-1]
    everything = {"mask": None, "from_channel": None, "to_channel": None}
    for i, (vertical, horizontal) in enumerate(zip(model.verticals, model.horizontals, strict=True)):
        a = masked(v, vertical.convolve, **everything) + label(vertical)
        source = (lambda j: j if j < channels else -1) if i == 0 else maps
        beside = masked(h, horizontal.convolve, mask="B" if i else "A", from_channel=source,
                        to_channel=lambda o: maps(o % p))  # fmt: skip
        g = gate(beside + masked(a, vertical.across, **everything) + label(horizontal))
        out = masked(g, horizontal.out, mask="B", from_channel=maps, to_channel=maps)
        h, v = (h + out if i else out), gate(a)
    h = masked(relu(h), model.head, mask="B", from_channel=maps, to_channel=head)
    out = masked(relu(h), model.lm_head, mask="B", from_channel=head, to_channel=lambda o: o // 4)
    assert_logits(model, x_BT, cond, out, grid)


def elu2(a):
    both = np.concatenate([a, -a], axis=1)
    return np.where(both > 0, both, np.expm1(np.minimum(both, 0)))


def plain(h, conv):
    """Every weight read; the weights of each output scaled to its length."""
    weight = conv.weight.detach()
    if conv.length is not None:
        weight = weight * (conv.length.detach() / weight.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
    scaled = SimpleNamespace(weight=weight, bias=conv.bias, left=conv.left)
    return masked(h, scaled, mask=None, from_channel=None, to_channel=None)


def grown(h, up, H, W):
    """Stride 2: pixel (i, j) is added to rows 2i, 2i + 1 and columns 2j - left .. of the output, by its weights."""
    weight = up.weight.detach().numpy()
    weight = weight / np.sqrt((weight**2).sum((0, 2, 3), keepdims=True)) * up.length.detach().numpy()[:, None, None]
    out = np.zeros((len(h), weight.shape[1], H, W)) + up.bias.detach().numpy()[:, None, None]
    for i, j, a, d in np.ndindex(*h.shape[2:], *weight.shape[2:]):
        y, x = 2 * i + a, 2 * j + d - up.left
        if y < H and 0 <= x < W:
            out[:, :, y, x] += h[:, :, i, j] @ weight[:, :, a, d]
    return out


def pp_layer(h, layer, beside):
    a = plain(elu2(h), layer.first)
    if beside is not None:
        a = a + plain(elu2(beside), layer.beside)
    a = plain(elu2(a), layer.second)
    half = a.shape[1] // 2
    return h + a[:, :half] * sigmoid(a[:, half:])


def pp_maps(model, x):
    """Both stacks side by side, as the paper's figure 2 draws them: down with everything kept, then up."""
    down, right = np.zeros_like(x), np.zeros_like(x)
    down[:, :, 1:], right[..., 1:] = x[:, :, :-1], x[..., :-1]
    u, ul = plain(down, model.first_above), plain(down, model.first_row) + plain(right, model.first_left)
    kept, sizes, scale, path = [(u, ul)], [], model.scales, []
    while True:
        for v, h in zip(scale.vertical_down, scale.horizontal_down, strict=True):
            u = pp_layer(u, v, None)
            ul = pp_layer(ul, h, u)
            kept.append((u, ul))
        path.append(scale)
        if scale.coarser is None:
            break
        sizes.append(u.shape[2:])
        u = plain(u, scale.vertical_shrink)[:, :, ::2, ::2]
        ul = plain(ul, scale.horizontal_shrink)[:, :, ::2, ::2]
        kept.append((u, ul))
        scale = scale.coarser
    u, ul = kept.pop()
    for scale in reversed(path):
        if scale.coarser is not None:
            H, W = sizes.pop()
            u, ul = grown(u, scale.vertical_grow, H, W), grown(ul, scale.horizontal_grow, H, W)
        for v, h in zip(scale.vertical_up, scale.horizontal_up, strict=True):
            old_u, old_ul = kept.pop()
            u = pp_layer(u, v, old_u)
            ul = pp_layer(ul, h, np.concatenate([u, old_ul], axis=1))
    assert not kept
    return plain(np.where(ul > 0, ul, np.expm1(np.minimum(ul, 0))), model.lm_head)


@pytest.mark.parametrize(("grid", "scales"), [((3, 4, 1), 1), ((4, 4, 3), 2), ((3, 5, 3), 3)])
def test_pixelcnn_pp_by_loops_and_the_joint_of_a_pixel(grid, scales):
    (H, W, C), V, K = grid, 6, 2
    model = make("pixelcnn_pp", grid, alphabet=V, scales=scales, width=3, components=K).double()
    x_BT, cond = rows(grid, 2, alphabet=V)
    out = pp_maps(model, inputs(x_BT, grid, V)).reshape(2, K, -1, H, W)
    out[:, :, 1 : 1 + C] += np.linspace(-1, 1, K)[:, None, None, None]  # where the components start
    out[:, :, 1 + C : 1 + 2 * C] -= math.log(K)
    place = x_BT.numpy().reshape(2, H, W, C) * 2 / (V - 1) - 1
    with torch.no_grad():
        got = model(x_BT, cond=cond).view(2, H, W, C).sum(-1).numpy()
    for b, r, c in np.ndindex(2, H, W):
        p = out[b, :, :, r, c]
        weight = np.exp(p[:, 0]) / np.exp(p[:, 0]).sum()
        k, x = np.tanh(p[:, 1 + 2 * C :]), place[b, r, c]
        joint = weight
        for i in range(C):
            mean = p[:, 1 + i] + sum(k[:, i * (i - 1) // 2 + j] * x[j] for j in range(i))
            scale = np.exp(p[:, 1 + C + i])
            high = 1.0 if x[i] > 0.999 else sigmoid((x[i] + 1 / (V - 1) - mean) / scale)
            low = 0.0 if x[i] < -0.999 else sigmoid((x[i] - 1 / (V - 1) - mean) / scale)
            joint = joint * (high - low)
        assert got[b, r, c] == pytest.approx(math.log(joint.sum()), abs=1e-5)
