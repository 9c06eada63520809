"""`lmtrain launch` with an ssh and a launcher that record what they are given; and once with the real one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from lmtrain.errors import EngineError, InputError
from lmtrain.launch import checks, launcher, probe
from lmtrain.launch.hostfile import Host
from lmtrain.launch.ssh import Answer
from lmtrain.train import Progress
from tests.house import config, lmtrain

SECRETS = {
    "HF_TOKEN": "hf_sesame_0123456789",
    "WANDB_API_KEY": "deadbeef" * 5,
    "AWS_SECRET_ACCESS_KEY": "aws/sesame+99",
}
SSH = """#!{python}
import json, os, subprocess, sys
host, line = sys.argv[sys.argv.index("--") + 1 :]
text = sys.stdin.read()
with open("{log}", "a") as file:
    request = json.loads(text)
    file.write(json.dumps([sys.argv[1:], dict(os.environ), request]) + "\\n")
if host in open("{down}").read().split():
    print("ssh: connect to host", host, "port 22: No route to host", file=sys.stderr)
    sys.exit(255)
from lmtrain.launch import probe, private
if request["do"] == "store":
    answer = {{}}
elif request["do"] == "end":
    answer = {{"ended": probe.end(request["drawn"], grace=0)}}
else:
    answer = probe.answer(request, environment={{"SSH_CONNECTION": "127.0.0.1 1 127.0.0.1 22"}})
print("welcome to", host)
print(probe.MARK + json.dumps(answer))
"""
DEEPSPEED = """#!{python}
import json, os, sys
log = "{log}"
with open(log, "a") as file:
    file.write(json.dumps([sys.argv[1:], dict(os.environ), open(os.environ["DS_ENV_FILE"]).read()]) + "\\n")
