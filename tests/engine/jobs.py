"""What the ranks of tests/engine do: tiny models, one global batch a step, the same for every number of ranks."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lmtrain import models
from lmtrain.engine import EngineConfig, OptimizerConfig, make
from lmtrain.errors import CheckpointError
from lmtrain.protocol import Batch, Cond, Engine, Fragment, Model, Place, Spec, StepReport, Weights
from tests.laws.cases import Case
from tests.laws.cases import cases as law_cases

ALPHABET, CONTEXT, ROWS = 29, 12, 12
SAVED, AFTER = 3, 6
"""Steps after which a run is saved, and until which runs that go on from there are compared."""

SMALL: dict[str, dict[str, Any]] = {
    "gpt": {"kind": "gpt", "layers": 2, "width": 24, "heads": 2, "dropout": 0.1},
    "rnn": {"kind": "rnn", "layers": 2, "width": 20, "dropout": 0.1},
    "gpt2": {"kind": "gpt", "preset": "gpt2", "layers": 1, "width": 12, "heads": 2, "context": None},
}


class Reader:
    """Whole tensors by (name, kind): what every rank saved, put together. Overlaps and gaps are errors."""

    def __init__(self, fragments: Iterable[Fragment]) -> None:
        self.tensors: dict[tuple[str, str], Tensor] = {}
        self.shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        written: dict[tuple[str, str], Tensor] = {}
        for f in fragments:
            key = (f.name, f.kind)
            if key not in self.tensors:
                self.shapes[key] = f.shape
                self.tensors[key] = torch.zeros(math.prod(f.shape), dtype=f.tensor.dtype)
                written[key] = torch.zeros(math.prod(f.shape), dtype=torch.int64)
            assert self.shapes[key] == f.shape
            assert f.tensor.dim() == 1
            self.tensors[key][f.start : f.start + f.tensor.numel()] = f.tensor
            written[key][f.start : f.start + f.tensor.numel()] += 1
        for key, times in written.items():
            assert bool((times == 1).all()), f"{key} was saved {times.min()} to {times.max()} times"

    def has(self, name: str, kind: str) -> bool:
        return (name, kind) in self.tensors

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        return self.shapes[name, kind]

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        if not self.has(name, kind):
            raise CheckpointError(f"no {kind} of {name}")
        return self.tensors[name, kind][start : start + numel]

    def digest(self) -> str:
        """SHA-256 over all names and bits."""
        sha = hashlib.sha256()
        for key in sorted(self.tensors):
            sha.update(repr((key, self.shapes[key])).encode())
            sha.update(self.tensors[key].numpy().tobytes())
        return sha.hexdigest()

    def save(self, path: Path) -> None:
        names = {f"{kind}/{name}": t.view(self.shapes[name, kind]).numpy() for (name, kind), t in self.tensors.items()}
        np.savez(path, **names)

    @classmethod
    def load(cls, path: Path) -> Reader:
        def fragments() -> Iterable[Fragment]:
            with np.load(path) as arrays:
                for key in arrays.files:
                    kind, _, name = key.partition("/")
                    yield Fragment(name, kind, arrays[key].shape, 0, torch.from_numpy(arrays[key].reshape(-1)))

        return cls(fragments())


class _NaNGradient(torch.autograd.Function):
    """Leaves the numbers, spoils the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * math.nan


