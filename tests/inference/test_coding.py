"""Coding under models: exact for every model that streams, as long as the model's own NLL says, astray by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain import models
from lmtrain.errors import EngineError, InputError
from lmtrain.inference.coding import START, Coded, Layout, Reading, check, decode, encode, repeatable
from lmtrain.inference.reopen import Plan, log_probs
from lmtrain.protocol import LN2, Distribution, Model, Spec, Stream
from tests.inference.hand_models import Fading, Pmf

MODELS: dict[str, tuple[dict, Spec]] = {
    "gpt": ({"kind": "gpt", "layers": 1, "width": 16, "heads": 2}, Spec(257, 8, 256)),
    "rnn": ({"kind": "rnn", "layers": 1, "width": 16}, Spec(257, 8, 256)),
    "gated_pixelcnn": (
        {
            "kind": "gated_pixelcnn",
            "layers": 2,
            "width": 8,
            "head_width": 12,
            "first_kernel": 3,
            "conditional": True,
        },
        Spec(5, 18, 5, grid=(3, 2, 3), labels=3),
    ),
    "made": ({"kind": "made", "width": 24, "ordering": "drawn"}, Spec(2, 7, 2)),
}


def made(name: str) -> tuple[Model, Spec]:
    tree, spec = MODELS[name]
    torch.manual_seed(0)
    model = models.build(models.parse(tree), spec)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape), alpha=0.4)
    return model, spec


def back_and_forth(model: Model, x_UD: np.ndarray, *, layout: Layout, reading: Reading) -> Coded:
    coded = encode(model, x_UD, layout=layout, reading=reading)
    assert len(coded.blocks) == layout.blocks
    assert np.array_equal(decode(model, coded.blocks, coded.state_B, layout=layout, reading=reading), x_UD)
    assert coded.table_bits - 1e-6 <= coded.payload_bits <= coded.table_bits + 96 * layout.lanes
    return coded


@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 9), st.integers(1, 12))
@settings(max_examples=60, deadline=None)
def test_every_unit_has_its_place(units: int, size: int, lanes: int, block: int) -> None:
    layout = Layout(units, size, lanes, block)
    x_UD = np.arange(1, units * size + 1).reshape(units, size)
    x_TB = layout.deal(x_UD)
    assert x_TB.shape == (layout.steps, lanes)
    assert np.array_equal(layout.gather(x_TB), x_UD)
    for step, x_B in enumerate(x_TB):
        assert (x_B[: layout.active(step)] > 0).all()
        assert (x_B[layout.active(step) :] == 0).all()
    for b in range(lanes):  # a lane is a run of what was given
        held = x_TB[:, b][x_TB[:, b] > 0]
        assert (np.diff(held) == 1).all()
    assert [step for n in range(layout.blocks) for step in layout.block_steps(n)] == list(range(layout.steps))


@pytest.mark.parametrize("name", ["gpt", "rnn"])
@pytest.mark.parametrize(("lanes", "block", "stride"), [(1, 1000, 8), (3, 5, 4), (7, 1, 1)])
def test_texts_longer_than_the_context(name: str, lanes: int, block: int, stride: int) -> None:
    model, spec = made(name)
    x_UD = np.random.default_rng(lanes).integers(256, size=(50, 1))
    plan = None if model.context is None else Plan(spec.context, stride)
    layout = Layout(50, 1, lanes, block)
    coded = back_and_forth(model, x_UD, layout=layout, reading=Reading(spec.bos, plan))
    # The lanes' log-probabilities from the other function that reads through streams.
    x_BT = torch.from_numpy(layout.deal(x_UD).T.copy())
    with repeatable(model):
        logp_BT = log_probs(model, x_BT, start_B=torch.full((lanes,), spec.bos), plan=plan)
    counted = np.array([[step < -(-(50 - b) // lanes) for step in range(layout.steps)] for b in range(lanes)])
    assert coded.float_bits == pytest.approx(-float(logp_BT.numpy()[counted].sum()) / LN2, rel=1e-5)
    assert coded.table_bits == pytest.approx(coded.float_bits, rel=1e-4)


@pytest.mark.parametrize("name", ["gated_pixelcnn", "made"])
@pytest.mark.parametrize(("records", "lanes"), [(1, 1), (5, 2), (4, 4)])
def test_records_in_the_order_of_the_model(name: str, records: int, lanes: int) -> None:
    model, spec = made(name)
    x_UD = np.random.default_rng(records).integers(spec.alphabet, size=(records, spec.context))
    label = 1 if spec.labels else None
    reading = Reading(spec.bos, record=True, label=label)
    coded = back_and_forth(model, x_UD, layout=Layout(records, spec.context, lanes, 10), reading=reading)
    from lmtrain.inference.records import surprisal

    label_N = None if label is None else np.full(records, label)
    nats = surprisal(model, x_UD, spec=spec, label_N=label_N).sum()
    assert coded.float_bits == pytest.approx(nats / LN2, rel=1e-5)


def test_nothing_at_all() -> None:
    model, spec = made("gpt")
    layout = Layout(0, 1, 1, 10)
    coded = encode(model, np.zeros((0, 1), np.int64), layout=layout, reading=Reading(spec.bos, Plan(8, 4)))
    assert (coded.blocks, coded.float_bits, coded.table_bits) == ((), 0.0, 0.0)
    assert (coded.state_B == START).all()
    assert decode(model, [], coded.state_B, layout=layout, reading=Reading(spec.bos, Plan(8, 4))).shape == (0, 1)


class Constant(Model):
    """One distribution for ever."""

    def __init__(self, logp_V: torch.Tensor) -> None:
        super().__init__()
        self.logp_V = logp_V

    def stream(self, batch: int, *, cond: object) -> Stream:
        return _ConstantStream(self.logp_V.expand(batch, -1))


class _ConstantStream(Stream):
    def __init__(self, logp_BV: torch.Tensor) -> None:
        self.logp_BV = logp_BV

    def distribution(self) -> Distribution:
        return Pmf(self.logp_BV)

    def push(self, x_B: torch.Tensor) -> None:
        pass


@pytest.mark.parametrize("V", [256, 32_000])
def test_the_tables_cost_less_than_a_ten_thousandth(V: int) -> None:
    """Of symbols drawn from a model's own conditional distributions, as held-out text is for a good model."""
    model = Fading(V, seed=1, bos=0, fade=0.5)
    with torch.no_grad():
        model.W_VD.mul_(3)
    draw, logp_BV = torch.Generator().manual_seed(0), None
    stream, out = model.stream(1, cond=type("C", (), {"start_B": torch.tensor([0])})), []
    with torch.no_grad():
        for _ in range(150):
            logp_BV = stream.distribution().log_pmf()
            out.append(int(torch.multinomial(logp_BV.exp()[0], 1, generator=draw)))
            stream.push(torch.tensor(out[-1:]))
    layout = Layout(150, 1, 1, 100)
    coded = back_and_forth(model, np.array(out)[:, None], layout=layout, reading=Reading(0))
    assert abs(coded.table_bits / coded.float_bits - 1) <= 1e-4


