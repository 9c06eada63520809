"""Whole records: drawn by number and seed alone, completed with what is given untouched, scored symbol by symbol."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lmtrain.errors import DivergenceError, InputError
from lmtrain.inference.records import draw, surprisal
from lmtrain.inference.sample import SampleConfig
from lmtrain.protocol import Cond, Model, Spec
from tests.inference.hand_models import Bigram, Pmf

SPEC = Spec(alphabet=4, context=3, bos=3)


class Backwards(Model):
    """p(x_2) p(x_1 | x_2) p(x_0 | x_1) by a table: the model takes a row from its end; one class shifts the table."""

    order = (2, 1, 0)

    def __init__(self) -> None:
        super().__init__()
        draws = torch.Generator().manual_seed(5)
        self.logits_VV = torch.nn.Parameter(2 * torch.randn(4, 4, generator=draws))

    def table(self, label_B: Tensor | None) -> Tensor:
        turn = torch.zeros(1, dtype=torch.int64) if label_B is None else label_B
        return torch.stack([torch.log_softmax(self.logits_VV.roll(int(k), 1), 1) for k in turn])

    def forward(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        before_BT = torch.cat([x_BT[:, 1:], cond.start_B[:, None]], dim=1)
        table_BVV = self.table(cond.label_B).expand(len(x_BT), -1, -1)
        return table_BVV[torch.arange(len(x_BT))[:, None], before_BT, x_BT]

    def stream(self, batch: int, *, cond: Cond):
        model = self

        class Reads:
            last_B = cond.start_B

            def distribution(self) -> Pmf:
                table_BVV = model.table(cond.label_B).expand(batch, -1, -1)
                return Pmf(table_BVV[torch.arange(batch), self.last_B])

            def push(self, x_B: Tensor) -> None:
                self.last_B = x_B

        return Reads()


class Whole(Bigram):
    """Draws whole rows in its own way (protocol.Draws): here, always the same symbol."""

    def draw(self, noise_BN: Tensor, *, cond: Cond) -> Tensor:
        assert noise_BN.shape[1] == 4
        return (noise_BN[:, :1] * 3).long().expand(-1, 3)


def settings(**more):
    return SampleConfig(**{"n": 7, "seed": 3, **more})


def test_a_record_depends_on_seed_and_number_alone():
    model = Bigram(4, seed=1)
    all_NT = draw(model, spec=SPEC, config=settings()).x_NT
    for batch in (1, 2, 5):
        assert np.array_equal(draw(model, spec=SPEC, config=settings(batch=batch)).x_NT, all_NT)
    assert np.array_equal(draw(model, spec=SPEC, config=settings(n=3)).x_NT, all_NT[:3])
    assert not np.array_equal(draw(model, spec=SPEC, config=settings(seed=4)).x_NT, all_NT)
    assert all_NT.dtype == np.int64


@pytest.mark.parametrize("make", [lambda: Bigram(4, seed=1), Backwards])
def test_frequencies_are_the_models(make):
    model = make()
    drawn = draw(model, spec=SPEC, config=settings(n=20_000, batch=4000))
    space_NT = torch.cartesian_prod(*[torch.arange(4)] * 3)
    p_N = model(space_NT, cond=Cond(torch.full((64,), 3))).sum(1).exp().detach().double().numpy()
    cell_N = drawn.x_NT @ np.array([16, 4, 1])
    seen_N = np.bincount(cell_N, minlength=64)
    enough_N = 20_000 * p_N >= 5
    statistic = (((seen_N - 20_000 * p_N) ** 2 / (20_000 * p_N))[enough_N]).sum()
    assert statistic < enough_N.sum() + 5 * math.sqrt(2 * enough_N.sum())


@pytest.mark.parametrize("make", [lambda: Bigram(4, seed=1), Backwards])
def test_what_a_draw_cost_is_what_scoring_says(make):
    model = make()
    drawn = draw(model, spec=SPEC, config=settings())
    assert np.allclose(drawn.nats_NT, surprisal(model, drawn.x_NT, spec=SPEC), atol=1e-5)
    assert np.array_equal(surprisal(model, drawn.x_NT, spec=SPEC, batch=2), surprisal(model, drawn.x_NT, spec=SPEC))


def test_given_symbols_stay_and_those_after_them_follow_from_them():
    model = Bigram(4, seed=1)
    x_NT = np.array([[0, 2, 1]] * 4000)
    given_NT = np.array([[True, True, False]] * 4000)
    done = draw(model, spec=SPEC, config=settings(batch=1000), x_NT=x_NT, given_NT=given_NT)
    assert (done.x_NT[:, :2] == x_NT[:, :2]).all()
    assert (done.nats_NT[:, :2] == 0).all()
    p_V = model.logp_VV[2].exp().detach().numpy()  # after symbol 2
    seen_V = np.bincount(done.x_NT[:, 2], minlength=4) / 4000
    assert np.abs(seen_V - p_V).max() < 5 * math.sqrt(0.25 / 4000)
    # In a model that takes the row from its end, the first symbol is the last to be drawn.
    back = Backwards()
    given_NT = np.array([[False, True, True]] * 4000)
    done = draw(back, spec=SPEC, config=settings(batch=1000), x_NT=x_NT, given_NT=given_NT)
    assert (done.x_NT[:, 1:] == x_NT[:, 1:]).all()
    p_V = torch.softmax(back.logits_VV[2], 0).detach().numpy()
    assert np.abs(np.bincount(done.x_NT[:, 0], minlength=4) / 4000 - p_V).max() < 5 * math.sqrt(0.25 / 4000)


def test_nothing_to_fill_in_changes_nothing():
    x_NT = np.array([[0, 1, 2], [3, 3, 0]])
    done = draw(Bigram(4, seed=1), spec=SPEC, config=settings(), x_NT=x_NT, given_NT=np.ones((2, 3), bool))
    assert np.array_equal(done.x_NT, x_NT)
    assert (done.nats_NT == 0).all()


def test_temperature_zero_takes_the_likeliest():
    model = Bigram(4, seed=1)
    drawn = draw(model, spec=SPEC, config=settings(temperature=0.0))
    x = 3
    for t in range(3):
        x = int(model.logp_VV[x].argmax())
        assert (drawn.x_NT[:, t] == x).all()


def test_classes_reach_the_model():
    spec = Spec(alphabet=4, context=3, bos=3, labels=3)
    label_N = np.array([0, 1, 2, 1, 0, 2, 2])
    drawn = draw(Backwards(), spec=spec, config=settings(), label_N=label_N)
    assert np.allclose(drawn.nats_NT, surprisal(Backwards(), drawn.x_NT, spec=spec, label_N=label_N), atol=1e-5)
    other = draw(Backwards(), spec=spec, config=settings(), label_N=(label_N + 1) % 3)
    assert not np.array_equal(other.x_NT, drawn.x_NT)
    with pytest.raises(InputError, match="label 3 is none of the 3 classes"):
        draw(Backwards(), spec=spec, config=settings(), label_N=label_N + 1)
    with pytest.raises(InputError, match="2 labels were given for 7"):
        draw(Backwards(), spec=spec, config=settings(), label_N=label_N[:2])


def test_a_model_that_draws_whole_rows_does_so_and_completes_none():
    model = Whole(4, seed=1)
    drawn = draw(model, spec=SPEC, config=settings(n=64))
    assert (drawn.x_NT == drawn.x_NT[:, :1]).all()
    assert set(drawn.x_NT[:, 0].tolist()) == {0, 1, 2}
    given_NT = np.array([[True, False, False]] * 2)
    with pytest.raises(InputError, match="Whole mixes orderings"):
        draw(model, spec=SPEC, config=settings(), x_NT=np.zeros((2, 3), np.int64), given_NT=given_NT)
    with pytest.raises(InputError, match="temperature"):
        draw(model, spec=SPEC, config=settings(temperature=0.5))


@pytest.mark.parametrize(
    ("x_NT", "why"),
    [(np.zeros((2, 4), np.int64), "records of 3 symbols"), (np.full((2, 3), 4), "symbol 4; the alphabet is 0 to 3")],
)
def test_records_that_do_not_fit_are_refused(x_NT, why):
    with pytest.raises(InputError, match=why):
        surprisal(Bigram(4, seed=1), x_NT, spec=SPEC)


def test_probabilities_that_are_not_numbers_are_told():
    model = Bigram(4, seed=1)
    with torch.no_grad():
        model.logp_VV[0] = torch.nan
    with pytest.raises(DivergenceError):
        draw(model, spec=SPEC, config=settings(n=200))


def test_reals_are_not_bent():
    with pytest.raises(InputError, match="density of reals"):
        draw(Bigram(4, seed=1), spec=Spec(alphabet=0, context=3, bos=0), config=settings(top_k=2))
