"""plain == ZeRO 0, 1, 2, 3 on one and more ranks; restored runs go on to the same bits; NaN changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lmtrain.protocol import Place
from tests.engine.jobs import AFTER, SAVED, Reader, run_case
from tests.laws.cases import cases as law_cases
from tests.spawn import spawn

MUON = {"kind": "muon", "lr": 0.02, "adamw_lr": 3e-3, "momentum_warmup": 10}

CASES: dict[str, dict[str, Any]] = {
    "gpt": {"model": "gpt", "steps": 20},
    "rnn": {"model": "rnn", "steps": 20},
    "gpt-muon": {"model": "gpt", "steps": 8, "optimizer": MUON | {"clip": 0.05}},
    "rnn-muon": {"model": "rnn", "steps": 8, "optimizer": MUON | {"clip": 0.0}},
    "gpt-clip": {"model": "gpt", "steps": 8, "optimizer": {"clip": 0.05}, "changes": {"tied": False}},
}

VARIANTS: dict[str, dict[str, Any]] = {
    "odd": {"model": "odd", "steps": 8},
    "odd-muon": {"model": "odd", "steps": 8, "optimizer": MUON},
    "gpt-recompute": {"model": "gpt", "steps": 8, "activation_checkpointing": True},
    "gpt-recompute-mlp": {"model": "gpt", "steps": 8, "activation_checkpointing": "mlp"},
    "gpt-offload": {"model": "gpt", "steps": 8, "offload": "cpu"},
    "rnn-offload-muon": {"model": "rnn", "steps": 8, "offload": "cpu", "optimizer": MUON},
}
LOW: dict[str, dict[str, Any]] = {
    "gpt-bf16": {"model": "gpt", "steps": 20, "precision": "bf16"},
    "gpt-bf16-muon": {"model": "gpt", "steps": 8, "precision": "bf16", "optimizer": MUON},
}


def micros(world: int) -> tuple[int, int]:
    """Micro-batches without and with accumulation on so many ranks."""
    return {1: (12, 3), 2: (6, 3), 3: (4, 2), 4: (3, 1)}[world]


def cases(world: int, names: list[str], **more: Any) -> list[dict[str, Any]]:
    """Each case without accumulation and with it."""
    known = CASES | VARIANTS | LOW
    return [known[n] | {"label": f"{n}-{m}", "micro": m} | more for n in names for m in micros(world)]


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`plain(case)`: what the plain engine does in it, and the folder of what it saved. Each case runs once."""
    folder = tmp_path_factory.mktemp("plain")
    done: dict[str, dict[str, Any]] = {}

    def result(case: dict[str, Any]) -> tuple[dict[str, Any], Path]:
        label = case["label"]
        if label not in done:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            kept = {k: v for k, v in case.items() if k not in {"zero_stage", "offload", "nvme_path", "deepspeed"}} | {
                "kind": "plain"
            }
            done[label] = run_case(Place(), folder, kept, reference=None)
            torch.set_num_threads(threads)
        return done[label], folder

    return result


def compare(
    plain: Any,
    stage: int,
    world: int,
    todo: list[dict[str, Any]],
    *,
    relative: float,
    folder: Path,
    job: str = "tests.engine.jobs:run_cases",
    timeout: float = 540,
) -> None:
    """Spawn the ranks, run all cases in them, and hold what they return against plain. timeout: their seconds."""
    for case in todo:
        _, references = plain(case)
    ranks = spawn(
        job,
        world=world,
        timeout=timeout,
        folder=folder,
        cases=[case | {"zero_stage": stage} for case in todo],
        references=str(references),
    )
    for rank in range(world):
        assert (folder / f"rank{rank}.out").read_text() == "", "stdout belongs to results"
    for other in ranks[1:]:
        assert other == ranks[0], "ranks disagree about the same numbers"
    for case, got in zip(todo, ranks[0], strict=True):
        want, _ = plain(case)
        where = f"{case['label']}, stage {stage}, {world} ranks"
        assert got["curve"] == pytest.approx(want["curve"], rel=relative), where
        assert len(set(got["curve"])) == case["steps"]
        assert got["onward"] == pytest.approx(want["curve"][SAVED:AFTER], rel=relative), f"{where}, from plain's save"
        assert got["onward_score"] == pytest.approx(want["score"], rel=relative), f"{where}, from plain's save"
        assert got["score"] == pytest.approx(want["score"], rel=relative), where
        assert got["scalars"] == want["scalars"], where
        label = case["label"]
        mine, theirs = Reader.load(folder / f"{label}-whole.npz"), Reader.load(references / f"{label}-whole.npz")
        assert mine.shapes == theirs.shapes, where
        for key, tensor in theirs.tensors.items():
            apart = (mine.tensors[key] - tensor).abs()
            if key[1] == "weight":
                apart = apart[~noise(theirs, key[0], apart)]
            worst = float(apart.max()) if apart.numel() else 0.0
            assert worst <= 200 * relative, f"{where}: {key} differs by {worst}"


