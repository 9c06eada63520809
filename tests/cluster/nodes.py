"""Hosts made of namespaces: each has its own address, name, processes, mounts, sshd and keys; the files are shared.

    with Cluster(folder, 3) as cluster:
        job = cluster.start(0, ["deepspeed", "--hostfile", cluster.hostfile, ...], cwd=folder)

Nothing is made in this machine's own network: the hosts hang on a bridge that lies in a namespace of its own. Every
namespace belongs to a process that dies with ours, however ours ends, and takes with it what it holds. The process
namespace matters for one more reason: an interrupted launcher runs `pkill -f` on every host.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

NET, PORT = "10.77.77", 2222
TOOLS = {"pdsh": "pdsh", "sshd": "openssh-server", "ssh-keygen": "openssh-client", "ip": "iproute2"}
"""What the hosts need, and the Debian package that has it; nsenter, unshare and setpriv are on every Linux."""
UNSHARE = ("setpriv", "--pdeathsig", "KILL", "unshare")
PATIENCE = 20.0
"""Seconds in which a host has to come up, or its processes to go."""


def missing() -> str | None:
    """Why no hosts can be made here, or None."""
    if os.geteuid() != 0:
        return "hosts out of namespaces need root"
    absent = [package for tool, package in TOOLS.items() if find(tool) is None]
    if absent:
        return f"hosts need the packages {', '.join(absent)} (.ci/setup installs them)"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--pid", "--uts", "--fork", "ip", "link", "add", "v0", "type", "veth"],
        capture_output=True,
        text=True,
        check=False,
    )
    return None if tried.returncode == 0 else f"namespaces or veth are not allowed here: {tried.stderr.strip()}"


def find(tool: str) -> str | None:
    """The path of a tool, also where only root's PATH has it."""
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Process(NamedTuple):
    """A process on a host, by its number on this machine."""

    pid: int
    command: str
    rank: int | None


class Node(NamedTuple):
    """One host. `holder` is the process that all of it depends on, `init` the host's process 1."""

    number: int
    name: str
    address: str
    holder: subprocess.Popen[bytes]
    init: int


