"""Real processes for tests: N ranks with gloo on loopback, a free port, a time limit; results come back as JSON.

    results = spawn("tests.engine.jobs:curves", world=2, stage=3)        # a list with one JSON value a rank

The job is a module-level function `job(place, folder, **arguments) -> JSON value`. `folder` is shared by the ranks of
one spawn; arrays go there as .npz, and what rank N writes to stdout and stderr as rankN.out and rankN.log. A rank that
fails, or is not done in time, fails the test with the ends of all logs, and no process outlives the call.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def free_port() -> int:
    """A TCP port that nobody listens on now."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def spawn(
    job: str, *, world: int, timeout: float = 180.0, threads: int = 1, folder: Path | None = None, **arguments: Any
) -> list[Any]:
    """Run `job` ("package.module:function") in `world` processes; the JSON value that each rank returned, by rank."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="ranks-") as made:
            return spawn(job, world=world, timeout=timeout, threads=threads, folder=Path(made), **arguments)
    port = free_port()
    ranks = [_start(job, folder, rank, world, port, threads, arguments) for rank in range(world)]
    failed: dict[int, int] = {}
    try:
        end = time.monotonic() + timeout
        while not failed and any(rank.poll() is None for rank in ranks):
            if time.monotonic() > end:
                failed = {i: -1 for i, rank in enumerate(ranks) if rank.poll() is None}
            failed |= {i: code for i, rank in enumerate(ranks) if (code := rank.poll()) not in (None, 0)}
            time.sleep(0.02)
        failed |= {i: code for i, rank in enumerate(ranks) if (code := rank.poll()) not in (None, 0)}
        if failed:
            time.sleep(0.5)  # let the others say why
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
            rank.wait()
    if failed:
        ends = [(folder / f"rank{i}.{end}").read_text()[-6000:] for i in range(world) for end in ("out", "log")]
        logs = "\n".join(f"--- rank {i}\n{ends[2 * i]}{ends[2 * i + 1]}" for i in range(world))
        what = ", ".join(
            f"rank {i} " + ("not done in time" if code == -1 else f"exit {code}") for i, code in failed.items()
        )
        raise AssertionError(f"{job} with {arguments}: {what}\n{logs}")
    return [json.loads((folder / f"rank{i}.json").read_text()) for i in range(world)]


def _start(
    job: str, folder: Path, rank: int, world: int, port: int, threads: int, arguments: dict[str, Any]
) -> subprocess.Popen[bytes]:
    order = {"job": job, "folder": str(folder), "rank": rank, "world": world, "port": port, "arguments": arguments}
    environment = {
        **{
            k: v
            for k, v in os.environ.items()
            if k not in {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
        },
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(threads),
        "WANDB_MODE": "offline",
    }
    with (folder / f"rank{rank}.out").open("wb") as out, (folder / f"rank{rank}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.spawn", json.dumps(order)],
            cwd=ROOT,
            env=environment,
            stdout=out,
            stderr=log,
            start_new_session=True,
        )


def _rank(order: dict[str, Any]) -> None:
    from lmtrain.protocol import Place

    place = Place(order["rank"], order["world"], order["rank"], "127.0.0.1", order["port"])
    module, _, name = order["job"].partition(":")
    folder = Path(order["folder"])
    result = getattr(importlib.import_module(module), name)(place, folder, **order["arguments"])
    text = json.dumps(result)
    (folder / f"rank{place.rank}.json").write_text(text)


if __name__ == "__main__":
    _rank(json.loads(sys.argv[1]))
