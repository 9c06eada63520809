"""The run's folder: one job at a time is at work in it, all hosts see it, and it says where a run goes on."""

from __future__ import annotations

import fcntl
import hashlib
import json
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lmtrain.checkpoint import Checkpoints
from lmtrain.checkpoint.ranks import share, tell
from lmtrain.config import dump
from lmtrain.corpora import say
from lmtrain.data.loader import compare_order
from lmtrain.errors import CheckpointError, ConfigError
from lmtrain.protocol import Corpus, Engine
from lmtrain.schema import RunConfig
from lmtrain.train import Progress

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
_SHARED_SECONDS = 3.0
"""How long a file that rank 0 wrote may take to be seen by all hosts."""


@contextmanager
def owned(folder: Path, engine: Engine) -> Iterator[None]:
    """One job at a time in a run folder: rank 0 holds a lock on it; all ranks learn when it cannot."""
    handle = None
    if engine.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / LOCK).open("w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.close()
            handle = None
    taken = engine.agree(int(engine.rank == 0 and handle is None))
    if taken:
        raise ConfigError(f"another job is at work in {folder}; give this one another run.name, or end that one")
    try:
        yield
    finally:
        if handle is not None:
            handle.close()


def require_alike(config: RunConfig, corpora: Sequence[Corpus], engine: Engine) -> None:
    """Refuse to begin when a rank was given another config, or reads other corpora, than rank 0: it names the hosts."""
    if engine.world == 1:
        return
    tree = config.model_dump(mode="json")
    for own in ("corpus", "remote"):  # where a host finds the corpora; what is in them is compared below
        del tree["data"][own]
    del tree["wandb"]  # of rank 0 alone, and under the variables of each host
    tree["corpora"] = [(one.fingerprint, part.weight) for one, part in zip(corpora, config.data.shares, strict=True)]
    hashes = [hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest()[:12] for part in tree.values()]
    told = [text.split() for text in share(engine, " ".join([socket.gethostname(), *hashes]))]
    others = set()
    for host, *found in told:
        if apart := [key for key, mine, first in zip(tree, found, told[0][1:], strict=True) if mine != first]:
            others.add(f"{host} has another {', '.join(apart)}")
    if others:
        raise ConfigError(
            f"the ranks were not given the same: {'; '.join(sorted(others))} than rank 0 on {told[0][0]}; "
            "give every host the same config file and the same corpora"
        )


def require_shared(folder: Path, engine: Engine) -> None:
    """Refuse a run folder that some host has for itself: it would resume from nothing, and its fragments be missed."""
    if engine.world == 1:
        return
    mark = tell(engine, (secrets.randbits(50),))[0]
    path = folder / f".shared-{mark:x}"
    if engine.rank == 0:
        path.touch()
    engine.agree(0)
    until = time.monotonic() + _SHARED_SECONDS
    while not (seen := path.exists()) and time.monotonic() < until:
        time.sleep(0.1)  # network file systems may remember for a while that it was not there
    blind = share(engine, "" if seen else socket.gethostname())
    if engine.rank == 0:
        path.unlink(missing_ok=True)
    if any(blind):
        hosts = ", ".join(sorted({host for host in blind if host}))
        raise ConfigError(
            f"{folder} is not shared: {hosts} does not see what rank 0 writes there; "
            "put run.dir on a file system that all hosts mount at the same path"
        )


def resume(
    config: RunConfig,
    store: Checkpoints,
    engine: Engine,
    *,
    identity: Mapping[str, Any],
    layout: Mapping[str, Any],
) -> Progress:
    """Where to begin: step 0, or the newest valid checkpoint, put into the engine. Stores the resolved config."""
    used = bool(engine.agree(int(engine.rank == 0 and store.any())))
    if used and config.run.resume == "never":
        raise ConfigError(
            f"{config.folder} was used before and run.resume = never; give another run.name, or run.resume=auto"
        )
    if not used and config.run.resume == "required":
        raise CheckpointError(
            f"{config.folder} has no checkpoint and run.resume = required; use run.resume=auto to start"
        )
    standing = Progress()
    if used:
        step, state = store.restore(engine)
        _same_run(state.get("identity", {}), identity, where=f"{store.folder} step {step}")
        changed = [
            f"{key} was {state['layout'].get(key)}, is {value}"
            for key, value in layout.items()
            if state.get("layout", {}).get(key) != value
        ]
        standing = Progress(**state["progress"])
        if engine.rank == 0:
            say(f"resumed step {step} of {config.folder}")
            scalars = engine.scalars()
            if scalars["optimizer_steps"] and scalars.get("ema_steps") == 0:
                say("no averaged weights were saved: optimizer.ema begins at the weights of this checkpoint")
            if changed:
                say(
                    f"the layout differs ({'; '.join(changed)}): batches are the same, sums may differ in the last bits"
                )
    if engine.rank == 0:
        _store_config(config)
    return standing


def _same_run(recorded: Mapping[str, Any], present: Mapping[str, Any], *, where: str) -> None:
    compare_order(recorded.get("order", {}), present["order"])
    for key, value in present["model"].items():
        was = recorded.get("model", {}).get(key)
        if was != value and key != "dropout":
            raise ConfigError(
                f"model.{key} = {value}, but {where} was trained with {was}; give the old value, or another run.name"
            )


def _store_config(config: RunConfig) -> None:
    path = config.folder / CONFIG
    text = dump(config)
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    if path.exists():  # the run goes on otherwise than it began: keep what it began with
        number = 1
        while (old := config.folder / f"config.{number}.yaml").exists():
            number += 1
        path.rename(old)
    new = path.with_suffix(".tmp")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def stored_fit(config: RunConfig) -> Mapping[str, Any] | None:
    """What the run fitted when it began, the same in all of its checkpoints; None when it is new or fits nothing."""
    if config.data.view.standardise:
        for saved in Checkpoints(config.folder / CHECKPOINTS, config.checkpoint, note=say).list():
            with suppress(CheckpointError):
                fit: Mapping[str, Any] | None = saved.manifest().state.get("fit")
                return fit
    return None
