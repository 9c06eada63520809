"""Rows of text that several documents share, and state that is carried from row to row."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from lmtrain.protocol import Carries, Cond
from tests.laws.cases import Case, cases
from tests.laws.law import logp, predict

every_text = pytest.mark.parametrize("case", [case for case in cases() if case.text], ids=lambda case: case.name)


@every_text
def test_a_masked_row_is_each_document_alone(case: Case):
    model = case.pushed
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
    model = case.pushed
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
    model = case.pushed
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
