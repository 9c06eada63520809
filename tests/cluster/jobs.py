"""Training jobs on hosts made of namespaces: the ways to start them, and what they leave behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.cluster.nodes import Cluster

ROOT = Path(__file__).resolve().parents[2]
FAULTS = Path(__file__).resolve().parent / "faults"
BIN = Path(sys.executable).parent
LIMIT = 500.0
"""Seconds that no job here comes near."""


def environment() -> dict[str, str]:
    """This process's variables with nothing of a launcher in them. PYTHON* alone go from host to host by themselves."""
    prefixes = ("SLURM_", "OMPI_", "WANDB_", "PDSH_", "LMTRAIN_")
    mine = {key: value for key, value in os.environ.items() if not key.startswith(prefixes)}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        mine.pop(name, None)
    path = f"{BIN}{os.pathsep}{mine.get('PATH', '')}"
    return {**mine, **_needed(), "PATH": path, "PYTHONPATH": f"{FAULTS}{os.pathsep}{ROOT}"}


def _needed() -> dict[str, str]:
    return {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


class Job:
    """One training job: the processes that were started for it, and what they print."""

    def __init__(self, cluster: Cluster, folder: Path, log: str) -> None:
        self.cluster, self.folder = cluster, folder
        self._log = log
        self.starters: list[subprocess.Popen[str]] = []
        # What does not pass through ssh by itself; read by the launcher in the folder that it is started in.
        (folder / ".deepspeed_env").write_text("".join(f"{k}={v}\n" for k, v in _needed().items()))

    def on(self, number: int, *command: object, **more: str) -> None:
        """Start a command of this job on a host; `more` are variables of its environment."""
        log = self.folder / f"{self._log}.{len(self.starters)}.log"
        self.starters.append(
            self.cluster.start(number, command, cwd=self.folder, log=log, environment=environment() | more)
        )

    def text(self) -> str:
        """All that was printed so far."""
        logs = [self.folder / f"{self._log}.{i}.log" for i in range(len(self.starters))]
        return "\n".join(log.read_text(errors="replace") for log in logs)

    def wait(self, limit: float = LIMIT) -> list[int]:
        """The exit codes of what was started, when all have ended."""
        end = time.monotonic() + limit
        while any(starter.poll() is None for starter in self.starters):
            assert time.monotonic() < end, f"not ended in {limit:g} s\n{self.text()[-6000:]}"
            time.sleep(0.02)
        return [starter.wait() for starter in self.starters]

    def until(self, ready: Callable[[], bool], what: str, limit: float = LIMIT) -> None:
        """Wait for something that the job does."""
        end = time.monotonic() + limit
        while not ready():
            ended = all(starter.poll() is not None for starter in self.starters)
            assert not ended, f"ended before {what}\n{self.text()[-6000:]}"
            assert time.monotonic() < end, f"{what} did not come\n{self.text()[-6000:]}"
            time.sleep(0.02)


def pdsh(cluster: Cluster, folder: Path, name: str, *arguments: object) -> Job:
    """The bare `deepspeed --hostfile H --module lmtrain train ...` on node0."""
    job = Job(cluster, folder, name)
    job.on(0, "deepspeed", "--hostfile", cluster.hostfile, "--module", "lmtrain", "train", *arguments)
    return job


def no_ssh(cluster: Cluster, folder: Path, name: str, *arguments: object) -> Job:
    """The same command with `--no_ssh` on every host."""
    job = Job(cluster, folder, name)
    for node in cluster.nodes:
        where = ["--no_ssh", "--node_rank", node.number, "--master_addr", cluster.nodes[0].address]
        hosts = ["--hostfile", cluster.hostfile]
        job.on(node.number, "deepspeed", *hosts, *where, "--module", "lmtrain", "train", *arguments)
    return job


def torchrun(cluster: Cluster, folder: Path, name: str, *arguments: object) -> Job:
    """`torchrun` on every host."""
    job = Job(cluster, folder, name)
    for node in cluster.nodes:
        where = ["--nnodes", cluster.count, "--node-rank", node.number, "--nproc-per-node", 1]
        master = ["--master-addr", cluster.nodes[0].address, "--master-port", 29500]
        job.on(node.number, "torchrun", *where, *master, "-m", "lmtrain", "train", *arguments)
    return job


Starter = Callable[..., Job]
STARTERS: dict[str, Starter] = {"pdsh": pdsh, "no_ssh": no_ssh, "torchrun": torchrun}


def saved(folder: Path) -> int:
    """The step of a run's newest checkpoint that is in its place, 0 for none."""
    names = (path.name.removeprefix("step-") for path in (folder / "checkpoints").glob("step-*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def rows(folder: Path, kind: str = "train") -> dict[int, dict[str, Any]]:
    """Rows of a run's metrics by step; those that were written whole."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    whole = [json.loads(line) for line in lines if line.endswith("\n")]
    return {row["step"]: row for row in whole if row["kind"] == kind}


def values(folder: Path, names: Sequence[str], kind: str = "train") -> dict[int, list[Any]]:
    """Some values of each row, by step."""
    return {step: [row.get(name) for name in names] for step, row in rows(folder, kind).items()}
