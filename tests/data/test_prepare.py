"""`prepare` gives the same files for any number of processes, after kills, and beside what is there already."""

from __future__ import annotations

import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from lmtrain.data import blocks, prepare, workplace
from lmtrain.data.shards import DOCUMENT, open_corpus
from lmtrain.errors import CorpusError
from tests.data.failing import same
from tests.data.making import BYTES, config, files, jsonl, prose
from tests.data.test_duplicates import talk


def test_any_number_of_processes_gives_the_same_files(tmp_path: Path) -> None:
    documents = prose(0, 240)
    source = jsonl(tmp_path / "text.jsonl", documents)
    settings = config(
        {
            "source": source,
            "tokenizer": {"kind": "sentencepiece-unigram", "vocab": 300},
            "block_bytes": 40_000,
            "drop": "leakage",
            "drop_share": 0.5,
            "split": {"kind": "hash", "valid": 0.1, "test": 0.1},
        }
    )
    seen: list[tuple[str, int, int | None]] = []
    one = prepare.prepare(settings, tmp_path / "one", processes=1, progress=lambda *what: seen.append(what))
    three = prepare.prepare(settings, tmp_path / "three", processes=3)
    assert one.fingerprint == three.fingerprint
    assert files(tmp_path / "one") == files(tmp_path / "three")
    assert one.manifest["blocks"] > 5
    assert one.manifest["drop"]["leakage"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"text.jsonl", "one", "three"}  # no folder of work is left

    assert [stage for stage, done, total in seen if done == total] == [
        *("read", "survey", "leakage", "held-out", "tokenizer", "tokens")
    ]
    total = sum(map(len, documents))
    assert all(0 <= done <= total and whole in (None, total) for _, done, whole in seen)

    corpus = open_corpus(tmp_path / "one")
    corpus.verify()
    saw = one.manifest["tokenizer"]["saw"]
    assert saw["documents"] == one.manifest["counts"]["train"]["documents"]
    assert saw["bytes"] == one.manifest["counts"]["train"]["bytes"]
    assert saw["split"]["buckets"] == [[200, 1000]]


