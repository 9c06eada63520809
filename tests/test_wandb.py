"""The W&B process against a server on the loopback that is well, unreachable, deaf, or dies in the middle."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from lmtrain import follower, tracker
from lmtrain.console import Console
from lmtrain.journal import METRICS, read
from lmtrain.protocol import Score
from lmtrain.stopping import STOP_FILE
from lmtrain.tracker import IDENTITY, Tracker, WandbConfig
from tests.spawn import ROOT, free_port
from tests.test_tracker import Result, record
from tests.wandb_server import Run, WandbServer

pytestmark = pytest.mark.slow

KEY = "0123456789" * 4


@pytest.fixture
def server() -> Iterator[WandbServer]:
    with WandbServer() as server:
        yield server


PATIENCE = 300.0


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine is no failure: only what is bounded on purpose, below, gets the real bounds."""
    monkeypatch.setattr(follower, "_LOCAL_SECONDS", PATIENCE)
    monkeypatch.setattr(tracker, "URGENT_SECONDS", PATIENCE)


def environment(home: Path, url: str | None, **more: str) -> dict[str, str]:
    """As a user has it, without what the one who runs the tests has set."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "NETRC"}
    return {**clean, "HOME": str(home), **({"WANDB_BASE_URL": url, "WANDB_API_KEY": KEY} if url else {}), **more}


class Watch:
    """A tracker, what it printed, and how long its calls took."""

    def __init__(self, folder: Path, variables: dict[str, str], **config: Any) -> None:
        self.folder, self.out = folder, io.StringIO()
        settings = WandbConfig(**{"project": "p", "timeout": PATIENCE, **config})
        self.tracker = Tracker(folder, settings, rank=0, environment=variables, console=Console(file=self.out))
        self.slowest = 0.0

    def start(self, *, step: int = 0, steps: int = 1000, **more: Any) -> None:
        self.call("start", step=step, steps=steps, config=more.pop("config", {}), facts=more.pop("facts", {}), **more)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            self.call("log_step", record(step, steps=1000))

    def call(self, name: str, *args: Any, **kwargs: Any) -> None:
        began = time.process_time()  # what it costs the training process
        getattr(self.tracker, name)(*args, **kwargs)
        self.slowest = max(self.slowest, time.process_time() - began)

    def finish(self, **how: Any) -> float:
        began = time.monotonic()
        self.tracker.finish(**how)
        return time.monotonic() - began

    @property
    def said(self) -> str:
        return self.out.getvalue()

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.said.splitlines() if "warning" in line]

    @property
    def sync_line(self) -> list[str]:
        """The last `wandb sync` that was printed."""
        found = re.findall(r"wandb (sync .*)$", self.said, re.MULTILINE)
        assert found, self.said
        return shlex.split(found[-1])


def upload(line: list[str], variables: dict[str, str], server: WandbServer) -> None:
    """Do what the line says, against a server that is well."""
    command = [sys.executable, "-m", "wandb", *line]
    online = {**variables, "WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY}
    done = subprocess.run(command, env=online, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def the(server: WandbServer) -> Run:
    (run,) = server.runs.values()
    return run


def workers(folder: Path) -> list[psutil.Process]:
    """W&B processes, ours and wandb-core, that work in a run folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.cmdline())
            if ("lmtrain.tracker" in line or "wandb-core" in line) and any(
                file.path.startswith(f"{folder}/") for file in process.open_files()
            ):
                found.append(process)
    return found


def nothing_left(folder: Path) -> bool:
    """No such process stays: one that was left behind by a killed trainer may take a while to end by itself."""
    stop = time.monotonic() + 2 * PATIENCE
    while workers(folder):
        if time.monotonic() > stop:
            return False
        time.sleep(0.05)
    return True


