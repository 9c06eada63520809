"""PixelRNN: what each pixel and channel sees, exactly; memory; counts; messages (layers: test_raster_lstm.py)."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lmtrain import models
from lmtrain.errors import ConfigError, InputError
from lmtrain.protocol import Cond, Spec

BASE = {"kind": "pixelrnn", "layers": 2, "hidden": 12, "head_width": 24}
VARIANTS = pytest.mark.parametrize("variant", ["row_lstm", "diagonal_bilstm"])


def make(variant, grid=(3, 4, 3), *, V=4, seed=0, push=0.0, **keys):
    torch.manual_seed(seed)
    T = grid[0] * grid[1] * grid[2]
    spec = Spec(alphabet=V, context=T, bos=V, grid=grid)
    model = models.build(models.parse({**BASE, "variant": variant, **keys}), spec)
    if push:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape), alpha=push)
    return model.eval()


def rows(grid=(3, 4, 3), batch=3, *, V=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x_BT = torch.randint(V, (batch, grid[0] * grid[1] * grid[2]), generator=generator)
    return x_BT, Cond(torch.full((batch,), V))


def moved(model, x_BT, cond):
    """bool [T, T]: whether a change of symbol s (second) moves the prediction of symbol t (first), in float64."""
    model = model.double()
    out = torch.zeros(x_BT.shape[1], x_BT.shape[1], dtype=torch.bool)
    with torch.no_grad():
        before = model.predict(x_BT, cond=cond)
        for s in range(x_BT.shape[1]):
            other_BT = x_BT.clone()
            other_BT[:, s] = (other_BT[:, s] + 1) % model.alphabet
            out[:, s] = (model.predict(other_BT, cond=cond) != before).any(2).any(0)
    return out


@VARIANTS
def test_a_channel_sees_earlier_pixels_and_earlier_channels_of_its_own(variant):
    seen_TT = moved(make(variant, push=0.2), *rows(batch=6))
    # 4 columns: the window reaches three to the right, so everything before is seen.
    assert torch.equal(seen_TT, torch.ones(36, 36, dtype=torch.bool).tril(-1))


def window(i, j, H, W):
    """The first layer: 7 x 7, mask A."""
    above = {(y, x) for y in range(i - 3, i) for x in range(j - 3, j + 4)}
    beside = {(i, x) for x in range(j - 3, j)}
    return {(y, x) for y, x in above | beside if y >= 0 and 0 <= x < W}


def walked(variant, layers, H, W):
    """{pixel: the pixels that it sees}, by walking through the layers' definitions."""
    sees = {(i, j): window(i, j, H, W) for i in range(H) for j in range(W)}
    none: set[tuple[int, int]] = set()
    for _ in range(layers):
        if variant == "row_lstm":
            state = {}
            for i in range(H):
                for j in range(W):
                    above = [state.get((i - 1, j + k), none) for k in (-1, 0, 1)]
                    state[i, j] = sees[i, j].union(sees.get((i, j - 1), none), *above)
            after = state
        else:
            right, left = {}, {}
            for i in range(H):
                for j in range(W):
                    right[i, j] = sees[i, j] | right.get((i, j - 1), none) | right.get((i - 1, j), none)
                for j in reversed(range(W)):
                    left[i, j] = sees[i, j] | left.get((i, j + 1), none) | left.get((i - 1, j), none)
            after = {(i, j): right[i, j] | left.get((i - 1, j), none) for i in range(H) for j in range(W)}
        sees = {place: sees[place] | after[place] for place in sees}
    return sees


