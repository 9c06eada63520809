"""A stream says what forward says, symbol by symbol, whether it remembers or reads the prefix again."""

from __future__ import annotations

import pytest
import torch

from lmtrain.errors import LmtrainError
from lmtrain.nn.stream import RecomputingStream
from tests.laws.cases import Case, cases
from tests.laws.law import predict, says

every = pytest.mark.parametrize("case", [case for case in cases() if case.steps], ids=lambda case: case.name)


def recomputing(case: Case, batch: int, cond) -> RecomputingStream:
    whole = case.whole and case.pushed.context is not None  # a model without bound goes on after a record's end
    return RecomputingStream(case.pushed, batch, cond=cond, length=case.spec.context if whole else None)


@every
def test_stream_is_forward(case: Case):
    model, order, real = case.pushed, case.order, case.real
    x_BT, cond = case.rows(8, seed=5)
    params_BT = predict(model, x_BT, cond)
    answer = [says(model.distribution(params_BT[:, t]), batch=8, real=real) for t in range(case.spec.context)]
    for stream in (model.stream(8, cond=cond), recomputing(case, 8, cond)):
        for t in order:
            got = stream.distribution()
            said = says(got, batch=8, real=real)
            torch.testing.assert_close(said, answer[t], atol=1e-5, rtol=1e-5)
            want = model.distribution(params_BT[:, t]).log_prob(x_BT[:, t])
            torch.testing.assert_close(got.log_prob(x_BT[:, t]), want, atol=1e-5, rtol=1e-5)
            assert said.dtype == torch.float32
            stream.push(x_BT[:, t])
    # Pushes that nobody asks about in between are the same.
    for asked in range(case.spec.context):
        stream = model.stream(8, cond=cond)
        for t in order[:asked]:
            stream.push(x_BT[:, t])
        torch.testing.assert_close(
            says(stream.distribution(), batch=8, real=real), answer[order[asked]], atol=1e-5, rtol=1e-5
        )


@every
def test_a_stream_refuses_to_read_past_its_context(case: Case):
    model = case.pushed
    x_BT, cond = case.rows(2, seed=6)
    for stream in (model.stream(2, cond=cond), recomputing(case, 2, cond)):
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
