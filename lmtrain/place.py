"""Where this process stands among the ranks, read from the variables of whatever started it.

Understood: `deepspeed` and `torchrun` (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT), `srun` (SLURM_*),
`mpirun` (OMPI_COMM_WORLD_*), and a pod of an Indexed Job (JOB_COMPLETION_INDEX, with WORLD_SIZE). Without any of them:
one process.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from lmtrain.errors import EngineError
from lmtrain.protocol import Place

_FAMILIES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("JOB_COMPLETION_INDEX", "WORLD_SIZE", "LOCAL_RANK"),
)
_FIRST_PORT, _PORTS = 20_000, 20_000
"""Where a port derived from a SLURM job id may lie: below the usual ephemeral range."""


def find(environment: Mapping[str, str], *, local_rank: int | None = None) -> Place:
    """This process's Place. `local_rank` is the launcher's `--local_rank`, -1 or None when there was none.

    Raises EngineError when variables are half set, are no numbers, or contradict one another.
    """
    family = next((names for names in _FAMILIES if _counts(environment, names)), None)
    if family is None:
        half = [name for name in ("RANK", "WORLD_SIZE") if name in environment]
        if half:
            raise EngineError(
                f"{half[0]} is set but not {'WORLD_SIZE' if half[0] == 'RANK' else 'RANK'}; set both or none"
            )
        return Place()
    rank, world = _number(environment, family[0]), _number(environment, family[1])
    given = local_rank if local_rank is not None and local_rank >= 0 else None
    local = given if given is not None else (_number(environment, family[2]) if family[2] in environment else 0)
    if world < 1 or not 0 <= rank < world:
        raise EngineError(f"{family[0]} = {rank} and {family[1]} = {world}: a rank lies in 0..{family[1]} - 1")
    address = environment.get("MASTER_ADDR") or _slurm_address(environment, world)
    if "MASTER_PORT" in environment:
        port = _number(environment, "MASTER_PORT")
    else:
        port = _FIRST_PORT + int(environment.get("SLURM_JOB_ID", "9500")) % _PORTS
    if not 0 < port < 65536:
        raise EngineError(f"MASTER_PORT = {port} is no port; use 1..65535")
    return Place(rank=rank, world=world, local_rank=local, address=address, port=port)


def _counts(environment: Mapping[str, str], names: tuple[str, str, str]) -> bool:
    """Whether this family of variables is set. An interactive SLURM shell (no step) is one process, not a rank."""
    if names[0].startswith("SLURM") and "SLURM_STEP_ID" not in environment:
        return False
    return names[0] in environment and names[1] in environment


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise EngineError(f"{name} = {environment[name]!r} is no whole number; the launcher sets it") from None


def _slurm_address(environment: Mapping[str, str], world: int) -> str:
    """The first host of the job, or this machine when there is one rank."""
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if nodes:
        return first_host(nodes)
    if world > 1:
        raise EngineError("MASTER_ADDR is not set and there are several ranks; set it to the address of rank 0's host")
    return "127.0.0.1"


def first_host(nodes: str) -> str:
    """The first host of a SLURM node list: `gpu[003-007,9],x1` -> `gpu003`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    if match is None:
        raise EngineError(
            f"SLURM's node list {nodes!r} cannot be read; set MASTER_ADDR to the address of rank 0's host"
        )
    return match.group(1) + (match.group(2) or "")