def test_a_server_that_is_well_gets_everything_but_secrets(server: WandbServer, tmp_path: Path) -> None:
    secret = "correct-horse-battery"
    variables = environment(tmp_path, server.url, HF_TOKEN=secret)
    folder = tmp_path / "run"
    run = Watch(folder, variables, entity="tester", group="g", tags=("a", "b"), name="n")
    run.start(
        config={"train": {"steps": 9, "tokens": None}, "prepare": {"token": "sesame-open", "url": f"x?{secret}"}},
        facts={"commit": "abc", "versions": {"torch": "2.13.0"}, "hashes": {"corpus": "00ff"}},
        deepspeed={"zero_optimization": {"stage": 2}},
        bytes_per_symbol=4.0,
    )
    run.steps(1, 9)
    for step, nats in ((3, 30.0), (6, 10.0), (9, 20.0)):
        run.call("log_eval", "valid", Result(Score(nats, 10.0, 0.0, 30.0)), step=step, tokens=100 * step)
    run.call("samples", ["text", "nats"], [["to be or", 1.5]], step=9)
    table = {"columns": ["rank", "host", "gpu"], "rows": [[0, "a", None], [1, "b", None]], "ranks/ratio": 1.25}
    run.call("ranks", table, step=9)
    run.call("alert", "training diverged", "lower optimizer.lr")
    run.call("preempting")
    server.wait(lambda: server.runs and the(server).preempting, PATIENCE)
    run.finish(stopped="SIGTERM", summary={"best": 1.0})

    got = the(server)
    assert run.warnings == ["warning: training diverged: lower optimizer.lr"]
    assert f"W&B: {server.url}/tester/p/runs/{got.name}" in run.said
    assert json.loads((folder / IDENTITY).read_text()) == {"id": got.name}
    first = got.upserts[0]
    assert (first["project"], first["entity"], first["groupName"], first["displayName"]) == ("p", "tester", "g", "n")
    assert first["tags"] == ["a", "b"]
    assert got.values("train/loss") == [(s, pytest.approx(1 / s)) for s in range(1, 10)]
    for name in ("train/grad_norm", "train/lr", "train/tokens", "train/bits_per_byte", "perf/tokens_per_s"):
        assert len(got.values(name)) >= 9, name
    assert got.values("eval/valid/loss") == [(3, 3.0), (6, 1.0), (9, 2.0)]
    assert [step for step, _ in got.values("eval/valid/perplexity")] == [3, 6, 9]
    assert [step for step, _ in got.values("eval/valid/bits_per_byte")] == [3, 6, 9]
    assert got.values("train/tokens")[-1] == (9, 900)
    assert (got.summary["best/valid/loss"], got.summary["best/valid/step"], got.summary["best"]) == (1.0, 6, 1.0)
    assert got.summary["eval/valid/loss"] == 2.0
    config = {key: value["value"] for key, value in got.config.items()}
    assert config["train"] == {"steps": 9, "tokens": None}
    assert config["deepspeed"] == {"zero_optimization": {"stage": 2}}
    assert config["facts"]["commit"] == "abc"
    metrics = {m.get("1") or m.get("2"): m for m in config["_wandb"]["m"]}  # 1 name, 2 glob, 5 index of the x-axis
    assert {"step", "train/tokens", "train/*", "perf/*", "eval/*"} <= set(metrics)
    axis = config["_wandb"]["m"].index(metrics["step"]) + 1
    assert all(metrics[name]["5"] == axis for name in ("train/tokens", "train/*", "perf/*", "eval/*"))
    (table,) = [json.loads(raw) for name, raw in got.files.items() if name.startswith("media/table/samples")]
    assert table == {"columns": ["text", "nats"], "data": [["to be or", 1.5]]}
    (table,) = [json.loads(raw) for name, raw in got.files.items() if name.startswith("media/table/ranks")]
    assert table == {"columns": ["rank", "host", "gpu"], "data": [[0, "a", None], [1, "b", None]]}
    assert got.values("ranks/ratio") == [(9, 1.25)]
    assert [(a["title"], a["text"], a["severity"]) for a in got.alerts] == [
        ("training diverged", "lower optimizer.lr", "ERROR")
    ]
    assert got.preempting
    assert got.exit_code == 75
    everything = b"".join(server.bodies) + b"".join(p.read_bytes() for p in folder.rglob("*") if p.is_file())
    for hidden in (KEY, secret, "sesame-open"):
        assert hidden.encode() not in everything
    assert nothing_left(folder)


TRAINER = """
import json, os, sys, time
from pathlib import Path
from lmtrain.tracker import Tracker, WandbConfig
from tests.test_tracker import record
folder, done, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
tracker = Tracker(folder, WandbConfig(project="p"), rank=0, environment=os.environ)
tracker.start(step=done, steps=1000, config={}, facts={})
for step in range(done + 1, last + 1):
    tracker.log_step(record(step, steps=1000))
    if step % 10 == 0:
        tracker.ranks({"columns": ["rank"], "rows": [[0]], "ranks/ratio": float(step)}, step=step)
print("written", flush=True)
time.sleep(600)
"""


def test_a_run_killed_with_9_goes_on_as_the_same_run(server: WandbServer, tmp_path: Path) -> None:
    variables = {**environment(tmp_path, server.url), "PYTHONPATH": str(ROOT)}
    folder = tmp_path / "run"
    command = [sys.executable, "-c", TRAINER, str(folder), "0", "40"]
    trainer = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, cwd=tmp_path)
    assert trainer.stdout is not None
    assert trainer.stdout.readline() == b"written\n"
    server.wait(lambda: server.runs and the(server).count("wandb-history.jsonl") > 0, PATIENCE)
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait()

    run = Watch(folder, variables)  # at once: the old process may still be sending
    run.start(step=25)
    run.steps(26, 50)
    run.finish()
    got = the(server)
    assert run.warnings == []
    losses = dict(got.values("train/loss"))
    assert losses == {step: pytest.approx(1 / step) for step in range(1, 51)}  # none dropped, in spite of the resume
    assert [row["step"] for row in read(folder / METRICS) if row["kind"] == "train"] == list(range(1, 51))
    assert {(10, 10.0), (20, 20.0)} <= set(got.values("ranks/ratio"))
    assert got.exit_code == 0
    assert nothing_left(folder)


