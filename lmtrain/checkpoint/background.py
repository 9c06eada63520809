"""Saving while training goes on: a rank's share is copied into memory made beforehand, another process writes it out.

The process (`scribe.py`) is a fresh interpreter, not a fork, and shares the memory by its descriptor. Nothing here is
collective: what the ranks have to agree on, `store.py` lets them agree on.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import select
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lmtrain.checkpoint import scribe, tensorfile
from lmtrain.checkpoint.manifest import canonical
from lmtrain.checkpoint.saving import divide, file_name, line, list_name, need_folder, outgoing
from lmtrain.errors import CheckpointError
from lmtrain.protocol import Engine

_ALIGN = 64


class Background:
    """One rank's memory and writing process. At most one share is in it at a time."""

    def __init__(self, *, file_bytes: int) -> None:
        self._file_bytes = file_bytes
        self._memory: _Memory | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._plan: dict[str, Any] = {}
        self._said = b""
        self._busy = False

    def prepare(self, engine: Engine) -> None:
        """Make the memory, of the size of all that this rank saves, and start the process; once.

        Raises CheckpointError when there is not so much memory.
        """
        if self._memory is None:
            files = divide(engine.fragments(), self._file_bytes)
            self._memory = _Memory(max(1, sum(_aligned(f.tensor.nbytes) for file in files for f in file)))
        if self._process is None:
            self._start(self._memory)

    def copy(self, engine: Engine, *, state: Mapping[str, Any]) -> None:
        """Copy this rank's share into the memory, in the order of the files that it will make.

        When it returns, the engine may go on. Raises CheckpointError for what can not be saved.
        """
        assert not self._busy
        self.prepare(engine)
        assert self._memory is not None
        files: list[dict[str, Any]] = []
        lines: list[list[Any]] = []
        at = 0
        for number, fragments in enumerate(divide(engine.fragments(), self._file_bytes)):
            name = file_name(engine.rank, number)
            ordered, head = tensorfile.head(outgoing(fragments))
            spans = []
            for tensor in ordered:
                (values,) = tensor.pieces
                self._memory.put(values, at)
                spans.append((at, tensor.bytes))
                at += _aligned(tensor.bytes)
            files.append({"name": name, "head": head.decode("latin-1"), "spans": spans})
            lines += [line(fragment, name) for fragment in fragments]
        record = {"fragments": lines, "scalars": engine.scalars(), "state": state}
        canonical(record, where="the state")
        self._plan = {"files": files, "list": list_name(engine.rank), "record": record}

    def begin(self, folder: Path) -> None:
        """Let what was copied be written into `folder`. Raises CheckpointError."""
        need_folder(folder)
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"folder": str(folder.resolve()), **self._plan}).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise CheckpointError(self._died()) from None
        self._busy = True

    def running(self) -> bool:
        """Whether the writing goes on; it never waits."""
        if self._busy and self._process is not None and self._process.stdout is not None:
            out = self._process.stdout.fileno()
            while b"\n" not in self._said and select.select([out], [], [], 0)[0]:
                chunk = os.read(out, 65536)
                if not chunk:
                    return False
                self._said += chunk
        return self._busy and b"\n" not in self._said

    def outcome(self) -> float:
        """Seconds that the writing took, once it is no longer running. Raises CheckpointError when it failed."""
        self._busy = False
        if b"\n" not in self._said:
            raise CheckpointError(self._died())
        told, self._said = json.loads(self._said), b""
        if "problem" in told:
            raise CheckpointError(told["problem"])
        return float(told["seconds"])

    def abandon(self) -> None:
        """End the process, wherever it is; the next save starts another one."""
        self._busy, self._said = False, b""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                with contextlib.suppress(OSError):  # what was left to send has no reader any more
                    pipe.close()

    def close(self) -> None:
        """Leave nothing behind. What is being written is cut short: finish it first."""
        self.abandon()
        self._memory = None

    def _start(self, memory: _Memory) -> None:
        # -I -S: nothing of the environment, of the working folder or of installed packages has a part in it
        command = [sys.executable, "-I", "-S", str(Path(scribe.__file__).resolve())]
        try:
            self._process = subprocess.Popen(
                [*command, str(memory.descriptor), str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[memory.descriptor],
            )
        except OSError as error:
            raise CheckpointError(f"the writing process cannot be started: {error.strerror or error}") from None

    def _died(self) -> str:
        process = self._process
        assert process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        self.abandon()
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
        return f"the writing process ended by itself ({how})"


class _Memory:
    """`size` bytes without a name, shared by descriptor; they are there before anything is put into them."""

    def __init__(self, size: int) -> None:
        what = f"checkpoint.background needs {size / 2**20:.0f} MiB of memory on every rank for what is being written"
        if not hasattr(os, "memfd_create"):
            raise CheckpointError(f"{what}, and Linux for having it; use checkpoint.background=false")
        self.size = size
        try:
            self.descriptor = os.memfd_create("lmtrain-checkpoint", os.MFD_CLOEXEC)
            os.posix_fallocate(self.descriptor, 0, size)
            self._map = mmap.mmap(self.descriptor, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        except OSError as error:
            raise CheckpointError(f"{what}: {error.strerror or error}; use checkpoint.background=false") from None
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def put(self, values: torch.Tensor, at: int) -> None:
        """Copy a tensor to offset `at`."""
        if at + values.nbytes > self.size:
            raise CheckpointError(f"there is more to save than the {self.size} bytes that there were at the start")
        self._bytes[at : at + values.nbytes].view(values.dtype).copy_(values)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN
