"""Streams opened anew at the context's end: the same probabilities as rows cut beforehand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lmtrain import models
from lmtrain.data.memory import MemoryCorpus
from lmtrain.errors import ConfigError
from lmtrain.inference.reopen import Plan, Reopened, log_probs
from lmtrain.inference.score import EvalConfig, evaluate
from lmtrain.protocol import Cond, Model, Spec
from tests.inference.hand_models import Bytes, Fading, fading_nats

PLANS = [(8, 8), (8, 4), (8, 1), (8, 7), (1, 1), (5, 3)]


@pytest.mark.parametrize(("context", "stride"), PLANS)
@pytest.mark.parametrize("symbols", [0, 1, 4, 5, 7, 8, 9, 12, 16, 17, 100])
def test_a_plan_answers_for_every_symbol_once(context: int, stride: int, symbols: int) -> None:
    """Walked as a stream would be: counting inputs, opening on the last k symbols."""
    plan = Plan(context, stride)
    assert plan.reread == context - stride + 1
    rows, begin, read = [], 0, 1  # which opening answers, where it began, how many inputs it has read
    begins = [0]
    for t in range(symbols):
        if read > context:
            begin = t - (plan.reread - 1)
            begins.append(begin)
            read = plan.reread
        rows.append(len(begins) - 1)
        read += 1
    assert plan.rows(symbols) == (len(begins) if symbols else 0)
    assert begins == [row * stride for row in range(len(begins))]
    assert rows == [plan.row_of(t) for t in range(symbols)]
    from_N, to_N = plan.spans(np.arange(plan.rows(symbols)), symbols)
    assert [row for row, (a, b) in enumerate(zip(from_N, to_N, strict=True)) for _ in range(a, b)] == rows


def test_strides_that_do_not_fit() -> None:
    for context, stride in ((8, 9), (8, 0), (0, 0)):
        with pytest.raises(ConfigError):
            Plan(context, stride)


@pytest.mark.parametrize(("context", "stride"), PLANS)
def test_streams_see_what_the_definition_says(context: int, stride: int) -> None:
    """Three texts side by side; the hand-written stream raises if it is given more inputs than the context."""
    model = Fading(20, seed=1, bos=0, context=context)
    x_BT = torch.randint(20, (3, 40), generator=torch.Generator().manual_seed(0))
    start_B = torch.tensor([0, 5, 7])
    found = log_probs(model, x_BT, start_B=start_B, plan=Plan(context, stride))
    for b in range(3):
        line = [int(start_B[b]), *x_BT[b].tolist()]

        def visible(t: int, line: list[int] = line) -> list[int]:
            row = next(j for j in range(100) if t < j * stride + context)
            return line[row * stride : t + 1]

        want = -fading_nats(model, x_BT[b].tolist(), visible=visible)
        np.testing.assert_allclose(found[b].detach().numpy(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("context", "stride"), PLANS)
@pytest.mark.parametrize("length", [0, 1, 4, 5, 8, 9, 31, 40])
def test_reading_a_prompt_is_pushing_it(context: int, stride: int, length: int) -> None:
    """A prompt of any length, read in one go, leaves the stream where symbol-by-symbol pushing leaves it, and after."""
    model = Fading(20, seed=2, bos=0, context=context)
    x_BT = torch.randint(20, (2, 60), generator=torch.Generator().manual_seed(3))
    start_B = torch.tensor([0, 1])
    pushed = Reopened(model, start_B=start_B, plan=Plan(context, stride))
    for t in range(length):
        pushed.push(x_BT[:, t])
    read = Reopened(model, start_B=start_B, plan=Plan(context, stride))
    read.read(x_BT[:, :length])
    for t in range(length, 60):
        torch.testing.assert_close(read.distribution().log_pmf(), pushed.distribution().log_pmf(), rtol=1e-6, atol=1e-6)
        read.push(x_BT[:, t])
        pushed.push(x_BT[:, t])


def test_a_long_prompt_costs_one_window() -> None:
    """Streams that a later opening would forget are not run."""
    opened = []

    class Counting(Fading):
        def stream(self, batch: int, *, cond: Cond) -> Any:
            opened.append(int(cond.start_B[0]))
            return super().stream(batch, cond=cond)

    model = Counting(20, seed=2, bos=0, context=8)
    stream = Reopened(model, start_B=torch.tensor([0]), plan=Plan(8, 4))
    stream.read(torch.randint(20, (1, 10_000)))
    assert len(opened) == 2


def real(kind: str, context: int) -> Model:
    """A small model of ours, moved away from its uniform start."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"gpt": {"layers": 2, "width": 16, "heads": 2}, "rnn": {"layers": 2, "width": 12}}[kind]
    model = models.build(models.parse({"kind": kind, **settings}), Spec(alphabet=257, context=context, bos=256))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return model.eval()


@pytest.mark.parametrize("kind", ["gpt", "rnn"])
@pytest.mark.parametrize("stride", [12, 5, 1])
def test_evaluation_equals_streams(kind: str, stride: int) -> None:
    """Sliding evaluation, row by row in one forward each, against streams opened anew at the context's end."""
    model = real(kind, 12)
    corpus = MemoryCorpus(Bytes(), [b"to be, or not to be", b"that is", b"the question"])
    split = corpus.split("data")
    config = EvalConfig(mode="sliding", stride=stride, batch=3)
    got = evaluate(model, split, corpus, config=config, context=12)
    x_BT = torch.from_numpy(split.read(0, split.symbols))[None]
    want = log_probs(model, x_BT, start_B=torch.tensor([256]), plan=Plan(12, stride))
    assert got.score.nats == pytest.approx(-want.double().sum().item(), rel=1e-4)
    # symbol by symbol too, by scoring with all weight on one row at a time
    for row in range(Plan(12, stride).rows(split.symbols)):
        begin = row * stride
        inside = x_BT[:, begin : begin + 12]
        start = torch.tensor([split.start_symbol(begin)])
        logp_BT = model(inside, cond=Cond(start))
        from_1, to_1 = Plan(12, stride).spans(np.array([row]), split.symbols)
        ours = logp_BT[0, from_1[0] - begin : to_1[0] - begin]
        torch.testing.assert_close(ours, want[0, from_1[0] : to_1[0]], rtol=1e-4, atol=1e-4)


def test_a_carried_state_equals_one_endless_stream() -> None:
    model = real("rnn", 12)
    text = b"to be, or not to be, that is the question"
    corpus = MemoryCorpus(Bytes(), [text])
    got = evaluate(model, corpus.split("data"), corpus, config=EvalConfig(mode="carried"), context=7)
    x_BT = torch.tensor([[*text, 256]])
    want = log_probs(model, x_BT, start_B=torch.tensor([256]), plan=None)
    assert got.score.nats == pytest.approx(-want.double().sum().item(), rel=1e-5)
    reset = evaluate(model, corpus.split("data"), corpus, config=EvalConfig(), context=7)
    assert reset.score.nats != pytest.approx(got.score.nats, rel=1e-4)
