"""Whatever ends or hangs on one of two hosts: the guilty one is named, nothing is left on any host, the run goes on."""

import contextlib
import os
import random
import signal
import statistics
import time

import pytest
from safetensors import safe_open

from tests.cluster import nodes
from tests.cluster.jobs import no_ssh, pdsh, rows, saved
from tests.house import config

TIMEOUT = 5.0
ROUNDS = 10
LEFT = 12
"""Time-outs after which nothing may be left on any host: launchers and ssh sessions end later than ranks."""
STEPS = 1000
"""More than all the deeds of a round leave time for."""
SILENT = "no sign of life"
NODE1 = "rank 1 of 2 on node1"


def prepare(folder, trained):
    train = {"steps": STEPS, "eval_every": 0, "save_every": 10}
    config(folder, train=train, data={"corpus": str(trained / "corpus"), "micro_batch": 2})


@pytest.fixture
def folder(trained, tmp_path):
    made = tmp_path / "job"
    made.mkdir()
    prepare(made, trained)
    return made


def start(cluster, folder, name, log="", *, timeout=TIMEOUT, by=pdsh):
    arguments = ["engine.kind=zero", "engine.zero_stage=2", f"engine.timeout={timeout}", f"run.name={name}"]
    return by(cluster, folder, f"{name}{log}", folder / "tiny.yaml", *arguments)


def go_on(cluster, folder, name, log, **more):
    """Start the run, and wait until it has got further than it was. The job, and the newest step saved before."""
    before = saved(folder / "runs" / name)
    job = start(cluster, folder, name, log, **more)
    job.until(lambda: saved(folder / "runs" / name) > before, "a checkpoint")
    return job, before


def tensors(folder, name):
    """Every tensor of the last checkpoint, as bytes."""
    found = {}
    for path in sorted((folder / "runs" / name / "checkpoints" / f"step-{STEPS:08d}").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {key: file.get_tensor(key).numpy().tobytes() for key in file.keys()}  # noqa: SIM118
    return found


def plant(cluster, folder, deed):
    (folder / "fault").write_text(deed)
    os.kill(cluster.rank(1).pid, signal.SIGUSR2)


def runner(cluster):
    """The `deepspeed` command that was typed on node0."""
    found = [p for p in cluster.processes(0) if "deepspeed --hostfile" in p.command and "nsenter" not in p.command]
    return next(p.pid for p in found if "launcher.launch" not in p.command)


def twice(pid):
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.3)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


def cut(cluster, folder):
    cluster.link(1, up=False)


def heal_late(cluster, folder):
    cluster.link(1, up=False)
    time.sleep(1.5 * TIMEOUT)
    cluster.link(1, up=True)


DEEDS = {
    "kill a rank": (lambda c, f: os.kill(c.rank(1).pid, signal.SIGKILL), [NODE1]),
    "kill rank 0": (lambda c, f: os.kill(c.rank(0).pid, signal.SIGKILL), ["rank 0 of 2"]),
    "kill a node": (lambda c, f: c.kill(1), [NODE1]),
    "kill the launcher": (lambda c, f: os.kill(runner(c), signal.SIGKILL), ["the launcher has ended"]),
    "kill a launcher of many": (lambda c, f: os.kill(runner(c), signal.SIGKILL), ["the launcher has ended"]),
    "stop a rank": (lambda c, f: os.kill(c.rank(1).pid, signal.SIGSTOP), [NODE1, SILENT]),
    "hang": (lambda c, f: plant(c, f, "hang"), [NODE1, "makes no progress", "sitecustomize.py", "time.sleep"]),
    "raise": (lambda c, f: plant(c, f, "raise"), [NODE1, "ValueError: planted", "Traceback"]),
    "exit 0": (lambda c, f: plant(c, f, "exit"), [NODE1]),
    "cut the link": (cut, [NODE1, SILENT]),
    "heal the link too late": (heal_late, [NODE1, SILENT]),
    "SIGTERM to the launcher": (lambda c, f: twice(runner(c)), []),
    "SIGTERM to a rank": (lambda c, f: twice(c.rank(1).pid), []),
}
TIMES: dict[str, list[tuple[float, float]]] = {}
"""For each deed, in every round: the seconds until it was told, and until everything had ended."""
GRACEFUL = {"kill the launcher", "kill a launcher of many", "SIGTERM to the launcher", "SIGTERM to a rank"}


@pytest.fixture(scope="module", autouse=True)
def table():
    """Printed at the end (`-s`)."""
    yield
    for what, times in TIMES.items():
        told, over = (
            f"{min(one):5.1f} {statistics.median(one):5.1f} {max(one):5.1f}" for one in zip(*times, strict=True)
        )
        print(
            f"\n{what:24} {len(times):2} rounds; told after (min, median, max, s) {told}; everything ended {over}",
            end="",
        )


