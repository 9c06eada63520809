"""A tiny corpus and a tiny run, made through the command line in this process; and the command line as a function."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import yaml

from lmtrain.__main__ import main

TINY = {
    "prepare": {
        "source": {"kind": "files", "paths": ["text"]},
        "tokenizer": {"kind": "bytes"},
        "split": {"kind": "hash", "valid": 0.2, "test": 0.2},
    },
    "train": {"steps": 6, "eval_every": 3, "save_every": 2, "seed": 3, "log_every": 1},
    "data": {"corpus": "corpus", "context": 16, "global_batch": 4},
    "model": {"kind": "gpt", "layers": 1, "width": 16, "heads": 2},
    "engine": {"kind": "plain"},
    "wandb": {"mode": "disabled"},
}


class Ran(NamedTuple):
    """What the command line did."""

    code: int
    out: str
    err: str


def lmtrain(*arguments: object) -> Ran:
    """`lmtrain ARGUMENTS...` in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["lmtrain", *map(str, arguments)]
    code = 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1 if end.code else 0
    finally:
        sys.argv = before
    return Ran(code, out.getvalue(), err.getvalue())


def texts(folder: Path, *, documents: int = 40) -> Path:
    """Some text files; the same at every call."""
    folder.mkdir(parents=True, exist_ok=True)
    words = [
        "a",
        "model",
        "gives",
        "every",
        "symbol",
        "its",
        "probability",
        "and",
        "an",
        "engine",
        "makes",
        "it",
        "grow",
    ]
    for number in range(documents):
        text = " ".join(words[(number * 7 + 3 * i * i) % len(words)] for i in range(30 + number))
        (folder / f"{number:03d}.txt").write_text(text + f"\n{number}\n")
    return folder


def config(folder: Path, **sections: object) -> Path:
    """A config file in `folder` whose paths lie there; `sections` are merged into TINY's."""
    tree = json.loads(json.dumps(TINY))
    tree["prepare"]["source"]["paths"] = [str(folder / "text")]
    tree["data"]["corpus"] = str(folder / "corpus")
    tree["run"] = {"dir": str(folder / "runs"), "name": "tiny"}
    for name, section in sections.items():
        if isinstance(section, dict):
            tree[name] = {**tree.get(name, {}), **section}
        else:
            tree[name] = section
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
