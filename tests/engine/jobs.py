"""What the ranks of tests/engine do. Every job returns JSON."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from lmtrain import models
from lmtrain.engine import EngineConfig, OptimizerConfig, make
from lmtrain.protocol import Batch, Cond, Engine, Model, Place, Spec

ALPHABET, CONTEXT, ROWS = 29, 12, 8

SMALL: dict[str, dict[str, Any]] = {
    "gpt": {"kind": "gpt", "layers": 2, "width": 24, "heads": 2, "dropout": 0.1},
    "rnn": {"kind": "rnn", "layers": 2, "width": 20, "dropout": 0.1},
}


def small_model(name: str, *, seed: int = 1, **changes: Any) -> Model:
    """A model of a few thousand parameters, the same for the same arguments."""
    torch.manual_seed(seed)
    config = models.parse(SMALL[name] | changes)
    model = models.build(config, spec=Spec(alphabet=ALPHABET, context=CONTEXT, bos=ALPHABET - 1))
    with torch.no_grad():
        for p in model.parameters():  # away from zero projections: every parameter has a gradient from the first step
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())), alpha=0.02)
    return model


def rows_of(step: int, *, micro: int) -> list[Batch]:
    """The global batch of a step as micro-batches: random text with very uneven weights, one row nearly all padding."""
    g = torch.Generator().manual_seed(1000 + step)
    x_BT = torch.randint(ALPHABET - 1, (ROWS, CONTEXT), generator=g)
    x_BT[:, 1::2] = (x_BT[:, 0::2] * 3 + 1) % (ALPHABET - 1)  # something to learn
    weight_BT = (torch.rand(ROWS, CONTEXT, generator=g) < torch.linspace(0.1, 1.0, ROWS)[:, None]).float()
    weight_BT[-1, 2:] = 0
    start_B = torch.randint(ALPHABET, (ROWS,), generator=g)
    return [
        Batch(x_BT[i : i + micro], weight_BT[i : i + micro], Cond(start_B[i : i + micro]), index=i)
        for i in range(0, ROWS, micro)
    ]


def train(engine: Engine, steps: range, *, micro: int, lr: float = 3e-3) -> list[float]:
    """nats a symbol of each step."""
    curve = []
    for step in steps:
        batches = rows_of(step, micro=micro)
        total = sum(float(b.weight_BT.sum()) for b in batches)
        report = engine.step(batches[engine.rank :: engine.world], total_weight=total, lr=lr, step=step)
        assert report.applied
        assert math.isfinite(report.grad_norm)
        assert report.weight == total
        curve.append(report.nats / report.weight)
    return curve


def engine_for(
    model: Model, place: Place, *, micro: int, optimizer: dict[str, Any] | None = None, **settings: Any
) -> Engine:
    """An engine over `rows_of` with fitting accumulation."""
    return make(
        EngineConfig(**settings),
        model,
        optimizer=OptimizerConfig(**(optimizer or {})),
        place=place,
        micro_batch=micro,
        accumulation=ROWS // micro // place.world,
        seed=5,
    )


def curve(place: Place, folder: Path, *, steps: int = 20, cases: list[dict[str, Any]]) -> Any:
    """Loss curves of several cases, one after the other in one process."""
    torch.set_num_threads(1)
    out = []
    for case in cases:
        case = dict(case)
        model = small_model(case.pop("model"))
        micro = case.pop("micro")
        engine = engine_for(model, place, micro=micro, **case)
        out.append(train(engine, range(steps), micro=micro))
        engine.close()
    return out
