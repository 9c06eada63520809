"""The recurrent model against torch's stacked layers and against the equations; carried state; locked dropout."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lmtrain import models
from lmtrain.errors import ConfigError, InputError
from lmtrain.nn.recurrent import GRU, LSTM, locked_dropout
from lmtrain.protocol import Carries, Cond, Spec

BASE = {"kind": "rnn", "layers": 2, "width": 12}
SPEC = Spec(alphabet=7, context=6, bos=6)
CELLS = pytest.mark.parametrize("cell", ["lstm", "gru"])


def make(spec=SPEC, *, seed=0, push=0.0, **keys):
    torch.manual_seed(seed)
    model = models.build(models.parse({**BASE, **keys}), spec)
    if push:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn(p.shape), alpha=push)
    return model


def rows(batch=4, *, T=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x_BT = torch.randint(7, (batch, T), generator=generator)
    return x_BT, Cond(torch.randint(7, (batch,), generator=generator))


# --- the network


@CELLS
@pytest.mark.parametrize("keys", [{}, {"embed_width": 5}, {"embed_width": 5, "tied": False}])
def test_it_is_torchs_stack_of_layers(cell, keys):
    model = make(push=0.3, cell=cell, **keys).eval()
    D = keys.get("embed_width", 12)
    stack = (torch.nn.LSTM if cell == "lstm" else torch.nn.GRU)(D, 12, num_layers=2, batch_first=True)
    with torch.no_grad():
        for i, layer in enumerate(model.layers):
            for name, p in layer.named_parameters():
                getattr(stack, name.replace("_l0", f"_l{i}")).copy_(p)
    x_BT, cond = rows()
    in_BT = torch.cat([cond.start_B[:, None], x_BT[:, :-1]], dim=1)
    out, _ = stack(model.embed.weight[in_BT])
    if model.project is not None:
        out = out @ model.project.weight.T
    matrix = model.embed.weight if keys.get("tied", True) else model.lm_head.weight
    want = out @ matrix.T
    torch.testing.assert_close(model.predict(x_BT, cond=cond), want, atol=1e-5, rtol=0)
    scored = torch.log_softmax(want, -1).gather(-1, x_BT[..., None])[..., 0]
    torch.testing.assert_close(model(x_BT, cond=cond), scored, atol=1e-5, rtol=0)
    assert (model.project is not None) == (D != 12 and keys.get("tied", True))


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


@CELLS
def test_one_layer_by_the_equations(cell):
    model = make(push=0.3, cell=cell, layers=1).double().eval()
    layer = model.layers[0]
    wi, wh, bi, bh = (p.detach().numpy() for p in layer.parameters())
    x_BT, cond = rows(batch=1)
    h, c = np.zeros(12), np.zeros(12)
    want = []
    for symbol in [int(cond.start_B[0]), *x_BT[0, :-1].tolist()]:
        e = model.embed.weight[symbol].detach().numpy()
        a, b = wi @ e + bi, wh @ h + bh
        if cell == "lstm":
            i, f, g, o = np.split(a + b, 4)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            (ar, az, an), (br, bz, bn) = np.split(a, 3), np.split(b, 3)
            r, z = sigmoid(ar + br), sigmoid(az + bz)
            h = (1 - z) * np.tanh(an + r * bn) + z * h
        want.append(model.embed.weight.detach().numpy() @ h)
    got = model.predict(x_BT, cond=cond)[0].detach().numpy()
    assert np.abs(got - np.stack(want)).max() < 1e-12


def test_first_values():
    torch.manual_seed(0)
    lstm = LSTM(50, 100)
    assert torch.equal(
        lstm.bias_ih_l0 + lstm.bias_hh_l0, torch.cat([torch.zeros(100), torch.ones(100), torch.zeros(200)])
    )
    for w in (lstm.weight_ih_l0, lstm.weight_hh_l0):
        assert w.abs().max() <= 0.1
        assert w.std().item() == pytest.approx(0.2 / 12**0.5, rel=0.02)
    gru = GRU(50, 100)
    assert not gru.bias_ih_l0.any()
    a, b = make(seed=3).state_dict(), make(seed=3).state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not torch.equal(a["embed.weight"], make(seed=4).state_dict()["embed.weight"])


# --- documents and state


def documents(first_BT, b):
    cuts = [0, *(t for t in range(1, first_BT.shape[1]) if first_BT[b, t]), first_BT.shape[1]]
    return list(pairwise(cuts))


@CELLS
def test_masked_rows_equal_documents_alone_in_value_and_gradient(cell):
    x_BT, cond = rows(batch=8, T=9)
    first_BT = torch.rand(8, 9, generator=torch.Generator().manual_seed(5)) < 0.3
    weight_BT = torch.rand(8, 9, generator=torch.Generator().manual_seed(6))
    together, apart = make(push=0.3, cell=cell), make(push=0.3, cell=cell)
    (together(x_BT, cond=Cond(cond.start_B, first_BT)) * weight_BT).sum().backward()
    for b in range(8):
        for begin, end in documents(first_BT, b):
            start = SPEC.bos if first_BT[b, begin] else int(cond.start_B[b])
            out = apart(x_BT[b : b + 1, begin:end], cond=Cond(torch.tensor([start])))
            (out[0] * weight_BT[b, begin:end]).sum().backward()
    for a, b in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)


@CELLS
def test_every_row_starts_at_zero_unless_carried(cell):
    model = make(push=0.3, cell=cell).eval()
    assert isinstance(model, Carries)
    x_BT, cond = rows()
    with torch.no_grad():
        first = model(x_BT, cond=cond)
        assert torch.equal(model(x_BT, cond=cond), first)
        got, state = model.carry(x_BT, cond=cond, state=None)
        torch.testing.assert_close(got, first, atol=1e-6, rtol=0)
        after = Cond(x_BT[:, -1])
        again, _ = model.carry(x_BT, cond=after, state=state)
        assert (again - model(x_BT, cond=after)).abs().max() > 1e-3
        # A state may be used twice, and reads its own last symbol whatever start the row is given.
        twice, _ = model.carry(x_BT, cond=Cond((after.start_B + 1) % 7), state=state)
        assert torch.equal(twice, again)


def test_stream_remembers_what_a_row_of_any_length_would():
    model = make(push=0.3).eval()
    x_BT, cond = rows(T=200)
    with torch.no_grad():
        want = model(x_BT, cond=cond)
    stream, got = model.stream(4, cond=cond), []
    for t in range(200):
        got.append(stream.distribution().log_prob(x_BT[:, t]))
        stream.push(x_BT[:, t])
    torch.testing.assert_close(torch.stack(got, 1), want, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="document"):
        model.stream(4, cond=Cond(cond.start_B, torch.zeros(4, 1, dtype=torch.bool)))
    with pytest.raises(InputError, match="shape"):
        model.stream(3, cond=cond)


# --- dropout, recomputation, precision, counts


def test_locked_dropout_keeps_the_mean():
    torch.manual_seed(0)
    mask = locked_dropout(torch.ones(400, 3, 500), dropout=0.3, cut=None)
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert (mask == 0).float().mean().item() == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("masked", [False, True])
def test_dropout_is_locked_along_each_sequence(masked):
    """A channel of the layer's output is off at all steps of a sequence or at none."""
    model = make(layers=1, input_dropout=0.0, output_dropout=0.5).train()
    x_BT, cond = rows(batch=6, T=10)
    first_BT = torch.zeros(6, 10, dtype=torch.bool)
    if masked:
        first_BT[:, 4] = first_BT[2, 7] = True
    seen = []
    model.embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.manual_seed(3)
    model(x_BT, cond=Cond(cond.start_B, first_BT if masked else None))
    h_BTH = seen[-1]
    assert h_BTH.shape == (6, 10, 12)
    off = h_BTH == 0
    patterns = []
    for b in range(6):
        for begin, end in documents(first_BT, b):
            assert torch.equal(off[b, begin:end], off[b, begin].expand(end - begin, -1))
            patterns.append(tuple(off[b, begin].tolist()))
    assert len(set(patterns)) == len(patterns)  # another draw for every sequence
    assert 0.3 < off.float().mean() < 0.7


