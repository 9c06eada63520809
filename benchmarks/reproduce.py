"""Published likelihoods, trained and scored by lmtrain itself: bits, reals and binarised images.

    python benchmarks/reproduce.py --data FOLDER [--work FOLDER] [--only fvsbn-dna made-mnist ...] [--minutes 30]

FOLDER has nade_uci.npz, red_wine.npz and binarized_mnist_static.npz. Every candidate of a task's grid is a written
config and one `lmtrain train`; the candidate with the lowest NLL on `valid` is scored once by `lmtrain eval --split
test --checkpoint best`. With folds, every fold chooses for itself. `--work` keeps runs and results: what is finished
there is not trained again, a run that was cut off goes on. `--only` takes names or beginnings of names; without
`--data` they are printed. `--finished` trains nothing and chooses among what is finished.

A task with a clock is stopped after `--minutes`. Seconds are processor seconds of the training of the whole grid.
Prints one table and writes JSON with the choice, all values on `valid`, the curves and the test results.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Tree = dict[str, Any]

COMMON = {
    "train.log_every": 100,
    "train.samples": 0,
    "engine.kind": "plain",
    "optimizer.kind": "adamw",
    "optimizer.ema": 0.98,
    "optimizer.ema_warmup": True,
    "eval.weights": "ema",
    "eval.batch": 200,
    "schedule.kind": "cosine",
    "schedule.warmup": 10,
    "wandb.mode": "disabled",
}
"""Keys of every run, under those of its task and its candidate."""

SPLITS = ("train", "valid", "test")


def _packed(name: str) -> Tree:
    arrays = {split: f"{name}_{split}" for split in SPLITS}
    return {"file": "nade_uci.npz", "arrays": arrays, "packed": f"{name}_dim"}


SOURCES = {
    **{name: _packed(name) for name in ("dna", "mushrooms", "nips")},
    "wine": {"file": "red_wine.npz", "arrays": {split: f"fold{{fold}}_{split}" for split in SPLITS}},
    "mnist": {
        "file": "binarized_mnist_static.npz",
        "arrays": {s: s for s in SPLITS},
        "packed": 784,
        "grid": [28, 28, 1],
    },
}
"""Where the records of each name come from: an archive and its arrays."""


@dataclass(frozen=True)
class Task:
    """A model on a data set: what it is held against, and what is tried.

    name, data, and the keys of the model that all candidates share; `grid`: candidates, each a few keys under a label.
    paper: nats a record as published, for reals the log-likelihood; `limit` likewise, None = reported alone.
    folds: how many; clocked: stopped after --minutes.
    """

    name: str
    data: str
    shared: Tree
    grid: dict[str, Tree]
    paper: float | None = None
    limit: float | None = None
    folds: int = 0
    clocked: bool = False
    reals: bool = False


def _rated(rates: list[float], decays: list[float]) -> dict[str, Tree]:
    return {
        f"lr{lr}-wd{decay}": {"optimizer.lr": lr, "optimizer.weight_decay": decay} for lr in rates for decay in decays
    }


def _direct(rates: list[float], decays: list[float]) -> dict[str, Tree]:
    """With connections from the inputs to the outputs: few hidden units have the degree of any one symbol."""
    return {f"direct-{label}": {"model.direct": True, **keys} for label, keys in _rated(rates, decays).items()}


def _plain(rates: list[float], decays: list[float]) -> dict[str, Tree]:
    """Nearly plain gradients: an `eps` far above them. Adam moves weights of rare bits as fast as others, and overfits.

    The loss is a mean over symbols, so that the rate is that of a mean over records times their number of bits.
    """
    return {f"plain-{label}": {"optimizer.eps": 1.0, **keys} for label, keys in _rated(rates, decays).items()}


def _long(steps: int, grid: dict[str, Tree]) -> dict[str, Tree]:
    """More steps than the task's: for candidates whose decay lets them learn on."""
    return {f"long-{label}": {"train.steps": steps, **keys} for label, keys in grid.items()}


def _stopped(steps: int, every: int, patience: int) -> Tree:
    return {"train.steps": steps, "train.eval_every": every, "train.patience": patience}


