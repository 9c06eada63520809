"""What the ranks of test_image_ranks.py do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lmtrain import models
from lmtrain.engine import EngineConfig, OptimizerConfig, make
from lmtrain.protocol import Batch, Cond, Place, Spec

SPEC = Spec(alphabet=4, context=12, bos=4, grid=(2, 2, 3), labels=3)


def curve_and_stream(place: Place, folder: Path, *, model: dict[str, Any], engine: dict[str, Any]) -> list[float]:
    """Losses of 3 steps over two micro-batches of images with classes; then what a stream says, symbol by symbol."""
    torch.manual_seed(0)
    made = make(
        EngineConfig(**engine),
        models.build(models.parse(model), SPEC),
        optimizer=OptimizerConfig(lr=1e-2, clip=0.0),
        place=place,
        micro_batch=3,
        accumulation=2 // place.world,
        seed=0,
    )
    draw, said = torch.Generator().manual_seed(0), []
    for step in range(3):
        x_BT = torch.randint(4, (6, 12), generator=draw)
        weight_BT = torch.rand(6, 12, generator=draw)
        cond = Cond(torch.full((6,), 4), label_B=torch.randint(3, (6,), generator=draw))
        batches = [
            Batch(
                x_BT[i : i + 3], weight_BT[i : i + 3], Cond(cond.start_B[:3], label_B=cond.label_B[i : i + 3]), index=i
            )
            for i in (0, 3)
        ]
        report = made.step(batches[place.rank :: place.world], total_weight=float(weight_BT.sum()), lr=1e-2, step=step)
        said.append(report.nats / report.weight)
    with made.evaluating() as built:
        cond = Cond(torch.full((2,), 4), label_B=torch.tensor([0, 2]))
        stream = built.stream(2, cond=cond)
        for t in range(SPEC.context):
            said.append(float(stream.distribution().log_pmf()[1, 0]))
            stream.push(torch.tensor([t % 4, t % 3]))
    made.close()
    return said