@pytest.mark.parametrize("key", ["dropout", "input_dropout", "output_dropout"])
def test_dropout_acts_in_training_only(key):
    model, quiet = make(push=0.3, **{key: 0.5}), make(push=0.3)
    x_BT, cond = rows()
    with torch.no_grad():
        want = quiet.eval()(x_BT, cond=cond)
        assert torch.equal(model.eval()(x_BT, cond=cond), want)
        assert not torch.equal(model.train()(x_BT, cond=cond), want)


@CELLS
@pytest.mark.parametrize("masked", [False, True])
def test_recomputed_activations_change_nothing(cell, masked):
    x_BT, cond = rows(batch=5, T=8)
    if masked:
        cond = Cond(cond.start_B, torch.rand(5, 8, generator=torch.Generator().manual_seed(2)) < 0.3)
    results = []
    for enabled in (False, True):
        model = make(push=0.3, dropout=0.3, cell=cell).train()
        model.checkpoint_activations(enabled)
        torch.manual_seed(4)
        out = model(x_BT, cond=cond)
        out.sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@CELLS
def test_bf16_is_near_fp32_and_answers_in_float32(cell):
    model, half = make(push=0.1, cell=cell), make(push=0.1, cell=cell).bfloat16()
    x_BT, cond = rows(batch=8)
    first_BT = torch.rand(8, 6, generator=torch.Generator().manual_seed(2)) < 0.3
    for c in (cond, Cond(cond.start_B, first_BT)):
        want, got = model(x_BT, cond=c), half(x_BT, cond=c)
        assert got.dtype == torch.float32
        assert 1e-6 < (got - want).abs().max() < 0.1
    got.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in half.parameters())


