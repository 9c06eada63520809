"""The average of the weights: its definition, plain == ZeRO, weights that come back bit for bit, checkpoints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lmtrain.engine import averaging
from lmtrain.errors import CheckpointError, ConfigError
from lmtrain.protocol import Engine, Place
from tests.engine.jobs import Reader, engine_for, one_step, score, small_model, together, train
from tests.spawn import spawn

MICRO, STEPS, EMA = 6, 3, 0.8
OPTIMIZER = {"ema": EMA, "eps": 1e-3}
"""AdamW with a large eps: where a gradient is nearly zero, it does not magnify the last bits."""


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def of_kind(reader: Reader, kind: str) -> dict[str, Tensor]:
    """The whole tensors of a kind, in float64."""
    return {name: t.double() for (name, found), t in reader.tensors.items() if found == kind}


def by_hand(average: dict[str, Tensor], weights: dict[str, Tensor], keep: float) -> dict[str, Tensor]:
    """One step of the definition in float64."""
    return {name: keep * old + (1 - keep) * weights[name] for name, old in average.items()}


def furthest(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of any element."""
    assert a.keys() == b.keys() != set()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def plain(model: str = "gpt", *, optimizer: dict[str, Any] | None = None, **settings: Any) -> Engine:
    """A plain engine with an average."""
    changes = {"layers": 1} if model == "gpt" else {}
    return engine_for(
        small_model(model, **changes),
        Place(),
        micro=MICRO,
        optimizer=OPTIMIZER | (optimizer or {}),
        kind="plain",
        **settings,
    )


def without_average(saved: Reader) -> Reader:
    """What a run without `optimizer.ema` would have saved."""
    other = Reader([])
    for key in saved.tensors:
        if key[1] != "ema":
            other.tensors[key], other.shapes[key] = saved.tensors[key], saved.shapes[key]
    return other


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_definition(warmup: bool, precision: str) -> None:
    """The fp32 master weights of every applied step; a step that was skipped is in neither."""
    engine = plain(optimizer={"ema_warmup": warmup}, precision=precision)
    want = of_kind(Reader(engine.fragments()), "weight")
    assert furthest(of_kind(Reader(engine.fragments()), "ema"), want) == 0
    for t in range(1, 7):
        before = Reader(engine.fragments()).digest()
        assert not one_step(engine, t, micro=MICRO, poison=1).applied
        assert Reader(engine.fragments()).digest() == before
        assert engine.scalars()["ema_steps"] == t - 1
        assert one_step(engine, t, micro=MICRO).applied
        now = Reader(engine.fragments())
        want = by_hand(want, of_kind(now, "weight"), min(EMA, (1 + t) / (10 + t)) if warmup else EMA)
        assert furthest(of_kind(now, "ema"), want) < 1e-6
        assert engine.scalars()["ema_steps"] == t
    assert furthest(of_kind(now, "ema"), of_kind(now, "weight")) > 1e-3, "an average that cannot be told apart"


def test_frozen_and_tied_parameters() -> None:
    engine = plain("odd")
    train(engine, range(2), micro=MICRO)
    saved = Reader(engine.fragments())
    assert of_kind(saved, "weight").keys() - of_kind(saved, "ema").keys() == {"frozen.weight"}
    with engine.evaluating(weights="ema") as model:
        assert torch.equal(model.frozen.weight.flatten().double(), of_kind(saved, "weight")["frozen.weight"])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("part", [averaging.AT_ONCE, 7])
