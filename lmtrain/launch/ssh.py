"""Asking hosts over ssh: one connection a host, all at once, the question on stdin."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from lmtrain.errors import EngineError, LmtrainError
from lmtrain.launch import probe
from lmtrain.launch.hostfile import LOCAL_NAMES, Host
from lmtrain.launch.shell import path_word

CONNECT_SECONDS = 10
KEEP_ALIVE = ("ServerAliveInterval=10", "ServerAliveCountMax=3")
"""ssh notices within half a minute that a host is gone; without it the launcher would wait for it for ever."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a host said, or why it did not; seconds since 1970 when it was asked and when it had answered."""

    host: Host
    facts: Mapping[str, Any] | None
    trouble: str = ""
    reached: bool = True
    asked: float = 0.0
    answered: float = 0.0


@dataclass(frozen=True, slots=True)
class Reach:
    """How hosts are reached. here: the only host is this machine, and nothing goes over ssh."""

    environment: Mapping[str, str]
    here: bool = False
    config: Path | None = None
    port: int | None = None
    timeout: float = 60.0

    def options(self) -> list[str]:
        """Options of ssh, for our own connections and for pdsh's (which cuts them at spaces)."""
        settings = ("BatchMode=yes", f"ConnectTimeout={CONNECT_SECONDS}", *KEEP_ALIVE)
        out = [part for setting in settings for part in ("-o", setting)]
        if self.config is not None:
            out += ["-F", path_word(str(self.config.absolute()), what="--ssh-config")]
        if self.port is not None:
            out += ["-p", str(self.port)]
        return out

    def ask(self, hosts: Sequence[Host], request: Mapping[str, Any]) -> list[Answer]:
        """Every host's answer, in order; one that does not answer is no error here. ranks: each host's own."""
        if self.here:
            return [self._ask_here(host, request) for host in hosts]
        with ThreadPoolExecutor(max_workers=min(64, len(hosts))) as pool:
            return list(pool.map(lambda host: self._ask(host, request), hosts))

    def _ask_here(self, host: Host, request: Mapping[str, Any]) -> Answer:
        asked = time.time()
        try:
            facts = probe.answer({**request, "ranks": len(host.slots)}, environment={})
        except (LmtrainError, OSError) as error:
            return Answer(host, None, str(error))
        return Answer(host, facts, asked=asked, answered=time.time())

    def _ask(self, host: Host, request: Mapping[str, Any]) -> Answer:
        command = self._command()
        asked = time.time()
        try:
            done = subprocess.run(
                ["ssh", "-T", "-a", "-x", *self.options(), "--", host.name, command],
                input=json.dumps({**request, "ranks": len(host.slots)}),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=self.timeout,
                env=dict(self.environment),
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Answer(host, None, f"no answer within {self.timeout:g} s", reached=False)
        except OSError as error:
            raise EngineError(f"ssh cannot be started: {error.strerror}; apt-get install openssh-client") from None
        for line in done.stdout.splitlines():
            if line.startswith(probe.MARK) and done.returncode == 0:
                try:
                    return Answer(host, json.loads(line.removeprefix(probe.MARK)), asked=asked, answered=time.time())
                except ValueError:
                    break
        said = (done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["nothing was said"])[-1]
        return Answer(host, None, f"{said!r} (exit {done.returncode})", reached=done.returncode != 255)

    def _command(self) -> str:
        """The probe, in the folder and with the search path that DeepSpeed gives to the ranks."""
        path = self.environment.get("PYTHONPATH")
        words = ["env", f"PYTHONPATH={Path.cwd()}:{path}", sys.executable] if path else [sys.executable]
        return f"cd {shlex.quote(str(Path.cwd()))} && exec {shlex.join(words)} -m lmtrain probe"


def is_here(hosts: Sequence[Host]) -> bool:
    """Whether the job has one host and it is this machine: by its name, or by an address of its name."""
    if len(hosts) != 1:
        return False
    name = hosts[0].name
    if name in LOCAL_NAMES or name in {socket.gethostname(), socket.getfqdn()}:
        return True
    try:
        theirs = {str(entry[4][0]) for entry in socket.getaddrinfo(name, None)}
    except OSError:
        return False
    ours = {one.address for some in psutil.net_if_addrs().values() for one in some}
    return bool(theirs & ours)
