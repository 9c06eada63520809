"""Where DeepSpeed 0.19.8 keeps gradients, fp32 weights and optimizer state at each ZeRO stage.

One small class a kind of optimizer wrapper, all with the same five methods; the engine knows no stage. Nothing here
imports deepspeed: the wrappers are handed in.

The norm of the gradient and the verdict whether a step is finite are computed by our engine in one reduction; the
wrappers are made to use them instead of computing their own. A bad verdict takes DeepSpeed's own way of leaving a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lmtrain.engine.muon import Layout, Muon
from lmtrain.engine.pieces import Piece, replicated, stays

Named = Sequence[tuple[str, Any]]
Moments = Mapping[str, tuple[str, ...]]
Spans = Callable[[int, int], tuple[tuple[int, int], ...]]


class Stage(Protocol):
    """What the engine asks of a stage."""

    pieces: list[Piece]
    divided: bool
    """Whether `gradients` of different ranks are different parts of one gradient; at stage 0 they are all of it."""

    def gradients(self) -> list[Tensor]:
        """This rank's averaged gradients of the step, scaled by the loss scale."""
        ...

    def step(self, norm: float) -> None:
        """Run the optimizer on gradients whose norm (loss scale included) is `norm`; if it is not finite, leave."""
        ...

    def publish(self) -> None:
        """Copy the fp32 weights of all ranks into the model, after they were written."""
        ...

    def lend(self, home: Tensor, *, changed: bool) -> AbstractContextManager[bool]:
        """See pieces.Lend."""
        ...


def whole(numel: int, world: int, size: int, at: int) -> tuple[tuple[int, int], ...]:
    """spans[r] of a parameter of `numel` elements at `at` of a flat tensor that is cut into runs of `size` elements."""
    spans = []
    for r in range(world):
        first, last = max(at, r * size), min(at + numel, (r + 1) * size)
        spans.append((first - at, last - first) if first < last else (0, 0))
    return tuple(spans)


def even(numel: int, world: int) -> tuple[tuple[int, int], ...]:
    """spans[r] of a parameter that is cut into `world` equal runs, the last ones short (stage 3)."""
    size = -(-numel // world)
    return tuple((min(r * size, numel), max(0, min(size, numel - r * size))) for r in range(world))


class InMemory:
    """What a stage is of which nothing is ever swapped out."""

    def lend(self, home: Tensor, *, changed: bool) -> AbstractContextManager[bool]:
        return stays(home, changed=changed)


class Flat(InMemory):
    """Pieces and Muon layouts of parameters whose elements are divided among ranks in flat fp32 tensors."""

    def __init__(self, *, rank: int, moments: Moments, group: dist.ProcessGroup | None) -> None:
        self.rank, self.moments, self.group = rank, moments, group
        self.pieces: list[Piece] = []
        self.divided = True

    def lay_out(
        self,
        optimizer: torch.optim.Optimizer,
        home: Tensor,
        rows: Iterable[tuple[str, tuple[int, ...], tuple[tuple[int, int], ...], int]],
    ) -> None:
        """Add the parameters of one flat tensor: (name, shape, spans by rank, offset of our span in `home`)."""
        rows = list(rows)
        for name, shape, spans, offset in rows:
            start, numel = spans[self.rank]
            if numel:
                self.pieces.append(Piece(name, shape, start, numel, home, offset, self.moments[name]))
        if isinstance(optimizer, Muon) and rows and self.moments[rows[0][0]] == ("momentum",):
            optimizer.layouts[home] = Layout(
                [shape for _, shape, _, _ in rows],
                [spans for _, _, spans, _ in rows],
                [offset for *_, offset in rows],
                rank=self.rank,
                group=self.group,
            )


class Stage0(InMemory):
    """Every rank has everything; DeepSpeed averages the gradients and steps the torch optimizer itself."""

    def __init__(self, engine: Any, named: Named, *, world: int, moments: Moments, clip: float) -> None:
        self.engine, self.divided = engine, False
        self.pieces = replicated(named, {}, moments, copies=world)
        self.trained = [p for _, p in named if p.requires_grad]
        self.norm = 0.0
        if world == 1:
            engine.enable_backward_allreduce = False  # flattens and copies back all gradients, for nobody

        def clip_gradients() -> None:
            if clip < self.norm + 1e-6:
                torch._foreach_mul_(self.gradients(), clip / (self.norm + 1e-6))

        engine.clip_fp32_gradients = clip_gradients

    def gradients(self) -> list[Tensor]:
        for p in self.trained:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in self.trained if p.grad is not None]

    def step(self, norm: float) -> None:
        self.norm = norm
        if norm < float("inf"):
            self.engine.step()
        else:
            self.engine.zero_grad()
            self.engine.micro_steps += 1
            self.engine.skipped_steps += 1

    def publish(self) -> None:
        """The optimizer's weights are the model's."""