def test_the_weights_change_places_and_come_back(monkeypatch: pytest.MonkeyPatch, precision: str, part: int) -> None:
    monkeypatch.setattr(averaging, "AT_ONCE", part)
    engine = plain(precision=precision)
    train(engine, range(3), micro=MICRO)
    saved = Reader(engine.fragments())
    low = {name: p.detach().clone() for name, p in engine.model.named_parameters()}
    raw = score(engine, micro=MICRO)
    with engine.evaluating(weights="ema") as model:
        for name, p in model.named_parameters():
            assert torch.equal(p, saved.tensors[name, "ema"].view(p.shape).to(p.dtype)), name
    assert score(engine, micro=MICRO, weights="ema") != raw
    boom = RuntimeError("boom")
    with pytest.raises(RuntimeError, match="boom"), engine.evaluating(weights="ema"):
        raise boom
    assert all(torch.equal(p, low[name]) for name, p in engine.model.named_parameters())
    assert Reader(engine.fragments()).digest() == saved.digest()
    assert score(engine, micro=MICRO) == raw
    undisturbed = plain(precision=precision)
    train(undisturbed, range(3), micro=MICRO)
    assert train(engine, range(3, 5), micro=MICRO) == train(undisturbed, range(3, 5), micro=MICRO)
    assert Reader(engine.fragments()).digest() == Reader(undisturbed.fragments()).digest()


def test_a_checkpoint_without_an_average_begins_one_and_one_too_many_is_left() -> None:
    engine = plain()
    train(engine, range(3), micro=MICRO)
    saved, scalars = Reader(engine.fragments()), engine.scalars()
    late = plain()
    train(late, range(1), micro=MICRO)
    bare = {key: value for key, value in scalars.items() if key != "ema_steps"}
    late.restore(without_average(saved), scalars=bare)
    now = Reader(late.fragments())
    assert furthest(of_kind(now, "ema"), of_kind(saved, "weight")) == 0
    assert late.scalars() == scalars | {"ema_steps": 0}
    with pytest.raises(CheckpointError, match="the checkpoint has no ema of "):
        late.restore(without_average(saved), scalars=scalars)
    none = plain(optimizer={"ema": None})
    none.restore(saved, scalars=scalars)
    assert none.scalars() == bare
    assert of_kind(Reader(none.fragments()), "ema") == {}
    with (
        pytest.raises(ConfigError, match=r"optimizer\.ema is null; set it"),
        none.evaluating(weights="ema"),
    ):
        pass