class Odd(Model):
    """A tied matrix, a frozen parameter, buffers that are saved and one that is not; all of it is in the output."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(ALPHABET, 7)
        self.inner = nn.Linear(7, 7)
        self.again = self.inner  # tied: two names, one parameter
        self.frozen = nn.Linear(7, 7, bias=False).requires_grad_(False)
        self.lm_head = nn.Linear(7, ALPHABET)
        self.register_buffer("shift", torch.randn(7))
        self.register_buffer("count", torch.tensor([seed, 3]))
        self.register_buffer("passing", torch.ones(3), persistent=False)

    def forward(self, x_BT: Tensor, *, cond: Cond) -> Tensor:
        in_BT = torch.cat([cond.start_B[:, None], x_BT[:, :-1]], dim=1)
        h_BTD = self.again(torch.tanh(self.inner(self.embed(in_BT))))
        h_BTD = self.frozen(h_BTD) + self.shift * self.count[1] * self.passing.mean()
        return torch.log_softmax(self.lm_head(h_BTD), -1).gather(2, x_BT[:, :, None])[:, :, 0]


def small_model(name: str, *, seed: int = 1, **changes: Any) -> Model:
    """A model of a few thousand parameters, the same for the same arguments. `law:<case>`: a case of tests/laws."""
    torch.manual_seed(seed)
    case = None
    if name == "odd":
        model: Model = Odd(seed)
    elif name.startswith("law:"):
        (case,) = (case for case in law_cases() if case.name == name.removeprefix("law:"))
        model = models.build(models.parse(case.model | changes), case.spec)
    else:
        config = models.parse(SMALL[name] | changes)
        model = models.build(config, spec=Spec(alphabet=ALPHABET, context=CONTEXT, bos=ALPHABET - 1))
    with torch.no_grad():
        for p in model.parameters():  # away from zero projections: every parameter has a gradient from the first step
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel() + seed)), alpha=0.02)
    model.spoil, model.law = False, case
    model.register_forward_hook(lambda model, given, out: _NaNGradient.apply(out) if model.spoil else out)
    return model


def batches_of(step: int, *, micro: int, case: Case | None = None) -> list[Batch]:
    """The global batch of a step as micro-batches: random text, very uneven weights, one row nearly padding.

    case: whose rows these are, instead.
    """
    g = torch.Generator().manual_seed(1000 + step)
    label_B = None
    if case is None:
        x_BT = torch.randint(ALPHABET - 1, (ROWS, CONTEXT), generator=g)
        x_BT[:, 1::2] = (x_BT[:, 0::2] * 3 + 1) % (ALPHABET - 1)  # something to learn
    else:
        x_BT, cond = case.rows(ROWS, seed=1000 + step)
        label_B = cond.label_B
    weight_BT = (torch.rand(x_BT.shape, generator=g) < torch.linspace(0.1, 1.0, ROWS)[:, None]).float()
    weight_BT[-1, 2:] = 0
    start_B = torch.randint(ALPHABET, (ROWS,), generator=g) if case is None else cond.start_B
    batches = []
    for i in range(0, ROWS, micro):
        part = slice(i, i + micro)
        cond = Cond(start_B[part], None, None if label_B is None else label_B[part])
        batches.append(Batch(x_BT[part], weight_BT[part], cond, index=i))
    return batches


def one_step(
    engine: Engine, step: int, *, micro: int, poison: int | None = None, spoil: int | None = None
) -> StepReport:
    """Step `step`. poison: index of the micro-batch whose loss becomes NaN. spoil: the rank whose gradients do."""
    batches = batches_of(step, micro=micro, case=getattr(engine.model, "law", None))
    total = sum(float(b.weight_BT.sum()) for b in batches)
    if poison is not None:
        batches[poison].weight_BT[0, 0] = math.nan
    engine.model.spoil = spoil == engine.rank
    report = engine.step(batches[engine.rank :: engine.world], total_weight=total, lr=3e-3, step=step)
    engine.model.spoil = False
    return report


def train(engine: Engine, steps: range, *, micro: int) -> list[float]:
    """nats a symbol of each step."""
    curve = []
    for step in steps:
        report = one_step(engine, step, micro=micro)
        assert report.applied
        assert math.isfinite(report.grad_norm)
        curve.append(report.nats / report.weight)
    return curve


def engine_for(
    model: Model, place: Place, *, micro: int, optimizer: dict[str, Any] | None = None, **settings: Any
) -> Engine:
    """An engine over `batches_of` with fitting accumulation."""
    return make(
        EngineConfig(**settings),
        model,
        optimizer=OptimizerConfig(**(optimizer or {})),
        place=place,
        micro_batch=micro,
        accumulation=ROWS // micro // place.world,
        seed=5,
    )


def together(engine: Engine, folder: Path, label: str) -> Reader:
    """What all ranks save now, on every rank."""
    mine = list(engine.fragments())
    header = [(f.name, f.kind, f.shape, f.start) for f in mine]
    part = folder / f"{label}.{engine.rank}"
    np.savez(part, **{str(i): f.tensor.numpy() for i, f in enumerate(mine)})
    part.with_name(part.name + ".json").write_text(json.dumps(header))
    engine.agree(0)

    def all_of() -> Iterable[Fragment]:
        for rank in range(engine.world):
            rows = json.loads((folder / f"{label}.{rank}.json").read_text())
            with np.load(folder / f"{label}.{rank}.npz") as arrays:
                for i, (name, kind, shape, start) in enumerate(rows):
                    yield Fragment(name, kind, tuple(shape), start, torch.from_numpy(arrays[str(i)]))

    reader = Reader(all_of())
    engine.agree(0)
    return reader


def score(engine: Engine, *, micro: int, weights: Weights = "raw") -> float:
    """nats of two fixed batches in evaluation mode, computed alike by every rank, dropout off."""
    with engine.evaluating(weights=weights) as model:
        assert not model.training
        parts = [
            model(b.x_BT, cond=b.cond).double() * b.weight_BT
            for s in (77, 78)
            for b in batches_of(s, micro=micro, case=getattr(engine.model, "law", None))
        ]
        assert not any(p.requires_grad for p in parts)
    assert engine.model.training
    return -math.fsum(float(p.sum()) for p in parts)


def run_case(place: Place, folder: Path, case: dict[str, Any], *, reference: Path | None) -> dict[str, Any]:
    """Train, save on the way, restore and go on, in one case. Bitwise claims are asserted here, the rest is returned.

    case: label, steps, model, micro, optimizer, keys of EngineConfig. reference: what plain saved after SAVED steps.
    """
    case = dict(case)
    label, steps = case.pop("label"), case.pop("steps")
    name, micro, changes = case.pop("model"), case.pop("micro"), case.pop("changes", {})
    engine = engine_for(small_model(name, **changes), place, micro=micro, **case)
    before = together(engine, folder, f"{label}-before")
    curve = train(engine, range(SAVED), micro=micro)
    saved, scalars = together(engine, folder, f"{label}-saved"), engine.scalars()
    assert saved.digest() != before.digest()
    out = {"score": score(engine, micro=micro), "label": label}
    curve += train(engine, range(SAVED, AFTER), micro=micro)
    after = together(engine, folder, f"{label}-after")
    curve += train(engine, range(AFTER, steps), micro=micro)
    engine.close()
    out |= {"curve": curve, "scalars": scalars}
    if place.rank == 0:
        saved.save(folder / f"{label}-whole.npz")

    other = engine_for(small_model(name, seed=2, **changes), place, micro=micro, **case)
    other.restore(saved, scalars=scalars)
    assert other.scalars() == scalars
    assert together(other, folder, f"{label}-again").digest() == saved.digest(), "restored is not what was saved"
    assert score(other, micro=micro) == out["score"]
    assert train(other, range(SAVED, AFTER), micro=micro) == curve[SAVED:AFTER], "a restored run takes another course"
    assert together(other, folder, f"{label}-after2").digest() == after.digest(), "... and ends at other bits"

    last = {"poison": ROWS // micro - 1}, {"spoil": place.world - 1}
    for fault in ({"poison": 0}, {"spoil": 0}, *(last if place.world > 1 else ())):
        skipped = other.scalars()["skipped_steps"]
        report = one_step(other, AFTER, micro=micro, **fault)
        assert not report.applied
        assert math.isfinite(report.nats) == ("spoil" in fault)
        assert not math.isfinite(report.grad_norm)
        assert together(other, folder, f"{label}-poisoned").digest() == after.digest(), "a skipped step changed bits"
        assert other.scalars()["skipped_steps"] == skipped + 1
        assert other.scalars()["optimizer_steps"] == AFTER
    assert train(other, range(AFTER, AFTER + 1), micro=micro) == curve[AFTER : AFTER + 1]

    if reference is not None:
        other.restore(
            Reader.load(reference), scalars={"optimizer_steps": SAVED, "skipped_steps": 1, "loss_scale": None}
        )
        out["onward_score"] = score(other, micro=micro)
        out["onward"] = train(other, range(SAVED, AFTER), micro=micro)
        assert other.scalars()["skipped_steps"] == 1
    other.restore(before, scalars={"optimizer_steps": 0, "skipped_steps": 0, "loss_scale": None})
    assert train(other, range(SAVED), micro=micro) == curve[:SAVED], "restored from before the first step"
    other.close()
    return out


def run_cases(place: Place, folder: Path, *, cases: list[dict[str, Any]], references: str) -> Any:
    """`run_case` for each; `references` is a folder with <label>-whole.npz of plain for it."""
    torch.set_num_threads(1)
    return [run_case(place, folder, case, reference=Path(references) / f"{case['label']}-whole.npz") for case in cases]
