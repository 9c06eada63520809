"""The process groups of a run: the default one and, for our own numbers, one of gloo; both with the time-out."""

from __future__ import annotations

import json
import secrets
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from lmtrain import section
from lmtrain.errors import EngineError
from lmtrain.protocol import Place


def join(place: Place, device: torch.device, *, timeout: float) -> dist.ProcessGroup | None:
    """Join the ranks. Returns the gloo group for sums and agreement, None for a single rank.

    The rendezvous listens on `place.address` alone where that is an address of this host, and on all interfaces else.
    A single rank needs none (gloo itself listens on a port of its choice all the same).
    Raises EngineError when the ranks do not meet in time.
    """
    limit = timedelta(seconds=timeout)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        if place.world == 1:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=limit)
            return None
        with section.waiting():
            store = _store(place, limit)
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.world, timeout=limit)
            control: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=limit)
        return control
    except (RuntimeError, ValueError, OSError) as error:
        raise _not_met(place, timeout, error) from None


def channel(place: Place, *, timeout: float) -> tuple[socket.socket | None, tuple[str, int], str]:
    """For the ranks' signs of life: rank 0's listening socket (None elsewhere), its address, and a secret of the run.

    Raises EngineError when the ranks do not meet in `timeout` seconds.
    """
    try:
        store = _store(place, timedelta(seconds=timeout))
        if place.rank:
            port, token = json.loads(store.get("lifeline"))
            return None, (place.address, port), token
        listener = _listener(place, port=0) or socket.create_server(("", 0), backlog=2048)
        port, token = listener.getsockname()[1], secrets.token_hex(16)
        store.set("lifeline", json.dumps([port, token]))
        return listener, (place.address, port), token
    except (RuntimeError, ValueError, OSError) as error:
        raise _not_met(place, timeout, error) from None


def _not_met(place: Place, timeout: float, error: Exception) -> EngineError:
    return EngineError(
        f"rank {place.rank} of {place.world} did not meet the others at {place.address}:{place.port} "
        f"within {timeout:g} s ({str(error).splitlines()[0]}); are all ranks started, and is the port free?"
    )


_stores: dict[tuple[str, int], list[Store]] = {}
"""Per address: the store, and a view of it for each time that this process joined there."""


def _store(place: Place, limit: timedelta) -> Store:
    """The rendezvous store. It lives as long as the process, and every join of the process has its own keys in it."""
    views = _stores.setdefault((place.address, place.port), [])
    if not views and dist.is_torchelastic_launched():
        # torchrun may serve the store itself; only torch knows.
        views.append(next(iter(rendezvous("env://", timeout=limit)))[0])
    if not views:
        listener = _listener(place, port=place.port) if place.rank == 0 else None
        views.append(
            TCPStore(
                place.address,
                place.port,
                place.world,
                is_master=place.rank == 0,
                timeout=limit,
                master_listen_fd=None if listener is None else listener.detach(),
            )
        )
    views.append(PrefixStore(f"join{len(views)}", views[0]))
    return views[-1]


def _listener(place: Place, *, port: int) -> socket.socket | None:
    """A socket bound to the rendezvous address, or None where this host does not have that address."""
    family, _, _, _, where = socket.getaddrinfo(place.address, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(where)
    except OSError as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == 98:  # in use
            raise
        return None
    listener.listen(2048)
    return listener
