"""Weights & Biases from a safe distance: its settings, and the keeper of the process that talks to it.

The process itself is the lower half of tracker.py. It reads metrics.jsonl as the file grows, so what is here sends it
no metrics: it starts it, reports once when it fails, puts an offline one in its place, and ends it in bounded time.
"""

from __future__ import annotations

import contextlib
import json
import math
import netrc
import os
import re
import secrets
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, Literal
from urllib.parse import urlsplit

import psutil
from pydantic import Field

from lmtrain.config import Config
from lmtrain.errors import ConfigError

IDENTITY = "wandb.json"
FOLDER = "wandb"
"""Below the run folder; W&B itself calls it so."""
REMOVED = "<removed>"
_SECRET_NAME = re.compile(r"(^|[_-])(api_?key|key|token|secret|password|passwd|credentials?)$", re.IGNORECASE)
_TEARDOWN_SECONDS = 5.0
_LOCAL_SECONDS = 30.0
"""What an offline process may take at least: no server can hold it up, a busy machine can."""


class WandbConfig(Config):
    """Where W&B shows the run. `auto`: disabled without a project, online with a key, else offline."""

    project: str | None = Field(None, min_length=1, max_length=128, description="project; none: W&B is off (mode auto)")
    entity: str | None = Field(None, min_length=1, description="user or team")
    name: str | None = Field(None, min_length=1, description="name of the run; the run folder's when not given")
    group: str | None = Field(None, min_length=1, description="group of runs")
    tags: tuple[str, ...] = Field((), description="tags of the run")
    mode: Literal["auto", "online", "offline", "disabled"] = Field("auto", description="see above")
    timeout: float = Field(30.0, gt=0, le=3600, description="seconds it may take to start, and again to finish")


def environment_settings(environment: Mapping[str, str]) -> dict[str, Any]:
    """The `wandb` section that the standard WANDB_* variables stand for; it goes over the file and under overrides.

    What is not ours (WANDB_BASE_URL, WANDB_NOTES, WANDB_JOB_TYPE, WANDB_DIR, ...) reaches the library by itself.
    """
    names = {
        "project": "WANDB_PROJECT",
        "entity": "WANDB_ENTITY",
        "name": "WANDB_NAME",
        "group": "WANDB_RUN_GROUP",
    }
    tree: dict[str, Any] = {key: environment[name] for key, name in names.items() if environment.get(name)}
    if tags := [tag.strip() for tag in environment.get("WANDB_TAGS", "").split(",") if tag.strip()]:
        tree["tags"] = tags
    mode = environment.get("WANDB_MODE", "").lower()
    if mode:
        known = {"online": "online", "run": "online", "offline": "offline", "dryrun": "offline", "disabled": "disabled"}
        if mode not in known:
            raise ConfigError(f"WANDB_MODE = {mode!r}; wanted online, offline or disabled")
        tree["mode"] = known[mode]
    if environment.get("WANDB_DISABLED", "").lower() in {"true", "1", "yes", "on"}:
        tree["mode"] = "disabled"
    return tree


def wandb_key(environment: Mapping[str, str]) -> str | None:
    """Where a W&B key is found (never the key itself), or None: WANDB_API_KEY, an identity token, or the netrc file."""
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"):
        if environment.get(name):
            return name
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    home = Path(environment.get("HOME") or Path.home())
    places = [Path(environment["NETRC"])] if environment.get("NETRC") else [home / ".netrc", home / "_netrc"]
    for place in places:
        try:
            found = netrc.netrc(str(place)).authenticators(host)
        except (OSError, netrc.NetrcParseError):
            continue
        if found and found[2]:
            return str(place)
    return None


def resolve_mode(config: WandbConfig, environment: Mapping[str, str]) -> Literal["online", "offline", "disabled"]:
    """What `config.mode` comes to here. Without a key nothing can be online."""
    if config.mode in {"offline", "disabled"}:
        return "offline" if config.mode == "offline" else "disabled"
    if config.mode == "auto" and config.project is None and not environment.get("WANDB_SWEEP_ID"):
        return "disabled"
    return "online" if wandb_key(environment) else "offline"


