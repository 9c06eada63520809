"""What every model must satisfy, whatever it is made of. Cases: tests/laws/cases.py.

B rows, T symbols of a row, V symbols of the alphabet, N outcomes of the enumerated space.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lmtrain.errors import LmtrainError
from lmtrain.nn.head import Categorical
from lmtrain.nn.stream import RecomputingStream
from lmtrain.protocol import Carries, Cond, Distribution, Model
from tests.laws.cases import CONFIGS, Case, cases

CASES = cases()
TEXT = [case for case in CASES if case.spec.bos < case.spec.alphabet]
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_text = pytest.mark.parametrize("case", TEXT, ids=lambda case: case.name)


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logp(model: Model, x_BT: Tensor, cond: Cond) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(x_BT, cond=cond)
    return out


def predict(model: Model, x_BT: Tensor, cond: Cond) -> Tensor:
    with torch.no_grad():
        return model.predict(x_BT, cond=cond)


def train(model: Model, x_BT: Tensor, cond: Cond, *, steps: int, lr: float) -> float:
    """Adam on one batch, the rate falling to zero over the last two thirds; nats a row in the end."""
    model.train()
    adam = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / 10, 1.5 * (1 - step / steps))
        adam.zero_grad()
        loss = -model(x_BT, cond=cond).sum() / x_BT.shape[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
    model.eval()
    return -logp(model, x_BT, cond).sum().item() / x_BT.shape[0]


def test_every_kind_is_enrolled_by_a_config():
    from lmtrain import models

    with_laws = {case.model["kind"] for case in CASES if any(CONFIGS.glob(f"{case.name.rsplit('-', 1)[0]}.yaml"))}
    assert with_laws == set(models.kinds())


@every
def test_probabilities_sum_to_one(case: Case):
    model, x_NT = case.build(), case.outcomes()
    for start in case.starts():
        cond = Cond(torch.full((len(x_NT),), start))
        p_N = logp(model, x_NT, cond).double().sum(1).exp()
        assert abs(p_N.sum().item() - 1.0) < 1e-5
        # Not by being uniform, which any error would leave in place.
        assert p_N.max() / p_N.min() > 5.0


@every
def test_log_probabilities_are_those_of_predict(case: Case):
    model = case.build()
    x_BT, cond = case.rows(64, seed=1)
    out_BT = logp(model, x_BT, cond)
    assert out_BT.dtype == torch.float32
    assert out_BT.shape == x_BT.shape
    for t in range(case.spec.context):
        distribution = model.distribution(predict(model, x_BT, cond)[:, t])
        torch.testing.assert_close(distribution.log_prob(x_BT[:, t]), out_BT[:, t], atol=1e-5, rtol=0)


def chi_square(count_N: np.ndarray, p_N: np.ndarray) -> float:
    """p-value of counts under probabilities; cells that expect fewer than 5 are pooled."""
    draws = count_N.sum()
    expected_N = p_N / p_N.sum() * draws
    small_N = expected_N < 5.0
    counts, expected = count_N[~small_N], expected_N[~small_N]
    if expected_N[small_N].sum() > 0:
        counts = np.append(counts, count_N[small_N].sum())
        expected = np.append(expected, expected_N[small_N].sum())
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    return torch.special.gammaincc(
        torch.tensor(freedom / 2, dtype=torch.float64), torch.tensor(statistic / 2, dtype=torch.float64)
    ).item()


def test_chi_square_is_the_tail_of_its_distribution():
    # Two cells: the statistic is a squared normal. 60 heads of 100: z = 2, two-sided p = 0.0455.
    assert chi_square(np.array([60, 40]), np.array([0.5, 0.5])) == pytest.approx(0.0455003, abs=1e-6)
    # Tail of 3.841 with one degree of freedom is 5 %, of 11.070 with five degrees 5 %.
    for freedom, critical in ((1, 3.841459), (5, 11.070498)):
        cells = freedom + 1
        expected = np.full(cells, 100.0)
        shift = math.sqrt(critical * 100.0 / 2)
        count = expected + np.array([shift, -shift] + [0.0] * (cells - 2))
        assert chi_square(count, expected / expected.sum()) == pytest.approx(0.05, abs=1e-6)


def sample_p_value(case: Case, model: Model, pick: Callable[[Distribution, Tensor, int], Tensor]) -> float:
    """p-value of 10,000 rows drawn by a stream, against exp(log p) of all outcomes."""
    B, V, T = 10_000, case.spec.alphabet, case.spec.context
    start = case.starts()[0]
    cond = Cond(torch.full((B,), start))
    noise_BT = torch.from_numpy(np.random.default_rng(7).random((B, T)))
    stream = model.stream(B, cond=cond)
    cell_B = torch.zeros(B, dtype=torch.int64)
    for t in range(T):
        x_B = pick(stream.distribution(), noise_BT[:, t], t)
        stream.push(x_B)
        cell_B = cell_B * V + x_B
    x_NT = case.outcomes()
    p_N = logp(model, x_NT, Cond(torch.full((len(x_NT),), start))).double().sum(1).exp().numpy()
    return chi_square(np.bincount(cell_B.numpy(), minlength=len(p_N)), p_N)


@every
def test_sampler_agrees_with_its_probabilities_and_a_wrong_one_does_not(case: Case):
    model = case.build()
    assert sample_p_value(case, model, lambda d, noise_B, _: d.sample(noise_B)) > 1e-4

    def warm(d: Distribution, noise_B: Tensor, _: int) -> Tensor:
        return Categorical(d.log_pmf() / 1.2).sample(noise_B)

    assert sample_p_value(case, model, warm) < 1e-4
    first: list[Distribution] = []

    def forgetful(d: Distribution, noise_B: Tensor, t: int) -> Tensor:
        first.append(d)
        return first[0 if t == 0 else 1].sample(noise_B)

    assert sample_p_value(case, model, forgetful) < 1e-4


@every
def test_the_future_changes_nothing(case: Case):
    model = case.build()
    x_BT, cond = case.rows(16, seed=2)
    params, scored = predict(model, x_BT, cond), logp(model, x_BT, cond)
    for s in range(case.spec.context):
        other_BT = x_BT.clone()
        other_BT[:, s] = (other_BT[:, s] + 1) % case.spec.alphabet
        assert torch.equal(predict(model, other_BT, cond)[:, : s + 1], params[:, : s + 1])
        assert torch.equal(logp(model, other_BT, cond)[:, :s], scored[:, :s])


@every
def test_after_five_steps_every_symbol_but_the_last_matters_later(case: Case):
    model = case.build(push=0.0)  # from the model's own first values, zeros among them
    x_BT, cond = case.rows(16, seed=3)
    train(model, x_BT, cond, steps=5, lr=1e-2)
    params = predict(model, x_BT, cond)
    for s in range(case.spec.context - 1):
        other_BT = x_BT.clone()
        other_BT[:, s] = (other_BT[:, s] + 1) % case.spec.alphabet
        assert not torch.equal(predict(model, other_BT, cond)[:, s + 1 :], params[:, s + 1 :])


@every
def test_the_start_symbol_matters(case: Case):
    if len(case.starts()) == 1:
        pytest.skip("records have one start")
    model = case.build()
    x_BT, cond = case.rows(16, seed=4)
    other = Cond((cond.start_B + 1) % case.spec.alphabet)
    assert not torch.equal(predict(model, x_BT, other)[:, 0], predict(model, x_BT, cond)[:, 0])


@every
def test_stream_is_forward(case: Case):
    model = case.build()
    x_BT, cond = case.rows(8, seed=5)
    pmf_BTV = torch.log_softmax(predict(model, x_BT, cond), dim=-1)
    streams = [model.stream(8, cond=cond), RecomputingStream(model, 8, cond=cond)]
    for stream in streams:
        for t in range(case.spec.context):
            got = stream.distribution()
            torch.testing.assert_close(got.log_pmf(), pmf_BTV[:, t], atol=1e-5, rtol=0)
            torch.testing.assert_close(got.log_prob(x_BT[:, t]), pmf_BTV[:, t].gather(1, x_BT[:, t : t + 1])[:, 0],
                                       atol=1e-5, rtol=0)  # fmt: skip
            assert got.log_pmf().dtype == torch.float32
            stream.push(x_BT[:, t])
    # Pushes that nobody asks about in between are the same.
    for asked in range(case.spec.context):
        stream = model.stream(8, cond=cond)
        for t in range(asked):
            stream.push(x_BT[:, t])
        torch.testing.assert_close(stream.distribution().log_pmf(), pmf_BTV[:, asked], atol=1e-5, rtol=0)


@every
def test_a_stream_refuses_to_read_past_its_context(case: Case):
    model = case.build()
    x_BT, cond = case.rows(2, seed=6)
    for stream in (model.stream(2, cond=cond), RecomputingStream(model, 2, cond=cond)):
        if model.context is None:
            for _ in range(3 * case.spec.context):
                stream.push(x_BT[:, 0])
            assert torch.isfinite(stream.distribution().log_pmf()).all()
            continue
        for _ in range(model.context):
            stream.distribution()
            stream.push(x_BT[:, 0])
        with pytest.raises(LmtrainError, match="context"):
            stream.distribution()
        with pytest.raises(LmtrainError, match="context"):
            stream.push(x_BT[:, 0])


@every
def test_one_batch_can_be_overfitted(case: Case):
    model = case.build(push=0.0)
    x_BT, cond = case.rows(100, seed=8)
    # A network that knows no absolute position cannot count how often its first input is repeated (models/gpt.py).
    six = (x_BT[:, 0] != cond.start_B).nonzero()[:6, 0]
    x_BT, cond = x_BT[six], Cond(cond.start_B[six])
    starts, rows = cond.start_B.tolist(), [tuple(row) for row in x_BT.tolist()]
    of_start, of_row = Counter(starts), Counter(zip(starts, rows, strict=True))
    # Rows that share a start cannot be told apart at first: the entropy of rows given starts is the floor.
    floor = sum(math.log(of_start[s] / of_row[s, r]) for s, r in zip(starts, rows, strict=True)) / len(rows)
    reached = train(model, x_BT, cond, steps=150, lr=1e-2)
    assert floor - 1e-4 < reached < floor + 0.1


@every
def test_saved_and_loaded_it_is_the_same(case: Case, tmp_path: Path):
    model = case.build(seed=0)
    x_BT, cond = case.rows(8, seed=9)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = case.build(seed=1)
    assert not torch.equal(logp(other, x_BT, cond), logp(model, x_BT, cond))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logp(other, x_BT, cond), logp(model, x_BT, cond))


@every
def test_a_row_does_not_know_its_neighbours(case: Case):
    model = case.build()
    x_BT, cond = case.rows(8, seed=10)
    together = logp(model, x_BT, cond)
    for b in range(8):
        alone = logp(model, x_BT[b : b + 1], Cond(cond.start_B[b : b + 1]))
        torch.testing.assert_close(alone[0], together[b], atol=1e-5, rtol=0)


@every_text
def test_a_masked_row_is_each_document_alone(case: Case):
    model = case.build()
    B, T, bos = 32, case.spec.context, case.spec.bos
    x_BT, cond = case.rows(B, seed=11)
    first_BT = torch.from_numpy(np.random.default_rng(12).random((B, T)) < 0.35)
    first_BT[0], first_BT[1] = False, True
    masked = logp(model, x_BT, Cond(cond.start_B, first_BT))
    for b in range(B):
        cuts = [0, *(t for t in range(1, T) if first_BT[b, t]), T]
        for begin, end in pairwise(cuts):
            start = bos if first_BT[b, begin] else int(cond.start_B[b])
            alone = logp(model, x_BT[b : b + 1, begin:end], Cond(torch.tensor([start])))
            torch.testing.assert_close(alone[0], masked[b, begin:end], atol=1e-5, rtol=0)
    # The cut is felt where a document ends inside the row with the end symbol, as in a corpus.
    x_BT[:, 1], first_BT[:] = bos, False
    first_BT[:, 2] = True
    cut, uncut = logp(model, x_BT, Cond(cond.start_B, first_BT)), logp(model, x_BT, cond)
    torch.testing.assert_close(cut[:, :2], uncut[:, :2], atol=1e-5, rtol=0)
    assert ((cut[:, 2:] - uncut[:, 2:]).abs() > 1e-3).any()


@every_text
def test_masking_keeps_the_gradient_inside_the_document(case: Case):
    """What is not attended to gets exactly no gradient: a later document's loss does not reach an earlier one."""
    model = case.build()
    x_BT, cond = case.rows(4, seed=13)
    first_BT = torch.zeros_like(x_BT, dtype=torch.bool)
    first_BT[:, 2] = True
    for s in range(2):
        other_BT = x_BT.clone()
        other_BT[:, s] = (other_BT[:, s] + 1) % case.spec.alphabet
        masked = Cond(cond.start_B, first_BT)
        assert torch.equal(predict(model, other_BT, masked)[:, 2:], predict(model, x_BT, masked)[:, 2:])


