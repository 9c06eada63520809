"""Drawing images with what was computed kept, against computing every pixel from the whole image, in one run.

    python benchmarks/sampling.py [--kind gated_pixelcnn] [--batches 1 16] [--recomputed 12]

28 x 28 pixels of 2 levels. The cached sampler draws whole images; of the recomputing one the first `--recomputed`
symbols are timed and taken for all 784, since each costs the same. Both draw from the same noise
and must draw the same symbols. Prints one table and writes JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from lmtrain import models
from lmtrain.nn.stream import RecomputingStream
from lmtrain.protocol import Cond, Model, Spec, Stream

SIDE, LEVELS = 28, 2
KINDS = {
    "pixelcnn": {"blocks": 7, "width": 64, "head_width": 64},
    "gated_pixelcnn": {"layers": 8, "width": 64, "head_width": 64},
    "pixelcnn_pp": {"scales": 3, "layers": 2, "width": 48},
}
WANTED = 20.0


def draw(stream: Stream, noise_BT: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The symbols of this noise, and seconds."""
    began, drawn = time.perf_counter(), []
    for noise_B in noise_BT.unbind(1):
        drawn.append(stream.distribution().sample(noise_B))
        stream.push(drawn[-1])
    return torch.stack(drawn, 1), time.perf_counter() - began


def compare(model: Model, batch: int, *, recomputed: int) -> dict[str, float]:
    """Seconds an image of both samplers."""
    cond = Cond(torch.full((batch,), LEVELS))
    noise_BT = torch.rand(batch, SIDE * SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    draw(model.stream(batch, cond=cond), noise_BT[:, :30])  # warm
    image_BT, cached = draw(model.stream(batch, cond=cond), noise_BT)
    slow_Bt, seconds = draw(RecomputingStream(model, batch, cond=cond, length=SIDE * SIDE), noise_BT[:, :recomputed])
    if not torch.equal(slow_Bt, image_BT[:, :recomputed]):
        raise SystemExit("the two samplers drew different symbols from the same noise")
    whole = seconds / recomputed * SIDE * SIDE
    return {"batch": batch, "cached": cached / batch, "recomputed": whole / batch, "ratio": whole / cached}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", nargs="+", choices=list(KINDS), default=["gated_pixelcnn"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--recomputed", type=int, default=12, help="symbols that the recomputing sampler draws")
    parser.add_argument("--out", type=Path, default=Path("sampling.json"))
    given = parser.parse_args()
    rows = []
    print(f"{'kind':16s} {'batch':>5s} {'cached s/image':>15s} {'recomputed s/image':>19s} {'ratio':>7s}")
    for kind in given.kind:
        torch.manual_seed(0)
        spec = Spec(alphabet=LEVELS, context=SIDE * SIDE, bos=LEVELS, grid=(SIDE, SIDE, 1))
        model = models.build(models.parse({"kind": kind, **KINDS[kind]}), spec).eval()
        for batch in given.batches:
            row = compare(model, batch, recomputed=given.recomputed)
            rows.append({"kind": kind, **row})
            print(
                f"{kind:16s} {batch:5d} {row['cached']:15.3f} {row['recomputed']:19.3f} {row['ratio']:7.1f}", flush=True
            )
    gated = [row for row in rows if row["kind"] == "gated_pixelcnn"]
    if gated:
        print(f"wanted of gated_pixelcnn: {WANTED:.0f}; {'held' if gated[-1]['ratio'] >= WANTED else 'NOT held'}")
    given.out.write_text(json.dumps({"threads": torch.get_num_threads(), "wanted": WANTED, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