GRIDS = {
    "dna": {
        "fvsbn": _rated([0.02], [0.3, 1.0]),
        "made": _rated([0.005], [1.0]) | _direct([0.01, 0.02], [0.3]),
        "made-masks": _direct([0.01], [0.1]) | _long(8000, _direct([0.01], [0.1])),
        "nade": _rated([0.01], [0.05, 0.2]),
    },
    "mushrooms": {
        "fvsbn": _rated([0.02], [0.03, 0.1]),
        "made": _rated([0.005], [0.03, 0.1]),
        "made-masks": _rated([0.005], [0.03]) | _long(8000, _direct([0.01], [0.03])),
        "nade": _rated([0.01], [0.01, 0.03]),
    },
    "nips": {
        "fvsbn": _rated([0.005], [3.0]) | _plain([30.0], [0.0]) | _plain([100.0], [0.0001]),
        "made": _rated([0.005], [1.0, 3.0]),
        "made-masks": _rated([0.005], [3.0]) | _long(4000, _rated([0.005], [3.0])),
        "nade": _rated([0.01], [0.3, 1.0, 3.0]) | _long(1500, _rated([0.01], [2.0, 3.0])) | _plain([50.0], [0.0]),
    },
}
"""What is tried of each model of bits: rates and decays. The fewer the records, the more decay."""


def _tables() -> list[Task]:
    """The models of bits on the three tables."""
    paper = {
        "fvsbn": {"dna": 83.64, "mushrooms": 10.27, "nips": 276.88},
        "made": {"dna": 83.63, "mushrooms": 9.68, "nips": 280.25},
        "made-masks": {"dna": 79.66, "mushrooms": 9.69, "nips": 277.28},
        "nade": {"dna": 84.81, "mushrooms": 9.81, "nips": 273.08},
    }
    tasks = []
    for data in ("dna", "mushrooms", "nips"):
        large = data == "mushrooms"
        steps = {**_stopped(1500 if large else 600, 50 if large else 20, 5), "data.global_batch": 100}
        made = {"model.kind": "made", "model.width": 500}
        many = {"model.masks": 16, "model.ordering": "drawn", "model.orderings": "each"}
        kinds: dict[str, Tree] = {
            "fvsbn": {"model.kind": "fvsbn"},
            "made": made,
            "made-masks": {**made, **many},
            "nade": {"model.kind": "nade", "model.width": 100},
        }
        for kind, keys in kinds.items():
            published = paper[kind][data]
            limit = None if kind == "made-masks" else round(published + 0.5, 2)
            tasks.append(Task(f"{kind}-{data}", data, {**steps, **keys}, GRIDS[data][kind], published, limit))
    return tasks


def _others() -> list[Task]:
    """Sequence models on DNA, reals, and images."""
    dna = {**_stopped(300, 50, 3), "data.global_batch": 50}
    lstm = {"model.kind": "rnn", "model.cell": "lstm", "model.layers": 1, "model.width": 64, "model.embed_width": 16}
    gpt = {"model.kind": "gpt", "model.layers": 2, "model.width": 32, "model.heads": 2, "model.positions": "learned"}
    wine = {
        **_stopped(1000, 50, 3),
        "data.global_batch": 100,
        "data.view.standardise": True,
        "model.kind": "rnade",
        "model.components": 20,
    }
    rnade = {
        "h50-wd0.3": {"model.width": 50, "optimizer.lr": 0.02, "optimizer.weight_decay": 0.3, "optimizer.ema": 0.995},
        "h100-wd1.0": {"model.width": 100, "optimizer.lr": 0.01, "optimizer.weight_decay": 1.0, "optimizer.ema": 0.99},
    }
    mnist = {"data.global_batch": 100, "eval.batch": 500, "optimizer.ema": 0.999, "train.eval_every": 500}
    clock = {
        "data.global_batch": 16,
        "schedule.kind": "constant",
        "optimizer.ema": 0.995,
        "train.steps": 1_000_000,
        "train.eval_every": 100,
        "eval.max_symbols": 784 * 500,
        "model.width": 32,
        "model.head_width": 32,
    }
    made = {**mnist, "model.kind": "made", "model.width": 500, "train.steps": 3000}
    pixelcnn = {**clock, "model.kind": "pixelcnn", "model.blocks": 5}
    gated = {**clock, "model.kind": "gated_pixelcnn", "model.layers": 5}
    clocked = _rated([0.003], [0.0])
    return [
        Task("lstm-dna", "dna", {**dna, **lstm}, {"dropout0.3": {"optimizer.lr": 0.01, "model.dropout": 0.3}}),
        Task("gpt-dna", "dna", {**dna, **gpt}, {"dropout0.2": {"optimizer.lr": 0.003, "model.dropout": 0.2}}),
        Task("rnade-wine", "wine", wine, rnade, -9.36, -9.86, folds=10, reals=True),
        Task("made-mnist", "mnist", made, _direct([0.005], [0.0]), 94.5, 95.0),
        Task("pixelcnn-mnist", "mnist", pixelcnn, clocked, 81.30, clocked=True),
        Task("gated_pixelcnn-mnist", "mnist", gated, clocked, clocked=True),
    ]