@pytest.mark.parametrize(
    ("tree", "words"),
    [({"ema": 1.0}, "ema"), ({"ema": 0.0}, "ema"), ({"ema": None, "ema_warmup": True}, "optimizer.ema is null")],
)
def test_averages_that_cannot_be(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        plain(optimizer=tree)


def own(engine: Engine) -> Reader:
    """What this rank owns, each fragment as a tensor of its own."""
    pieces = [replace(f, name=f"{f.name} {f.start}", shape=f.tensor.shape, start=0) for f in engine.fragments()]
    return Reader(pieces)


def ranks(place: Place, folder: Path, *, cases: dict[str, dict[str, Any]], reference: str) -> dict[str, Any]:
    """On every stage: the definition, the weights back bit for bit, and plain's checkpoint read. Asserted here."""
    torch.set_num_threads(1)
    whole = Reader.load(Path(reference))
    scalars = {"optimizer_steps": STEPS, "skipped_steps": 0, "loss_scale": None}
    out = {}
    for label, case in cases.items():
        engine = engine_for(
            small_model("gpt", layers=1),
            place,
            micro=MICRO,
            **case | {"optimizer": OPTIMIZER | case.get("optimizer", {})},
        )
        want, curve = of_kind(own(engine), "weight"), []
        for step in range(STEPS):
            curve += train(engine, range(step, step + 1), micro=MICRO)
            saved = own(engine)
            want = by_hand(want, of_kind(saved, "weight"), EMA)
            assert furthest(of_kind(saved, "ema"), want) < 1e-6, label
        assert not one_step(engine, STEPS, micro=MICRO, spoil=place.world - 1).applied
        assert own(engine).digest() == saved.digest(), f"{label}: a skipped step changed bits"
        assert engine.scalars()["ema_steps"] == STEPS
        all_saved = together(engine, folder, label)
        raw = score(engine, micro=MICRO)
        averaged = score(engine, micro=MICRO, weights="ema")
        assert own(engine).digest() == saved.digest(), f"{label}: the weights did not come back"
        assert score(engine, micro=MICRO) == raw, label
        onward, end = train(engine, range(STEPS, STEPS + 1), micro=MICRO), own(engine).digest()
        engine.restore(all_saved, scalars=engine.scalars() | {"optimizer_steps": STEPS, "ema_steps": STEPS})
        assert train(engine, range(STEPS, STEPS + 1), micro=MICRO) == onward, f"{label}: an evaluation left traces"
        assert own(engine).digest() == end, label
        engine.restore(without_average(all_saved), scalars=scalars)
        assert furthest(of_kind(own(engine), "ema"), of_kind(saved, "weight")) == 0
        assert score(engine, micro=MICRO, weights="ema") == raw
        if "optimizer" not in case:
            engine.restore(whole, scalars=scalars | {"ema_steps": STEPS})
            assert together(engine, folder, label).digest() == whole.digest(), f"{label} has not what plain saved"
        engine.close()
        if place.rank == 0:
            all_saved.save(folder / f"{label}.npz")
        out[label] = {"curve": curve, "raw": raw, "averaged": averaged}
    return out


FP32 = {
    **{f"stage{stage}": {"zero_stage": stage} for stage in range(4)},
    "all-divided": {
        "zero_stage": 3,
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    },
    "offload": {"zero_stage": 2, "offload": "cpu"},
}
BF16 = {f"bf16-{stage}": {"zero_stage": stage, "precision": "bf16"} for stage in (1, 2, 3)}
"""Three kinds of optimizer wrapper."""
MUON = {"muon-3": {"zero_stage": 3, "optimizer": {"kind": "muon", "lr": 0.02}}}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(["stage0", "stage1", "stage2", "stage3", "all-divided", "bf16-3"], marks=pytest.mark.slow),
        pytest.param(["offload", "bf16-1", "bf16-2", "muon-3"], marks=pytest.mark.exhaustive),
    ],
)
def test_every_stage_averages_as_plain(names: list[str], tmp_path: Path) -> None:
    """Two ranks: scores and averages within 1e-6 of plain's in fp32; the rest in `ranks`, to the bit."""
    told = {}
    for precision in ("fp32", "bf16"):
        engine = plain(precision=precision)
        curve = train(engine, range(STEPS), micro=MICRO)
        saved = Reader(engine.fragments())
        saved.save(tmp_path / f"plain-{precision}.npz")
        both = {"raw": score(engine, micro=MICRO), "averaged": score(engine, micro=MICRO, weights="ema")}
        told[precision] = {"curve": curve, **both}
        with torch.no_grad():  # the average is what a model with these weights says
            model = small_model("gpt", layers=1)
            for name, p in model.named_parameters():
                p.copy_(saved.tensors[name, "ema"].view(p.shape))
        other = engine_for(model, Place(), micro=MICRO, kind="plain", precision=precision)
        assert score(other, micro=MICRO) == both["averaged"] != both["raw"]
    cases = {name: (FP32 | BF16 | MUON)[name] for name in names}
    results = spawn(
        "tests.engine.test_averaging:ranks",
        world=2,
        timeout=500,
        folder=tmp_path,
        cases=cases,
        reference=str(tmp_path / "plain-fp32.npz"),
    )
    assert results[0] == results[1]
    for label, got in results[0].items():
        if label in MUON:
            continue
        want, near = (told["bf16"], 5e-4) if label in BF16 else (told["fp32"], 1e-6)
        assert got["curve"] == pytest.approx(want["curve"], rel=near), label
        assert got["raw"] == pytest.approx(want["raw"], rel=near), label
        assert got["averaged"] == pytest.approx(want["averaged"], rel=near), label
        if label in FP32:
            mine, theirs = (Reader.load(tmp_path / f"{name}.npz") for name in (label, "plain-fp32"))
            assert furthest(of_kind(mine, "ema"), of_kind(theirs, "ema")) < 1e-6, label