def test_what_a_server_missed_is_sent_at_the_next_start(server: WandbServer, tmp_path: Path) -> None:
    variables = environment(tmp_path, server.url)
    folder = tmp_path / "run"
    disabled = Watch(folder, variables, mode="disabled")  # stands for any outage
    disabled.start()
    disabled.steps(1, 30)
    disabled.finish()
    run = Watch(folder, {**variables, "WANDB_RUN_ID": "later"})
    run.start(step=30)
    run.steps(31, 35)
    run.finish()
    assert [step for step, _ in server.runs["later"].values("train/loss")] == list(range(1, 36))


def test_without_a_key_all_is_kept_for_wandb_sync(server: WandbServer, tmp_path: Path) -> None:
    variables = environment(tmp_path, None)
    folder = tmp_path / "run"
    for done in (0, 20):
        run = Watch(folder, variables)
        run.start(step=done)
        run.steps(done + 1, done + 20)
        run.finish()
        assert run.warnings == []
        assert Path(run.sync_line[-1]).parent == folder / follower.FOLDER
    upload(run.sync_line, variables, server)  # the newest one holds the whole run
    assert [step for step, _ in the(server).values("train/loss")] == list(range(1, 41))
    assert the(server).name == json.loads((folder / IDENTITY).read_text())["id"]


def test_no_server_stops_or_delays_training(
    tmp_path: Path, server: WandbServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens; somebody listens and never answers; a server dies; our process dies; Stop is pressed.

    All at once, for each takes its time.
    """
    with WandbServer() as deaf, WandbServer() as mortal, WandbServer() as bereft, WandbServer() as pressed:
        deaf.hang()
        pressed.stopping.set()
        urls = {
            "closed": f"http://127.0.0.1:{free_port()}",
            "deaf": deaf.url,
            "mortal": mortal.url,
            "bereft": bereft.url,
            "pressed": pressed.url,
        }
        runs: dict[str, Watch] = {}
        for name, url in urls.items():
            timeout = 12.0 if name in {"closed", "deaf"} else PATIENCE
            runs[name] = Watch(tmp_path / name, environment(tmp_path, url), timeout=timeout)
            runs[name].start()
            runs[name].steps(1, 20)
        for living in (mortal, bereft):
            living.wait(lambda s=living: s.runs and the(s).count("wandb-history.jsonl") > 0, PATIENCE)
        mortal.die()
        (ours,) = [p for p in workers(tmp_path / "bereft") if "wandb-core" not in " ".join(p.cmdline())]
        ours.kill()
        for run in runs.values():
            run.steps(21, 40)
        deadline = time.monotonic() + PATIENCE
        lost = ("closed", "deaf", "bereft")
        while not (tmp_path / "pressed" / STOP_FILE).exists() or not all("wandb sync" in runs[n].said for n in lost):
            assert time.monotonic() < deadline, {n: r.said for n, r in runs.items()}
            time.sleep(0.05)
        for run in runs.values():
            run.steps(41, 45)
        assert "stop was pressed" in runs["pressed"].said
        descendants = {p.pid for p in psutil.Process().children(recursive=True)}
        here = workers(tmp_path)
        assert len(here) >= len(urls)
        assert not descendants & {p.pid for p in here}  # out of reach of a launcher that ends a rank's children
        monkeypatch.setattr(tracker, "URGENT_SECONDS", 5.0)
        took = runs["mortal"].finish(stopped="SIGTERM")
        for run in runs.values():
            run.finish()

    assert runs.pop("pressed").warnings == []
    for name, run in runs.items():
        assert run.slowest < 1.0, name
        assert len(run.warnings) == 1, run.warnings  # reported once
        assert [row["step"] for row in read(run.folder / METRICS) if row["kind"] == "train"] == list(range(1, 46))
        assert nothing_left(run.folder)
        variables = environment(tmp_path, None)
        upload(run.sync_line, variables, server)
        name_there = json.loads((run.folder / IDENTITY).read_text())["id"]
        sent = [step for step, _ in server.runs[name_there].values("train/loss")]
        assert sent == list(range(1, len(sent) + 1)), name
        assert len(sent) == 45 or (name == "mortal" and len(sent) >= 40), name  # it had 5 seconds for the last rows
    assert "12 s to start" in runs["deaf"].warnings[0]
    assert "ended by itself" in runs["bereft"].warnings[0]
    assert "did not take everything" in runs["mortal"].warnings[0]
    assert took < 5.0 + 2 * follower._TEARDOWN_SECONDS + 60  # 5 on an idle machine
