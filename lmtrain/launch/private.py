"""Tokens and keys on their way to the ranks: a file of 0600 for each rank, which the rank reads and removes.

The files lie in memory (/dev/shm) where there is one. Their name is drawn for each launch; the ranks know it by the
variable LMTRAIN_PRIVATE, which is no secret.
"""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from lmtrain.errors import EngineError

VARIABLE = "LMTRAIN_PRIVATE"
LAUNCH = "LMTRAIN_LAUNCH"
"""Set in every process of a launch to what it drew: by it they are found on a host, and no others."""
_DRAWN = re.compile(r"[0-9a-f]{32}")


def is_drawn(text: object) -> bool:
    """Whether this is what a launch draws: 32 hexadecimal digits."""
    return isinstance(text, str) and _DRAWN.fullmatch(text) is not None


def _path(drawn: str, local_rank: int) -> Path:
    assert is_drawn(drawn)
    shm = Path("/dev/shm")
    folder = shm if shm.is_dir() and os.access(shm, os.W_OK) else Path(tempfile.gettempdir())
    return folder / f"lmtrain-{drawn}.{local_rank}"


def write(values: Mapping[str, str], *, drawn: str, ranks: int) -> None:
    """A file for each of the `ranks` of this host. It has its mode from the instant that it exists."""
    data = json.dumps(dict(values)).encode("ascii")
    for local_rank in range(ranks):
        path = _path(drawn, local_rank)
        path.unlink(missing_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)


def remove(drawn: str, *, ranks: int) -> None:
    """Remove what no rank took."""
    for local_rank in range(ranks):
        _path(drawn, local_rank).unlink(missing_ok=True)


def take(environment: MutableMapping[str, str], *, local_rank: int) -> None:
    """Put the variables of this rank's file, if the launch has one, into the environment, and remove the file.

    Raises EngineError when the file is missing, or when others than its owner may read it.
    """
    drawn = environment.pop(VARIABLE, "")
    if not drawn:
        return
    if not is_drawn(drawn):
        raise EngineError(f"{VARIABLE} is not what `lmtrain launch` sets; unset it")
    path = _path(drawn, max(0, local_rank))
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError as error:
        raise EngineError(
            f"the tokens and keys of this launch, {path}, cannot be read: {error.strerror}; start with lmtrain launch"
        ) from None
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise EngineError(f"{path} may be read by others, or is not ours; remove it, and start with lmtrain launch")
        values = json.loads(file.read())
    path.unlink(missing_ok=True)
    environment.update(values)
