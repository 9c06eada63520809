"""The process that writes a rank's share of a checkpoint while the rank trains on. The standard library alone.

It is a fresh interpreter that is run by this file's path (`background.py` does it), so it starts in a moment, knows
nothing of torch and can hold nothing of a GPU's. What it writes lies in memory that it shares with its parent and that
has no name: when both are gone, so is the memory, however they ended.

A line on stdin is an order, {"folder", "files": [{"name", "head", "spans": [[offset, bytes], ...]}], "list": name,
"record": what the list says besides the files}; the answer is a line on stdout, {"seconds"} or {"problem"}. The end of
stdin is the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import mmap
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

_CHUNK = 4 * 2**20
_PR_SET_PDEATHSIG = 1
_NICE = 5
"""Training goes first; when it waits for the writing, there is nobody to give way to."""


def serve(descriptor: int, parent: int) -> None:
    """Carry out orders until stdin ends, or the process `parent` does."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # they reach whole groups; what is to be done then, the parent decides
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:  # it ended before we asked
        return
    with contextlib.suppress(OSError):
        os.nice(_NICE)
    with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as memory, memoryview(memory) as view:
        for line in sys.stdin.buffer:
            began = time.perf_counter()
            try:
                write_share(json.loads(line), view, parent)
                answer: dict[str, Any] = {"seconds": time.perf_counter() - began}
            except OSError as error:
                place = f": {error.filename}" if error.filename else ""
                answer = {"problem": f"{error.strerror or error}{place}"}
            print(json.dumps(answer), flush=True)


def write_share(order: dict[str, Any], memory: memoryview, parent: int) -> None:
    """Write the files of an order, each fsynced, then the list of them. Raises OSError."""
    folder = Path(order["folder"])
    files = {}
    for file in order["files"]:
        digest, size = hashlib.sha256(), 0
        with (folder / file["name"]).open("xb", buffering=0) as out:
            for data in [memoryview(file["head"].encode("latin-1")), *(memory[a : a + n] for a, n in file["spans"])]:
                for at in range(0, len(data), _CHUNK):
                    if os.getppid() != parent:  # where the kernel does not tell of it
                        sys.exit(1)
                    part = data[at : at + _CHUNK]
                    digest.update(part)
                    written = 0
                    while written < len(part):
                        written += out.write(part[written:])
                size += len(data)
            os.fsync(out.fileno())
        files[file["name"]] = {"bytes": size, "sha256": digest.hexdigest()}
    (folder / order["list"]).write_text(json.dumps({"files": files, **order["record"]}), encoding="utf-8")


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