def is_secret(name: str) -> bool:
    """Whether a variable or key is named as secrets are (`tokens` and `tokenizer` are not)."""
    return _SECRET_NAME.search(name) is not None


def secrets_in(environment: Mapping[str, str]) -> frozenset[str]:
    """The values of variables that are named like secrets; too short ones would hide innocent text."""
    return frozenset(v for k, v in environment.items() if is_secret(k) and len(v) >= 8)


def scrub(value: Any, secrets: frozenset[str]) -> Any:
    """A tree without what is named like a secret, is one of `secrets`, or is a password in a URL."""
    if isinstance(value, Mapping):
        return {
            str(k): REMOVED if isinstance(v, str) and is_secret(str(k)) else scrub(v, secrets) for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [scrub(v, secrets) for v in value]
    if isinstance(value, str):
        for secret in secrets:
            value = value.replace(secret, REMOVED)
        return re.sub(r"(\w+://[^/\s:@]*):[^/\s@]+@", rf"\1:{REMOVED}@", value)
    return value


class Follower:
    """Keeps the W&B process. Everything happens in a thread of its own: no method but `finish` waits.

    job: what the process is told (see tracker.follow). mode: online or offline. environment: the process's variables.
    timeout: seconds to start, and again to finish. say, warn: for the person at the terminal.
    """

    def __init__(
        self,
        job: Mapping[str, Any],
        *,
        mode: str,
        environment: Mapping[str, str],
        timeout: float,
        say: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._job, self._environment, self._timeout = dict(job), dict(environment), timeout
        self._secrets = secrets_in(environment)
        self._say, self._warn = say, warn
        self._modes = ("online", "offline") if mode == "online" else ("offline",)
        self._pid: int | None = None
        self._place, self._since = "", 0.0
        self._exit_code: int | None = None
        self._comes_back = False
        self._limit = math.inf
        self._local = max(timeout, _LOCAL_SECONDS)
        self._mode = self._modes[0]
        self._thread = threading.Thread(target=self._keep, name="wandb", daemon=True)
        self._thread.start()

    def finish(self, *, exit_code: int, timeout: float | None = None) -> None:
        """Let the process send what is left and end; after the configured time-out it is ended.

        timeout: a shorter one, for a run that was asked to stop and will be started again: what is not sent, the next
        start sends.
        """
        if timeout is not None:
            self._comes_back = True
            self._timeout = min(timeout, self._timeout)
            self._local = min(timeout, self._local)
        self._limit = time.monotonic() + (self._local if self._mode == "offline" else self._timeout)
        self._exit_code = exit_code
        self._thread.join(self._timeout + self._local + 2 * _TEARDOWN_SECONDS + 5)

    def _keep(self) -> None:
        for mode in self._modes:
            self._mode = mode
            why = self._attend(mode)
            if why is None:
                return
            if self._comes_back:
                then = "the next start sends what is missing"
            elif mode == self._modes[-1]:
                then = "W&B is left alone from here; metrics.jsonl has every row"
            else:
                then = "going on offline"
            self._warn(f"W&B ({mode}): {scrub(why, self._secrets)}; {then}")
            if self._comes_back:
                return
            if self._exit_code is not None:
                self._limit = time.monotonic() + self._local

    def _attend(self, mode: str) -> str | None:
        """One process from start to end; None when it ended well, else what went wrong."""
        self._pid = None
        try:
            folder = Path(self._job["folder"]) / FOLDER
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "follower.log").open("ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "lmtrain.tracker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    env=self._environment,
                    start_new_session=True,  # Ctrl-C is for the training process, which ends this one
                )
        except OSError as error:
            return f"its process cannot be started: {error}"
        try:
            return self._converse(process, mode)
        except OSError as error:
            return f"its process is gone: {error}"
        finally:
            _end(process, self._pid)

    def _converse(self, process: subprocess.Popen[bytes], mode: str) -> str | None:
        assert process.stdin is not None
        assert process.stdout is not None
        _send(process.stdin, {**self._job, "mode": mode})
        patience = self._local if mode == "offline" else self._timeout
        deadline = time.monotonic() + patience
        waiting_for, ready, done, why, rest = "to start", False, False, None, b""
        while time.monotonic() < min(deadline, self._limit):
            if ready and self._exit_code is not None and waiting_for != "to finish":
                _send(process.stdin, {"exit_code": self._exit_code})
                waiting_for = "to finish"
            if not select.select([process.stdout], [], [], 0.2)[0]:
                continue
            chunk = os.read(process.stdout.fileno(), 65536)
            if not chunk:
                return None if done else why or "its process ended by itself"
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                news = json.loads(line)
                if news["state"] == "started":
                    self._pid = news["pid"]
                elif news["state"] == "ready":
                    ready, deadline = True, math.inf
                    self._ready(news, mode)
                elif news["state"] == "done":
                    done, deadline = True, time.monotonic() + _TEARDOWN_SECONDS
                    self._done(news, mode)
                elif news["state"] == "note":
                    self._say(f"W&B: {scrub(news['text'], self._secrets)}")
                else:
                    why = str(news["why"])
        if done:
            return None
        if waiting_for == "to finish" and mode == "online":
            self._done({"synced": False}, mode)
            return None
        if time.monotonic() < deadline:
            return f"it was still waiting {waiting_for} when the run ended"
        return f"it took more than {patience:g} s {waiting_for}"

    def _ready(self, news: Mapping[str, Any], mode: str) -> None:
        self._place, self._since = news["folder"], time.monotonic()
        if mode == "online":
            self._say(f"W&B: {news['url']}")
        else:
            self._say(f"W&B: offline; upload with: {self._upload(mode)}")

    def _done(self, news: Mapping[str, Any], mode: str) -> None:
        if mode == "offline":
            if time.monotonic() - self._since > 60:  # else it still stands on the screen
                self._say(f"W&B: offline; upload with: {self._upload(mode)}")
        elif not news["synced"]:
            self._warn(f"W&B did not take everything in time; upload the rest with: {self._upload(mode)}")

    def _upload(self, mode: str) -> str:
        online = "--no-skip-online " if mode == "online" else ""
        return f"wandb sync {online}{shlex.quote(self._place)}"


def _send(pipe: IO[bytes], message: Mapping[str, Any]) -> None:
    pipe.write(json.dumps(message).encode() + b"\n")
    pipe.flush()


def _end(process: subprocess.Popen[bytes], pid: int | None) -> None:
    """Nothing of it is left: `process`, which only forked, the one that it left behind, and wandb-core below that."""
    family: list[psutil.Process] = []
    if pid is not None:
        with contextlib.suppress(psutil.Error):
            family = psutil.Process(pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for member in family:
        with contextlib.suppress(psutil.Error):
            member.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was left to send has no reader any more
                pipe.close()


def job(folder: Path, config: WandbConfig, environment: Mapping[str, str], *, offset: int) -> dict[str, Any]:
    """What the W&B process needs to know: who the run is, where its rows are and which of them are old."""
    place = folder.resolve()
    settings = {
        "init_timeout": config.timeout,
        "finish_timeout": config.timeout,
        "finish_timeout_raises": True,
        "console": "off",
        "silent": True,
        "disable_code": True,
        "program": "lmtrain",
        "x_stats_pid": os.getpid(),
    }
    return {
        "folder": str(place),
        "offset": offset,
        "parent": os.getpid(),
        "id": _identity(place / IDENTITY, environment),
        "project": config.project or "lmtrain",
        "entity": config.entity,
        "name": config.name or place.name,
        "group": config.group,
        "tags": list(config.tags) or None,
        "dir": None if environment.get("WANDB_DIR") else str(place),
        "settings": {k: v for k, v in settings.items() if not environment.get(f"WANDB_{k.upper()}")},
    }


def _identity(path: Path, environment: Mapping[str, str]) -> str:
    """The W&B id of the run in this folder, stored for the next start: WANDB_RUN_ID, the stored one, or a new one."""
    stored = None
    if path.exists():
        try:
            stored = str(json.loads(path.read_text())["id"])
        except (ValueError, KeyError, TypeError):
            stored = None  # a torn file: the run shows up under a new id, its rows are all sent again
    chosen = environment.get("WANDB_RUN_ID") or stored or secrets.token_hex(4)
    if chosen != stored:
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(path.name + ".tmp")
        new.write_text(json.dumps({"id": chosen}) + "\n")
        new.replace(path)
    return chosen
