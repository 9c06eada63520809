"""`lmtrain launch` over real ssh and pdsh: what it starts, what nobody sees, whom it refuses, whom it leaves out."""

import hashlib
import json
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.cluster.jobs import ROOT, Job, rows
from tests.cluster.nodes import NET, PORT
from tests.house import config, lmtrain

STEPS, LONG = 8, 200
SECRETS = {
    "WANDB_API_KEY": "deadbeef" * 5,
    "HF_TOKEN": "hf_sesame_0123456789",
    "AWS_SECRET_ACCESS_KEY": "aws/sesame+99",
    "MLFLOW_TRACKING_TOKEN": "mlflow-sesame-1",  # DeepSpeed's launcher would put this family on command lines
}
TOLD = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")
SITE = """
import atexit, hashlib, json, os
if "RANK" in os.environ and "LOCAL_RANK" in os.environ:
    def tell():
        known = {name: hashlib.sha256(os.environ.get(name, "").encode()).hexdigest() for name in %r}
        open(os.path.join(%r, "told." + os.environ["RANK"]), "w").write(json.dumps(known))
    atexit.register(tell)
"""
"""Python imports it by itself: a rank says at its end what it was told, but not in words that could be found."""


@pytest.fixture(scope="module")
def place(trained, tmp_path_factory):
    """A folder with a config, the plain engine's run `plain`, and an ssh config with other names."""
    folder = tmp_path_factory.mktemp("launch")
    train = {"steps": STEPS, "eval_every": 4, "save_every": 4}
    data = {"corpus": str(trained / "corpus"), "micro_batch": 2}
    path = config(folder, train=train, data=data, model={"dropout": 0.1})
    ran = lmtrain("train", path, "run.name=plain")
    assert ran.code == 0, ran.err
    names = "".join(f"Host {name}\n HostName {NET}.{i + 1}\n" for i, name in enumerate(("alpha", "beta")))
    (folder / "ssh_config").write_text(
        f"{names}Host *\n Port {PORT}\n IdentityFile /etc/ssh/user\n StrictHostKeyChecking no\n"
        " UserKnownHostsFile /dev/null\n LogLevel ERROR\n"
    )
    (folder / "two").write_text("alpha slots=1\nbeta slots=1\n")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE % (TOLD, str(folder)))
    return folder


def start(cluster, folder, name, *arguments, options=(), hosts="two", **more):
    """`lmtrain launch` on the first host."""
    job = Job(cluster, folder, name)
    where = ["--hostfile", folder / hosts, "--ssh-config", folder / "ssh_config", *options]
    zero = ["engine.kind=zero", "engine.zero_stage=1", f"run.name={name}"]
    path = {"PYTHONPATH": f"{folder / 'site'}:{ROOT}"}
    command = [sys.executable, "-m", "lmtrain", "launch", *where, folder / "tiny.yaml", *zero, *arguments]
    job.on(0, *command, **path | more)
    return job


def assert_same(folder, name, plain, steps):
    want, got = rows(folder / "runs" / plain), rows(folder / "runs" / name)
    assert list(want) == list(got) == list(range(1, steps + 1))
    worst = max(abs(got[step]["train/loss"] - row["train/loss"]) for step, row in want.items())
    print(f"{name}: losses within {worst:.1e} of {plain}'s")
    assert worst <= 1e-5


def nobody(cluster, *numbers):
    """Nothing of the job runs any more on these hosts, and no file of tokens is left there."""
    for number in numbers:
        assert cluster.processes(number) == []
        assert cluster.memory(number) == []


class Watch(threading.Thread):
    """Looks at every process of this machine, hosts included, until told to stop: command lines and environments."""

    def __init__(self):
        super().__init__(daemon=True)
        self.lines, self.starters, self.looks = set(), set(), 0
        self.done = threading.Event()

    def run(self):
        while not self.done.is_set():
            for entry in Path("/proc").iterdir():
                if not entry.name.isdigit():
                    continue
                try:
                    line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    self.lines.add(line)
                    if any(word in line for word in ("deepspeed", "pdsh", "ssh ", "local_rank")):
                        self.starters.add((line, (entry / "environ").read_bytes().decode(errors="replace")))
                except OSError:
                    continue
            self.looks += 1
            self.done.wait(0.01)