number = len(open(log).readlines())
hosts = open(sys.argv[sys.argv.index("--hostfile") + 1]).read()
open(log + f".hosts{{number}}", "w").write(hosts)
print("a token", {secret!r}, "leaks")
exec(open("{plan}").read())
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Hosts node-0, node-1, node-2 that are this machine, behind a fake ssh; `plan` is what the fake launcher does."""
    path = config(tmp_path, data={"global_batch": 12, "corpus": str(tmp_path / "corpus")})
    (tmp_path / "hosts").write_text("node-0 slots=2\nnode-1 slots=2\nnode-2 slots=2\n")
    names = {name: str(tmp_path / f"{name}.log") for name in ("ssh", "deepspeed")}
    (tmp_path / "down").write_text("")
    (tmp_path / "plan").write_text("sys.exit(0)")
    (tmp_path / "bin").mkdir()
    files = {
        "ssh": SSH.format(python=sys.executable, log=names["ssh"], down=tmp_path / "down"),
        "deepspeed": DEEPSPEED.format(
            python=sys.executable, log=names["deepspeed"], plan=tmp_path / "plan", secret=SECRETS["HF_TOKEN"]
        ),
    }
    for name, text in files.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "PAUSE", 0.0)
    root = str(Path(__file__).resolve().parents[2])
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path), "PYTHONPATH": root, **SECRETS,
        "HF_HOME": "/data/hf", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    # subprocess looks the program up on this process's PATH
    monkeypatch.setenv("PATH", environment["PATH"])
    wish = launcher.Wish(
        config=path, overrides=("run.name=x y",), hostfile=tmp_path / "hosts", interface="lo",
        program=str(tmp_path / "bin" / "deepspeed"),
    )  # fmt: skip
    return tmp_path, wish, environment


def calls(folder, name):
    path = folder / f"{name}.log"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def finished(monkeypatch, step=6):
    monkeypatch.setattr(launcher.Launch, "_step", lambda self: step)


def test_what_is_started_and_what_is_never_shown(cluster, monkeypatch, capfd):
    folder, wish, environment = cluster
    finished(monkeypatch)
    assert launcher.launch(wish, environment=environment) == 0
    ((argv, given, shown),) = calls(folder, "deepspeed")
    assert argv[argv.index("--module") :] == ["--module", "lmtrain", "train", str(wish.config), "run.name=x y"]
    assert argv[argv.index("--master_addr") + 1] == "127.0.0.1"
    assert {"--force_multi", "--no_ssh_check"} <= set(argv)
    assert "ServerAliveInterval=10" in given["PDSH_SSH_ARGS_APPEND"]
    lines = dict(line.split("=", 1) for line in shown.splitlines())
    assert lines.pop("LMTRAIN_PRIVATE") == lines.pop("LMTRAIN_LAUNCH")
    assert lines == {
        "HF_HOME": "/data/hf", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "LMTRAIN_PREFIX": "1",
        "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo",
    }  # fmt: skip
    stored = [request["private"] for _, _, request in calls(folder, "ssh") if request["do"] == "store"]
    assert stored == [SECRETS] * 3
    out = capfd.readouterr()
    assert "deepspeed --hostfile" in out.err
    assert "a token <removed> leaks" in out.out
    files = [path.read_text(errors="replace") for path in (folder / "runs").rglob("*") if path.is_file()]
    words = [json.dumps([argv, given]) for argv, given, _ in calls(folder, "ssh") + calls(folder, "deepspeed")]
    for secret in SECRETS.values():
        assert not any(secret in text for text in [out.out, out.err, *files, *words])
    assert len(files) >= 2
    assert all(argv[: argv.index("--")].count("-o") == 4 for argv, _, _ in calls(folder, "ssh"))


def test_hosts_that_are_not_fit_are_named_and_nothing_is_started(cluster, monkeypatch):
    folder, wish, environment = cluster
    (folder / "down").write_text("node-1")
    with pytest.raises(EngineError, match=r"node-1 cannot be reached over ssh: .*No route to host"):
        launcher.launch(replace(wish, restarts=3), environment=environment)
    assert calls(folder, "deepspeed") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"code": {"train.py": "other"}}, "has other code: lmtrain/"),
        ({"torch": "1.0"}, "has torch 1.0"),
        ({"deepspeed": None}, "has deepspeed not at all"),
        ({"config": "other"}, "has another config"),
        ({"config": None}, "has no config"),
        ({"corpora": {"c": "x"}}, "has another corpus c"),
        ({"shared": False}, "does not see the run folder"),
        ({"writable": False}, "cannot write"),
        ({"free": 1 << 20}, "has 0.00 GiB free"),
        ({"clock": 1006.0}, r"a clock that is \+6 s off"),
        ({"clock": 994.0}, "a clock that is -6 s off"),
        ({}, ""),
    ],
)
def test_what_must_be_the_same(change, message):
    ours = {
        "code": {"a.py": "1"}, "python": "3", "torch": "2", "deepspeed": "0", "config": "h", "corpora": {"c": "f"},
        "shared": True, "writable": True, "free": 1 << 40, "clock": 1000.0,
    }  # fmt: skip
    found = checks.compare(ours, Answer(Host("node", (0,)), {**ours, **change}, asked=1000.0, answered=1000.5))
    assert len(found) == bool(message)
    assert not message or re.search(message, found[0])


def test_where_the_ranks_meet():
    def of(name, arrived, **interfaces):
        facts = {"addresses": {"lo": ["127.0.0.1"], **interfaces}, "arrived": arrived}
        return Answer(Host(name, (0,)), facts)

    there = of("b", ["10.0.0.1", "5", "10.0.0.2", "22"], eth0=["10.0.0.2"])
    first = of("a", ["10.0.0.9", "5", "10.0.0.1", "22"], eth0=["10.0.0.1"], ib0=["192.168.0.1"])
    assert checks.rendezvous([first, there], interface=None) == "10.0.0.1"
    assert checks.rendezvous([first], interface="ib0") == "192.168.0.1"
    with pytest.raises(EngineError, match="b has no interface 'ib0' with an address; it has eth0, lo"):
        checks.rendezvous([first, there], interface="ib0")
    itself = of("a", ["127.0.0.1", "5", "127.0.1.1", "22"], eth0=["10.0.0.1"])
    assert checks.rendezvous([itself, there], interface=None) == "10.0.0.1"
    with pytest.raises(EngineError, match="say --interface, one of eth0"):
        checks.rendezvous([itself, of("c", [])], interface=None)


def test_it_starts_again_with_the_hosts_that_are_left(cluster, monkeypatch, capfd):
    folder, wish, environment = cluster
    finished(monkeypatch)
    lose = f"open({str(folder / 'down')!r}, 'w').write('node-0')\nsys.exit(5 if number == 1 else 0)"
    (folder / "plan").write_text(lose)
    assert launcher.launch(replace(wish, restarts=1), environment=environment) == 0
    hosts = [(folder / f"deepspeed.log.hosts{n}").read_text() for n in (1, 2)]
    assert hosts == ["node-0 slots=2\nnode-1 slots=2\nnode-2 slots=2\n", "node-1 slots=2\nnode-2 slots=2\n"]
    err = capfd.readouterr().err
    assert "node-0 does not answer and is left out" in err
    assert "restart 1 of 1: 2 hosts, 4 ranks, from step 6" in err


@pytest.mark.parametrize("scheme", ["file", "https"])
def test_a_corpus_that_is_a_url(cluster, capfd, scheme):
    folder, wish, environment = cluster
    url = f"{scheme}://{folder}/corpus" if scheme == "file" else "https://example.org/corpus"
    wish = replace(wish, overrides=(f"data.corpus={url}",), check_only=True)
    assert launcher.launch(wish, environment=environment) == 0
    compared = calls(folder, "ssh")[0][2]["corpora"]
    assert compared == ([str(folder / "corpus")] if scheme == "file" else [])
    err = capfd.readouterr().err
    assert ("config and corpora" in err) == (scheme == "file")
    assert (f"not compared, a URL: {url}" in err) == (scheme == "https")


def test_hosts_that_are_all_away_for_a_while_cost_one_restart(cluster, monkeypatch, capfd):
    folder, wish, environment = cluster
    finished(monkeypatch)
    down, waits = folder / "down", []
    (folder / "plan").write_text(
        f"open({str(down)!r}, 'w').write('node-0 node-1 node-2')\nsys.exit(5 if number == 1 else 0)"
    )

    def pause(self, attempt):
        waits.append(attempt)
        if attempt == 2:
            down.write_text("")
        return True

    monkeypatch.setattr(launcher.Launch, "_pause", pause)
    assert launcher.launch(replace(wish, restarts=2), environment=environment) == 0
    assert len(calls(folder, "deepspeed")) == 2
    assert waits == [1, 2]
    assert "node-2 cannot be reached over ssh" in capfd.readouterr().err


def test_restarts_wait_longer_each_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(launcher.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(launcher.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    waited = []
    for attempt in (1, 2, 3, 50):
        began = now[0]
        assert launcher.Launch._pause(SimpleNamespace(_signals=0), attempt)
        waited.append(now[0] - began)
    assert waited == pytest.approx([2, 4, 8, 60])
    assert not launcher.Launch._pause(SimpleNamespace(_signals=1), 1)


def test_not_where_the_batch_does_not_divide(cluster, monkeypatch):
    folder, wish, environment = cluster
    finished(monkeypatch)
    (folder / "plan").write_text(f"open({str(folder / 'down')!r}, 'w').write('node-0')\nsys.exit(5)")
    (folder / "hosts").write_text("node-0 slots=2\nnode-1 slots=3\nnode-2 slots=1\n")
    with pytest.raises(Exception, match=r"without node-0 4 ranks are left, and data.global_batch = 18"):
        launcher.launch(replace(wish, restarts=1, overrides=("data.global_batch=18",)), environment=environment)
    assert len(calls(folder, "deepspeed")) == 1


@pytest.mark.slow  # eleven starts
@pytest.mark.parametrize(("code", "starts"), [(5, 3), (137, 3), (2, 1), (6, 1), (75, 1)])
def test_what_is_worth_another_start(cluster, code, starts):
    folder, wish, environment = cluster
    (folder / "plan").write_text(f"sys.exit({code})")
    assert launcher.launch(replace(wish, restarts=2), environment=environment) == code
    assert len(calls(folder, "deepspeed")) == starts


def test_a_launcher_that_says_0_is_not_believed(cluster, capfd):
    """DeepSpeed's exits 0 when what it runs was killed."""
    _, wish, environment = cluster
    assert launcher.launch(wish, environment=environment) == EngineError.exit_code
    assert "the run stands at step 0" in capfd.readouterr().err