@CELLS
def test_flops_are_those_of_the_products(cell):
    model = make(cell=cell, embed_width=5, layers=3)
    gates = 4 if cell == "lstm" else 3
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        h = torch.zeros(10, 12)
        for D in (5, 12, 12):  # torch does not count inside its fused layers: their products, written out
            torch.zeros(10, D) @ torch.zeros(D, gates * 12)
            h @ torch.zeros(12, gates * 12)
        h @ torch.zeros(12, 5)
        torch.zeros(10, 5) @ torch.zeros(5, 7)
    assert model.flops_per_symbol(99) == 3 * counter.get_total_flops() / 10


def test_parameter_counts():
    model = make(tied=False, embed_width=5)
    total = sum(p.numel() for p in model.parameters())
    assert model.parameter_counts() == {"total": total, "without_embeddings": total - 7 * 5 - 7 * 12}
    reserved = make(Spec(alphabet=7, context=6, bos=7))
    assert reserved.embed.weight.shape == (8, 12)
    assert reserved.predict(rows()[0], cond=Cond(torch.full((4,), 7))).shape == (4, 6, 7)


def test_it_survives_its_parameters_being_moved():
    """Engines replace `param.data` (flat buffers, gathered pieces): the layer must read what is there at each call."""
    model = make(push=0.3).eval()
    x_BT, cond = rows()
    want = model(x_BT, cond=cond).detach()
    held = {name: p.data.clone() for name, p in model.named_parameters()}
    flat = torch.cat([v.flatten() for v in held.values()])
    at = 0
    for p in model.parameters():
        p.data = flat[at : at + p.numel()].view(p.shape)
        at += p.numel()
    assert torch.equal(model(x_BT, cond=cond), want)
    flat.mul_(0.5)
    assert not torch.equal(model(x_BT, cond=cond), want)
    for name, p in model.named_parameters():
        p.data = torch.empty(0)
        p.data = held[name]
    assert torch.equal(model(x_BT, cond=cond), want)


def test_bad_keys_give_one_line():
    for keys, message in (
        ({"cell": "rnn"}, "cell"),
        ({"heads": 2}, "unknown key 'heads'"),
        ({"width": 0}, "width = 0"),
        ({"dropout": -0.1}, "dropout"),
    ):
        with pytest.raises(ConfigError, match=message):
            models.parse({**BASE, **keys})
