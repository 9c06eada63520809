"""What every model must satisfy, whatever it is made of. Cases: tests/laws/cases.py.

B rows, T symbols of a row, V symbols of the alphabet. "Before" and "later" are meant in the model's own order.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lmtrain import models
from lmtrain.protocol import Cond
from tests.laws.cases import Case, cases
from tests.laws.law import logp, predict, train

CASES = cases()
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_step = pytest.mark.parametrize("case", [case for case in CASES if case.steps], ids=lambda case: case.name)
every_colour = pytest.mark.parametrize(
    "case",
    [case for case in CASES if case.steps and case.spec.grid and case.spec.grid[2] > 1],
    ids=lambda case: case.name,
)

every_now_or_later = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[] if case.text or (case.config and not case.spec.grid) else pytest.mark.exhaustive)
        for case in CASES
    ],
    ids=lambda case: case.name,
)
"""The slowest law is left to the full matrix for images and for variants of models of records."""


def test_every_kind_is_enrolled_by_a_config():
    assert {case.model["kind"] for case in CASES if case.config} == set(models.kinds())


@every_step
def test_log_probabilities_are_those_of_predict(case: Case):
    model = case.pushed
    x_BT, cond = case.rows(64, seed=1)
    out_BT = logp(model, x_BT, cond)
    assert out_BT.dtype == torch.float32
    assert out_BT.shape == x_BT.shape
    for t in range(case.spec.context):
        distribution = model.distribution(predict(model, x_BT, cond)[:, t])
        torch.testing.assert_close(distribution.log_prob(x_BT[:, t]), out_BT[:, t], atol=1e-5, rtol=1e-5)


@every_step
def test_the_future_changes_nothing(case: Case):
    model, order = case.pushed, case.order
    x_BT, cond = case.rows(16, seed=2)
    params, scored = predict(model, x_BT, cond), logp(model, x_BT, cond)
    for place, s in enumerate(order):
        other_BT = case.disturbed(x_BT, s)
        assert torch.equal(predict(model, other_BT, cond)[:, order[: place + 1]], params[:, order[: place + 1]])
        assert torch.equal(logp(model, other_BT, cond)[:, order[:place]], scored[:, order[:place]])


@every_step
def test_after_five_steps_every_symbol_but_the_last_matters_later(case: Case):
    model, order = case.build(push=0.0), case.order  # from the model's own first values, zeros among them
    x_BT, cond = case.rows(16, seed=3)
    train(model, x_BT, cond, steps=5, lr=1e-2)
    params = predict(model, x_BT, cond)
    for place, s in enumerate(order[:-1]):
        later = order[place + 1 :]
        assert not torch.equal(predict(model, case.disturbed(x_BT, s), cond)[:, later], params[:, later])


@every_colour
def test_every_channel_matters_to_the_later_ones_of_its_pixel_and_to_the_next_pixel(case: Case):
    H, W, C = case.spec.grid
    model = case.build(push=0.0)
    x_BT, cond = case.rows(16, seed=3)
    train(model, x_BT, cond, steps=5, lr=1e-2)
    params = predict(model, x_BT, cond)
    for pixel in range(H * W):
        for c in range(C):
            changed = predict(model, case.disturbed(x_BT, pixel * C + c), cond)
            for other in range(C):
                same = torch.equal(changed[:, pixel * C + other], params[:, pixel * C + other])
                assert same == (other <= c), f"channel {c} of pixel {pixel}, seen from channel {other}"
            if (pixel + 1) % W:  # the neighbour to the right is seen by every architecture, from its first channel on
                assert not torch.equal(changed[:, (pixel + 1) * C], params[:, (pixel + 1) * C])


@pytest.mark.parametrize("case", [case for case in CASES if case.text], ids=lambda case: case.name)
def test_the_start_symbol_matters(case: Case):
    model = case.pushed
    x_BT, cond = case.rows(16, seed=4)
    other = Cond((cond.start_B + 1) % case.spec.alphabet)
    assert not torch.equal(predict(model, x_BT, other)[:, 0], predict(model, x_BT, cond)[:, 0])


@pytest.mark.parametrize("case", [case for case in CASES if case.spec.labels], ids=lambda case: case.name)
def test_the_label_matters_to_a_conditional_model_alone(case: Case):
    model = case.pushed
    x_BT, cond = case.rows(16, seed=4)
    assert cond.label_B is not None
    other = replace(cond, label_B=(cond.label_B + 1) % case.spec.labels)
    if not case.conditional:
        assert torch.equal(logp(model, x_BT, other), logp(model, x_BT, cond))
        return
    differs_BT = logp(model, x_BT, other) != logp(model, x_BT, cond)
    assert differs_BT.any(dim=1).all()
    if case.steps:  # from the first symbol on
        assert differs_BT[:, case.order[0]].all()


@every_now_or_later
def test_one_batch_can_be_overfitted(case: Case):
    """At one of three rates: a single layer of large weights takes longer steps than a deep network can bear."""
    x_BT, cond = case.rows(100, seed=8)
    # A network that knows no absolute position cannot count how often its first input is repeated (models/gpt.py).
    six = (x_BT[:, 0] != cond.start_B).nonzero()[:6, 0]
    label_B = None if cond.label_B is None else cond.label_B[six]
    x_BT, cond = x_BT[six], Cond(cond.start_B[six], None, label_B)
    if case.real:
        # Better by a nat a symbol than the best independent Gaussians.
        floor = (x_BT.double().std(dim=0, correction=0).log() + 0.5 * math.log(2 * math.pi * math.e)).sum().item()
        assert train(case.build(push=0.0), x_BT, cond, steps=200, lr=2e-2) < floor - case.spec.context
        return
    told_apart = label_B.tolist() if label_B is not None and case.conditional else [0] * len(six)
    begins = list(zip(cond.start_B.tolist(), told_apart, strict=True))
    rows = [tuple(row) for row in x_BT.tolist()]
    of_begin, of_row = Counter(begins), Counter(zip(begins, rows, strict=True))
    # Rows that begin alike cannot be told apart at first: the entropy of rows given their beginnings is the floor.
    floor = sum(math.log(of_begin[b] / of_row[b, r]) for b, r in zip(begins, rows, strict=True)) / len(rows)
    for lr in (1e-2, 1e-1, 5e-1):
        reached = train(case.build(push=0.0), x_BT, cond, steps=150, lr=lr)
        assert floor - 1e-4 < reached
        if reached < floor + 0.1:
            return
    assert reached < floor + 0.1


@every
def test_saved_and_loaded_it_is_the_same(case: Case, tmp_path: Path):
    model = case.pushed
    x_BT, cond = case.rows(8, seed=9)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    other = case.build(seed=1)
    assert not torch.equal(logp(other, x_BT, cond), logp(model, x_BT, cond))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logp(other, x_BT, cond), logp(model, x_BT, cond))


@every
def test_a_row_does_not_know_its_neighbours(case: Case):
    model = case.pushed
    x_BT, cond = case.rows(8, seed=10)
    together = logp(model, x_BT, cond)
    for b in range(8):
        label_B = None if cond.label_B is None else cond.label_B[b : b + 1]
        alone = logp(model, x_BT[b : b + 1], Cond(cond.start_B[b : b + 1], None, label_B))
        torch.testing.assert_close(alone[0], together[b], atol=1e-5, rtol=1e-5)
