"""Can a likelihood tell what is outside: images of one kind against another, digits and text against altered ones.

    python benchmarks/anomaly.py --mnist mnist.npz [--fashion FOLDER] [--code FOLDER] [--work FOLDER] [--limit 1000]

mnist.npz has x_train, y_train, x_test, y_test; FOLDER of Fashion-MNIST the four idx files (default: where Debian's
dataset-fashion-mnist puts them); --code any source text, a folder or a file (default: this package's). Every model is a
small config written here and one `lmtrain train`, its background model the same on corrupted symbols; every question
one `lmtrain anomaly`. `--work` keeps runs: what is finished there is not trained again, what was cut off goes on.
`--only` takes beginnings of names. Prints one table of AUROC and writes JSON with all figures and intervals.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lmtrain

Tree = dict[str, Any]

COMMON: Tree = {
    "engine": {"kind": "plain"},
    "wandb": {"mode": "disabled"},
    "optimizer": {"kind": "adamw", "lr": 6e-3, "weight_decay": 0.0},
    "schedule": {"kind": "cosine", "warmup": 30},
    "eval": {"max_symbols": 100_000},
}
PIXELCNN: Tree = {"kind": "gated_pixelcnn", "layers": 3, "width": 20, "head_width": 32, "first_kernel": 5}
SMALL: Tree = {**PIXELCNN, "width": 24}
GPT: Tree = {"kind": "gpt", "layers": 4, "width": 128, "heads": 2}
MUON: Tree = {"kind": "muon", "lr": 0.02, "adamw_lr": 0.01, "clip": 0.0, "weight_decay": 0.0}


@dataclass(frozen=True)
class Question:
    """A run, its background model, and the sets that it is held against."""

    name: str
    source: Tree
    model: Tree
    rows: int
    steps: int
    corrupt: float
    background_steps: int
    outside: tuple[str, ...]
    shown: tuple[str, ...]
    more: Tree
    arguments: tuple[str, ...] = ()


def questions(given: argparse.Namespace) -> list[Question]:
    """What is asked."""
    mnist = {
        "kind": "npz",
        "paths": str(given.mnist),
        "arrays": {"train": "x_train", "test": "x_test"},
        "label_arrays": {"train": "y_train", "test": "y_test"},
    }
    fashion: Tree = {"kind": "fashion-mnist"} | ({"paths": str(given.fashion)} if given.fashion else {})
    tokenizer = {"kind": "sentencepiece-unigram", "vocab": 4096, "sample_bytes": 2_097_152}
    code = str(given.code or own_code(given.work))
    corpora = given.work / "corpora"
    return [
        Question("fashion", {"source": fashion}, PIXELCNN, 16, 500, 0.2, 300,
                 (f"{corpora / 'mnist'}:test",), ("Fashion -> MNIST",), {}),
        Question("mnist", {"source": mnist}, PIXELCNN, 16, 500, 0.2, 300,
                 (f"{corpora / 'fashion'}:test",), ("MNIST -> Fashion",), {}),
        Question("digits", {"source": {"kind": "digits"}}, SMALL, 32, 300, 0.2, 300,
                 ("@permuted", "@constant", "@noise"),
                 ("digits -> permuted", "digits -> constant", "digits -> noise"),
                 {"optimizer": {**COMMON["optimizer"], "lr": 5e-3}, "schedule": {"kind": "cosine", "warmup": 10}}),
        Question("sotu", {"source": {"kind": "sotu"}, "tokenizer": tokenizer}, GPT, 8, 290, 0.1, 160,
                 (code, "@shuffled"), ("sotu -> source code", "sotu -> shuffled words"),
                 {"optimizer": MUON, "schedule": {"kind": "wsd", "warmup": 0.02, "decay": 0.5, "min_lr": 0.0}},
                 ("--piece", "1000")),
    ]  # fmt: skip


def own_code(work: Path) -> Path:
    """The source text of this package in one file."""
    path = work / "code.txt"
    path.write_text("".join(file.read_text() for file in sorted(Path(lmtrain.__file__).parent.rglob("*.py"))))
    return path


def config(question: Question, work: Path, *, background: bool) -> Tree:
    """One training, as YAML takes it (JSON is YAML)."""
    steps = question.background_steps if background else question.steps
    data: Tree = {"corpus": str(work / "corpora" / question.name), "global_batch": question.rows}
    if question.source["source"]["kind"] == "sotu":
        data["context"] = 256
    if background:
        data["view"] = {"corrupt": question.corrupt}
    name = question.name + ("-background" if background else "")
    return {
        **COMMON,
        **question.more,
        "run": {"dir": str(work / "runs"), "name": name},
        "train": {"steps": steps, "eval_every": steps, "save_every": max(steps // 2, 1), "samples": 0},
        "prepare": question.source,
        "data": data,
        "model": question.model,
    }


def call(*arguments: str) -> str:
    """`lmtrain ARGUMENTS...`; its errors go where ours go."""
    return subprocess.run(
        [sys.executable, "-m", "lmtrain", *arguments], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def finished(run: Path) -> bool:
    """Whether a training ended as it should."""
    journal = run / "metrics.jsonl"
    return journal.exists() and '"kind": "finish"' in journal.read_text().splitlines()[-1]


def train(question: Question, work: Path, *, background: bool) -> Path:
    """The run's folder."""
    tree = config(question, work, background=background)
    run = work / "runs" / tree["run"]["name"]
    if not finished(run):
        path = work / f"{run.name}.yaml"
        path.write_text(json.dumps(tree, indent=1))
        print(f"training {run.name}", file=sys.stderr, flush=True)
        call("train", str(path))
    return run