@pytest.mark.parametrize(("stale", "code", "starts"), [(2, 0, 1), (1, EngineError.exit_code, 2)])
def test_a_run_that_is_out_of_patience_is_finished(cluster, monkeypatch, stale, code, starts):
    folder, wish, environment = cluster
    path = folder / "runs" / "x y" / "checkpoints" / "step-00000004"
    manifest = SimpleNamespace(state={"progress": Progress(step=4, best=1.0, stale=stale).to_json()})
    saved = SimpleNamespace(path=path, step=4, manifest=lambda: manifest)
    monkeypatch.setattr(launcher.Checkpoints, "list", lambda self: [saved])
    monkeypatch.setattr(launcher, "faults", lambda path, *, contents: [])
    wanted = (*wish.overrides, "train.patience=2", "train.eval_every=1")
    assert launcher.launch(replace(wish, restarts=1, overrides=wanted), environment=environment) == code
    assert len(calls(folder, "deepspeed")) == starts


def test_a_signal_asks_the_second_ends_and_other_jobs_live(cluster, monkeypatch, capfd):
    folder, wish, environment = cluster
    stop = folder / "runs" / "x y" / "STOP"
    orphan = f"[{sys.executable!r}, '-c', 'import time; time.sleep(600)']"
    (folder / "plan").write_text(
        "import signal, subprocess, time\n"
        "for name in (signal.SIGINT, signal.SIGTERM): signal.signal(name, lambda *a: open(log + '.signalled', 'w'))\n"
        f"child = subprocess.Popen({orphan}, env=dict(os.environ, **dict([l.strip().split('=', 1) for l in "
        "open(os.environ['DS_ENV_FILE'])])), start_new_session=True)\n"
        "open(log + '.child', 'w').write(str(child.pid))\n"
        "import os.path\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        f"while not os.path.exists({str(stop)!r}): time.sleep(0.01)\n"
        "open(log + '.asked', 'w')\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(600)\n"
    )
    bystander = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(600)", "deepspeed.launcher.launch"],
        env={**os.environ, "LMTRAIN_LAUNCH": "0" * 32},
    )
    try:
        code = launcher.launch(replace(wish, restarts=5), environment=environment)
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    assert code == EngineError.exit_code
    assert (folder / "deepspeed.log.asked").exists()
    assert not (folder / "deepspeed.log.signalled").exists()
    pid = int((folder / "deepspeed.log.child").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert not stop.exists()
    assert len(calls(folder, "deepspeed")) == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_a_launch_that_is_killed_or_hung_up_leaves_no_launcher(cluster, number):
    folder, _, environment = cluster
    stop = folder / "runs" / "x" / "STOP"
    (folder / "hosts").write_text("localhost slots=2\n")
    (folder / "plan").write_text(
        "import os.path, time\n"
        "open(log + '.env', 'w').write(os.environ['LMTRAIN_LAUNCH'])\n"
        "open(log + '.new', 'w').write(str(os.getpid()))\n"
        "os.rename(log + '.new', log + '.pid')\n"
        f"while not os.path.exists({str(stop)!r}): time.sleep(0.01)\n"
        "sys.exit(75)\n"
    )
    text = (
        "import os, sys\nfrom pathlib import Path\nfrom lmtrain.launch import launcher\n"
        "wish = launcher.Wish(config=Path(sys.argv[1]), overrides=('run.name=x',), hostfile=Path('hosts'), "
        "interface='lo', program=sys.argv[2])\n"
        "sys.exit(launcher.launch(wish, environment=os.environ))\n"
    )
    words = [sys.executable, "-c", text, str(cluster[1].config), str(folder / "bin" / "deepspeed")]
    launched = subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    pid, tokens = folder / "deepspeed.log.pid", []
    try:
        until = time.monotonic() + 60
        while not pid.exists():
            assert launched.poll() is None
            assert time.monotonic() < until
            time.sleep(0.02)
        child = psutil.Process(int(pid.read_text()))
        drawn = (folder / "deepspeed.log.env").read_text()
        tokens = [Path(f"/dev/shm/lmtrain-{drawn}.{rank}") for rank in range(2)]
        assert all(path.exists() for path in tokens)
        launched.send_signal(number)
        code = launched.wait(30)
        psutil.wait_procs([child], timeout=10)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
        if number == signal.SIGHUP:
            assert code == 75
            assert not any(path.exists() for path in tokens)
            assert not stop.exists()
    finally:
        launched.kill()
        launched.wait()
        stop.parent.mkdir(parents=True, exist_ok=True)
        stop.touch()  # ends the fake where the launch left it
        for path in tokens:
            path.unlink(missing_ok=True)


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_on_the_command_line_is_refused(cluster, secret):
    folder, wish, environment = cluster
    with pytest.raises(InputError) as error:
        launcher.launch(replace(wish, overrides=(f"wandb.name={SECRETS[secret]}",)), environment=environment)
    assert "wandb.name" in str(error.value)
    assert SECRETS[secret] not in str(error.value)
    assert calls(folder, "deepspeed") == []


def test_a_probe_does_nothing_else():
    for request in ("", "[", "{}", '{"do": "rm", "drawn": "' + "0" * 32 + '", "ranks": 1}', '{"drawn": "../x"}'):
        with pytest.raises(InputError):
            probe.serve(request, environment={})


PREFIXED = """
import os, sys
from lmtrain.launch import prefix
prefix.begin("3")
print("one\\ntwo", flush=True)
os.write(2, b"x" * 9000 + b"\\nlast words")
os.kill(os.getpid(), 9)
"""


def test_every_line_says_its_rank_to_the_last():
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PREFIXED], capture_output=True, text=True, timeout=60, cwd=root, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "[rank 3] one\n[rank 3] two\n"
    lines = done.stderr.splitlines()
    assert all(line.startswith("[rank 3] ") and len(line) < 4096 for line in lines)
    assert "".join(line.removeprefix("[rank 3] ") for line in lines) == "x" * 9000 + "last words"


