"""What DeepSpeed's offload to NVMe needs of this host: a folder of this process alone, and a built extension.

DeepSpeed names its files by rank, and empties folders that it finds: two jobs with one path would write into each
other's files. So every process gets a folder of its own below `engine.nvme_path`. It is locked while the process
lives; what a killed one left behind is removed by the next one that starts there.
"""

from __future__ import annotations

import atexit
import copy
import fcntl
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from lmtrain.errors import EngineError

_PREFIX, _LOCK = "lmtrain-swap-", "lock"


class SwapFolder:
    """A new folder below `path`, removed by `close`. EngineError where no file can be read past the page cache."""

    def __init__(self, path: str) -> None:
        self._lock = -1
        try:
            Path(path).mkdir(parents=True, exist_ok=True)
            with _held(Path(path) / f".{_PREFIX}{_LOCK}"):  # nobody sweeps between the two lines that make a folder
                _sweep(Path(path))
                self.folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=path))
                self._lock = _locked(self.folder / _LOCK, wait=True)
        except OSError as error:
            raise EngineError(
                f"engine.nvme_path = {path} cannot be used: {error.strerror}; give a folder on a local disk"
            ) from None
        atexit.register(self.close)
        probe = self.folder / "direct"
        try:
            os.close(os.open(probe, os.O_CREAT | os.O_WRONLY | os.O_DIRECT, 0o600))
            probe.unlink()
        except OSError as error:
            self.close()
            raise EngineError(
                f"engine.nvme_path = {path}: its file system has no direct reads and writes ({error.strerror}); "
                "give a folder on a disk, not in memory"
            ) from None

    def close(self) -> None:
        """Remove the folder. A second time is harmless."""
        if self._lock >= 0:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1
            atexit.unregister(self.close)


def _sweep(path: Path) -> None:
    for left in path.glob(f"{_PREFIX}*"):
        with suppress(OSError):  # its process lives, or it is another user's
            lock = _locked(left / _LOCK, wait=False)
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _locked(path: Path, *, wait: bool) -> int:
    """The descriptor of a file that is locked while it is open. Raises OSError when another process has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        raise
    return handle


@contextmanager
def _held(path: Path) -> Iterator[None]:
    handle = _locked(path, wait=True)
    try:
        yield
    finally:
        os.close(handle)


def placed(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A DeepSpeed configuration whose offload to NVMe goes into `folder`."""
    out = copy.deepcopy(dict(config))
    out["zero_optimization"]["offload_optimizer"]["nvme_path"] = str(folder)
    return out


def is_used(config: Mapping[str, Any]) -> bool:
    """Whether a DeepSpeed configuration offloads to NVMe."""
    return bool(config["zero_optimization"].get("offload_optimizer", {}).get("device") == "nvme")


def extensions() -> Path:
    """Where this user's builds of DeepSpeed's extension stay: by host, since they are made for its processor."""
    made_with = f"{platform.node()}-python{platform.python_version()}-torch{torch.__version__}"
    return Path.home() / ".cache" / "lmtrain" / "extensions" / made_with


@contextmanager
def only_builder(folder: Path) -> Iterator[None]:
    """One process at a time builds in `folder`. What locks a killed build left, torch would wait for: they go."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _held(folder / ".builder"):
        for left in [*folder.glob("*/lock"), *folder.glob("*/.ninja_lock")]:
            left.unlink(missing_ok=True)
        yield
