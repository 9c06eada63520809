"""What the ranks of tests/inference do. Every job returns JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmtrain import models
from lmtrain.data.memory import MemoryCorpus
from lmtrain.data.symbols import Bytes
from lmtrain.engine import EngineConfig, OptimizerConfig, make
from lmtrain.inference.score import EvalConfig, evaluate
from lmtrain.protocol import Model, Place, Spec

CONTEXT = 12

RUNS: list[dict[str, Any]] = [
    {"model": "gpt", "mode": "window"},
    {"model": "gpt", "mode": "window", "masking": True},
    {"model": "gpt", "mode": "sliding", "stride": 5},
    {"model": "gpt", "mode": "window", "max_symbols": 200},
    {"model": "rnn", "mode": "window", "masking": True},
    {"model": "rnn", "mode": "carried"},
]


def corpus() -> MemoryCorpus:
    """35 documents of 0 to 25 bytes: rows end inside documents, the last row is short, no rank has the same work."""
    rng = np.random.default_rng(0)
    texts = [rng.integers(97, 123, rng.integers(0, 26)).astype(np.uint8).tobytes() for _ in range(35)]
    return MemoryCorpus(Bytes(recipe={}), texts)


def model_of(kind: str) -> Model:
    """A model of a few thousand parameters with dropout, the same on every rank, away from its uniform start."""
    settings: dict[str, dict[str, Any]] = {
        "gpt": {"layers": 2, "width": 16, "heads": 2, "dropout": 0.3},
        "rnn": {"layers": 2, "width": 12, "dropout": 0.3},
    }
    torch.manual_seed(0)
    model = models.build(models.parse({"kind": kind, **settings[kind]}), Spec(alphabet=257, context=CONTEXT, bos=256))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return model


def scores(place: Place, folder: Path, *, engine: dict[str, Any], batches: list[int]) -> list[dict[str, Any]]:
    """Every run of RUNS at every batch size, on a model that the engine holds."""
    torch.set_num_threads(1)
    held = corpus()
    out = []
    for kind in ("gpt", "rnn"):
        made = make(
            EngineConfig.model_validate(engine),
            model_of(kind),
            optimizer=OptimizerConfig(),
            place=place,
            micro_batch=1,
            accumulation=1,
            seed=0,
        )
        with made.evaluating() as model:
            for run in RUNS:
                if run["model"] != kind:
                    continue
                settings = {key: value for key, value in run.items() if key not in {"model", "masking"}}
                for batch in batches:
                    result = evaluate(
                        model,
                        held.split("data"),
                        held,
                        config=EvalConfig.model_validate({**settings, "batch": batch}),
                        context=CONTEXT,
                        masking=run.get("masking", False),
                        rank=made.rank,
                        world=made.world,
                        add=made.add,
                        device=made.device,
                    )
                    out.append({**run, "batch": batch, "result": result.to_json()})
        made.close()
    return out