@pytest.mark.parametrize("V", [2, 256, 32_000])
def test_what_is_certain_costs_next_to_nothing(V: int) -> None:
    logp_V = torch.full((V,), -torch.inf)
    logp_V[1] = 0.0
    x_UD = np.ones((100, 1), np.int64)
    coded = back_and_forth(Constant(logp_V), x_UD, layout=Layout(100, 1, 2, 20), reading=Reading(0))
    assert coded.float_bits == 0
    assert coded.table_bits / 100 <= 1e-4
    x_UD[7] = 0  # impossible, and coded all the same
    wrong = back_and_forth(Constant(logp_V), x_UD, layout=Layout(100, 1, 2, 20), reading=Reading(0))
    assert np.isinf(wrong.float_bits)
    assert wrong.table_bits < 31


def test_another_model_is_found_out_at_a_block() -> None:
    model, spec = made("gpt")
    x_UD = np.random.default_rng(0).integers(256, size=(60, 1))
    layout, reading = Layout(60, 1, 2, 10), Reading(spec.bos, Plan(8, 4))
    coded = encode(model, x_UD, layout=layout, reading=reading)
    with torch.no_grad():
        next(iter(model.parameters())).add_(1e-2)
    with pytest.raises(EngineError, match=r"block \d of 3: .*(ran out|left over|where it began)"):
        decode(model, coded.blocks, coded.state_B, layout=layout, reading=reading)


def test_the_coder_sets_and_restores_what_it_needs() -> None:
    model, _ = made("rnn")
    model.train()
    torch.set_num_threads(2)
    try:
        with repeatable(model):
            assert torch.get_num_threads() == 1
            assert not model.training
            assert not torch.is_grad_enabled()
        assert torch.get_num_threads() == 2
        assert model.training
    finally:
        torch.set_num_threads(1)
    with pytest.raises(InputError, match="bfloat16"), repeatable(model.bfloat16()):
        pass


def test_models_that_cannot_code_say_why() -> None:
    model, _ = made("made")
    with pytest.raises(InputError, match="density of real numbers"):
        check(model, alphabet=0)
    tree, spec = MODELS["made"]
    mixture = models.build(models.parse({**tree, "masks": 2}), spec)
    with pytest.raises(InputError, match="mixes orderings"):
        check(mixture, alphabet=2)
