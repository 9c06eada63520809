"""What `lmtrain launch` does on each host: look, put the tokens where the ranks find them, end what is left.

It runs as `python -m lmtrain probe` with a request, JSON, on its stdin: nothing of a request is ever on a command line.
The answer is one line of stdout behind a mark, since a login shell may greet on stdout too. No torch is imported.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

import lmtrain
from lmtrain.errors import InputError
from lmtrain.launch import private

MARK = "lmtrain-probe:"
DRAWN_FILE = "drawn"
"""In the run folder's `launch`: what this launch drew. Where it cannot be read, the run folder is not shared."""
_GONE = 10.0
"""Seconds that a killed process may take to be gone."""


def answer(request: Mapping[str, Any], *, environment: Mapping[str, str]) -> dict[str, Any]:
    """Do what a request asks: `look`, `store` or `end`. Raises InputError for anything else."""
    drawn, ranks = request.get("drawn"), request.get("ranks")
    if not private.is_drawn(drawn) or not isinstance(ranks, int) or not 0 <= ranks <= 1024:
        raise InputError("the request is not one of `lmtrain launch`'s")
    assert isinstance(drawn, str)
    match request.get("do"):
        case "look":
            return look(request, drawn=drawn, environment=environment)
        case "store":
            private.write(request["private"], drawn=drawn, ranks=ranks)
            return {}
        case "end":
            private.remove(drawn, ranks=ranks)
            return {"ended": end(drawn, grace=float(request["grace"]))}
    raise InputError(f"a probe cannot do {request.get('do')!r}")


def look(request: Mapping[str, Any], *, drawn: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """What the hosts of one job must agree on, and what the launcher needs to know of each."""
    folder = Path(request["folder"])
    at = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return {
        "code": code(Path(lmtrain.__file__).parent),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "deepspeed")},
        "config": _hash(Path(request["config"])),
        "corpora": {path: _hash(Path(path) / "manifest.json") for path in request["corpora"]},
        "shared": _text(folder / "launch" / DRAWN_FILE) == drawn,
        "writable": os.access(at, os.W_OK),
        "free": shutil.disk_usage(at).free,
        "clock": time.time(),
        "addresses": addresses(),
        "arrived": environment.get("SSH_CONNECTION", "").split(),
        "port": _free_port(),
    }


def code(folder: Path) -> dict[str, str]:
    """The hash of every Python file of the package, by its path in it."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(folder.rglob("*.py"))
    }


def addresses() -> dict[str, list[str]]:
    """The IPv4 addresses of every interface of this host that is up."""
    up = {name for name, state in psutil.net_if_stats().items() if state.isup}
    found = {
        name: [one.address for one in some if one.family == socket.AF_INET]
        for name, some in psutil.net_if_addrs().items()
        if name in up
    }
    return {name: some for name, some in found.items() if some}


def end(drawn: str, *, grace: float) -> int:
    """Kill the processes of one launch on this host and no others; returns how many. grace: seconds to go by itself."""
    left = _processes(drawn)
    _, left = psutil.wait_procs(left, timeout=grace) if left else ([], [])
    ended = 0
    until = time.monotonic() + _GONE
    while (left := _processes(drawn)) and time.monotonic() < until:
        for process in left:
            try:
                process.send_signal(signal.SIGKILL)
                ended += 1
            except psutil.Error:
                continue
        psutil.wait_procs(left, timeout=1)
    return ended


def _processes(drawn: str) -> list[psutil.Process]:
    """Those that have LMTRAIN_LAUNCH set to what was drawn, as far as we may see; never this one."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            if process.environ().get(private.LAUNCH) == drawn:
                found.append(process)
        except (psutil.Error, OSError):
            continue
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _hash(path: Path) -> str | None:
    """sha256 of a file, None where there is none that can be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("", 0))
        return int(server.getsockname()[1])


def serve(text: str, *, environment: Mapping[str, str]) -> str:
    """The line that answers a request's text."""
    try:
        request = json.loads(text)
    except ValueError:
        raise InputError("the request on stdin is no JSON; `lmtrain launch` sends it") from None
    return MARK + json.dumps(answer(request, environment=environment))
