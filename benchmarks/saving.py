"""What a checkpoint costs the loop: seconds of standing still, saved in the background over saved and waited for.

    python benchmarks/saving.py [--parameters 50] [--rounds 3] [--tokens 64] [--folder DIR] [--json FILE]

One process, the plain engine, a GPT of so many million parameters, fp32 weights and two moments. Each round saves once
and waits, then saves once in the background and trains on until it is on disk; the clock runs around every call that
the loop makes to the store. The ratio is taken round by round, so that other load on the machine falls on both, and its
median is printed. `step` is what training itself pays while the other process writes: seconds of a step with a save on
its way over those without. It ends with exit code 1 when the ratio is above the limit of 0.15.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lmtrain import models
from lmtrain.checkpoint import CheckpointConfig, Checkpoints
from lmtrain.engine import EngineConfig, OptimizerConfig, make
from lmtrain.protocol import Batch, Cond, Engine, Place, Spec

LIMIT = 0.15
ALPHABET = 4096


def engine_of(millions: float, tokens: int) -> tuple[Engine, int]:
    """An engine with a GPT of about so many parameters; and how many they are."""
    layers = 12
    width = max(64, round((millions * 1e6 / (12 * layers)) ** 0.5 / 64) * 64)
    config = models.parse({"kind": "gpt", "layers": layers, "width": width, "heads": width // 64})
    torch.manual_seed(0)
    model = models.build(config, spec=Spec(alphabet=ALPHABET, context=tokens, bos=0))
    engine = make(
        EngineConfig(kind="plain", device="cpu"),
        model,
        optimizer=OptimizerConfig(lr=1e-4),
        place=Place(),
        micro_batch=1,
        accumulation=1,
        seed=0,
    )
    return engine, sum(p.numel() for p in model.parameters())


def compare(engine: Engine, folder: Path, *, rounds: int, tokens: int) -> dict[str, Any]:
    """Seconds of every round."""
    x_BT = torch.randint(ALPHABET, (1, tokens), generator=torch.Generator().manual_seed(1))
    batch = Batch(x_BT, torch.ones(1, tokens), Cond(torch.zeros(1, dtype=torch.int64)))
    told: list[Any] = []
    waited = Checkpoints(folder / "waited", CheckpointConfig(), watch=told.append)
    behind = Checkpoints(folder / "behind", CheckpointConfig(background=True), watch=told.append)
    step = 0

    def train() -> float:
        nonlocal step
        began = time.perf_counter()
        engine.step([batch], total_weight=float(tokens), lr=1e-4, step=step)
        step += 1
        return time.perf_counter() - began

    behind.prepare(engine)
    rows: list[dict[str, float]] = []
    train()
    for _ in range(rounds):
        quiet = [train() for _ in range(3)]
        began = time.perf_counter()
        waited.save(engine, step=step, state={})
        whole = time.perf_counter() - began
        began = time.perf_counter()
        behind.save(engine, step=step, state={}, wait=False)
        copied = time.perf_counter() - began
        blocked, busy, before = copied, [], len(told)
        while len(told) == before:
            busy.append(train())
            began = time.perf_counter()
            behind.attend(engine)
            blocked += time.perf_counter() - began
        assert told[-1]["failed"] is None, told[-1]["failed"]
        mb_per_s = [save["bytes"] / 1e6 / save["writing"] for save in told[-2:]]
        rows.append(
            {
                "waited": whole,
                "blocked": blocked,
                "copied": copied,
                "ratio": blocked / whole,
                "until_on_disk": told[-1]["seconds"],
                "mb_per_s_waited": mb_per_s[0],
                "mb_per_s_behind": mb_per_s[1],
                "step": statistics.median(busy) / statistics.median(quiet),
                "bytes": told[-1]["bytes"],
            }
        )
        show(rows[-1])
    behind.close()
    return {"rounds": rows, "ratio": statistics.median(row["ratio"] for row in rows)}


def show(row: dict[str, float]) -> None:
    """A line of the table."""
    print(
        f"{row['waited']:>8.3f} {row['blocked']:>8.3f} {row['copied']:>8.3f} {row['ratio']:>7.3f} "
        f"{row['until_on_disk']:>8.3f} {row['bytes'] / 1e6:>5.0f} {row['mb_per_s_waited']:>6.0f} "
        f"{row['mb_per_s_behind']:>7.0f} {row['step']:>6.2f}",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=float, default=50, help="millions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="of a step; few: what is measured is saving")
    parser.add_argument("--folder", type=Path, default=None, help="on the file system that is meant; a temporary one")
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    engine, parameters = engine_of(given.parameters, given.tokens)
    print(f"{parameters / 1e6:.1f} M parameters; seconds")
    names = f"{'waited':>8} {'blocked':>8} {'(copy)':>8} {'ratio':>7} {'on disk':>8} {'MB':>5} {'MB/s':>6}"
    print(f"{names} {'behind':>7} {'step':>6}", flush=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        found = compare(engine, Path(folder), rounds=given.rounds, tokens=given.tokens)
    print(f"median ratio {found['ratio']:.3f}, limit {LIMIT}")
    if given.json:
        given.json.write_text(json.dumps({"benchmark": "saving", "parameters": parameters, **found}, indent=1) + "\n")
    return 0 if found["ratio"] <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
