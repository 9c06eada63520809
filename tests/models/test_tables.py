"""Models of whole records against plain numpy loops over their papers' equations; what others got wrong; refusals."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from lmtrain import models
from lmtrain.errors import ConfigError, InputError
from lmtrain.protocol import Cond, Draws, Spec
from tests.laws.law import chi_square

D = 6
BITS = Spec(alphabet=2, context=D, bos=2, labels=3)
REALS = Spec(alphabet=0, context=D, bos=0, labels=3)


def build(tree, spec=BITS, *, push=0.5, seed=0):
    torch.manual_seed(seed)
    model = models.build(models.parse(tree), spec)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape), alpha=push)
    return model.eval()


def weights(model):
    return {name: p.detach().double().numpy() for name, p in model.named_parameters()}


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def bits_and_cond(n=16, *, labels=True):
    draw = np.random.default_rng(1)
    label_B = torch.from_numpy(draw.integers(3, size=n)) if labels else None
    return torch.from_numpy(draw.integers(2, size=(n, D))), Cond(torch.full((n,), 2), None, label_B)


def all_bits():
    return torch.cartesian_prod(*[torch.arange(2)] * D)


@torch.no_grad()
def test_fvsbn_is_a_chain_of_logistic_regressions():
    model = build({"kind": "fvsbn", "conditional": True})
    w, (x, cond) = weights(model), bits_and_cond()
    out = model(x, cond=cond)
    for b in range(len(x)):
        row, label = x[b].numpy(), int(cond.label_B[b])
        for d in range(D):
            z = w["matrix.bias"][d] + w["label_embed.weight"][label, d]
            z += sum(w["matrix.weight"][d, j] * row[j] for j in range(d))
            p = sigmoid(z)
            assert out[b, d].item() == pytest.approx(math.log(p if row[d] else 1 - p), abs=1e-5)


@torch.no_grad()
def test_nade_is_its_equations():
    model = build({"kind": "nade", "width": 9, "conditional": True})
    w, (x, cond) = weights(model), bits_and_cond()
    out = model(x, cond=cond)
    for b in range(len(x)):
        row = x[b].numpy()
        a = w["hidden.bias"] + w["label_embed.weight"][int(cond.label_B[b])]
        for d in range(D):
            p = sigmoid(w["hidden.out_bias"][d] + w["hidden.out_weight"][d, 0] @ sigmoid(a))
            assert out[b, d].item() == pytest.approx(math.log(p if row[d] else 1 - p), abs=1e-5)
            a = a + w["hidden.weight"][d] * row[d]


@torch.no_grad()
@pytest.mark.parametrize("head", ["gaussians", "logistics"])
def test_rnade_is_its_equations(head):
    K = 3
    tree = {"kind": "rnade", "width": 9, "components": K, "head": head, "conditional": True}
    model = build(tree, REALS, push=0.2)
    w = weights(model)
    x, cond = torch.randn(16, D), Cond(torch.zeros(16, dtype=torch.int64), None, bits_and_cond()[1].label_B)
    out = model(x, cond=cond)
    for b in range(len(x)):
        a = w["hidden.bias"] + w["label_embed.weight"][int(cond.label_B[b])]
        for d in range(D):
            h = np.maximum(0, w["hidden.scale"][d] * a)
            y = w["hidden.out_bias"].reshape(D, K, 3)[d] + (w["hidden.out_weight"][d] @ h).reshape(K, 3)
            share, mean, scale = np.exp(y[:, 0]) / np.exp(y[:, 0]).sum(), y[:, 1], np.exp(y[:, 2])
            z = (float(x[b, d]) - mean) / scale
            if head == "gaussians":
                density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
            else:
                density = sigmoid(z) * sigmoid(-z)
            assert out[b, d].item() == pytest.approx(math.log((share * density / scale).sum()), abs=1e-4)
            a = a + w["hidden.weight"][d] * float(x[b, d])


def made_joint(model, w, x, label, m):
    """log p of each bit under mask m, by explicit mask matrices."""
    read = np.asarray(x, dtype=float)
    h = read
    for i, layer in enumerate(model.layers):
        into, start = layer.into_MO[m].numpy() - 1, layer.from_MI[m].numpy()
        mask = into[:, None] >= start[None]
        h = (w[f"layers.{i}.weight"] * mask) @ h + w[f"layers.{i}.bias"]
        if i == 0:
            h = h + w["label_embed.weight"][label]
        h = np.maximum(h, 0)
    into, start = model.out.into_MO[m].numpy(), model.out.from_MI[m].numpy()
    z = (w["out.weight"] * (into[:, None] > start[None])) @ h + w["out.bias"] + w["label_embed_out.weight"][label]
    order = model.direct.into_MO[m].numpy()
    z = z + (w["direct.weight"] * (order[:, None] > order[None])) @ read
    return np.where(read > 0, -np.log1p(np.exp(-z)), -np.log1p(np.exp(z)))


MADE = {"kind": "made", "width": 17, "layers": 2, "direct": True, "conditional": True, "ordering": "drawn"}


@torch.no_grad()
def test_made_is_its_equations():
    model = build(MADE)
    w, (x, cond) = weights(model), bits_and_cond()
    assert sorted(model.order) == list(range(D))
    assert model.order != tuple(range(D))
    out = model(x, cond=cond)
    for b in range(len(x)):
        want = made_joint(model, w, x[b].numpy(), int(cond.label_B[b]), 0)
        np.testing.assert_allclose(out[b].numpy(), want, atol=1e-5)


@torch.no_grad()
def test_an_ensemble_is_the_mixture_of_its_joints():
    """Averaging logits instead, as some do, gives no distribution at all: shown beside it."""
    model = build(MADE | {"masks": 4, "orderings": "each"}, push=1.5)
    assert isinstance(model, Draws)
    assert not isinstance(build(MADE), Draws)
    assert model.order is None
    w, x = weights(model), all_bits()
    cond = Cond(torch.full((len(x),), 2), None, torch.ones(len(x), dtype=torch.int64))
    parts = np.array([[made_joint(model, w, row, 1, m).sum() for row in x.numpy()] for m in range(4)])
    out = model(x, cond=cond)
    assert (out[:, :-1] == 0).all()
    np.testing.assert_allclose(out[:, -1].numpy(), np.logaddexp.reduce(parts, axis=0) - math.log(4), atol=1e-5)
    assert out[:, -1].double().exp().sum().item() == pytest.approx(1, abs=1e-5)
    logits = torch.stack([model(x, cond=cond, member_B=torch.full((len(x),), m)) for m in range(4)]).mean(dim=0)
    averaged = torch.nn.functional.logsigmoid(torch.where(x.bool(), logits, -logits)).sum(dim=1)
    assert abs(averaged.double().exp().sum().item() - 1) > 1e-2
    for refused in (lambda: model.predict(x, cond=cond), lambda: model.stream(1, cond=cond)):
        with pytest.raises(InputError, match=r"model\.masks = 1"):
            refused()


def test_an_ensemble_trains_one_mask_a_call_by_torchs_noise():
    model = build(MADE | {"masks": 5, "orderings": "each", "conditional": False, "direct": False}).train()
    x, cond = bits_and_cond(labels=False)
    x = x[:4]
    cond = Cond(cond.start_B[:4])
    alone = [model._log_prob(model(x, cond=cond, member_B=torch.full((4,), m)), x) for m in range(5)]
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        out = model(x, cond=cond)
        which = [m for m in range(5) if torch.allclose(out, alone[m], atol=1e-6)]
        assert len(which) == 1
        seen.add(which[0])
        torch.manual_seed(seed)
        assert torch.equal(model(x, cond=cond), out)
    assert seen == set(range(5))


def test_training_one_mask_leaves_the_weights_outside_of_it(monkeypatch):
    """`weight.data *= mask` would destroy what the other masks have learned."""
    model = build(MADE | {"masks": 2, "orderings": "each", "conditional": False}).train()
    x, cond = bits_and_cond(labels=False)
    layers = {"layers.0": model.layers[0], "layers.1": model.layers[1], "out": model.out, "direct": model.direct}
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for m in (0, 1, 0):
        monkeypatch.setattr(torch, "randint", lambda *_, m=m, **__: torch.tensor(m))
        before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
        sgd.zero_grad()
        (-model(x, cond=cond).sum()).backward()
        sgd.step()
        for name, layer in layers.items():
            mask = layer.into_MO[m][:, None] > layer.from_MI[m][None]
            moved = layer.weight.detach() != before[name]
            assert not moved[~mask].any(), name
            assert moved[mask].any(), name
            assert (~mask).any()
            assert (layer.weight.detach()[~mask] != 0).all(), "pushed away from zero, and still there"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["nade", "fvsbn", "made"])
def test_a_second_sigmoid_is_noticed(kind, monkeypatch):
    """p = sigmoid(sigmoid(z)) sums to one like any; what is drawn from the right one does not follow it."""
    model = build({"kind": kind} | ({} if kind == "fvsbn" else {"width": 12}))
    x, n = all_bits(), 10_000
    noise, stream = np.random.default_rng(5).random((n, D)), model.stream(n, cond=Cond(torch.full((n,), 2)))
    cell = np.zeros(n, dtype=int)
    for t in range(D):
        drawn = stream.distribution().sample(torch.from_numpy(noise[:, t]))
        stream.push(drawn)
        cell = 2 * cell + drawn.numpy()
    cond = Cond(torch.full((len(x),), 2))
    count = np.bincount(cell, minlength=2**D)
    right = model(x, cond=cond).double().sum(dim=1).exp().numpy()
    assert chi_square(count, right) > 1e-4
    twice = torch.sigmoid(model.predict(x, cond=cond))
    wrong = torch.nn.functional.logsigmoid(torch.where(x.bool(), twice, -twice)).double().sum(dim=1).exp().numpy()
    assert wrong.sum() == pytest.approx(1, abs=1e-5)
    assert chi_square(count, wrong) < 1e-4


@pytest.mark.parametrize("kind", ["fvsbn", "nade", "made", "rnade"])
def test_what_cannot_be_read_is_refused_in_one_line(kind):
    own = REALS if kind == "rnade" else BITS
    text = Spec(alphabet=2, context=D, bos=1)
    other = {"rnade": BITS, "made": REALS}.get(kind, Spec(alphabet=17, context=D, bos=17))
    bare = Spec(alphabet=own.alphabet, context=D, bos=own.bos)
    build({"kind": kind}, own)
    for spec, tree, words in (
        (text, {}, "the corpus is text"),
        (other, {}, "reads"),
        (bare, {"conditional": True}, "no labels"),
    ):
        with pytest.raises(ConfigError, match=words) as caught:
            build({"kind": kind} | tree, spec)
        assert "\n" not in str(caught.value)


def test_orderings_do_not_change_from_one_version_to_the_next():
    """They are not saved: other numbers would make nonsense of every trained model. By hand from raw Philox."""
    model = build({"kind": "made", "ordering": "drawn", "mask_seed": 11, "width": 4})
    key = np.array([11, 0], dtype=np.uint64)
    assert list(model.order) == np.argsort(np.random.Philox(key=key).random_raw(D), kind="stable").tolist()


def test_work_and_parameters_are_counted():
    H = 10
    for tree, total, work in (
        ({"kind": "fvsbn"}, D * D + D, 6 * D),
        ({"kind": "nade", "width": H}, 2 * D * H + H + D, 12 * H),
        ({"kind": "made", "width": H, "layers": 2}, 2 * D * H + H * H + 2 * H + D, 6 * (2 * D * H + H * H) / D),
    ):
        model = build(tree)
        assert model.parameter_counts()["total"] == total
        assert model.flops_per_symbol(D) == pytest.approx(work)
    model = build({"kind": "rnade", "width": H, "components": 2}, REALS)
    assert model.parameter_counts()["total"] == D * H + H + D + 6 * D * H + 6 * D
    assert model.flops_per_symbol(D) == 6 * H * 7


def test_a_record_costs_nade_its_symbols_times_its_units():
    """O(H D): twice the symbols or twice the units, at most a little more than twice the multiplications."""

    def elements(symbols, units):
        model = models.build(models.parse({"kind": "nade", "width": units}), Spec(alphabet=2, context=symbols, bos=2))
        made = []
        original = torch.Tensor.cumsum

        def counted(self, *a, **k):
            made.append(self.numel())
            return original(self, *a, **k)

        torch.Tensor.cumsum = counted
        try:
            model(torch.zeros(4, symbols, dtype=torch.int64), cond=Cond(torch.full((4,), 2)))
        finally:
            torch.Tensor.cumsum = original
        return sum(made)

    sizes = [elements(64, 16), elements(128, 16), elements(128, 32)]
    assert sizes[0] == 4 * 64 * 16
    for a, b in pairwise(sizes):
        assert b == 2 * a
