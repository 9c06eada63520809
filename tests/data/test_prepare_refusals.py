"""What cannot be prepared is refused in one line that names what was given and what to do."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmtrain.config import build
from lmtrain.data import prepare
from lmtrain.data.blocks import Workers, describe
from lmtrain.data.tokenizer import TokenizerConfig, train
from lmtrain.errors import ConfigError, CorpusError, LmtrainError, TokenizerError
from tests.data.failing import die, refuse
from tests.data.making import BYTES, config, jsonl
from tests.data.test_duplicates import talk


def files(paths: Any, **more: Any) -> dict[str, Any]:
    return {"source": {"kind": "files", "paths": paths}, "tokenizer": BYTES, **more}


def text(**more: Any) -> dict[str, Any]:
    """33 documents."""
    return files("text.jsonl", **more)


def one(**more: Any) -> dict[str, Any]:
    """One document of 12 bytes."""
    return files("one.txt", **more)


def parts(**more: Any) -> dict[str, Any]:
    """33 documents of train, one of valid."""
    return files({"train": "text.jsonl", "valid": "valid.jsonl"}, **more)


SOURCES = [
    (files("no.txt"), CorpusError, "no such file: no.txt"),
    (files("empty.txt"), CorpusError, "the source files gave no text"),
    (files("bad.jsonl"), CorpusError, "bad.jsonl"),
    (text(tokenizer={"path": "nowhere"}), TokenizerError, "no tokenizer nowhere"),
    (
        text(tokenizer={"path": "bytes", "kind": "characters"}),
        TokenizerError,
        "kind = characters, but bytes has",
    ),
    (text(tokenizer={"path": "bytes", "vocab": 300}), TokenizerError, "vocab = 300, but bytes has vocab 257"),
    (text(tokenizer={"vocab": 60_000}), TokenizerError, "vocab = 60000 is too large for this text"),
    (parts(tokenizer={"kind": "characters", "byte_fallback": False}), TokenizerError, "the character 'V'"),
]
SPLITS = [
    (
        {"valid": 0.5, "test": 0.5},
        ConfigError,
        "valid = 0.5 and split.test = 0.5 leave nothing to train on; make",
    ),
    ({"kind": "hash", "valid": 2}, ConfigError, "valid = 2 is no fraction below 1 (only kind tail takes raw bytes)"),
    (
        {"kind": "tail", "valid": 2.5},
        ConfigError,
        "valid = 2.5 is neither a fraction below 1 nor a whole number",
    ),
    ({"valid": -0.1}, ConfigError, "split.valid = -0.1: input should be greater than or equal to 0"),
    ({"valid": float("nan")}, ConfigError, "split.valid = nan"),
    ({"kind": "tail", "valid": float("inf")}, ConfigError, "split.valid = inf: input should be a finite number"),
    (
        {"kind": "hash", "valid": 1e-5},
        ConfigError,
        "valid = 1e-05 is less than one of 1,000 buckets; use 0.001",
    ),
    ({"kind": "hash", "valid": 0.9996}, ConfigError, "valid and test take all 1,000 buckets"),
    ({"kind": "source"}, ConfigError, "split.kind = source, but 33 of 33 documents bring no split; use hash or tail"),
    ({"kind": "random"}, ConfigError, "split.kind = 'random'"),
    ({"kinds": "hash"}, ConfigError, "unknown key 'split.kinds'; did you mean 'kind'?"),
]
CASES = [
    *SOURCES,
    *[(text(split=split), kind, message) for split, kind, message in SPLITS],
    (one(split={"kind": "hash", "test": 0.1}), CorpusError, "is empty (documents: train 1, valid 0, test 0)"),
    (
        parts(split={"kind": "source", "valid": 0.1}),
        ConfigError,
        "brings its own valid split (train 33, valid 1",
    ),
    (
        files({"train": "text.jsonl"}, split={"kind": "source"}),
        CorpusError,
        "brings train 33, valid 0, test 0 documents: train and at least one held-out split are wanted",
    ),
    (
        files({"valid": "text.jsonl"}, split={"kind": "source"}),
        CorpusError,
        "brings train 0, valid 33, test 0",
    ),
    (
        one(split={"kind": "tail", "valid": 12}),
        CorpusError,
        "nothing to train on: train 0, valid 12",
    ),
    (one(split={"kind": "tail", "valid": 13}), CorpusError, "nothing to train on"),
    (one(split={"kind": "tail", "valid": 0}), ConfigError, "holds nothing out; set split.valid"),
    (
        one(split={"kind": "tail", "valid": 1e-9, "test": 0.3}),
        CorpusError,
        "split 'valid' by tail is empty (train 8",
    ),
    (parts(split={"test": 200}), ConfigError, "split.test = 200 bytes needs split.kind = tail, not source"),
    (text(spilt={}), ConfigError, "unknown key 'spilt'; did you mean 'split'?"),
    (text(block_bytes=0), ConfigError, "block_bytes = 0: input should be greater than or equal to 1"),
    (text(drop="both", leakage=False), ConfigError, "drop = both needs leakage = true"),
    (text(drop_share=0.5), ConfigError, "drop_share = 0.5 belongs to drop = leakage or both, not none"),
    (
        files({"train": "one.txt", "valid": "same.txt"}, drop="duplicates"),
        CorpusError,
        "drops all 1 training doc",
    ),
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with sources that are good, bad and precious."""
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "text.jsonl", [raw for raw in talk(1, 60) if raw][:33])
    jsonl(tmp_path / "valid.jsonl", [b"V"])
    Path("bad.jsonl").write_text('{"text": "good"}\n{"text": \n')
    Path("one.txt").write_bytes(b"one document")
    Path("same.txt").write_bytes(b"one document")
    Path("empty.txt").touch()
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("precious")
    train(build(TokenizerConfig, BYTES, where="t"), iter(()), recipe={}).save(Path("bytes"))
    return tmp_path