class Cluster:
    """`count` hosts node0, node1, ...; a context manager. `hostfile` lists them with one slot each."""

    def __init__(self, folder: Path, count: int, *, slots: int = 1) -> None:
        self.folder, self.count = folder, count
        self.hostfile = folder / "hostfile"
        self.nodes: list[Node] = []
        self._switch: subprocess.Popen[bytes] | None = None
        self._jobs: list[subprocess.Popen[str]] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.hostfile.write_text("".join(f"node{i} slots={slots}\n" for i in range(count)))

    def __enter__(self) -> Cluster:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- making and unmaking ---------------------------------------------------------------------------------------

    def _build(self) -> None:
        keys = self.folder / "keys"
        keys.mkdir(mode=0o700)
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / "user")
        names = [f"{NET}.{i + 1} node{i}" for i in range(self.count)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
        self._switch = subprocess.Popen([*UNSHARE, "--net", "sleep", "infinity"])
        _wait(lambda: _namespace(self._switch.pid, "net") != _namespace(os.getpid(), "net"), "the switch")
        self._on_switch("link", "add", "br0", "type", "bridge")
        self._on_switch("link", "set", "br0", "up")
        for number in range(self.count):
            self.nodes.append(self._node(number))
        for node in self.nodes:
            log = self.folder / node.name / "sshd.log"
            _wait(lambda log=log: "Server listening" in log.read_text(), f"sshd of {node.name}")

    def _node(self, number: int) -> Node:
        name, address = f"node{number}", f"{NET}.{number + 1}"
        home = self.folder / name
        home.mkdir(mode=0o700)
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", home / "hostkey")
        shutil.copy(self.folder / "keys" / "user.pub", home / "authorized_keys")
        shutil.copy(self.folder / "keys" / "user", home / "user")
        (home / "user").chmod(0o600)
        # What is found under /etc/ssh: of the real one, and of the real home, nothing is seen.
        (home / "ssh_config").write_text(
            f"Host *\n Port {PORT}\n IdentityFile /etc/ssh/user\n StrictHostKeyChecking no\n BatchMode yes\n"
            " UserKnownHostsFile /dev/null\n LogLevel ERROR\n ConnectTimeout 5\n"
            " ServerAliveInterval 1\n ServerAliveCountMax 5\n"
        )
        (home / "sshd_config").write_text(
            f"Port {PORT}\nHostKey /etc/ssh/hostkey\nAuthorizedKeysFile /etc/ssh/authorized_keys\n"
            "PermitRootLogin prohibit-password\nPasswordAuthentication no\nUsePAM no\nStrictModes no\nPidFile none\n"
            "MaxStartups 100\nMaxSessions 100\n"
        )
        script = (
            "set -e; mount --make-rprivate /; hostname $1; "
            "mount --bind $2/$1 /etc/ssh; mount --bind $2/hosts /etc/hosts; "
            "mount -t tmpfs tmpfs /run; mkdir /run/sshd; mount -t tmpfs tmpfs /dev/shm; "
            "ip link set lo up; exec $3 -D -e -f /etc/ssh/sshd_config"
        )
        spaces = ["--mount", "--net", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        with (home / "sshd.log").open("wb") as log:
            holder = subprocess.Popen(
                [*UNSHARE, *spaces, "sh", "-c", script, "sh", name, str(self.folder), str(find("sshd"))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
        node = Node(number, name, address, holder, 0)
        try:
            _wait(lambda: children.read_text().split(), name)
            node = node._replace(init=int(children.read_text().split()[0]))
            port = f"p{number}"
            self._on_switch("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", node.init)
            self._on_switch("link", "set", port, "master", "br0", "up")
            inside = ["nsenter", "-t", node.init, "-n"]
            _run(*inside, "ip", "addr", "add", f"{address}/24", "dev", "eth0")
            _run(*inside, "ip", "link", "set", "eth0", "up")
        except BaseException:
            holder.kill()
            holder.wait()
            raise
        return node

    def _on_switch(self, *words: object) -> None:
        assert self._switch is not None
        _run("nsenter", "-t", self._switch.pid, "-n", "ip", *words)

    def close(self) -> None:
        """End every process of every host, and with them the hosts. May be called again."""
        for node in self.nodes:
            self.kill(node.number)
        for job in self._jobs:
            if job.poll() is None:
                job.kill()
            job.wait()
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait()

    # ---- what is done with them ------------------------------------------------------------------------------------

    def start(
        self, number: int, command: Sequence[object], *, cwd: Path, log: Path, environment: dict[str, str]
    ) -> subprocess.Popen[str]:
        """Start a command on a host; what it prints goes into the file `log`."""
        inside = ["nsenter", "-t", str(self.nodes[number].init), "-n", "-m", "-p", "-u", f"--wd={cwd}", "--"]
        with log.open("wb") as out:
            job = subprocess.Popen(
                [*UNSHARE[:-1], *inside, *map(str, command)],
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                text=True,
            )
        self._jobs.append(job)
        return job

    def processes(self, number: int) -> list[Process]:
        """What runs on a host beside its sshd; zombies do not run."""
        space = _namespace(self.nodes[number].init, "pid")
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or space is None or _namespace(int(entry.name), "pid") != space:
                continue
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                values = dict(v.split("=", 1) for v in (entry / "environ").read_text().split("\0") if "=" in v)
            except OSError:
                continue  # gone meanwhile
            if command and not command.startswith(("sshd", str(find("sshd")))):
                is_rank = "-m lmtrain" in command and "deepspeed" not in command and "torchrun" not in command
                rank = int(values["RANK"]) if is_rank and "RANK" in values else None
                found.append(Process(int(entry.name), command, rank))
        return found

    def rank(self, rank: int) -> Process:
        """The process of a rank, on whatever host it runs."""
        (found,) = [p for node in self.nodes for p in self.processes(node.number) if p.rank == rank]
        return found

    @contextmanager
    def masked(self, number: int, path: Path, other: Path) -> Iterator[None]:
        """On this host alone, the file or folder `path` is `other`."""
        inside = ["nsenter", "-t", self.nodes[number].init, "-m", "-p"]
        _run(*inside, "mount", "--bind", other, path)
        try:
            yield
        finally:
            _run(*inside, "umount", "--lazy", path)

    def memory(self, number: int) -> list[str]:
        """What lies in a host's /dev/shm."""
        its_root = Path("/proc", str(self.nodes[number].init), "root")
        return sorted(path.name for path in (its_root / "dev" / "shm").iterdir())

    def link(self, number: int, *, up: bool) -> None:
        """Plug a host's cable in, or pull it."""
        self._on_switch("link", "set", f"p{number}", "up" if up else "down")

    def kill(self, number: int) -> None:
        """Switch a host off: all its processes die at once."""
        holder = self.nodes[number].holder
        if holder.poll() is None:
            try:
                os.kill(self.nodes[number].init, signal.SIGKILL)
                holder.wait(PATIENCE)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                holder.kill()
        holder.wait()


def _namespace(pid: int, kind: str) -> str | None:
    try:
        return os.readlink(f"/proc/{pid}/ns/{kind}")
    except OSError:
        return None


def _run(*words: object) -> None:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")


def _wait(ready: object, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not ready():  # type: ignore[operator]
        if time.monotonic() > end:
            raise RuntimeError(f"{what} did not come up in {PATIENCE:g} s")
        time.sleep(0.02)