@every_text
def test_carried_rows_are_one_long_row(case: Case):
    model = case.build()
    if not isinstance(model, Carries):
        pytest.skip("the model carries no state")
    B, T = 4, case.spec.context
    rows = [case.rows(B, seed=20 + i)[0] for i in range(4)]
    start_B = case.rows(B, seed=20)[1].start_B
    long = logp(model, torch.cat(rows, dim=1), Cond(start_B))
    state = None
    for i, x_BT in enumerate(rows):
        with torch.no_grad():
            got, state = model.carry(x_BT, cond=Cond(start_B), state=state)
        torch.testing.assert_close(got, long[:, i * T : (i + 1) * T], atol=1e-5, rtol=0)
        start_B = x_BT[:, -1]
    # With documents that begin inside rows, at their first symbol, and nowhere.
    first_BT = torch.from_numpy(np.random.default_rng(14).random((B, 4 * T)) < 0.15)
    first_BT[0, T], first_BT[1] = True, False
    start_B = case.rows(B, seed=20)[1].start_B
    long, state = logp(model, torch.cat(rows, dim=1), Cond(start_B, first_BT)), None
    for i, x_BT in enumerate(rows):
        here = slice(i * T, (i + 1) * T)
        with torch.no_grad():
            got, state = model.carry(x_BT, cond=Cond(start_B, first_BT[:, here]), state=state)
        torch.testing.assert_close(got, long[:, here], atol=1e-5, rtol=0)
        start_B = x_BT[:, -1]