def test_blocks_end_with_the_document_that_fills_them(tmp_path: Path) -> None:
    sizes = [30, 80, 10, 99, 1, 500, 3, 4]
    documents = [bytes([65 + i]) * size for i, size in enumerate(sizes)]
    tree = {"source": jsonl(tmp_path / "t.jsonl", documents), "tokenizer": BYTES, "block_bytes": 100}
    settings = config({**tree, "split": {"kind": "hash", "test": 0.5}})
    prepare.prepare(settings, tmp_path / "out")
    found = [(tmp_path / "out" / f"documents-{n:05d}.bin").stat().st_size // DOCUMENT.itemsize for n in range(4)]
    assert found == [2, 2, 2, 2]  # 30 + 80; 10 + 99; 1 + 500; 3 + 4
    assert not (tmp_path / "out" / "documents-00004.bin").exists()


SCRIPT = """
import json, sys
from pathlib import Path
from lmtrain.config import build
from lmtrain.data.prepare import PrepareConfig, prepare

if __name__ == "__main__":
    def show(stage, done, total):
        print(stage, done, flush=True)

    settings = build(PrepareConfig, json.loads(sys.argv[1]), where="test")
    prepare(settings, Path(sys.argv[2]), processes=int(sys.argv[3]), progress=show)
"""


def start(folder: Path, tree: dict[str, Any], out: Path, processes: int) -> subprocess.Popen[str]:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    arguments = [sys.executable, str(script), json.dumps(tree), str(out), str(processes)]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_killed_at_many_instants_it_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    tree = {
        "source": jsonl(tmp_path / "text.jsonl", [b"%d: " % i + raw for i, raw in enumerate(talk(3, 400))]),
        "tokenizer": BYTES,
        "block_bytes": 8_000,
        "split": {"kind": "hash"},
    }
    wanted = prepare.prepare(config(tree), tmp_path / "wanted")
    assert wanted.manifest["blocks"] > 12

    # Kill -9 when so many lines of progress have been seen in a stage, and a little later, on fresh ground each time.
    random_delay = random.Random(0)
    kept = partial = tmp_path / "out.partial"
    tokens: dict[str, int] = {}
    for stage, after in [("survey", 2), ("leakage", 9), ("tokens", 2), ("tokens", 7), ("tokens", 11)]:
        child = start(tmp_path, tree, tmp_path / "out", 2)
        assert child.stdout is not None
        count = 0
        for line in child.stdout:
            count += line.split()[0] == stage
            if count == after:
                break
        time.sleep(random_delay.random() * 0.02)
        workers = psutil.Process(child.pid).children(recursive=True)
        child.send_signal(signal.SIGKILL)
        child.communicate()
        assert count == after, f"the child ended before {after} lines of {stage}"
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive, "workers outlive the preparation"
        assert partial.exists()
        assert not (tmp_path / "out").exists()
        # What was finished at an earlier kill is still the same file, not written again.
        assert all((kept / name).stat().st_ino == inode for name, inode in tokens.items())
        done = [path.stem.removeprefix("block-") for path in partial.glob("block-*.json")]
        tokens = {f"tokens-{number}.bin": (kept / f"tokens-{number}.bin").stat().st_ino for number in done}
        assert bool(tokens) == (stage == "tokens")
    result = prepare.prepare(config(tree), tmp_path / "out", processes=1)
    assert result.fingerprint == wanted.fingerprint
    assert files(tmp_path / "out") == files(tmp_path / "wanted")
    assert all((tmp_path / "out" / name).stat().st_ino == inode for name, inode in tokens.items())


class _Killed(BaseException):
    """Stands for kill -9: nothing of ours catches it."""


@pytest.mark.parametrize("change", ["none", "content", "shorter", "longer"])
def test_every_instant_of_progress_can_be_the_last(tmp_path: Path, change: str) -> None:
    """Stop at calls of progress from first to last; the source may have changed when the work goes on."""
    documents = talk(5, 24)
    source = {"kind": "files", "paths": [str(tmp_path / "t.jsonl")]}
    tree = {"source": source, "tokenizer": BYTES, "block_bytes": 2_000, "drop": "duplicates"}
    settings = config({**tree, "split": {"kind": "hash", "valid": 0.3}})
    later = {
        "none": documents,
        "content": [*documents[:20], b"other words", *documents[21:]],
        "shorter": documents[:18],
        "longer": [*documents, *talk(6, 9)],
    }[change]
    jsonl(tmp_path / "t.jsonl", later)
    wanted = prepare.prepare(settings, tmp_path / "wanted")

    for instant in range(0, 200, 4):
        jsonl(tmp_path / "t.jsonl", documents)
        out = tmp_path / f"out-{instant}"
        calls = 0

        def stop(stage: str, done: int, total: int | None, instant: int = instant) -> None:
            nonlocal calls
            if calls == instant:
                raise _Killed
            calls += 1

        try:
            prepare.prepare(settings, out, progress=stop)
        except _Killed:
            jsonl(tmp_path / "t.jsonl", later)
            assert prepare.prepare(settings, out).fingerprint == wanted.fingerprint, f"after {instant} calls"
            assert files(out) == files(tmp_path / "wanted")
        else:
            assert instant > 18, "too few instants for this to be a test"
            break


def test_a_source_that_grew_by_whole_blocks_is_planned_anew(tmp_path: Path) -> None:
    documents = [b"%099d" % i + b"." for i in range(8)]  # each fills a block, so every old block stays the same
    tree = {"source": jsonl(tmp_path / "t.jsonl", documents[:6]), "tokenizer": {"kind": "characters"}}
    settings = config({**tree, "block_bytes": 100, "split": {"kind": "tail", "valid": 0.25}})

    def stop(stage: str, done: int, total: int | None) -> None:
        if stage == "tokens" and done == 300:
            raise _Killed

    with pytest.raises(_Killed):
        prepare.prepare(settings, tmp_path / "out", progress=stop)
    assert len(list((tmp_path / "out.partial").glob("block-*.json"))) == 3
    jsonl(tmp_path / "t.jsonl", documents)
    found = prepare.prepare(settings, tmp_path / "out")
    assert found.fingerprint == prepare.prepare(settings, tmp_path / "wanted").fingerprint
    assert found.manifest["counts"]["train"]["documents"] == 6


def test_what_is_whole_is_published_and_what_is_damaged_is_redone(tmp_path: Path, monkeypatch: Any) -> None:
    source = jsonl(tmp_path / "t.jsonl", talk(7, 30))
    settings = config({"source": source, "tokenizer": BYTES, "block_bytes": 3_000})
    wanted = prepare.prepare(settings, tmp_path / "wanted")
    out, partial = tmp_path / "out", tmp_path / "out.partial"

    def die(*_: Any, **__: Any) -> None:
        raise _Killed

    with monkeypatch.context() as patch:  # killed between the manifest and the renaming
        patch.setattr(workplace.Workplace, "publish", die)
        with pytest.raises(_Killed):
            prepare.prepare(settings, out)
    (tmp_path / "t.jsonl").unlink()  # nothing is read again
    assert prepare.prepare(settings, out).fingerprint == wanted.fingerprint

    jsonl(tmp_path / "t.jsonl", talk(7, 30))
    out = tmp_path / "again"
    partial = tmp_path / "again.partial"
    with monkeypatch.context() as patch:  # killed before the index, then a finished block is damaged
        patch.setattr(prepare, "finish", die)
        with pytest.raises(_Killed):
            prepare.prepare(settings, out)
    assert not list(partial.glob("raw-*.zst"))  # raw text goes as soon as its tokens are there
    path = partial / "tokens-00001.bin"
    path.write_bytes(path.read_bytes()[:-1])
    assert prepare.prepare(settings, out).fingerprint == wanted.fingerprint
    open_corpus(out).verify()


def test_a_finished_corpus_is_left_refused_or_replaced(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "t.jsonl", talk(8, 60))
    tree = {"source": source, "tokenizer": BYTES}
    out = tmp_path / "out"
    first = prepare.prepare(config(tree), out)
    inode = (out / "manifest.json").stat().st_ino
    second = prepare.prepare(config(tree), out, processes=2)
    assert (first.reused, second.reused) == (False, True)
    assert "prepared already" in second.describe()
    assert second.fingerprint == first.fingerprint
    assert (out / "manifest.json").stat().st_ino == inode
    assert not (tmp_path / "out.partial").exists()

    other = config({**tree, "split": {"kind": "hash", "valid": 0.2}})
    with pytest.raises(
        CorpusError, match=r"prepared otherwise \(prepare\.split\.kind = 'auto' there, 'hash' here; .*valid"
    ):
        prepare.prepare(other, out)
    assert (out / "manifest.json").stat().st_ino == inode
    replaced = prepare.prepare(other, out, force=True)
    assert replaced.fingerprint != first.fingerprint
    assert {path.name for path in tmp_path.iterdir()} == {"t.jsonl", "out"}
    open_corpus(out).verify()
    # With force the same settings are made anew too: the text behind them may have changed.
    jsonl(tmp_path / "t.jsonl", talk(9, 60))
    assert prepare.prepare(other, out).fingerprint == replaced.fingerprint
    assert prepare.prepare(other, out, force=True).fingerprint not in (first.fingerprint, replaced.fingerprint)


@pytest.mark.parametrize("stage", ["leakage", "tokens"])
def test_an_unfinished_preparation_with_other_settings_is_kept_once_it_has_a_plan(tmp_path: Path, stage: str) -> None:
    source = jsonl(tmp_path / "t.jsonl", talk(8, 60))

    def stop(now: str, done: int, total: int | None) -> None:
        if now == stage:
            raise _Killed

    with pytest.raises(_Killed):
        prepare.prepare(config({"source": source, "tokenizer": BYTES}), tmp_path / "out", progress=stop)
    other = config({"source": source, "tokenizer": BYTES, "block_bytes": 1000})
    wanted = prepare.prepare(other, tmp_path / "wanted")
    if stage == "leakage":
        assert prepare.prepare(other, tmp_path / "out").fingerprint == wanted.fingerprint
        return
    with pytest.raises(
        CorpusError, match=r"unfinished preparation with other settings \(prepare\.block_bytes = 67108864"
    ):
        prepare.prepare(other, tmp_path / "out")
    assert prepare.prepare(other, tmp_path / "out", force=True).fingerprint == wanted.fingerprint


def test_two_preparations_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workplace, "PATIENCE", 0.1)
    settings = config({"source": jsonl(tmp_path / "t.jsonl", talk(8, 60)), "tokenizer": BYTES})
    with workplace.Workplace(tmp_path / "out", settings.model_dump(mode="json")).locked(force=False):
        for force in (False, True):
            with pytest.raises(CorpusError, match=r"another preparation of .*out is at work"):
                prepare.prepare(settings, tmp_path / "out", force=force)
    assert not prepare.prepare(settings, tmp_path / "out").reused


def test_a_worker_that_outlives_the_preparation_still_holds_the_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(handle, fcntl.LOCK_EX)
    found = [blocks.describe(number, 0, [b"x"], np.zeros(1, np.uint8)) for number in range(5)]
    other = os.open(path, os.O_RDWR)
    with blocks.Workers(2, lock=handle) as workers:
        results = dict(workers.map("tokens", same, [(number,) for number in range(5)], found))
        assert results == {number: number for number in range(5)}
        os.close(handle)  # as when this process is killed
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)
