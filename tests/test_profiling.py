"""A file PROFILE is seen, agreed on, obeyed and removed; a trace that fails costs nothing but a line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lmtrain import profiling
from lmtrain.profiling import PROFILE_FILE, Profile, ProfileConfig
from lmtrain.protocol import Place
from tests.engine.jobs import engine_for, one_step, small_model
from tests.fake_ranks import engines
from tests.house import config, lmtrain
from tests.spawn import spawn


def steps(tracer: Profile, engine: Any, first: int, last: int) -> None:
    """As the loop does: work, then the boundary. What is multiplied tells the step."""
    for step in range(first, last + 1):
        with torch.profiler.record_function(f"work of step {step}"):
            torch.ones(step, step) @ torch.ones(step, 1)
        tracer(engine, {"step": step})


def worked(path: Path) -> list[int]:
    """The steps in a trace."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {event["name"] for event in events if event.get("cat") == "user_annotation"}
    return sorted(int(name.rsplit(" ", 1)[1]) for name in names if name.startswith("work of step "))


def make(folder: Path, **settings: Any) -> tuple[Profile, list[str]]:
    said: list[str] = []
    return Profile(ProfileConfig(**{"every": 2, **settings}), folder, note=said.append), said


def test_the_next_steps_are_traced_and_the_file_is_gone(tmp_path: Path) -> None:
    (engine,) = engines(1)
    tracer, said = make(tmp_path, steps=3)
    steps(tracer, engine, 1, 4)
    assert not (tmp_path / "profile").exists()
    (tmp_path / PROFILE_FILE).touch()
    steps(tracer, engine, 5, 6)  # looked for at step 6
    assert not (tmp_path / PROFILE_FILE).exists()
    steps(tracer, engine, 7, 12)
    (trace,) = (tmp_path / "profile").rglob("*.*")
    assert trace == tmp_path / "profile" / "step-00000007" / "rank-00000.json.gz"
    assert worked(trace) == [7, 8, 9]
    assert said == [f"tracing steps 7 to 9 of all ranks into {trace.parent}"]


def test_the_file_may_say_how_many_and_ask_again(tmp_path: Path) -> None:
    (engine,) = engines(1)
    tracer, _ = make(tmp_path)
    (tmp_path / PROFILE_FILE).write_text("2\n")
    steps(tracer, engine, 1, 3)
    (tmp_path / PROFILE_FILE).write_text("1")  # while the first trace is being made
    steps(tracer, engine, 4, 8)
    traces = sorted((tmp_path / "profile").rglob("*.gz"))
    assert [worked(trace) for trace in traces] == [[3, 4], [5]]


def test_every_rank_traces_the_same_steps_or_rank_0_alone(tmp_path: Path) -> None:
    """Rank 1's part, which sees no file itself: a process has one profiler, so here the other rank's word is given."""
    (engine,) = engines(1)
    engine.rank = 1
    engine.agree = lambda flag: max(flag, 2)  # type: ignore[method-assign]
    for which in ("all", "first"):
        folder = tmp_path / which
        tracer, said = make(folder, ranks=which, every=4)
        steps(tracer, engine, 1, 7)
        assert said == []
        found = [(path.name, worked(path)) for path in folder.rglob("*.gz")]
        assert found == ([("rank-00001.json.gz", [5, 6])] if which == "all" else [])


@pytest.mark.parametrize("fault", ["start", "stop", "disk"])
def test_a_trace_that_fails_is_told_and_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    (engine,) = engines(1)
    tracer, said = make(tmp_path, steps=1)

    ends = profiling.profile.stop

    def refuse(profiler: Any) -> None:
        if fault == "stop":
            ends(profiler)
        raise RuntimeError("no\nprofiler here")

    if fault == "disk":
        (tmp_path / "profile").write_text("not a folder")
    else:
        monkeypatch.setattr(profiling.profile, fault, refuse)
    (tmp_path / PROFILE_FILE).touch()
    steps(tracer, engine, 1, 6)
    assert not (tmp_path / PROFILE_FILE).exists()
    assert len(said) == 2
    assert said[1].endswith("training goes on")
    assert "\n" not in said[1]
    monkeypatch.undo()
    if fault == "disk":
        (tmp_path / "profile").unlink()
    (tmp_path / PROFILE_FILE).touch()
    steps(tracer, engine, 7, 9)
    assert [worked(trace) for trace in (tmp_path / "profile").rglob("*.gz")] == [[9]]


def test_a_file_that_cannot_be_removed_begins_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its trace would begin again and again."""
    (engine,) = engines(1)
    tracer, said = make(tmp_path)

    def refuse(path: Path) -> None:
        raise PermissionError(f"not yours: {path.name}")

    monkeypatch.setattr(Path, "unlink", refuse)
    (tmp_path / PROFILE_FILE).touch()
    steps(tracer, engine, 1, 8)
    assert not (tmp_path / "profile").exists()
    (line,) = said
    assert "cannot be removed (not yours: PROFILE)" in line


def test_the_end_of_a_run_ends_its_trace(tmp_path: Path) -> None:
    (engine,) = engines(1)
    tracer, _ = make(tmp_path, steps=50)
    (tmp_path / PROFILE_FILE).touch()
    with tracer:
        steps(tracer, engine, 1, 5)
    assert [worked(trace) for trace in (tmp_path / "profile").rglob("*.gz")] == [[3, 4, 5]]
    assert not torch.autograd._profiler_enabled()


def traced(place: Place, folder: Path) -> list[str]:
    """A real engine at stage 2; rank 0 alone sees the file come, before step 3."""
    torch.set_num_threads(1)
    engine = engine_for(small_model("rnn"), place, micro=6, zero_stage=2)
    said: list[str] = []
    with Profile(ProfileConfig(every=2, steps=2), folder, note=said.append) as tracer:
        for step in range(1, 8):
            if step == 3 and place.rank == 0:
                (folder / PROFILE_FILE).touch()
            with torch.profiler.record_function(f"work of step {step}"):
                one_step(engine, step, micro=6)
            tracer(engine, {"step": step})
    engine.close()
    return said


@pytest.mark.slow
def test_two_ranks_trace_the_same_steps(tmp_path: Path) -> None:
    said = spawn("tests.test_profiling:traced", world=2, timeout=400, folder=tmp_path)
    assert [len(lines) for lines in said] == [1, 0]
    assert not (tmp_path / PROFILE_FILE).exists()
    traces = sorted((tmp_path / "profile" / "step-00000005").iterdir())
    assert [path.name for path in traces] == ["rank-00000.json.gz", "rank-00001.json.gz"]
    for path in traces:
        assert worked(path) == [5, 6]
        names = {event["name"] for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]}
        assert any("all_reduce" in name or "reduce_scatter" in name for name in names), "the collectives are in it"


def test_a_run_is_watched_and_traced(trained: Path, tmp_path: Path) -> None:
    """Through the command line: rows of all ranks, and a trace, in the run folder."""
    sections = {"watch": {"every": 2}, "profile": {"every": 1, "steps": 2}}
    path = config(tmp_path, data={"corpus": str(trained / "corpus")}, **sections)
    folder = tmp_path / "runs" / "tiny"
    folder.mkdir(parents=True)
    (folder / PROFILE_FILE).touch()
    ran = lmtrain("train", path)
    assert ran.code == 0, ran.err
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "ranks"] == [2, 4, 6]
    assert not (folder / PROFILE_FILE).exists()
    (trace,) = (folder / "profile").rglob("*.gz")
    assert trace.parent.name == "step-00000002"
    names = {event["name"] for event in json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]}
    assert any("mm" in name for name in names)