def table(columns: dict[str, list[Tree]]) -> str:
    """AUROC with its interval, a score a row, a direction a column; controls in italics."""
    rows = {row["score"]: row["kind"] for rows in columns.values() for row in rows}
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, kind in sorted(rows.items(), key=lambda item: item[1] == "control"):
        cells = []
        for found in columns.values():
            one = next((row["as it is"] for row in found if row["score"] == name), None)
            bounds = one and one["auroc_interval"]
            cells.append("" if one is None else f"{one['auroc']:.3f}" + (
                f" [{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else ""))  # fmt: skip
        lines.append(f"| {f'*{name}*' if kind == 'control' else name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mnist", type=Path, help="mnist.npz")
    parser.add_argument("--fashion", type=Path, help="the folder of the idx files")
    parser.add_argument("--code", type=Path, help="source text to hold against the addresses")
    parser.add_argument("--work", type=Path, default=Path("anomalies"), help="where corpora, runs and results go")
    parser.add_argument("--only", nargs="+", default=[""], help="beginnings of names: fashion, mnist, digits, sotu")
    parser.add_argument("--limit", type=int, default=1000, help="units of each set, chosen by hash")
    parser.add_argument("--out", type=Path, default=Path("anomaly.json"))
    given = parser.parse_args()
    if given.mnist is None:
        print("anomaly: give --mnist mnist.npz; nothing was run")
        return
    given.work = given.work.resolve()
    given.work.mkdir(parents=True, exist_ok=True)
    asked = [question for question in questions(given) if question.name.startswith(tuple(given.only))]
    runs = {q.name: tuple(train(q, given.work, background=b) for b in (False, True)) for q in asked}
    columns: dict[str, list[Tree]] = {}
    answers = []
    for question in asked:
        run, background = runs[question.name]
        arguments = ["anomaly", str(run), "--background", str(background), "--limit", str(given.limit), "--json"]
        for outside in question.outside:
            arguments += ["--outside", outside]
        print(f"asking {question.name}", file=sys.stderr, flush=True)
        found = json.loads(call(*arguments, *question.arguments))
        answers += found
        columns |= dict(zip(question.shown, (each["scores"] for each in found), strict=True))
        given.out.write_text(json.dumps(answers, indent=1))
    print(table(columns))


if __name__ == "__main__":
    main()
