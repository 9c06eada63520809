"""Muon against float64 by hand, alone and with matrices divided among real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lmtrain.engine.muon import Layout, Muon, orthogonalise
from lmtrain.engine.rendezvous import join
from lmtrain.engine.stages import even, whole
from lmtrain.protocol import Place
from tests.spawn import spawn


def newton_schulz(x: np.ndarray, steps: int) -> np.ndarray:
    """float64: the quintic p(y) = 3.4445 y - 4.775 y^3 + 2.0315 y^5 of the singular values, by the SVD."""
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = s / (np.sqrt((s**2).sum()) + 1e-7)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return np.asarray((u * s) @ vt)


@pytest.mark.parametrize("shape", [(6, 6), (5, 17), (40, 3), (1, 9), (64, 32)])
def test_orthogonalise_is_the_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))
    got = orthogonalise(x, steps=5)
    np.testing.assert_allclose(got.numpy(), newton_schulz(x.double().numpy(), 5), atol=2e-4)
    values = np.linalg.svd(got.numpy(), compute_uv=False)
    big = np.linalg.svd(x.numpy(), compute_uv=False) > 0.05 * float(x.norm())
    assert (values[big] > 0.6).all()
    assert (values < 1.25).all()
    assert got.shape == x.shape


def by_hand(p: np.ndarray, grads: list[np.ndarray], *, lr: float, beta: float, decay: float) -> np.ndarray:
    """K. Jordan's Muon in float64: Nesterov momentum, orthogonalised, scaled by sqrt(max(1, rows / columns))."""
    p, m = p.copy(), np.zeros_like(p)
    for g in grads:
        m = beta * m + (1 - beta) * g
        ahead = (1 - beta) * g + beta * m
        rows, columns = p.shape[0], p[0].size
        update = newton_schulz(ahead.reshape(rows, columns), 5) * max(1, rows / columns) ** 0.5
        p = p * (1 - lr * decay) - lr * update.reshape(p.shape)
    return p


def adamw_by_hand(p: np.ndarray, grads: list[np.ndarray], *, lr: float, decay: float) -> np.ndarray:
    """Loshchilov and Hutter's algorithm 2 in float64, with betas (0.9, 0.95)."""
    p, m, v = p.copy(), np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, start=1):
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g**2
        p = p - lr * decay * p - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.95**t)) + 1e-8)
    return p


def test_steps_against_float64() -> None:
    rng = np.random.default_rng(0)
    shapes = [(6, 10), (12, 5), (4, 3, 2), (7,), (9, 8)]
    start = [rng.normal(size=s) for s in shapes]
    grads = [[rng.normal(size=s) for s in shapes] for _ in range(4)]
    params = [torch.nn.Parameter(torch.tensor(p, dtype=torch.float32)) for p in start]
    groups = [
        {"params": params[:3], "weight_decay": 0.2, "muon": True, "rate": 1.0, "momentum": 0.9},
        {"params": params[3:], "weight_decay": 0.1, "muon": False, "rate": 0.5},
    ]
    optimizer = Muon(groups, lr=0.02, betas=(0.9, 0.95), eps=1e-8, newton_schulz=5)
    for row in grads:
        for p, g in zip(params, row, strict=True):
            p.grad = torch.tensor(g, dtype=torch.float32)
        optimizer.step()
    for i, p in enumerate(params):
        history = [row[i] for row in grads]
        if i < 3:
            want = by_hand(start[i], history, lr=0.02, beta=0.9, decay=0.2)
        else:
            want = adamw_by_hand(start[i], history, lr=0.02, decay=0.1)
        np.testing.assert_allclose(p.detach().numpy(), want, atol=3e-5)


SHAPES = [(8, 6), (5, 20), (3, 3), (30, 4), (7, 2, 3)]


def divided(place: Place, folder: Path) -> dict[str, Any]:
    """Orthogonalise matrices divided as ZeRO 1 and 2, and as ZeRO 3, divide them; the largest error of our spans."""
    torch.set_num_threads(1)
    join(place, torch.device("cpu"), timeout=60)
    g = torch.Generator().manual_seed(3)
    full = [torch.randn(s, generator=g) for s in SHAPES]
    want = [
        orthogonalise(x.view(x.shape[0], -1), steps=5).mul(max(1.0, x.shape[0] / x[0].numel()) ** 0.5).reshape(-1)
        for x in full
    ]
    worst = {}
    for kind in ("one after the other", "evenly", "on few ranks"):
        flat = [x.reshape(-1) for x in full]
        size = -(-sum(map(len, flat)) // (place.world if kind != "on few ranks" else 2))
        spans, offsets, parts = [], [], []
        at = used = 0
        for x in flat:
            span = even(x.numel(), place.world) if kind == "evenly" else whole(x.numel(), place.world, size, at)
            start, numel = span[place.rank]
            spans.append(span)
            offsets.append(used)
            parts.append(x.narrow(0, start, numel))
            used += numel
            at += x.numel()
        home = torch.cat([*parts, torch.zeros(5)])  # DeepSpeed pads
        layout = Layout(SHAPES, spans, offsets, rank=place.rank, group=dist.group.WORLD)
        got = layout.update(home, steps=5)
        assert not got[used:].any()
        errors = [0.0]
        for w, span, offset in zip(want, spans, offsets, strict=True):
            start, numel = span[place.rank]
            if numel:
                errors.append(float((got.narrow(0, offset, numel) - w.narrow(0, start, numel)).abs().max()))
        worst[kind] = max(errors)
        owners = {m.owner for m in layout.matrices}
        assert kind != "evenly" or len(owners) == place.world, "one rank does all the work"
    dist.destroy_process_group()
    return worst


@pytest.mark.slow
def test_divided_matrices_are_put_together_exactly() -> None:
    """Three ranks; bitwise, for every rank orthogonalises whole matrices with the very same numbers."""
    for worst in spawn("tests.engine.test_muon:divided", world=3):
        assert worst == {"one after the other": 0.0, "evenly": 0.0, "on few ranks": 0.0}


@pytest.mark.parametrize(("numel", "world"), [(10, 3), (2, 4), (7, 1), (8, 4), (5, 3)])
def test_even_spans_cover_without_overlap(numel: int, world: int) -> None:
    covered = [i for start, n in even(numel, world) for i in range(start, start + n)]
    assert covered == list(range(numel))


@pytest.mark.parametrize(("at", "numel", "size"), [(0, 10, 4), (3, 1, 4), (4, 4, 4), (5, 9, 4), (15, 1, 4)])
def test_contiguous_spans_cover_without_overlap(at: int, numel: int, size: int) -> None:
    spans = whole(numel, 4, size, at)
    assert [i for start, n in spans for i in range(start, start + n)] == list(range(numel))
    for r, (start, n) in enumerate(spans):
        assert n == 0 or (at + start) // size == (at + start + n - 1) // size == r
