"""metrics.jsonl: nothing lost, nothing twice, whatever is killed when."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.journal import ABANDONED, METRICS, Journal, Tail, read, rewind, strict


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read(path)]


def fill(folder: Path, last: int, *, resume: int = 0) -> None:
    log = Journal(folder, resume=resume)
    for step in range(resume + 1, last + 1):
        log.append({"kind": "train", "step": step, "train/loss": 1 / step})
    log.close()


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    log = Journal(tmp_path, resume=0)
    row = {"kind": "train", "step": 1, "train/loss": 0.1 + 0.2, "batch": "00ff", "text": "é\n\u2028\x00"}
    log.append(row)
    (got,) = read(tmp_path / METRICS)  # before close: flushed
    assert {k: got[k] for k in row} == row
    assert got["time"] > 1.7e9
    log.close()
    log.close()


def test_a_resumed_run_has_no_step_twice_and_loses_no_row(tmp_path: Path) -> None:
    fill(tmp_path, 10)
    before = {row["step"]: row for row in read(tmp_path / METRICS)}
    fill(tmp_path, 12, resume=6)
    assert steps(tmp_path / METRICS) == list(range(1, 13))
    assert list(read(tmp_path / METRICS))[:6] == [before[s] for s in range(1, 7)]
    abandoned = list(read(tmp_path / ABANDONED))
    assert abandoned == [{**before[s], "abandoned_at": 6} for s in range(7, 11)]
    fill(tmp_path, 3, resume=0)  # killed before its first checkpoint: everything is done again
    assert steps(tmp_path / METRICS) == [1, 2, 3]
    assert len(list(read(tmp_path / ABANDONED))) == 4 + 12


def test_resuming_at_the_end_moves_nothing(tmp_path: Path) -> None:
    fill(tmp_path, 5)
    raw = (tmp_path / METRICS).read_bytes()
    assert rewind(tmp_path / METRICS, step=5) == 0
    assert (tmp_path / METRICS).read_bytes() == raw
    assert sorted(p.name for p in tmp_path.iterdir()) == [METRICS]


@pytest.mark.parametrize("damage", [b'{"kind": "train", "ste', b"\xff\xfe\n", b"[1]\n", b"{}\n", b'{"step": "7"}\n'])
def test_a_damaged_line_is_dropped_when_resuming(tmp_path: Path, damage: bytes) -> None:
    fill(tmp_path, 4)
    with (tmp_path / METRICS).open("ab") as file:
        file.write(damage)
    assert steps(tmp_path / METRICS) == [1, 2, 3, 4]
    fill(tmp_path, 6, resume=4)
    assert steps(tmp_path / METRICS) == [1, 2, 3, 4, 5, 6]
    for line in (tmp_path / METRICS).read_bytes().splitlines():
        json.loads(line)


def test_a_kill_before_the_rename_leaves_the_old_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, 8)
    raw = (tmp_path / METRICS).read_bytes()

    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            rewind(tmp_path / METRICS, step=3)
    assert (tmp_path / METRICS).read_bytes() == raw
    assert rewind(tmp_path / METRICS, step=3) == 5
    assert steps(tmp_path / METRICS) == [1, 2, 3]


WRITER = """
import sys
from pathlib import Path
from lmtrain.journal import Journal
folder, resume = Path(sys.argv[1]), int(sys.argv[2])
log = Journal(folder, resume=resume)
for step in range(resume + 1, 10**9):
    log.append({"kind": "train", "step": step, "train/loss": 1 / step})
    print(step, flush=True)
"""


def test_kill_9_loses_no_row_that_was_written_and_doubles_none(tmp_path: Path) -> None:
    resume = 0
    for round_ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path), str(resume)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        told = [int(writer.stdout.readline()) for _ in range(200 * (round_ + 1))][-1]
        os.kill(writer.pid, signal.SIGKILL)
        rest = writer.stdout.read().split()
        writer.wait()
        told = int(rest[-1]) if rest else told
        seen = steps(tmp_path / METRICS)
        assert seen == list(range(1, len(seen) + 1))
        assert len(seen) >= told
        resume = told - 37  # the last checkpoint
    fill(tmp_path, resume + 5, resume=resume)
    assert steps(tmp_path / METRICS) == list(range(1, resume + 6))


def test_numbers_that_json_does_not_have_become_null(tmp_path: Path) -> None:
    values = {
        "nan": math.nan,
        "inf": [math.inf, -math.inf, 1.5],
        "numpy": np.float32(np.nan),
        "count": np.int64(7),
        "torch": torch.tensor(2.5),
        "path": Path("a") / "b",
        "tuple": (1, None, True),
    }
    assert strict(values) == {
        "nan": None,
        "inf": [None, None, 1.5],
        "numpy": None,
        "count": 7,
        "torch": 2.5,
        "path": "a/b",
        "tuple": [1, None, True],
    }
    log = Journal(tmp_path, resume=0)
    log.append({"step": 1, "kind": "train", **values})

    def refuse(text: str) -> None:
        raise AssertionError(f"{text} is not JSON")

    json.loads((tmp_path / METRICS).read_text(), parse_constant=refuse)


@settings(max_examples=60, deadline=None)
@given(cuts=st.lists(st.integers(0, 400), max_size=8))
def test_a_tail_gives_every_row_once_however_the_file_grows(cuts: list[int]) -> None:
    rows = [{"step": i, "text": "é" * (i % 5)} for i in range(12)]
    raw = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    marks = sorted({min(c, len(raw)) for c in cuts} | {0, len(raw)})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / METRICS
        path.touch()
        tail = Tail(path)
        got = []
        for start, stop in itertools.pairwise(marks):
            with path.open("ab") as file:
                file.write(raw[start:stop])
            whole = raw[:stop].count(b"\n")
            got += list(tail.rows())
            assert len(got) == whole
        tail.close()
    assert [row for _, row in got] == rows
    for at, row in got:
        assert json.loads(raw[at:].split(b"\n")[0]) == row
