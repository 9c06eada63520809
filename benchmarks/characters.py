"""nanoGPT's laptop task: characters of one text file, 2,000 steps of 12 x 64, the last 10 % held out and scored whole.

    python benchmarks/characters.py --text tinyshakespeare.txt [--seeds 3]

Prints one table and writes JSON. nanoGPT's own figure on tinyshakespeare is 1.8857 nats a character, an estimate from
random batches; here every held-out character is scored once, in mode window.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = Path(__file__).parent.parent / "configs" / "gpt-nano-characters.yaml"
REFERENCE = 1.8857


def lmtrain(*arguments: object) -> str:
    """Standard output of a command of lmtrain."""
    command = [sys.executable, "-m", "lmtrain", *map(str, arguments)]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="the text file")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--engine", choices=["zero", "plain"], default="zero")
    parser.add_argument("--out", type=Path, default=Path("characters.json"))
    given = parser.parse_args()
    if given.text is None:
        print("characters: give --text FILE; nothing was run")
        return
    results = []
    with tempfile.TemporaryDirectory(prefix="characters-") as made:
        for seed in range(given.seeds):
            common = (
                f"run.dir={made}/runs",
                f"run.name=seed{seed}",
                f"train.seed={seed}",
                f"engine.kind={given.engine}",
            )
            where = (f"prepare.source.paths=[{given.text.resolve()}]", f"data.corpus={made}/corpus")
            lmtrain("train", CONFIG, *common, *where, "train.log_every=200", "wandb.mode=disabled")
            result = json.loads(lmtrain("eval", f"{made}/runs/seed{seed}", "--json"))["valid"]
            results.append({"seed": seed, **result})
    nats = [row["nats"] / row["symbols"] for row in results]
    for row, value in zip(results, nats, strict=True):
        print(f"seed {row['seed']}  {value:.4f} nats a character  {row['bits_per_byte']:.4f} bits per byte")
    spread = statistics.stdev(nats) if len(nats) > 1 else 0.0
    print(
        f"mean   {statistics.mean(nats):.4f} (standard deviation {spread:.4f}); nanoGPT {REFERENCE} by random batches"
    )
    given.out.write_text(
        json.dumps({"results": results, "mean": statistics.mean(nats), "reference": REFERENCE}, indent=1)
    )


if __name__ == "__main__":
    main()