class Stage12(Flat):
    """Parameters of a group lie one after the other in a flat tensor, cut into one run a rank (stages 1 and 2)."""

    def __init__(self, engine: Any, named: Named, *, rank: int, world: int, moments: Moments, group: Any) -> None:
        super().__init__(rank=rank, moments=moments, group=group)
        self.engine, self.zero = engine, engine.optimizer
        self.verdict = torch.zeros(())
        self.zero.scaled_global_norm = lambda norm_type=2: self.verdict
        self.zero.check_grad_overflow = True
        self.zero.check_overflow = lambda partition_gradients=True: None
        if world == 1 and self.zero.dtype == torch.float32:
            # The mean over one rank: DeepSpeed would flatten, divide by one and copy back every gradient.
            self.zero.average_tensor = self.zero.buffered_reduce_fallback = lambda *_, **__: None
        names = {id(p): name for name, p in named}
        for i, home in enumerate(self.zero.single_partition_of_fp32_groups):
            self.lay_out(
                self.zero.optimizer,
                home,
                flat_rows(names, self.zero.bit16_groups[i], self.zero.bit16_groups_flat[i], home, rank, world),
            )
        self.pieces += replicated([(n, p) for n, p in named if not p.requires_grad], {}, {}, copies=world)

    def gradients(self) -> list[Tensor]:
        if self.zero.cpu_offload:
            return [home.grad for home in self.zero.single_partition_of_fp32_groups]
        return [g.reshape(-1) for group in self.zero.averaged_gradients.values() for g in group]

    def step(self, norm: float) -> None:
        self.verdict = torch.tensor(norm if norm < float("inf") else -1.0)
        self.engine.step()

    def publish(self) -> None:
        self.zero.update_lp_params()


class Stage1Bf16(Flat):
    """Stage 1 in bf16 has a wrapper of its own, with whole fp32 gradients on every rank."""

    def __init__(self, engine: Any, named: Named, *, rank: int, world: int, moments: Moments, group: Any) -> None:
        super().__init__(rank=rank, moments=moments, group=group)
        self.engine, self.zero = engine, engine.optimizer
        self.verdict = torch.zeros(1)
        grads = self.zero.get_grads_for_norm

        def for_norm(for_clipping: bool = False) -> Any:
            return grads(for_clipping=True) if for_clipping else ([self.verdict], {})

        self.zero.get_grads_for_norm = for_norm
        names = {id(p): name for name, p in named}
        for i, home in enumerate(self.zero.fp32_groups_flat_partition):
            self.lay_out(
                self.zero.optimizer,
                home,
                flat_rows(names, self.zero.bf16_groups[i], self.zero.bf16_groups_flat[i], home, rank, world),
            )
        self.pieces += replicated([(n, p) for n, p in named if not p.requires_grad], {}, {}, copies=world)

    def gradients(self) -> list[Tensor]:
        return list(self.zero.fp32_groups_gradient_flat_partition)

    def step(self, norm: float) -> None:
        self.verdict = torch.tensor([norm])
        self.engine.step()

    def publish(self) -> None:
        self.zero.update_lp_params()


