"""Words between ranks, said with the two collectives that every engine has: all know what went wrong on any of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lmtrain.errors import CheckpointError
from lmtrain.protocol import Engine

_LONGEST = 2_000


def share(engine: Engine, text: str) -> list[str]:
    """Every rank's text (its first 2,000 bytes), on every rank."""
    raw = text.encode(errors="replace")[:_LONGEST].replace(b"\0", b"?")
    longest = engine.agree(len(raw))
    if not longest:
        return [""] * engine.world
    slots = np.zeros(engine.world * longest)
    slots[engine.rank * longest : engine.rank * longest + len(raw)] = np.frombuffer(raw, np.uint8)
    rows = engine.add(slots).reshape(engine.world, longest).astype(np.uint8)
    return [row.tobytes().rstrip(b"\0").decode(errors="replace") for row in rows]


def tell(engine: Engine, values: tuple[int, ...]) -> tuple[int, ...]:
    """Rank 0's integers (below 2**53), on every rank."""
    mine = np.array(values if engine.rank == 0 else (0,) * len(values), dtype=np.float64)
    return tuple(int(v) for v in engine.add(mine))


def together(engine: Engine, act: Callable[[], None], *, what: str) -> None:
    """Do `act` on this rank; when it failed on any rank, CheckpointError on all of them, naming each rank's trouble."""
    problem = ""
    try:
        act()
    except OSError as error:
        problem = f"{error.strerror or error}" + (f": {error.filename}" if error.filename else "")
    except CheckpointError as error:
        problem = str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    told = share(engine, problem)
    found = [f"rank {rank}: {text}" for rank, text in enumerate(told) if text]
    if found:
        alone = told[0] if engine.world == 1 else "; ".join(found)
        raise CheckpointError(f"{what}: {alone}")