@pytest.mark.parametrize(("tree", "kind", "message"), CASES, ids=[re.sub(r"\W+", "-", case[2])[:40] for case in CASES])
def test_settings_and_sources(place: Path, tree: dict[str, Any], kind: type[LmtrainError], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)) as caught:
        prepare.prepare(config(tree), place / "out")
    assert "\n" not in str(caught.value)
    assert not (place / "out").exists()


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("one.txt", "one.txt is a file; wanted a folder"),
        ("full", "full is a folder that holds no corpus; give a new or empty one"),
        ("one.txt/out", "cannot be written: Not a directory; give another folder"),
        ("x" * 300, "cannot be written: File name too long; give another folder"),
    ],
)
def test_places(place: Path, out: str, message: str, force: bool) -> None:
    with pytest.raises(CorpusError, match=re.escape(message)):
        prepare.prepare(config(text(split={"kind": "hash", "valid": 0.3})), Path(out), force=force)
    assert Path("full/thesis.txt").read_text() == "precious"
    assert Path("one.txt").read_bytes() == b"one document"


def test_a_negative_number_of_processes(place: Path) -> None:
    with pytest.raises(ConfigError, match="processes = -1; wanted 1 or more, or 0 for one a core"):
        prepare.prepare(config(text()), place / "out", processes=-1)


def test_damage_in_the_folder_of_work_is_named(place: Path) -> None:
    class Stop(BaseException):
        pass

    def stop(stage: str, done: int, total: int | None) -> None:
        if stage == "survey":
            raise Stop

    settings = config(text(split={"kind": "hash", "valid": 0.3}))
    with pytest.raises(Stop):
        prepare.prepare(settings, Path("out"), progress=stop)
    path = Path("out.partial/raw-00000.zst")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorpusError, match=r"raw-00000\.zst cannot be read .*; remove out\.partial and prepare again"):
        prepare.prepare(settings, Path("out"))


FULL = """
import json, resource, sys
from pathlib import Path
from lmtrain.config import build
from lmtrain.data.prepare import PrepareConfig, prepare
from lmtrain.errors import CorpusError

settings = build(PrepareConfig, json.loads(sys.argv[1]), where="test")
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    prepare(settings, Path("out"))
except CorpusError as error:
    print(error)
"""


@pytest.mark.parametrize("most", [0, 5000])
def test_no_room_is_told_and_mended(place: Path, most: int) -> None:
    """The system refuses files above a size, as a full disk would; afterwards the same command goes on."""
    tree = text(split={"kind": "hash", "valid": 0.3})
    result = subprocess.run(
        [sys.executable, "-c", FULL, json.dumps(tree), str(most)], capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r".*(cannot be written|no room).*: File too large.*\n", result.stdout), result
    assert prepare.prepare(config(tree), place / "out").fingerprint == prepare.prepare(config(tree), "b").fingerprint


def test_a_worker_that_dies_or_refuses_is_told(place: Path) -> None:
    found = [describe(number, 0, [b"x"], np.zeros(1, np.uint8)) for number in range(4)]
    tasks = [(number,) for number in range(4)]
    with (
        Workers(2) as workers,
        pytest.raises(CorpusError, match=r"a worker process of 2 died .* finished blocks are kept"),
    ):
        list(workers.map("tokens", die, tasks, found))
    with Workers(2) as workers, pytest.raises(TokenizerError, match=r"refused \d"):
        list(workers.map("tokens", refuse, tasks, found))
