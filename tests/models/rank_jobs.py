"""What the ranks of test_rank_calls.py do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lmtrain import models
from lmtrain.engine import EngineConfig, OptimizerConfig, make
from lmtrain.protocol import Batch, Cond, Place, Spec


def masked_curve(place: Place, folder: Path, *, model: dict[str, Any], engine: dict[str, Any]) -> list[float]:
    """Losses of 5 steps over two micro-batches: the first without a document's start, the second full of them."""
    torch.manual_seed(0)
    built = models.build(models.parse(model), Spec(alphabet=11, context=16, bos=10))
    made = make(
        EngineConfig(**engine),
        built,
        optimizer=OptimizerConfig(lr=1e-2, clip=0.0),
        place=place,
        micro_batch=3,
        accumulation=2 // place.world,
        seed=0,
    )
    curve = []
    for step in range(5):
        draw = torch.Generator().manual_seed(step)
        x_BT = torch.randint(11, (6, 16), generator=draw)
        first_BT = torch.rand(6, 16, generator=draw) < 0.4
        first_BT[:3] = False
        start_B = torch.randint(11, (6,), generator=draw)
        batches = [
            Batch(x_BT[i : i + 3], torch.ones(3, 16), Cond(start_B[i : i + 3], first_BT[i : i + 3]), index=i)
            for i in (0, 3)
        ]
        report = made.step(batches[place.rank :: place.world], total_weight=96.0, lr=1e-2, step=step)
        curve.append(report.nats / report.weight)
    made.close()
    return curve