def ended(cluster, job):
    alive = [node for node in cluster.nodes if node.holder.poll() is None]
    return all(one.poll() is not None for one in job.starters) and not any(
        cluster.processes(node.number) for node in alive
    )


def disturb(cluster, folder, what, name, *, timeout=TIMEOUT):
    """Do the deed when a checkpoint is there, and look at how it ends."""
    act, wanted = DEEDS[what]
    by = no_ssh if what == "kill a launcher of many" else pdsh
    job, before = go_on(cluster, folder, name, f" {what}", timeout=timeout, by=by)
    began, named = time.monotonic(), None
    act(cluster, folder)
    while not ended(cluster, job):
        left = [cluster.processes(node.number) for node in cluster.nodes]
        assert time.monotonic() - began < LEFT * timeout, f"{what}: left {left}\n{job.text()[-8000:]}"
        if named is None and (wanted[0] in job.text() if wanted else finished(folder, name, before)):
            named = time.monotonic() - began
        time.sleep(0.05)
    over = time.monotonic() - began
    seconds, text = over if named is None else named, job.text()
    TIMES.setdefault(what, []).append((seconds, over))
    print(f"{what}: told after {seconds:.1f} s, everything ended after {over:.1f} s, time-out {timeout:g} s")
    for words in wanted:
        assert words in text, f"{what}: {words!r} is not in\n{text[-8000:]}"
    assert seconds < 3 * timeout, text[-4000:]
    assert all(job.wait()), "the launcher says that all is well"
    if what == "raise":
        assert text.index("Traceback") == text.index("Traceback (most recent call last)")
        assert "ValueError: planted" in text[text.index("Traceback") :].split("Traceback")[1]
    if what in GRACEFUL:
        (last,) = finished(folder, name, before)
        assert last["stopped"] == "SIGTERM", "it was over before it was asked"
        assert saved(folder / "runs" / name) == max(rows(folder / "runs" / name)), text[-4000:]


def finished(folder, name, after):
    """How the run was ended after this step."""
    return [row for step, row in rows(folder / "runs" / name, "finish").items() if step > after]


def losses(folder, name):
    """What the run recorded, by step."""
    return {step: (row["batch"], row["train/loss"]) for step, row in rows(folder / "runs" / name).items()}


@pytest.fixture(scope="module")
def whole(hosts_possible, trained, tmp_path_factory):
    """A folder with a config and the run `whole`, which nobody touched."""
    made = tmp_path_factory.mktemp("safety")
    prepare(made, trained)
    with nodes.Cluster(tmp_path_factory.mktemp("hosts") / "peace", 2) as cluster:
        job = start(cluster, made, "whole")
        assert job.wait() == [0], job.text()[-6000:]
    return made


@pytest.mark.slow
def test_a_rank_is_killed(cluster, folder):
    """A connection that closes tells of it at once, whatever the time-out is."""
    disturb(cluster, folder, "kill a rank", "slow", timeout=20.0)


@pytest.mark.exhaustive
@pytest.mark.timeout(4000)
@pytest.mark.parametrize("number", range(ROUNDS))
def test_the_guilty_one_is_named_and_the_run_goes_on_in_the_same_bits(hosts, whole, number):
    """One run through all that can happen, in another order each round: every start goes on from the newest checkpoint.

    Nothing is left on any host; and in the end the run is as if nobody had touched it.
    """
    name = f"round{number}"
    for what in random.Random(number).sample(list(DEEDS), len(DEEDS)):
        cluster = hosts(2)
        disturb(cluster, whole, what, name)
        cluster.close()
    cluster = hosts(2)
    job, _ = go_on(cluster, whole, name, " healed")
    cluster.link(1, up=False)
    time.sleep(0.3 * TIMEOUT)
    cluster.link(1, up=True)
    assert job.wait() == [0], f"a link that heals in time is no trouble\n{job.text()[-6000:]}"
    cluster.close()
    assert losses(whole, name) == losses(whole, "whole")
    assert tensors(whole, name) == tensors(whole, "whole")


@pytest.mark.exhaustive
@pytest.mark.timeout(1500)
def test_a_run_folder_that_is_not_shared_is_refused_by_the_hosts_name(hosts, folder):
    cluster = hosts(2)
    (folder / "runs").mkdir()
    cover = cluster.start(
        1, ["mount", "-t", "tmpfs", "tmpfs", folder / "runs"], cwd=folder, log=folder / "mount.log", environment={}
    )
    assert cover.wait(20) == 0
    job = start(cluster, folder, "apart")
    assert job.wait() != [0]
    assert "is not shared: node1 does not see" in job.text(), job.text()[-6000:]
