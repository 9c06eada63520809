"""Two ranks that train from a corpus behind HTTP: the very losses of the disk, also when the server goes and comes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from lmtrain.data.layout import MIB
from tests.data.small import random_documents, write
from tests.data.test_remote import BOUND, Server, taken
from tests.house import config
from tests.spawn import ROOT, free_port

STEPS = 40
LIMIT = 500.0
SPLITS = {
    "train": {"groups": [0], "buckets": [0, 1000]},
    "valid": {"groups": [1], "buckets": [0, 500]},
    "test": {"groups": [1], "buckets": [500, 1000]},
}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with `corpus`: more text than the cache may hold, and a little that is held out."""
    folder = tmp_path_factory.mktemp("served")
    blocks = [random_documents(40, seed=seed, longest=400_000) for seed in range(3)]
    blocks.append(random_documents(40, seed=9, longest=300))
    write(folder / "corpus", blocks, splits=SPLITS, group=lambda raw: int(len(raw) <= 300))
    assert sum(path.stat().st_size for path in (folder / "corpus").glob("tokens-*")) > BOUND + 4 * MIB
    return folder


def start(path, name, corpus, log, *more):
    """Two ranks through DeepSpeed's launcher."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", 2, "--master_port", free_port()]
    zero = ["engine.kind=zero", "engine.zero_stage=1", f"run.name={name}", f"data.corpus={corpus}"]
    command = [*launcher, "--module", "lmtrain", "train", path, *zero, *more]
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_", "WANDB_"))}
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        mine.pop(variable, None)
    mine |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    with log.open("wb") as out:
        return subprocess.Popen(
            list(map(str, command)), env=mine, cwd=path.parent, stdout=out, stderr=out,
            start_new_session=True,
        )  # fmt: skip


def until(job, ready, log, what):
    end = time.monotonic() + LIMIT
    while not ready():
        assert job.poll() is None, f"ended before {what}: {log.read_text()[-4000:]}"
        assert time.monotonic() < end, f"{what} did not come: {log.read_text()[-4000:]}"
        time.sleep(0.01)


def rows(folder):
    """What was logged whole, by step and kind: losses, norms, held-out losses and the hash of the batch."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return {}
    keys = ("batch", "train/loss", "train/grad_norm", "eval/valid/loss")
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return {(r["kind"], r["step"]): [r.get(k) for k in keys] for r in found if r["kind"] in {"train", "eval"}}


@pytest.mark.exhaustive
@pytest.mark.timeout(1800)
def test_two_ranks_over_http_lose_nothing_when_the_server_does(served, tmp_path):
    """Bit for bit the run from disk; the ranks' one cache keeps its bound; killed mid-run, the server is waited for."""
    data = {"context": 64, "global_batch": 8, "micro_batch": 2, "block_windows": 4}
    path = config(tmp_path, data=data, train={"steps": STEPS, "eval_every": 20, "save_every": 0})
    job = start(path, "disk", served / "corpus", tmp_path / "disk.log")
    assert job.wait(LIMIT) == 0, (tmp_path / "disk.log").read_text()[-4000:]
    wanted = rows(tmp_path / "runs" / "disk")
    assert len(wanted) == STEPS + 2
    assert len({tuple(row) for row in wanted.values()}) == STEPS + 2

    cache, log, afar = tmp_path / "cache", tmp_path / "http.log", tmp_path / "runs" / "http"
    server = Server(served)
    most = 0

    def looked(ready):
        def look():
            nonlocal most
            most = max(most, taken(cache))
            assert most <= BOUND
            return ready()

        return look

    try:
        more = [f"data.remote.cache={cache}", f"data.remote.cache_bytes={BOUND}", "data.remote.ahead=2"]
        job = start(path, "http", server.url, log, *more)
        until(job, looked(lambda: ("train", 5) in rows(afar)), log, "step 5")
        server.kill()
        until(job, looked(lambda: "waiting for " in log.read_text()), log, "a word of waiting")
        before = max(step for _, step in rows(afar))
        assert before < STEPS
        server.start()
        until(job, looked(lambda: job.poll() is not None or ("train", STEPS) in rows(afar)), log, "the last step")
        assert job.wait(LIMIT) == 0, log.read_text()[-4000:]
    finally:
        server.kill()
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.wait()
    assert rows(afar) == wanted
    assert 8 * MIB < most <= BOUND
    assert not cache.exists()
    print(
        f"over HTTP: {len(wanted)} rows bit for bit; down at step {before}; the cache took at most {most / MIB:.1f} MiB"
    )