@VARIANTS
@pytest.mark.parametrize("layers", [1, 2])
def test_receptive_field_is_what_the_layers_say(variant, layers):
    H, W = grid = (4, 9)
    seen_TT = moved(make(variant, (*grid, 1), push=0.2, layers=layers), *rows((*grid, 1), batch=6))
    expected = walked(variant, layers, H, W)
    for t in range(H * W):
        assert {divmod(s, W) for s in seen_TT[t].nonzero()[:, 0].tolist()} == expected[t // W, t % W], divmod(t, W)


def test_the_row_lstm_sees_a_triangle():
    """One layer: k rows above, from four columns left of the triangle of [1], 3.1, to two columns right of it."""
    H, W = 5, 12
    seen_TT = moved(make("row_lstm", (H, W, 1), push=0.2, layers=1), *rows((H, W, 1), batch=6))
    for i in range(H):
        for j in range(W):
            for k in range(1, i + 1):
                columns = seen_TT[i * W + j, (i - k) * W : (i - k + 1) * W].nonzero()[:, 0].tolist()
                assert columns == list(range(max(0, j - k - 4), min(W - 1, j + k + 2) + 1))


@pytest.mark.parametrize("layers", [1, 2])
def test_the_diagonal_bilstm_sees_all_before_but_one_blind_spot(layers):
    """The last pixel of the row above, for columns that the first layer's window does not reach it from."""
    H, W = 4, 8
    seen_TT = moved(make("diagonal_bilstm", (H, W, 1), push=0.2, layers=layers), *rows((H, W, 1), batch=6))
    expected = torch.ones(H * W, H * W, dtype=torch.bool).tril(-1)
    for i in range(1, H):
        expected[i * W : i * W + W - 4, i * W - 1] = False
    assert torch.equal(seen_TT, expected)


@VARIANTS
def test_a_stream_answers_as_the_whole_image_does(variant):
    model = make(variant, push=0.3)
    x_BT, cond = rows()
    pmf_BTV = torch.log_softmax(model.predict(x_BT, cond=cond), dim=-1)
    scored = model(x_BT, cond=cond)
    assert scored.dtype == pmf_BTV.dtype == torch.float32
    torch.testing.assert_close(pmf_BTV.gather(2, x_BT[..., None])[..., 0], scored, atol=1e-6, rtol=0)
    stream = model.stream(3, cond=cond)
    for t in range(36):
        torch.testing.assert_close(stream.distribution().log_pmf(), pmf_BTV[:, t], atol=1e-5, rtol=0)
        stream.push(x_BT[:, t])


@VARIANTS
def test_layers_add_to_what_they_read(variant):
    """With nothing brought back from the LSTMs the network is the first layer and the head."""
    model = make(variant, push=0.3)
    with torch.no_grad():
        for layer in model.layers:
            layer.up.weight.zero_()
            layer.up.bias.zero_()
    bare = make(variant, push=0.3)
    del bare.layers[:]
    x_BT, cond = rows()
    assert torch.equal(model(x_BT, cond=cond), bare(x_BT, cond=cond))


@VARIANTS
def test_recomputed_activations_change_nothing(variant):
    x_BT, cond = rows()
    results, kept = [], []
    for enabled in (False, True):
        model = make(variant, push=0.3).train()
        model.checkpoint_activations(enabled)
        sizes = []

        def note(t, sizes=sizes):
            sizes.append(t.numel())
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            out = model(x_BT, cond=cond)
        kept.append(sum(sizes))
        out.sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[1] < kept[0] / 2


@VARIANTS
def test_bf16_is_near_fp32_and_answers_in_float32(variant):
    model, half = make(variant, push=0.1), make(variant, push=0.1).bfloat16()
    x_BT, cond = rows()
    want, got = model(x_BT, cond=cond), half(x_BT, cond=cond)
    assert got.dtype == torch.float32
    assert 1e-6 < (got - want).abs().max() < 0.1
    got.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in half.parameters())


@VARIANTS
def test_flops_are_those_that_torch_counts(variant):
    """torch counts the states of the skewed image's empty corners too."""
    H = 3
    model = make(variant, (H, 4, 3))
    x_BT, cond = rows((H, 4, 3))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x_BT, cond=cond)
    empty = 0
    if variant == "diagonal_bilstm":  # 2 directions, H (H - 1) empty cells, h + h states for 4 h gates, h = 12
        empty = 2 * 2 * H * (H - 1) * (2 * 12) * (4 * 12) * 2
    assert model.flops_per_symbol(36) == pytest.approx(3 * (counter.get_total_flops() / 3 - empty) / 36, rel=1e-9)


def test_parameter_counts():
    """The Row LSTM of [1] for CIFAR-10: 12 layers of 128 units, 1,024 feature maps before the output."""
    model = make("row_lstm", (32, 32, 3), V=256, layers=12, hidden=128, head_width=1024)
    first = 256 * 3 * 4 * 7 + 256
    layer = (512 * 256 * 3 + 512) + 512 * 128 * 3 + (256 * 128 + 256)
    head = (1024 * 256 + 1024) + (1024 * 1024 + 1024) + (768 * 1024 + 768)
    total = first + 12 * layer + head
    assert model.parameter_counts() == {"total": total, "without_embeddings": total}


def test_what_it_cannot_read_is_refused():
    parsed = models.parse(BASE)
    with pytest.raises(ConfigError, match="no grid"):
        models.build(parsed, Spec(alphabet=5, context=8, bos=4))
    with pytest.raises(ConfigError, match="real numbers"):
        models.build(parsed, Spec(alphabet=0, context=4, bos=0, grid=(2, 2, 1)))
    with pytest.raises(ConfigError, match="each of the 3 channels"):
        make("row_lstm", hidden=2)
    x_BT, cond = rows()
    with pytest.raises(InputError, match="3 x 4 x 3 = 36"):
        make("row_lstm")(x_BT[:, :35], cond=cond)
