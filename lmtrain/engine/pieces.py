"""What a rank owns of each named tensor, and how it is saved and restored: the same for every engine and ZeRO stage.

A piece is a run of elements of one named parameter in fp32, lying somewhere in a tensor that the optimizer updates.
Moments lie in the optimizer's state of that tensor at the same place. Pieces of different ranks never overlap.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lmtrain.errors import CheckpointError
from lmtrain.protocol import Fragment, FragmentReader

AVERAGE = "ema"
"""The kind of fragment that holds averaged weights."""
Averaged = Callable[[Tensor], Tensor | None]
"""The average that lies as a tensor of weights does; None where there is none."""
READ_AT_ONCE = 4 * 2**20
"""Elements of a tensor that are read at a time (16 MiB of fp32)."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, start + numel) of the flattened parameter `name`: `home.view(-1)[offset : offset + numel]`.

    home: the fp32 tensor that the optimizer updates, or a frozen parameter's data. moments: names of the tensors in the
    optimizer's state of `home` that belong to it; empty for a frozen parameter. copies: how many ranks hold this same
    piece; each of them saves its share, and each restores all of it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    home: Tensor
    offset: int
    moments: tuple[str, ...] = ()
    copies: int = 1

    def of(self, flat: Tensor) -> Tensor:
        """The piece's elements of a tensor that is laid out as `home`."""
        return flat.detach().view(-1).narrow(0, self.offset, self.numel)


def share(numel: int, rank: int, world: int) -> tuple[int, int]:
    """(start, count) of rank's share of `numel` elements that every rank holds whole; shares are disjoint and cover."""
    size = -(-numel // world)
    start = min(rank * size, numel)
    return start, min(size, numel - start)


def replicated(
    named: Iterable[tuple[str, Tensor]],
    homes: Mapping[str, Tensor],
    moments: Mapping[str, tuple[str, ...]],
    *,
    copies: int,
) -> list[Piece]:
    """One piece for each whole parameter; `homes` where the master weights are not the parameter itself."""
    return [
        Piece(name, tuple(p.shape), 0, p.numel(), homes.get(name, p), 0, moments.get(name, ()), copies)
        for name, p in named
    ]


Lend = Callable[..., AbstractContextManager[bool]]
"""`lend(home, changed=...)`: a context in which a home and its moments are in memory, and whether they leave it after.

changed: what is done there has to last.
"""


def stays(home: Tensor, *, changed: bool) -> AbstractContextManager[bool]:
    """The `Lend` of tensors that are in memory always."""
    return nullcontext(False)


def by_home(pieces: Iterable[Piece]) -> Iterator[tuple[Tensor, list[Piece]]]:
    """The pieces of each home; those of one home come one after the other."""
    for _, group in itertools.groupby(pieces, key=lambda piece: id(piece.home)):
        found = list(group)
        yield found[0].home, found


def fill_state(optimizer: torch.optim.Optimizer, pieces: Sequence[Piece]) -> None:
    """Create the zero moments that the optimizer would create in its first step, where it has none yet."""
    for piece in pieces:
        state = optimizer.state[piece.home] if piece.moments else {}
        for moment in piece.moments:
            if moment not in state:
                state[moment] = torch.zeros_like(piece.home.detach(), memory_format=torch.preserve_format)
        if "exp_avg" in piece.moments and "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=piece.home.device)


def fragments(
    pieces: Sequence[Piece],
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    *,
    rank: int,
    averaged: Averaged | None = None,
    lend: Lend = stays,
) -> Iterator[Fragment]:
    """All fragments of this rank on the CPU: fp32 weights, moments, averages and, on rank 0, persistent buffers.

    Where they lie on the CPU already they are views, no copies: they hold until the next step.
    """
    for home, group in by_home(pieces):
        first_save = any(moment not in optimizer.state[home] for piece in group for moment in piece.moments)
        with lend(home, changed=first_save) as leaves:
            fill_state(optimizer, group)
            for fragment in _of_home(group, optimizer, rank=rank, averaged=averaged):
                yield replace(fragment, tensor=fragment.tensor.clone()) if leaves else fragment
    if rank == 0:
        for name, buffer in buffers(model).items():
            yield Fragment(name, "buffer", tuple(buffer.shape), 0, buffer.detach().reshape(-1).cpu())


def _of_home(
    group: Sequence[Piece], optimizer: torch.optim.Optimizer, *, rank: int, averaged: Averaged | None
) -> Iterator[Fragment]:
    for piece in group:
        first, count = share(piece.numel, rank, piece.copies) if piece.copies > 1 else (0, piece.numel)
        if count == 0:
            continue
        state = optimizer.state[piece.home] if piece.moments else {}
        tensors = {"weight": piece.home} | {moment: state[moment] for moment in piece.moments}
        average = averaged(piece.home) if averaged is not None else None
        if average is not None:
            tensors[AVERAGE] = average
        for kind, tensor in tensors.items():
            data = piece.of(tensor).narrow(0, first, count).to("cpu", torch.float32)
            yield Fragment(piece.name, kind, piece.shape, piece.start + first, data)


def restore(
    pieces: Sequence[Piece],
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    reader: FragmentReader,
    *,
    steps: int,
    averaged: Averaged | None = None,
    lend: Lend = stays,
) -> None:
    """Read weights, moments, averages (into `averaged`, if given) and buffers; `steps` is the optimizer's count.

    All are looked for before any is read. Raises CheckpointError naming the first tensor that is missing or has another
    shape.
    """
    extra = (AVERAGE,) if averaged is not None else ()
    wanted = [(p.name, kind, p.shape) for p in pieces for kind in ("weight", *p.moments, *(extra if p.moments else ()))]
    wanted += [(name, "buffer", tuple(buffer.shape)) for name, buffer in buffers(model).items()]
    for name, kind, shape in wanted:
        if not reader.has(name, kind):
            raise CheckpointError(
                f"the checkpoint has no {kind} of {name}; it belongs to another model or another optimizer.kind"
            )
        if reader.shape(name, kind) != shape:
            raise CheckpointError(
                f"{kind} of {name} has shape {list(reader.shape(name, kind))} in the checkpoint, "
                f"{list(shape)} in the model"
            )
    with torch.no_grad():
        for home, group in by_home(pieces):
            with lend(home, changed=True):
                fill_state(optimizer, group)
                for piece in group:
                    state = optimizer.state[home] if piece.moments else {}
                    _read(reader, piece, "weight", home)
                    for moment in piece.moments:
                        _read(reader, piece, moment, state[moment])
                    average = averaged(home) if averaged is not None else None
                    if average is not None:
                        _read(reader, piece, AVERAGE, average)
                    if "step" in state:
                        state["step"].fill_(steps)
        for name, buffer in buffers(model).items():
            buffer.copy_(reader.read(name, "buffer", 0, buffer.numel()).view(buffer.shape))


def _read(reader: FragmentReader, piece: Piece, kind: str, into: Tensor) -> None:
    """By parts of bounded size: besides what the rank owns, one part at a time is in memory."""
    target = piece.of(into)
    for at in range(0, piece.numel, READ_AT_ONCE):
        count = min(READ_AT_ONCE, piece.numel - at)
        target[at : at + count].copy_(reader.read(piece.name, kind, piece.start + at, count))


def buffers(model: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers by name (what a state dict would hold besides parameters)."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found