@pytest.mark.slow
def test_two_hosts_over_ssh_and_what_nobody_sees(cluster, place):
    """The numbers of the plain engine; every rank knows the tokens, and they stand nowhere that others could read."""
    watch = Watch()
    watch.start()
    job = start(cluster, place, "launched", **SECRETS)
    try:
        assert job.wait() == [0], job.text()[-6000:]
    finally:
        watch.done.set()
        watch.join()
    text = job.text()
    assert "looked over 2 hosts: same code, versions, config and corpora" in text
    assert "deepspeed --hostfile" in text
    assert "[rank 0] " in text
    assert_same(place, "launched", "plain", STEPS)
    nobody(cluster, 0, 1)

    wanted = {name: hashlib.sha256(SECRETS[name].encode()).hexdigest() for name in TOLD}
    assert [json.loads((place / f"told.{rank}").read_text()) for rank in (0, 1)] == [wanted, wanted]
    assert sum("deepspeed.launcher.launch" in line for line in watch.lines) >= 2, "the hosts were not watched"
    assert sum("lmtrain probe" in line for line in watch.lines) >= 2
    assert watch.looks > 20
    files = [path for path in place.rglob("*") if path.is_file() or path.is_symlink()]
    assert {".deepspeed_env", "hostfile"} <= {p.name for p in files if p.parent.name == "launch"}
    ours = ("lmtrain launch", "-m pytest", "bin/pytest")  # whoever starts the launch knows what it hands over
    known = [line + values for line, values in watch.starters if not any(word in line for word in ours)]
    assert len(known) > 2
    for name, secret in SECRETS.items():
        assert secret not in text, name
        assert not [line for line in watch.lines if secret in line], name
        assert not [line for line in known if secret in line], name
        assert not [str(path) for path in files if secret in path.read_text(errors="replace")], name


def changed(folder, path, text):
    """A copy of a file with something at its end."""
    other = folder / f"other-{path.name}"
    other.write_text(path.read_text() + text)
    return path, other


def wrong(kind, place, trained, tmp_path):
    """What the second host has instead of what the first one has, and what is said of it."""
    if kind == "code":
        return changed(tmp_path, ROOT / "lmtrain" / "train.py", "\n"), "has other code: lmtrain/train.py"
    if kind == "config":
        return changed(tmp_path, place / "tiny.yaml", "\n# later\n"), "has another config"
    if kind == "corpus":
        return changed(tmp_path, trained / "corpus" / "manifest.json", "\n"), "has another corpus"
    if kind == "clock":
        slow = "\nimport time\nnow = time.time\ntime.time = lambda: now() - 1000\n"
        return changed(tmp_path, place / "site" / "sitecustomize.py", slow), "has a clock that is -"
    (tmp_path / "empty").mkdir()
    return (place / "runs", tmp_path / "empty"), "does not see the run folder"


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["code", "config", "corpus", "clock", "folder", "down"])
def test_a_host_that_is_not_fit_is_refused_by_name(cluster, place, trained, tmp_path, kind):
    name, hosts = f"refused-{kind}", "two"
    if kind == "down":  # nobody has this address
        (tmp_path / "gone").write_text(f"alpha slots=1\n{NET}.9 slots=1\n")
        hosts, mask, said = tmp_path / "gone", nullcontext(), f"{NET}.9 cannot be reached over ssh"
    else:
        (path, other), what = wrong(kind, place, trained, tmp_path)
        mask, said = cluster.masked(1, path, other), f"beta {what}"
    with mask:
        job = start(cluster, place, name, hosts=hosts, options=["--restarts", 2])
        assert job.wait() == [5], job.text()
    text = job.text()
    assert said in text
    assert "alpha " not in text, "a host that is fit was named"
    assert len(text.strip().splitlines()) == 1
    folder = place / "runs" / name
    assert [path.name for path in folder.rglob("*")] == ["launch"], "something was started"
    nobody(cluster, 0, 1)


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
def test_a_host_that_dies_is_left_out_and_the_numbers_stay(hosts, place):
    """The second host is switched off mid-run: the first one goes on with the whole global batch, in the same order."""
    length = [f"train.steps={LONG}", "train.eval_every=0", "train.save_every=20"]
    ran = lmtrain("train", place / "tiny.yaml", "run.name=long", *length)
    assert ran.code == 0, ran.err
    cluster = hosts(2)
    job = start(cluster, place, "one-left", "engine.timeout=5", *length, options=["--restarts", 1])
    job.until(lambda: max(rows(place / "runs" / "one-left"), default=0) >= 50, "step 50")
    cluster.kill(1)
    assert job.wait(500) == [0], job.text()[-6000:]
    text = job.text()
    assert "beta does not answer and is left out" in text
    assert "restart 1 of 1: 1 host, 1 ranks, from step " in text
    start_step = int(text.partition("1 ranks, from step ")[2].split()[0])
    assert 40 <= start_step < LONG
    assert_same(place, "one-left", "long", LONG)
    nobody(cluster, 0)