@pytest.mark.slow
def test_a_real_job_on_this_host(trained, tmp_path):
    """DeepSpeed's own launcher, two ranks; no ssh; the numbers of the plain engine; the key is nowhere to be seen."""
    path = config(tmp_path, data={"corpus": str(trained / "corpus")})
    assert lmtrain("train", path, "run.name=plain").code == 0
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin" / "ssh").chmod(0o755)
    root = Path(__file__).resolve().parents[2]
    environment = {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "HOME": str(tmp_path), "PYTHONPATH": str(root), **SECRETS,
        "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "WANDB_MODE": "disabled",
    }  # fmt: skip
    command = [sys.executable, "-m", "lmtrain", "launch", "--hostfile", "hosts", "--restarts", "1", str(path)]
    command += ["run.name=two ranks", "engine.kind=zero", "engine.zero_stage=1"]
    with (tmp_path / "out").open("wb") as out:
        job = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=out)
        seen = set()
        until = time.monotonic() + 500
        while job.poll() is None:
            assert time.monotonic() < until
            for process in psutil.Process(job.pid).children(recursive=True):
                try:
                    words = " ".join(process.cmdline())
                    seen.add(words)
                    if "deepspeed" in words or "--local_rank" in words:  # what a rank starts may know its tokens
                        seen.add(words + json.dumps(process.environ()))
                except psutil.Error:
                    continue
            time.sleep(0.05)
    text = (tmp_path / "out").read_text()
    assert job.returncode == 0, text
    assert "[rank 0] " in text
    assert any("deepspeed.launcher.launch" in line for line in seen)
    folder = tmp_path / "runs" / "two ranks"
    files = [one.read_text(errors="replace") for one in folder.rglob("*") if one.is_file()]
    for secret in SECRETS.values():
        assert [one for one in [text, *seen, *files] if secret in one] == []
    rows = {}
    for name in ("plain", "two ranks"):
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        rows[name] = [row["train/loss"] for row in map(json.loads, lines) if row["kind"] == "train"]
    assert rows["two ranks"] == pytest.approx(rows["plain"], rel=1e-5)
    assert not list(Path("/dev/shm").glob("lmtrain-*"))
