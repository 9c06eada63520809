"""Engines without a process group: N ranks as threads, each of which owns an uneven share of every tensor.

What a checkpoint must not care about is what this varies: how many ranks, where the cuts are, which kinds there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from lmtrain.protocol import Fragment, FragmentReader

MOMENTS = ("exp_avg", "exp_avg_sq")


class Small(nn.Module):
    """A few parameters of awkward shapes, a tied one, and buffers of several dtypes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(7, 5)
        self.body = nn.Linear(5, 3)
        self.scale = nn.Parameter(torch.zeros(()))
        self.lm_head = nn.Linear(5, 7, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator))


class World:
    """What the threads of one group meet in."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size)
        self.slots: list[np.ndarray] = [np.zeros(0)] * size

    def exchange(self, rank: int, values: np.ndarray) -> list[np.ndarray]:
        self.slots[rank] = values
        self.barrier.wait(30)
        found = list(self.slots)
        self.barrier.wait(30)
        return found


class FakeEngine:
    """A rank that keeps whole tensors and hands out its share of each; `moments[kind][name]` are the optimizer's."""

    def __init__(self, model: nn.Module, *, rank: int = 0, world: World | None = None) -> None:
        self.meeting = world or World(1)
        self.rank, self.world = rank, self.meeting.size
        self.device = torch.device("cpu")
        self.model: Any = model
        self.optimizer_steps = 0
        self.moments = {k: {n: torch.zeros_like(p) for n, p in model.named_parameters()} for k in MOMENTS}

    def add(self, values: np.ndarray) -> np.ndarray:
        found = self.meeting.exchange(self.rank, np.asarray(values, np.float64))
        assert len({f.shape for f in found}) == 1, "ranks added arrays of unequal shapes"
        return np.sum(found, axis=0)

    def agree(self, flag: int) -> int:
        return int(max(f[0] for f in self.meeting.exchange(self.rank, np.array([flag]))))

    def share(self, numel: int) -> tuple[int, int]:
        """Uneven cuts; with more ranks than elements some ranks own nothing."""
        cuts = [numel * r * (r + 1) // (self.world * (self.world + 1)) for r in range(self.world + 1)]
        return cuts[self.rank], cuts[self.rank + 1]

    def fragments(self) -> Iterator[Fragment]:
        tensors = {"weight": dict(self.model.named_parameters()), **self.moments}
        for kind, named in tensors.items():
            for name, tensor in named.items():
                start, stop = self.share(tensor.numel())
                if start < stop:
                    piece = tensor.detach().reshape(-1)[start:stop]
                    yield Fragment(name, kind, tuple(tensor.shape), start, piece)
        if self.rank == self.world - 1:
            kept = self.model.state_dict()
            for name, buffer in self.model.named_buffers():
                if name in kept:
                    yield Fragment(name, "buffer", tuple(buffer.shape), 0, buffer.reshape(-1))

    @torch.no_grad()
    def restore(self, reader: FragmentReader, *, scalars: Mapping[str, Any]) -> None:
        tensors = {"weight": dict(self.model.named_parameters()), **self.moments}
        for kind, named in tensors.items():
            for name, tensor in named.items():
                assert reader.shape(name, kind) == tuple(tensor.shape)
                middle = tensor.numel() // 2
                halves = [reader.read(name, kind, 0, middle), reader.read(name, kind, middle, tensor.numel() - middle)]
                tensor.copy_(torch.cat(halves).view(tensor.shape))
        for name, buffer in self.model.named_buffers():
            if reader.has(name, "buffer"):
                buffer.copy_(reader.read(name, "buffer", 0, buffer.numel()).view(buffer.shape))
        self.optimizer_steps = int(scalars["optimizer_steps"])

    def scalars(self) -> dict[str, Any]:
        return {"optimizer_steps": self.optimizer_steps}

    @torch.no_grad()
    def advance(self, step: int) -> None:
        """A made-up step: everything becomes a function of what it was and of the step."""
        generator = torch.Generator().manual_seed(step)
        for name, p in self.model.named_parameters():
            g = torch.randn(p.shape, generator=generator)
            m, v = self.moments["exp_avg"][name], self.moments["exp_avg_sq"][name]
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.99).addcmul_(g, g, value=0.01)
            p.addcdiv_(m, v.sqrt().add_(1e-8), value=-0.01)
        self.model.count += 1
        self.optimizer_steps += 1

    def everything(self) -> dict[str, torch.Tensor]:
        """All that a checkpoint must bring back, by kind and name."""
        found = {f"weight {n}": p.detach().clone() for n, p in self.model.named_parameters()}
        for kind, named in self.moments.items():
            found |= {f"{kind} {n}": t.clone() for n, t in named.items()}
        found |= {f"buffer {n}": b.clone() for n, b in self.model.state_dict().items() if n in ("count", "mask")}
        found["optimizer_steps"] = torch.tensor(self.optimizer_steps)
        return found


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    """Bit-equal."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def engines(world: int, *, seed: int = 0, steps: int = 0) -> list[FakeEngine]:
    """A group of ranks that has made `steps` steps."""
    meeting = World(world)
    ranks = [FakeEngine(Small(seed), rank=r, world=meeting) for r in range(world)]
    for engine in ranks:
        for step in range(steps):
            engine.advance(step)
    return ranks


def on_all(ranks: Sequence[FakeEngine], act: Callable[[FakeEngine], Any]) -> list[Any]:
    """Run `act` on every rank in its own thread; its values, or the exceptions it raised."""
    results: list[Any] = [None] * len(ranks)

    def run(i: int) -> None:
        try:
            results[i] = act(ranks[i])
        except BaseException as error:
            results[i] = error
            if not isinstance(error, Exception):
                ranks[i].meeting.barrier.abort()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(ranks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads), "ranks wait for one another"
    return results
