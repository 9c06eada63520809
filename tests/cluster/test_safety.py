"""Whatever ends or hangs on one of two hosts: the guilty one is named, nothing is left on any host, the run goes on."""

import contextlib
import os
import signal
import time

import pytest
from safetensors import safe_open

from tests.cluster.jobs import pdsh, rows
from tests.house import config

TIMEOUT = 5.0
STEPS = 120
SILENT = "no sign of life"
NODE1 = "rank 1 of 2 on node1"


@pytest.fixture
def folder(trained, tmp_path):
    made = tmp_path / "job"
    made.mkdir()
    train = {"steps": STEPS, "save_every": 10}
    config(made, train=train, data={"corpus": str(trained / "corpus"), "micro_batch": 2})
    return made


def start(cluster, folder, name):
    arguments = ["engine.kind=zero", "engine.zero_stage=2", f"engine.timeout={TIMEOUT}", f"run.name={name}"]
    return pdsh(cluster, folder, name, folder / "tiny.yaml", *arguments)


def saved(folder, name):
    """Steps whose checkpoints are there, oldest first."""
    found = (folder / "runs" / name / "checkpoints").glob("step-*")
    return sorted(int(path.name.split("-")[1]) for path in found if path.name.split("-")[1].isdigit())


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
    "stop a rank": (lambda c, f: os.kill(c.rank(1).pid, signal.SIGSTOP), [NODE1, SILENT]),
    "hang": (lambda c, f: plant(c, f, "hang"), [NODE1, "no progress", "sitecustomize.py", "time.sleep"]),
    "raise": (lambda c, f: plant(c, f, "raise"), [NODE1, "ValueError: planted", "Traceback"]),
    "exit 0": (lambda c, f: plant(c, f, "exit"), [NODE1]),
    "cut the link": (cut, [NODE1, SILENT]),
    "heal the link too late": (heal_late, [NODE1, SILENT]),
    "SIGTERM to the launcher": (lambda c, f: twice(runner(c)), []),
    "SIGTERM to a rank": (lambda c, f: twice(c.rank(1).pid), []),
}
GRACEFUL = {"kill the launcher", "SIGTERM to the launcher", "SIGTERM to a rank"}


def ended(cluster, job):
    alive = [node for node in cluster.nodes if node.holder.poll() is None]
    return all(one.poll() is not None for one in job.starters) and not any(
        cluster.processes(node.number) for node in alive
    )


def disturb(cluster, folder, what, name):
    """Do the deed when a checkpoint is there, and look at how it ends."""
    act, wanted = DEEDS[what]
    job = start(cluster, folder, name)
    job.until(lambda: saved(folder, name), "a checkpoint")
    began = time.monotonic()
    act(cluster, folder)
    while not ended(cluster, job):
        left = [cluster.processes(node.number) for node in cluster.nodes]
        assert time.monotonic() - began < 4 * 3 * TIMEOUT, f"{what}: left {left}\n{job.text()[-8000:]}"
        time.sleep(0.05)
    seconds = time.monotonic() - began
    print(f"{what}: everything ended {seconds:.1f} s later, time-out {TIMEOUT:g} s")
    text = job.text()
    for words in wanted:
        assert words in text, f"{what}: {words!r} is not in\n{text[-8000:]}"
    assert seconds < 3 * TIMEOUT, text[-4000:]
    if what == "raise":
        assert text.index("Traceback") == text.index("Traceback (most recent call last)")
        assert "ValueError: planted" in text[text.index("Traceback") :].split("Traceback")[1]
    if what in GRACEFUL:
        assert saved(folder, name)[-1] == max(rows(folder / "runs" / name)), text[-4000:]


@pytest.mark.slow
def test_a_rank_is_killed(cluster, folder):
    disturb(cluster, folder, "kill a rank", "slow")


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", DEEDS)
def test_ten_times_and_the_run_goes_on_in_the_same_bits(hosts, folder, what):
    """Ten runs are disturbed; each then ends as the one that nobody touched."""
    with_peace = hosts(2)
    assert start(with_peace, folder, "whole").wait() == [0]
    with_peace.close()
    wanted = {step: row["train/loss"] for step, row in rows(folder / "runs" / "whole").items()}
    for number in range(10):
        cluster, name = hosts(2), f"run{number}"
        disturb(cluster, folder, what, name)
        cluster.close()
        again = hosts(2)
        job = start(again, folder, name)
        assert job.wait() == [0], job.text()[-6000:]
        again.close()
        assert {step: row["train/loss"] for step, row in rows(folder / "runs" / name).items()} == wanted
        assert tensors(folder, name) == tensors(folder, "whole")


@pytest.mark.exhaustive
def test_a_link_that_heals_in_time_is_no_trouble(hosts, folder):
    cluster = hosts(2)
    job = start(cluster, folder, "healed")
    job.until(lambda: saved(folder, "healed"), "a checkpoint")
    cluster.link(1, up=False)
    time.sleep(0.3 * TIMEOUT)
    cluster.link(1, up=True)
    assert job.wait() == [0], job.text()[-6000:]
    assert max(rows(folder / "runs" / "healed")) == STEPS


@pytest.mark.exhaustive
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
