"""The PixelCNN family: what each pixel reads, streams, labels, refusals, precision and counts."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lmtrain import models
from lmtrain.errors import ConfigError, InputError
from lmtrain.nn.stream import RecomputingStream
from lmtrain.protocol import Cond, Spec
from tests.models.pixelcnn_models import SMALL, every_row, make, rows

softmax = pytest.mark.parametrize("kind", ["pixelcnn", "gated_pixelcnn"])
every = pytest.mark.parametrize("kind", list(SMALL))


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


@pytest.mark.slow
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
    grid, T = (2, 4, 2), 16
    model = make(kind, grid)
    _, cond = rows(grid, 5)
    noise_BT = torch.from_numpy(np.random.default_rng(0).random((5, T)))
    images = []
    for stream in (model.stream(5, cond=cond), model.stream(5, cond=cond),
                   RecomputingStream(model, 5, cond=cond, length=T)):  # fmt: skip
        drawn = []
        for t in range(T):
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
        with pytest.raises(InputError, match="its rows come without labels"):
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