def noise(saved: Reader, name: str, like: Tensor) -> Tensor:
    """bool: where the gradient is nothing but rounding: for the bias of attention's keys, which changes no softmax.
    AdamW makes steps of its usual length out of that.
    """
    if not name.endswith("qkv.bias") or not saved.has(name, "exp_avg_sq"):
        return torch.zeros_like(like, dtype=torch.bool)
    squares = saved.tensors[name, "exp_avg_sq"]
    return (squares > 0) & (squares < 1e-16)


def test_zero_1_on_two_ranks(plain: Any, tmp_path: Path) -> None:
    """The inner loop's share of the matrix below."""
    todo = [case for case in cases(2, ["gpt", "rnn-muon"]) if case["micro"] == 3]
    compare(plain, 1, 2, todo, relative=1e-6, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "world"),
    [
        (0, 1),
        (3, 1),
        (0, 2),
        (1, 2),
        (2, 2),
        (3, 2),
        *(pytest.param(s, 1, marks=pytest.mark.exhaustive) for s in (1, 2)),
    ],
)
def test_zero_is_plain(plain: Any, tmp_path: Path, stage: int, world: int) -> None:
    """gpt and rnn without and with accumulation; the other optimizers with it (all of them: `test_every_case`)."""
    others = [case for case in cases(world, list(CASES)[2:]) if case["micro"] == 3]
    todo = cases(world, ["gpt", "rnn"]) + (others if world > 1 else others[:1])
    compare(plain, stage, world, todo, relative=1e-6, folder=tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_case(plain: Any, tmp_path: Path, stage: int, world: int) -> None:
    compare(plain, stage, world, cases(world, [*CASES, "odd", "odd-muon"]), relative=1e-6, folder=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*(pytest.param(s, marks=pytest.mark.exhaustive) for s in (0, 1, 2)), 3])
def test_variants_are_plain(plain: Any, tmp_path: Path, stage: int) -> None:
    """Frozen and tied parameters, buffers, recomputed activations, offloaded optimizer state."""
    names = [n for n, case in VARIANTS.items() if stage > 0 or "offload" not in case]
    todo = [case for case in cases(2, names) if case["micro"] == 3]
    if stage == 3:  # no parameter is small enough to stay, and weights live in host memory
        added = {"stage3_param_persistence_threshold": 0, "offload_param": {"device": "cpu", "pin_memory": False}}
        more = {"label": "gpt-params", "micro": 3, "deepspeed": {"zero_optimization": added}}
        todo.append(CASES["gpt"] | {"steps": 8} | more)
    compare(plain, stage, 2, todo, relative=1e-6, folder=tmp_path)


def kinds(names: list[str] | None = None) -> list[dict[str, Any]]:
    """Cases of the laws, of every kind of model, as cases of this file: eight steps on micro-batches of three rows."""
    found = [case.name for case in law_cases() if names is None or case.name in names]
    assert names is None or len(found) == len(names)
    return [{"model": f"law:{n}", "steps": AFTER + 2, "label": f"law-{n}", "micro": 3} for n in found]


@pytest.mark.slow
def test_a_few_kinds_are_plain(plain: Any, tmp_path: Path) -> None:
    """A mixture of orderings, trained on masks drawn by each micro-batch's noise; densities of reals, of classes."""
    compare(plain, 3, 2, kinds(["made-orderings", "rnade-logistics"]), relative=1e-6, folder=tmp_path)


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_kind_is_plain(plain: Any, tmp_path: Path, stage: int) -> None:
    compare(plain, stage, 2, kinds(), relative=1e-6, folder=tmp_path, timeout=3000)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*(pytest.param(s, marks=pytest.mark.exhaustive) for s in (1, 2)), 3])
def test_bf16_is_plain_bf16(plain: Any, tmp_path: Path, stage: int) -> None:
    """Sums over two ranks round in bf16 where plain's are of one rank: within a few of its steps of 2^-8."""
    todo = [case for case in cases(2, list(LOW)) if case["micro"] == 3]
    compare(plain, stage, 2, todo, relative=5e-4, folder=tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("world", [3, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_more_ranks(plain: Any, tmp_path: Path, stage: int, world: int) -> None:
    """Runs of unequal length: nothing divides by three."""
    compare(plain, stage, world, cases(world, [*CASES, "odd", "odd-muon"]), relative=1e-6, folder=tmp_path)


@pytest.mark.exhaustive
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_compiled_is_plain(plain: Any, tmp_path: Path, stage: int) -> None:
    """torch.compile, dropout off (compiled code draws other masks), against the uncompiled plain engine."""
    case = {"model": "gpt", "steps": 8, "changes": {"dropout": 0.0}, "label": "gpt-still-6", "micro": 6}
    want, references = plain(case)
    ranks = spawn(
        "tests.engine.jobs:run_cases",
        world=2,
        timeout=1500,
        folder=tmp_path,
        cases=[case | {"zero_stage": stage, "compile": True}],
        references=str(references),
    )
    assert ranks[0][0]["curve"] == pytest.approx(want["curve"], rel=1e-5)
    assert ranks[0][0]["onward"] == pytest.approx(want["curve"][SAVED:AFTER], rel=1e-5)