def nested(flat: Tree) -> Tree:
    """{"a.b": 1} as {"a": {"b": 1}}."""
    tree: Tree = {}
    for key, value in flat.items():
        *outer, last = key.split(".")
        inner = tree
        for word in outer:
            inner = inner.setdefault(word, {})
        inner[last] = value
    return tree


def _child(arguments: list[str], out: str) -> None:
    """A command of lmtrain in this process: its output and its processor seconds into files."""
    for number, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(out + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    from lmtrain.__main__ import main as lmtrain

    sys.argv = ["lmtrain", *arguments]
    try:
        lmtrain()
    finally:
        sys.stdout.flush()
        used = resource.getrusage(resource.RUSAGE_SELF)
        Path(out + ".cpu").write_text(json.dumps(used.ru_utime + used.ru_stime))


class Commands:
    """Commands of lmtrain, each in a process of its own, forked from one that has imported what they need."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["lmtrain.__main__", "lmtrain.use", "lmtrain.run"])

    def run(self, *arguments: object, out: Path, seconds: float | None = None) -> tuple[str, float]:
        """(standard output, processor seconds). SIGTERM asks it to stop after `seconds`; RuntimeError if it failed."""
        process = self._context.Process(target=_child, args=([str(a) for a in arguments], str(out)))
        process.start()
        process.join(seconds)
        asked = process.is_alive()
        if asked and process.pid:
            os.kill(process.pid, signal.SIGTERM)
            process.join()
        if process.exitcode and not asked:
            said = Path(f"{out}.err").read_text()[-2000:]
            raise RuntimeError(f"lmtrain {' '.join(map(str, arguments))}: exit code {process.exitcode}\n{said}")
        return Path(f"{out}.out").read_text(), json.loads(Path(f"{out}.cpu").read_text())


@dataclass
class Bench:
    """Where data lies, where runs go, how long a task with a clock may take; finished: nothing is trained any more."""

    data: Path
    work: Path
    minutes: float
    commands: Commands
    finished: bool = False

    def config(self, task: Task, candidate: Tree, *, corpus: str, fold: int | None, name: str) -> Tree:
        """The whole config of a candidate."""
        source = SOURCES[task.data]
        prepare: Tree = {
            "source": {
                "kind": "npz",
                "paths": str((self.data / source["file"]).resolve()),
                **{k: v for k, v in source.items() if k != "file"},
            }
        }
        if fold is not None:
            prepare["split"] = {"fold": fold}
        keys = {
            **COMMON,
            **task.shared,
            **candidate,
            "run.dir": str(self.work / "runs"),
            "run.name": name,
            "data.corpus": str(self.work / "corpora" / corpus),
        }
        return {**nested(keys), "prepare": prepare}

    def train(self, task: Task, label: str, fold: int | None) -> Tree | None:
        """One candidate (of one fold): its best NLL on `valid`, or what was found before; None if it may not train."""
        where = task.data if fold is None else f"{task.data}-fold{fold}"
        name = f"{task.name}-{label}" + ("" if fold is None else f"-fold{fold}")
        config = self.config(task, task.grid[label], corpus=where, fold=fold, name=name)
        run = self.work / "runs" / name
        done = self.work / "results" / f"{name}.json"
        done.parent.mkdir(parents=True, exist_ok=True)
        found = {"config": config, "minutes": self.minutes if task.clocked else None}
        if done.exists():
            before = json.loads(done.read_text())
            if {key: before[key] for key in found} == found:
                return before
        if self.finished:
            return None
        kept = run.with_name(f"{name}.yaml")
        kept.parent.mkdir(parents=True, exist_ok=True)
        written = json.dumps(config, indent=1)
        if task.clocked or not kept.exists() or kept.read_text() != written:
            shutil.rmtree(run, ignore_errors=True)  # of other keys, or of a clock that has run down
        kept.write_text(written)
        began = time.monotonic()
        limit = self.minutes * 60 if task.clocked else None
        _, cpu = self.commands.run("train", kept, out=done.with_suffix(""), seconds=limit)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        curve = {r["step"]: r["score"]["nats"] / r["records"] for r in rows if r["kind"] == "eval"}
        if not curve:
            raise RuntimeError(f"{name}: stopped before the first evaluation; give more --minutes")
        best = min(curve, key=lambda step: curve[step])
        found |= {"name": name, "label": label, "valid": curve[best], "step": best, "steps": rows[-1]["step"]}
        found |= {
            "cpu_seconds": cpu,
            "seconds": time.monotonic() - began,
            "curve": [list(point) for point in curve.items()],
        }
        found["cores"] = len(os.sched_getaffinity(0))
        done.write_text(json.dumps(found, indent=1))
        return found

    def test(self, chosen: Tree) -> Tree:
        """The test split, once, by the best checkpoint."""
        done = self.work / "results" / f"{chosen['name']}.test.json"
        if not done.exists() or json.loads(done.read_text())["of"] != chosen:
            arguments = ["--split", "test", "--checkpoint", "best", "--json", "--set", "eval.max_symbols=null"]
            run = self.work / "runs" / chosen["name"]
            out, _ = self.commands.run("eval", run, *arguments, out=done.with_suffix(""))
            done.write_text(json.dumps({"of": chosen, "result": json.loads(out)["test"]}))
        return dict(json.loads(done.read_text())["result"])

    def task(self, task: Task) -> Tree | None:
        """All candidates of a task (of all folds), the choices, the test result. None: nothing of it is finished."""
        tried, tests = [], []
        for fold in range(1, task.folds + 1) if task.folds else [None]:
            here = []
            for label in task.grid:
                one = self.train(task, label, fold)
                if one is not None:
                    here.append(one)
                    print(
                        f"  {one['name']:42} valid {one['valid']:9.3f}  step {one['step']}/{one['steps']}", flush=True
                    )
            if not here:
                continue
            chosen = min(here, key=lambda one: one["valid"])
            tests.append({"chosen": chosen["name"], **self.test(chosen)})
            tried += here
        if not tests:
            return None
        sign = -1.0 if task.reals else 1.0
        ours = sign * sum(test["nats_per_record"] for test in tests) / len(tests)
        whole = len(tests) == max(1, task.folds)
        holds = None if task.limit is None or not whole else (ours >= task.limit if task.reals else ours <= task.limit)
        spent: Tree = {key: sum(one[key] for one in tried) for key in ("cpu_seconds", "seconds")}
        spent["candidates"] = f"{len(tried)} of {len(task.grid) * max(1, task.folds)}"
        about = {"task": task.name, "paper": task.paper, "ours": ours, "limit": task.limit, "holds": holds}
        return {**about, **spent, "tried": tried, "tests": tests}


def show(rows: list[Tree]) -> None:
    """The table."""
    print(f"\n{'task':24}{'paper':>9}{'ours':>9}{'limit':>9}  {'holds':7}{'cpu s':>7}  {'tried':10}chosen on valid")
    for row in rows:
        paper, limit = ("" if row[key] is None else f"{row[key]:.2f}" for key in ("paper", "limit"))
        holds = {None: "", True: "yes", False: "NO"}[row["holds"]]
        chosen = row["tests"][0]["chosen"] if len(row["tests"]) == 1 else f"{len(row['tests'])} folds"
        ours, cpu = f"{row['ours']:.2f}", f"{row['cpu_seconds']:.0f}"
        about = f"{row['candidates']:10}{chosen.removeprefix(row['task'] + '-')}"
        print(f"{row['task']:24}{paper:>9}{ours:>9}{limit:>9}  {holds:7}{cpu:>7}  {about}")


def main() -> None:
    tasks = [*_tables(), *_others()]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="the folder of the archives")
    parser.add_argument("--work", type=Path, default=Path("reproductions"), help="where corpora, runs and results go")
    parser.add_argument("--only", nargs="+", default=[""], help="names of tasks, or beginnings of names")
    parser.add_argument("--minutes", type=float, default=30.0, help="of a task with a clock")
    parser.add_argument("--finished", action="store_true", help="train nothing: choose among what is finished")
    parser.add_argument("--out", type=Path, default=Path("reproduce.json"))
    given = parser.parse_args()
    wanted = [task for task in tasks if task.name.startswith(tuple(given.only))]
    if given.data is None or not wanted:
        print("reproduce: give --data FOLDER; nothing was run. Tasks:", *(task.name for task in wanted or tasks))
        return
    bench = Bench(given.data, given.work.resolve(), given.minutes, Commands(), given.finished)
    rows = []
    for task in wanted:
        print(task.name, flush=True)
        if (row := bench.task(task)) is not None:
            rows.append(row)
            show([row])
        given.out.write_text(json.dumps(rows, indent=1))
    show(rows)


if __name__ == "__main__":
    main()
