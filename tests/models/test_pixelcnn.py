"""The PixelCNN family: what each pixel reads, against definitions by loops, pixel by pixel, channel by channel."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lmtrain import models
from lmtrain.errors import ConfigError, InputError
from lmtrain.nn.stream import RecomputingStream
from lmtrain.protocol import Cond, Spec

SMALL = {
    "pixelcnn": {"kind": "pixelcnn", "blocks": 2, "width": 12, "head_width": 8},
    "gated_pixelcnn": {"kind": "gated_pixelcnn", "layers": 3, "width": 7, "head_width": 8},
    "pixelcnn_pp": {"kind": "pixelcnn_pp", "scales": 3, "layers": 1, "width": 8, "components": 3},
}
softmax = pytest.mark.parametrize("kind", ["pixelcnn", "gated_pixelcnn"])
every = pytest.mark.parametrize("kind", list(SMALL))


def spec_of(grid, *, alphabet=4, labels=0):
    return Spec(alphabet=alphabet, context=math.prod(grid), bos=alphabet, grid=grid, labels=labels)


def make(kind, grid, *, alphabet=4, labels=0, seed=0, push=0.3, **keys):
    torch.manual_seed(seed)
    spec = spec_of(grid, alphabet=alphabet, labels=labels)
    model = models.build(models.parse({**SMALL[kind], **keys}), spec)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape), alpha=push / max(1, p[0].numel()) ** 0.5)
    return model.eval()


def rows(grid, batch=3, *, alphabet=4, labels=0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x_BT = torch.randint(alphabet, (batch, math.prod(grid)), generator=generator)
    label_B = torch.randint(labels, (batch,), generator=generator) if labels else None
    return x_BT, Cond(torch.full((batch,), alphabet), label_B=label_B)


def every_row(grid, *, alphabet):
    T = math.prod(grid)
    x_NT = torch.cartesian_prod(*[torch.arange(alphabet)] * T).view(-1, T)
    return x_NT, Cond(torch.full((len(x_NT),), alphabet))


# --- probabilities


@every
@pytest.mark.parametrize(("grid", "alphabet"), [((2, 3, 1), 3), ((1, 2, 3), 2), ((2, 1, 2), 4)])
def test_probabilities_of_all_images_sum_to_one(kind, grid, alphabet):
    model = make(kind, grid, alphabet=alphabet, push=2.0)
    x_NT, cond = every_row(grid, alphabet=alphabet)
    with torch.no_grad():
        p_N = model(x_NT, cond=cond).double().sum(1).exp()
    assert p_N.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert p_N.max() > 5 * p_N.min()


@every
def test_each_channel_reads_what_comes_before_and_nothing_else(kind):
    """All of it, in a small image: every earlier pixel, and the earlier channels of its own."""
    grid = (2, 2, 3)
    wide = {"head_width": 48} if "head_width" in SMALL[kind] else {}
    model = make(kind, grid, width=24, **wide)  # wide enough that no path is cut by a ReLU
    x_BT, cond = rows(grid, 16)
    with torch.no_grad():
        params, logp = model.predict(x_BT, cond=cond), model(x_BT, cond=cond)
        assert params.shape[:2] == (16, 12)
        for s in range(12):
            other = x_BT.clone()
            other[:, s] = (other[:, s] + 1) % 4
            after = model.predict(other, cond=cond)
            assert torch.equal(after[:, : s + 1], params[:, : s + 1])
            assert torch.equal(model(other, cond=cond)[:, :s], logp[:, :s])
            changed = (after != params).flatten(2).any(2).any(0)[s + 1 :]
            assert changed.all(), f"symbol {s} is not read by {(~changed).nonzero()[:, 0] + s + 1}"


def read_at(model, grid, r, c):
    """bool [H, W]: which pixels change the prediction at (r, c), by disturbing each of them."""
    H, W, _ = grid
    x_BT, cond = rows(grid, H * W, seed=3)
    x_BT[:] = x_BT[0]
    with torch.no_grad():
        want = model.predict(x_BT, cond=cond)[:, r * W + c]
        pixel = torch.arange(H * W)
        x_BT[pixel, pixel] = (x_BT[pixel, pixel] + 1) % 4
        got = model.predict(x_BT, cond=cond)[:, r * W + c]
    return (got != want).flatten(1).any(1).view(H, W).numpy()


def before(r, c, *, H, W):
    y, x = np.mgrid[:H, :W]
    return (y < r) | ((y == r) & (x < c))


@pytest.mark.parametrize(("first", "kernel"), [(7, 3), (3, 3), (3, 5)])
def test_the_blind_spot_of_pixelcnn_is_a_cone_above_to_the_right(first, kernel):
    H, W = 7, 11
    grid = (H, W, 1)
    model = make("pixelcnn", grid, blocks=6, first_kernel=first, kernel=kernel).double()
    for r, c in [(6, 1), (6, 5), (3, 0), (0, 7), (6, 10)]:
        y, x = np.mgrid[:H, :W]
        d, e = r - y, x - c
        a, b = first // 2, kernel // 2
        blind = (d >= 1) & (e > a + b * (d - 1))
        near = (d <= a + 6 * b) & (-e <= a + 6 * b)
        assert np.array_equal(read_at(model, grid, r, c), before(r, c, H=H, W=W) & ~blind & near)
        assert blind.any() == (c < W - 1 - a and r > 0)


def test_gated_pixelcnn_has_no_blind_spot():
    H, W = 7, 11
    grid = (H, W, 1)
    model = make("gated_pixelcnn", grid, layers=8, first_kernel=7).double()
    for r, c in [(6, 1), (6, 5), (3, 0), (0, 7), (6, 10)]:
        assert np.array_equal(read_at(model, grid, r, c), before(r, c, H=H, W=W))
    model = make("gated_pixelcnn", grid, layers=2, first_kernel=3).double()
    y, x = np.mgrid[:H, :W]
    near = (6 - y <= 2) & (abs(x - 5) <= 2)
    assert np.array_equal(read_at(model, grid, 6, 5), before(6, 5, H=H, W=W) & near)


# --- independent references: the papers' k x k kernels, written out by loops


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


def test_pixelcnn_pp_has_no_blind_spot():
    H, W = 6, 9
    grid = (H, W, 1)
    for keys in ({"scales": 3, "layers": 2}, {"scales": 1, "layers": 5}):
        model = make("pixelcnn_pp", grid, **keys).double()
        for r, c in [(5, 1), (5, 4), (3, 0), (0, 7), (5, 8), (4, 3)]:
            assert np.array_equal(read_at(model, grid, r, c), before(r, c, H=H, W=W))


def test_dropout_acts_in_training_only():
    grid = (4, 4, 1)
    x_BT, cond = rows(grid)
    model, quiet = make("pixelcnn_pp", grid), make("pixelcnn_pp", grid, dropout=0.0)
    with torch.no_grad():
        want = quiet(x_BT, cond=cond)
        assert torch.equal(model(x_BT, cond=cond), want)
        assert torch.equal(quiet.train()(x_BT, cond=cond), want)
        torch.manual_seed(0)
        one = model.train()(x_BT, cond=cond)
        torch.manual_seed(0)
        assert torch.equal(model(x_BT, cond=cond), one)
        assert not torch.equal(one, want)


# --- streams


@every
@pytest.mark.parametrize("grid", [(5, 4, 1), (3, 3, 3), (1, 6, 2), (4, 1, 1)])
def test_the_stream_is_forward(kind, grid):
    model = make(kind, grid, labels=3, conditional=True)
    x_BT, cond = rows(grid, labels=3)
    T = x_BT.shape[1]
    with torch.no_grad():
        want = model(x_BT, cond=cond)
    for step in (1, 2, 3, 7):  # how many symbols are pushed between two questions
        stream = model.stream(3, cond=cond)
        for t in range(T):
            if t % step == 0:
                torch.testing.assert_close(stream.distribution().log_prob(x_BT[:, t]), want[:, t], atol=1e-5, rtol=0)
            stream.push(x_BT[:, t])
        with pytest.raises(InputError, match="context"):
            stream.distribution()


@every
def test_the_same_noise_gives_the_same_image_with_and_without_cache(kind):
    grid = (4, 4, 2)
    model = make(kind, grid)
    _, cond = rows(grid, 5)
    noise_BT = torch.from_numpy(np.random.default_rng(0).random((5, 32)))
    images = []
    for stream in (model.stream(5, cond=cond), model.stream(5, cond=cond),
                   RecomputingStream(model, 5, cond=cond, length=32)):  # fmt: skip
        drawn = []
        for t in range(32):
            drawn.append(stream.distribution().sample(noise_BT[:, t]))
            stream.push(drawn[-1])
        images.append(torch.stack(drawn, 1))
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])
    assert len({tuple(image) for image in images[0].tolist()}) == 5


# --- labels, refusals, precision, counts


@every
def test_labels_condition_the_whole_image(kind):
    grid = (3, 3, 1)
    model = make(kind, grid, labels=3, conditional=True)
    x_BT, cond = rows(grid, 4, labels=3)
    with torch.no_grad():
        one = model(x_BT, cond=Cond(cond.start_B, label_B=torch.zeros(4, dtype=torch.int64)))
        other = model(x_BT, cond=Cond(cond.start_B, label_B=torch.ones(4, dtype=torch.int64)))
        assert ((one - other).abs() > 1e-4).all()
        with pytest.raises(InputError, match="without labels"):
            model(x_BT, cond=Cond(cond.start_B))
        blind = make(kind, grid, labels=3)
        assert torch.equal(blind(x_BT, cond=cond), blind(x_BT, cond=Cond(cond.start_B)))
    with pytest.raises(ConfigError, match="labels"):
        make(kind, grid, conditional=True)


@softmax
@pytest.mark.parametrize(
    ("keys", "says"),
    [({"first_kernel": 4}, "odd"), ({"width": 2, "grid": (2, 2, 3)}, "feature maps"), ({"grid": None}, "grid")],
)
def test_what_cannot_be_is_refused_in_one_line(kind, keys, says):
    keys = dict(keys)
    spec = Spec(alphabet=4, context=12, bos=4, grid=keys.pop("grid", (2, 2, 3)))
    with pytest.raises(ConfigError, match=says) as refused:
        models.build(models.parse({**SMALL[kind], **keys}), spec)
    assert "\n" not in str(refused.value)


@every
def test_rows_that_are_no_images_are_refused(kind):
    model = make(kind, (2, 2, 3))
    with pytest.raises(InputError, match="2 x 2 x 3 = 12"):
        model(torch.zeros(1, 11, dtype=torch.int64), cond=Cond(torch.tensor([4])))


@every
def test_256_levels_at_the_edges(kind):
    grid = (3, 3, 3)
    model = make(kind, grid, alphabet=256).train()
    for scale in (1.0, 1e4):
        with torch.no_grad():
            model.lm_head.weight.mul_(scale)
        for level in (0, 255):
            model.zero_grad()
            torch.manual_seed(0)
            out = model(torch.full((2, 27), level), cond=Cond(torch.full((2,), 256)))
            assert out.dtype == torch.float32
            out.sum().backward()
            assert torch.isfinite(out).all()
            assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@every
def test_every_parameter_learns_and_recomputed_activations_change_nothing(kind):
    grid = (3, 4, 3)
    x_BT, cond = rows(grid, labels=3)
    results = []
    for enabled in (False, True):
        model = make(kind, grid, labels=3, conditional=True).train()
        model.checkpoint_activations(enabled)
        torch.manual_seed(4)
        out = model(x_BT, cond=cond)
        out.sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
        assert a.abs().sum() > 0


@every
def test_half_precision_gives_float32(kind):
    grid = (3, 4, 3)
    model = make(kind, grid)
    x_BT, cond = rows(grid)
    with torch.no_grad():
        want = model(x_BT, cond=cond)
        got = model.bfloat16()(x_BT, cond=cond)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, atol=0.1, rtol=0)


@every
def test_flops_are_those_counted_by_torch(kind):
    grid = (6, 5, 3)
    model = make(kind, grid).train()
    x_BT, cond = rows(grid)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x_BT, cond=cond)
    assert model.flops_per_symbol(90) == 3 * counter.get_total_flops() / x_BT.numel()
    counts = model.parameter_counts()
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["without_embeddings"] < counts["total"]