class Stage3(Flat):
    """Every parameter is cut into equal runs; a rank's runs of a group lie one after the other.

    With offload to NVMe a group that is large enough is in memory only while DeepSpeed steps it, and while it is lent.
    """

    def __init__(self, engine: Any, named: Named, *, rank: int, world: int, moments: Moments, group: Any) -> None:
        super().__init__(rank=rank, moments=moments, group=group)
        self.engine, self.zero = engine, engine.optimizer
        self.verdict = torch.zeros(())
        self.zero._get_norm_groups = lambda: [self.verdict]
        self.zero.check_overflow = lambda partition_gradients=True: None
        names = {id(p): name for name, p in named}
        self.numbers: dict[int, int] = {}
        for i, home in enumerate(self.zero.fp32_partitioned_groups_flat):
            self.numbers[id(home)] = i
            rows, offset = [], 0
            for p in self.zero.fp16_groups[i]:
                rows.append((names[id(p)], tuple(p.ds_shape), even(p.ds_numel, world), offset))
                offset += p.partition_numel()
            self.lay_out(self.zero.optimizer, home, rows)
        for name, p in named:
            if not p.requires_grad:
                start, numel = even(p.ds_numel, world)[rank]
                if numel:
                    self.pieces.append(Piece(name, tuple(p.ds_shape), start, numel, p.ds_tensor, 0))

    def gradients(self) -> list[Tensor]:
        if not self.zero.offload_optimizer:
            return [g for group in self.zero.averaged_gradients.values() for g in group]
        found = []
        for i, home in enumerate(self.zero.fp32_partitioned_groups_flat):
            if not self.zero._swappable_optimizer_subgroup(i):
                found.append(home.grad)
                continue
            # They may be on their way to the disk: of each, DeepSpeed keeps the norm, and that of norms is the same.
            norms, ids = self.zero.norm_for_param_grads, map(self.zero.get_param_id, self.zero.fp16_groups[i])
            found += [norms[key].reshape(1) for key in ids if key in norms]
        return found

    def step(self, norm: float) -> None:
        self.verdict = torch.tensor(norm if norm < float("inf") else -1.0)
        self.engine.step()

    @torch.no_grad()
    def publish(self) -> None:
        self.zero._partition_all_parameters()  # what stays gathered between steps would not be gathered again
        for i, home in enumerate(self.zero.fp32_partitioned_groups_flat):
            with self.lend(home, changed=False):
                self.zero._reassign_or_swap_out_partitioned_parameters(i)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    @contextmanager
    def lend(self, home: Tensor, *, changed: bool) -> Iterator[bool]:
        i = self.numbers.get(id(home))
        if i is None or not self.zero._swappable_optimizer_subgroup(i):
            yield False
            return
        self.zero._optimizer_states_and_gradient_swap_in(i)
        try:
            yield True
        finally:
            if changed:  # new moments get their files here
                self.zero.optimizer_swapper.swap_out_optimizer_state(parameter=home, async_swap=False)
                home.grad = None
            else:
                self.zero._release_swap_buffers(i)


def flat_rows(
    names: Mapping[int, str], params: Sequence[Any], flat: Tensor, home: Tensor, rank: int, world: int
) -> list[tuple[str, tuple[int, ...], tuple[tuple[int, int], ...], int]]:
    """Rows for `Flat.lay_out`: the parameters are views of `flat`, of which `home` is this rank's run."""
    size = home.numel()
    rows = []
    for p in params:
        at = p.storage_offset() - flat.storage_offset()
        spans = whole(p.numel(), world, size, at)
        start, numel = spans[rank]
        rows.append((names[id(p)], tuple(p.shape), spans, at + start - rank * size if numel else 0))
    return rows
