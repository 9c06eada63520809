"""Watching a run: the console, metrics.jsonl (the truth) and Weights & Biases (a follower that may be down).

W&B runs in a process of its own that reads metrics.jsonl as it grows (`follow`, below). So nothing that W&B does, be it
a crash, a server that is unreachable, hangs or dies, or a Stop pressed in its UI, can touch the training process; a run
that was cut off sends at its next start what the server has not got; and start and end are bounded, for a process can
be killed. This file is the only one that imports wandb, and only in that process. Names of metrics: docs/metrics.md.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil

from lmtrain.console import Console
from lmtrain.errors import EXIT_STOPPED
from lmtrain.follower import (
    FOLDER,
    IDENTITY,
    Follower,
    WandbConfig,
    environment_settings,
    job,
    resolve_mode,
    scrub,
    secrets_in,
)
from lmtrain.journal import METRICS, Journal, Tail, strict

if TYPE_CHECKING:
    from lmtrain.hardware import Peak

__all__ = ["IDENTITY", "Tracker", "WandbConfig", "environment_settings"]

STOP_FILE = "STOP"
URGENT_SECONDS = 8.0
"""What W&B may take to finish when the run was asked to stop: those who ask kill half a minute later."""
_ORPHAN_SECONDS = 10.0
_POLL_SECONDS = 0.5
_PLOTTED = {"train", "eval", "save", "load"}


class Tracker:
    """Tells everyone who watches the run, on rank 0; on other ranks every method does nothing.

    folder: the run folder. environment: the process's variables, for W&B. A context manager: an exception that leaves
    it finishes the run with that exception's exit code.
    """

    def __init__(
        self,
        folder: Path,
        config: WandbConfig,
        *,
        rank: int,
        environment: Mapping[str, str],
        console: Console | None = None,
    ) -> None:
        self._folder, self._config, self._environment = folder, config, environment
        self._silent = rank != 0
        self._console = console if console is not None or self._silent else Console()
        self._journal: Journal | None = None
        self._follower: Follower | None = None
        self._window: list[Mapping[str, Any]] = []
        self._log_every, self._flops, self._peak, self._bytes = 1, 0.0, math.inf, 0.0
        self._dims, self._offset = 0.0, 0.0
        self._step = 0
        self._seconds: float | None = None
        self._stopping = False

    def start(
        self,
        *,
        step: int,
        steps: int,
        config: Mapping[str, Any],
        facts: Mapping[str, Any],
        deepspeed: Mapping[str, Any] | None = None,
        log_every: int = 1,
        flops_per_symbol: float = 0.0,
        peak: Peak | None = None,
        bytes_per_symbol: float = 0.0,
        dims_per_symbol: float = 0.0,
        offset_per_symbol: float = 0.0,
    ) -> None:
        """Begin, or go on after `step` of `steps`: rows of later steps leave metrics.jsonl.

        config: the resolved config. facts: commit, versions, hashes, layout. log_every: steps a row. flops_per_symbol
        and peak (of the whole job) give the MFU; bytes_per_symbol (the train split's mean) bits per byte, and
        dims_per_symbol with offset_per_symbol (nats) bits per dimension. 0: not known.
        """
        if self._silent:
            return
        assert self._console is not None
        self._step, self._log_every, self._flops, self._bytes = step, log_every, flops_per_symbol, bytes_per_symbol
        self._dims, self._offset = dims_per_symbol, offset_per_symbol
        self._peak = peak.flops if peak is not None else math.inf
        self._journal = Journal(self._folder, resume=step)
        hidden = secrets_in(self._environment)
        self._append({"kind": "start", "step": step, "steps": steps, "facts": scrub(strict(facts), hidden)})
        self._console.start(step=step, steps=steps, meaning=peak.meaning if peak is not None else "MFU")
        mode = resolve_mode(self._config, self._environment)
        if mode == "disabled":
            return
        everything = {**config, "deepspeed": deepspeed, "facts": facts}
        told = job(self._folder, self._config, self._environment, offset=self._journal.size)
        self._follower = Follower(
            {**told, "config": scrub(strict(everything), hidden)},
            mode=mode,
            environment=self._environment,
            timeout=self._config.timeout,
            say=self._console.say,
            warn=self._console.warn,
        )

    def log_step(self, record: Mapping[str, Any]) -> None:
        """One step of the loop. Every `log_every` steps, at the end, and when a step was skipped, a row is written.

        A row's loss is total nats / total weight of its steps, skipped ones left out; its rates are over its steps.
        """
        if self._silent:
            return
        assert self._console is not None
        self._window.append(record)
        step, last = record["step"], record["step"] >= record["steps"]
        if step % self._log_every and record["applied"] and not last:
            return
        row = self._row(self._window)
        self._window = []
        self._append(row)
        self._step = step
        seconds = row["perf/step_seconds"]
        self._seconds = seconds if self._seconds is None else 0.8 * self._seconds + 0.2 * seconds
        self._console.step(strict(row), eta=(record["steps"] - step) * self._seconds)

    def _row(self, window: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        last = window[-1]
        counted = [r for r in window if r["applied"]]
        weight = sum(r["step_tokens"] for r in counted)
        loss = math.nan
        if len(counted) == 1:
            loss = counted[0]["loss"]  # to the last bit
        elif weight:
            loss = sum(r["loss"] * r["step_tokens"] for r in counted) / weight
        seconds = max(sum(r["step_seconds"] for r in window), 1e-9)
        rate = sum(r["step_tokens"] for r in window) / seconds
        row = {
            "kind": "train",
            "step": last["step"],
            "train/loss": loss,
            "train/grad_norm": last["grad_norm"],
            "train/lr": last["lr"],
            "train/tokens": last["tokens"],
            "train/skipped": last["skipped"],
            "train/loss_scale": last["loss_scale"],
            "perf/tokens_per_s": rate,
            "perf/step_seconds": seconds / len(window),
            "perf/data_wait": sum(r["data_wait"] for r in window) / seconds,
            "batch": last.get("batch"),
        }
        if self._bytes:
            row["train/bits_per_byte"] = loss / (math.log(2) * self._bytes)
        if self._dims:
            row["train/bits_per_dim"] = (loss + self._offset) / (math.log(2) * self._dims)
        if self._flops and math.isfinite(self._peak):
            row["perf/mfu"] = rate * self._flops / self._peak
        return row

    def log_eval(self, name: str, result: Any, *, step: int, tokens: int) -> None:
        """A held-out result: `result.score` (protocol.Score); what else the dataclass has goes to metrics.jsonl.

        A result may have a `perplexity` of its own, None where the score's is none: of densities of real numbers.
        """
        if self._silent:
            return
        assert self._console is not None
        score = result.score
        row: dict[str, Any] = {"kind": "eval", "step": step, "train/tokens": tokens, "set": name}
        for key, value in (
            ("loss", score.nats_per_symbol),
            ("perplexity", getattr(result, "perplexity", score.perplexity)),
            ("word_perplexity", score.word_perplexity),
            ("bits_per_byte", score.bits_per_byte),
            ("bits_per_dim", score.bits_per_dim),
            ("kl", getattr(result, "kl", None)),
        ):
            if value is not None:
                row[f"eval/{name}/{key}"] = value
        if dataclasses.is_dataclass(result) and not isinstance(result, type):
            row = {**dataclasses.asdict(result), **row}
        self._append(row, durable=True)
        self._console.eval(name, strict(row))

    def log_save(self, told: Mapping[str, Any]) -> None:
        """A checkpoint that was saved, or was not: what `Checkpoints` tells its `watch`."""
        row = {key: told[key] for key in ("step", "best", "background", "bytes", "failed")}
        row |= {"kind": "save", "perf/save_seconds": told["seconds"], "perf/save_blocked": told["blocked"]}
        if told["failed"] is None:
            row["perf/save_mb_per_s"] = told["bytes"] / 1e6 / max(told["writing"], 1e-9)
        self._append(row)
        if told["failed"] is not None:
            self.alert("a checkpoint was not saved, training goes on", told["failed"])

    def log_load(self, told: Mapping[str, Any]) -> None:
        """The checkpoint that the run goes on from: `Checkpoints.loaded`."""
        rate = told["bytes"] / 1e6 / max(told["seconds"], 1e-9)
        row = {"kind": "load", "step": told["step"], "bytes": told["bytes"]}
        self._append({**row, "perf/load_seconds": told["seconds"], "perf/load_mb_per_s": rate})

    def samples(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, step: int) -> None:
        """A table of samples."""
        self._append({"kind": "samples", "step": step, "columns": list(columns), "rows": [list(r) for r in rows]})

    def picture(self, path: Path, *, caption: str, step: int) -> None:
        """An image file in the run folder."""
        row = {"kind": "picture", "step": step, "path": str(path.relative_to(self._folder)), "caption": caption}
        self._append(row)

    def ranks(self, table: Mapping[str, Any], *, step: int) -> None:
        """How every rank fares: `columns`, `rows` and what was made of them (lmtrain.fleet)."""
        self._append({"kind": "ranks", "step": step, **table})

    def alert(self, title: str, text: str) -> None:
        """Something that a person should look at, such as divergence."""
        if self._console is not None:
            self._console.warn(f"{title}: {text}")
        self._append({"kind": "alert", "step": self._step, "title": title, "text": text}, durable=True)

    def preempting(self) -> None:
        """The run was asked to stop; it will be started again."""
        self._stopping = True
        self._append({"kind": "preempting", "step": self._step}, durable=True)

    def finish(
        self, *, stopped: str | None = None, summary: Mapping[str, Any] | None = None, exit_code: int | None = None
    ) -> None:
        """The end: rows on the disk, W&B given its bounded time. summary: the best value and the like. Once only."""
        if self._journal is None or self._console is None:
            return
        self._stopping = self._stopping or stopped is not None
        code = exit_code if exit_code is not None else EXIT_STOPPED if stopped else 0
        if self._window and code == 0:  # a run that ended early, between two rows
            self._append(self._row(self._window))
            self._window = []
        row = {"kind": "finish", "step": self._step, "exit_code": code, "stopped": stopped, "summary": summary or {}}
        self._append(row, durable=True)
        self._journal.close()
        self._journal = None
        self._console.stop()
        if self._follower is not None:
            self._follower.finish(exit_code=code, timeout=URGENT_SECONDS if self._stopping else None)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish(exit_code=None if error is None else int(getattr(error, "exit_code", 1)))

    def _append(self, row: Mapping[str, Any], *, durable: bool = False) -> None:
        if self._journal is not None:
            self._step = max(self._step, row["step"])
            self._journal.append(row, durable=durable)


# ---------------------------------------------------------------------- below: the W&B process, and nothing else


def follow() -> int:
    """The W&B process: reads its job and then its end from stdin, rows from metrics.jsonl; answers on stdout.

    The end is `{"exit_code": n}`, or the parent's death, after which it has 10 seconds. Signals are left to the parent.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what wandb prints goes to the log

    def tell(**news: Any) -> None:
        print(json.dumps(news), file=answers, flush=True)

    tell(state="started", pid=os.getpid())
    job = json.loads(sys.stdin.readline())
    try:
        with _alone(Path(job["folder"]) / FOLDER):
            run = _open(job, tell)
            tell(state="ready", url=run.url, folder=str(Path(run.dir).parent))
            exit_code = _send_rows(run, job)
            try:
                run.finish(exit_code=exit_code)
            except TimeoutError:
                tell(state="done", synced=False)
            else:
                tell(state="done", synced=True)
    except Exception as error:  # whatever it is, the other side must hear of it
        tell(state="failed", why=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        raise
    return 0


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One at a time: the process of a killed run may still be sending. Whoever waits too long is ended from outside."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "follower.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            print("this file system has no locks; going on without", file=sys.stderr)
        yield


def _open(job: Mapping[str, Any], tell: Callable[..., None]) -> Any:
    import wandb

    def stop() -> None:
        tell(state="note", text="stop was pressed; the run ends after this step with a checkpoint")
        (Path(job["folder"]) / STOP_FILE).touch()

    run = wandb.init(
        **{key: job[key] for key in ("project", "entity", "name", "group", "tags", "id", "dir", "config", "mode")},
        resume="allow",
        settings=wandb.Settings(**job["settings"], stop_fn=stop),
    )
    run.define_metric("step", hidden=True)
    run.define_metric("train/tokens", step_metric="step")
    for names in ("train/*", "perf/*", "eval/*", "ranks/*", "samples", "picture", "ranks"):
        run.define_metric(names, step_metric="step")
    return run


def _send_rows(run: Any, job: Mapping[str, Any]) -> int:
    """Follow metrics.jsonl until the end; returns the exit code to finish with.

    Rows of earlier processes (before `offset`) are sent when the server has not got them: an offline run, or one that
    is new to the server, gets them all.
    """
    ends: queue.Queue[int] = queue.Queue()
    threading.Thread(target=_listen, args=(ends,), daemon=True).start()
    known = int(run.summary.get("step") or 0) if run.resumed else 0
    tail, exit_code, best = Tail(Path(job["folder"]) / METRICS), None, dict[str, float]()
    while True:
        for at, row in tail.rows():
            old = at < job["offset"]
            if row["kind"] == "eval":
                run.summary.update(_improved(row, best))
            if not old or (row["step"] >= known and row["kind"] in _PLOTTED | {"samples", "ranks"}):
                _send_row(run, row, Path(job["folder"]))
        if exit_code is not None:
            return exit_code
        try:
            exit_code = ends.get(timeout=_POLL_SECONDS)  # then one more look: what was written before it was told
        except queue.Empty:
            if not psutil.pid_exists(job["parent"]):  # with luck; the end of stdin is what usually tells
                ends.put(_orphaned())


def _improved(row: Mapping[str, Any], best: dict[str, float]) -> dict[str, Any]:
    """The summary's `best/<set>/...` when this held-out loss is the lowest of the run so far, else nothing."""
    name = row["set"]
    loss = row.get(f"eval/{name}/loss")
    if loss is None or loss >= best.get(name, math.inf):
        return {}
    best[name] = loss
    values = {key.replace("eval/", "best/", 1): value for key, value in row.items() if key.startswith("eval/")}
    return {**values, f"best/{name}/step": row["step"]}


def _listen(ends: queue.Queue[int]) -> None:
    line = sys.stdin.readline()
    ends.put(json.loads(line)["exit_code"] if line else _orphaned())


def _orphaned() -> int:
    """The training process is gone: an end in bounded time without it, as a failed run."""
    leave = threading.Timer(_ORPHAN_SECONDS, os._exit, args=(1,))
    leave.daemon = True
    leave.start()
    return 1


def _send_row(run: Any, row: Mapping[str, Any], folder: Path) -> None:
    kind, step = row["kind"], row["step"]
    values = {"step": step, **{k: v for k, v in row.items() if "/" in k and v is not None}}
    if kind in _PLOTTED:
        run.log(values)
    elif kind in {"samples", "ranks"}:
        import wandb

        cells = [[cell if isinstance(cell, int | float | None) else str(cell) for cell in r] for r in row["rows"]]
        run.log({**values, kind: wandb.Table(columns=row["columns"], data=cells)})
    elif kind == "picture":
        import wandb

        path = folder / row["path"]
        if path.exists():
            run.log({**values, kind: wandb.Image(str(path), caption=row["caption"])})
    elif kind == "alert":
        run.alert(title=row["title"][:63], text=row["text"], level="ERROR")
    elif kind == "preempting":
        run.mark_preempting()
    elif kind == "finish":
        for key, value in row["summary"].items():
            if value is not None:
                run.summary[key] = value


if __name__ == "__main__":
    if os.fork():  # so as to be nobody's child: a launcher that stops a rank stops its children first, and at once
        os._exit(0)
    sys.exit(follow())
