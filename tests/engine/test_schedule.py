"""The learning rate as a function of the step, against formulas written out again."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest

from lmtrain.config import build
from lmtrain.engine import ScheduleConfig, rate
from lmtrain.errors import ConfigError


def rates(steps: int, base: float = 1.0, **config: Any) -> list[float]:
    return [rate(ScheduleConfig(**config), step=s, steps=steps, base=base) for s in range(steps + 3)]


def test_cosine_is_nanogpts() -> None:
    """nanoGPT: warm-up lr (it + 1) / (warmup_iters + 1), then half a cosine down to min_lr at lr_decay_iters."""
    steps, warmup, base, low = 2000, 100, 1e-3, 1e-4
    for step, got in enumerate(rates(steps, base, kind="cosine", warmup=warmup, min_lr=low)):
        if step < warmup:
            want = base * (step + 1) / (warmup + 1)
        elif step > steps:
            want = low
        else:
            want = low + 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) * (base - low)
        assert got == pytest.approx(want, rel=1e-12)


def test_cosine_ends_at_a_tenth_by_default() -> None:
    curve = rates(100, 2.0, kind="cosine", warmup=0)
    assert curve[0] == 2.0
    assert curve[100] == curve[102] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(curve[:101]))


def test_constant() -> None:
    assert rates(10, kind="constant", warmup=4) == [0.2, 0.4, 0.6, 0.8] + [1.0] * 9


def test_wsd_is_flat_and_then_linear() -> None:
    curve = rates(100, 1.0, kind="wsd", warmup=10, decay=0.2, min_lr=0.0)
    assert curve[9] == pytest.approx(10 / 11)
    assert curve[10:80] == [1.0] * 70
    assert curve[80] == pytest.approx(20 / 21)
    assert curve[99] == pytest.approx(1 / 21)
    assert curve[100] == 0.0
    drops = {round(a - b, 12) for a, b in pairwise(curve[79:101])}
    assert drops == {round(1 / 21, 12)}


def test_fractions_and_counts_say_the_same() -> None:
    for kind in ("cosine", "wsd"):
        assert rates(500, kind=kind, warmup=0.1, decay=0.3) == rates(500, kind=kind, warmup=50, decay=150)
    assert rates(50, kind="wsd", warmup=0, decay=1)[0] == pytest.approx(50 / 51 * 0.9 + 0.1)


def test_warm_up_as_long_as_the_run() -> None:
    assert rates(4, kind="cosine", warmup=4, min_lr=0.5)[:5] == [0.2, 0.4, 0.6, 0.8, 0.5]


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"kind": "linear"}, "kind = 'linear'"),
        ({"warmup": 10.5}, "warmup = 10.5"),
        ({"warmup": -1}, "warmup = -1"),
        ({"decay": 1.5}, "decay = 1.5"),
        ({"min_lr": -1e-3}, "min_lr"),
        ({"warm_up": 10}, "did you mean 'warmup'?"),
    ],
)
def test_what_cannot_be(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(ScheduleConfig, tree, where="schedule")
    assert words in str(caught.value)


def test_negative_steps() -> None:
    with pytest.raises(ValueError, match="step = -1"):
        rate(ScheduleConfig(), step=-1, steps=10, base=1.0)
