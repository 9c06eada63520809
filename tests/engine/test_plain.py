"""The reference engine against loops written out here, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lmtrain.engine import EngineConfig, OptimizerConfig, make
from lmtrain.engine.noise import noise_seed
from lmtrain.engine.optimizer import groups, momentum
from lmtrain.errors import CheckpointError, ConfigError, EngineError
from lmtrain.protocol import Model, Place
from tests.engine.jobs import ROWS, Reader, batches_of, engine_for, one_step, small_model, train


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_hand(model: Model, steps: int, *, clip: float, decay_embeddings: bool) -> list[float]:
    """The whole global batch at once, torch's unfused AdamW in float64, torch's clipping. No lmtrain but the model."""
    model.double().train()
    decayed = [p for n, p in model.named_parameters() if p.dim() >= 2 and (decay_embeddings or "embed" not in n)]
    rest = [p for p in model.parameters() if not any(p is q for q in decayed)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=3e-3,
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
        fused=False,
    )
    curve = []
    for step in range(steps):
        (batch,) = batches_of(step, micro=ROWS)
        logp_BT = model(batch.x_BT, cond=batch.cond)
        loss = -(logp_BT * batch.weight_BT).sum() / batch.weight_BT.sum()
        optimizer.zero_grad()
        loss.backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        curve.append(float(loss.detach()))
    return curve


@pytest.mark.parametrize("micro", [12, 4, 1])
@pytest.mark.parametrize(
    ("name", "clip", "decay_embeddings"), [("gpt", 0.0, True), ("gpt", 0.05, False), ("rnn", 0.1, True)]
)
def test_against_a_loop_by_hand(name: str, clip: float, decay_embeddings: bool, micro: int) -> None:
    """Also: micro-batches of very uneven weight give the gradient of the whole batch."""
    optimizer = {"clip": clip, "decay_embeddings": decay_embeddings}
    engine = engine_for(small_model(name, dropout=0.0), Place(), micro=micro, optimizer=optimizer, kind="plain")
    got = train(engine, range(12), micro=micro)
    want = by_hand(small_model(name, dropout=0.0), 12, clip=clip, decay_embeddings=decay_embeddings)
    assert got == pytest.approx(want, rel=1e-5)
    assert len(set(got)) == 12


def test_weights_scale_out() -> None:
    """The loss is nats over weight: doubling every weight changes nothing but the two sums."""
    engines = [engine_for(small_model("gpt"), Place(), micro=6, kind="plain") for _ in range(2)]
    reports = []
    for scale, engine in zip((1.0, 2.0), engines, strict=True):
        for step in range(3):
            batches = batches_of(step, micro=6)
            for b in batches:
                b.weight_BT.mul_(scale)
            total = sum(float(b.weight_BT.sum()) for b in batches)
            report = engine.step(batches, total_weight=total, lr=3e-3, step=step)
        reports.append(report)
    assert reports[1].nats == pytest.approx(2 * reports[0].nats, rel=1e-6)
    assert reports[1].grad_norm == pytest.approx(reports[0].grad_norm, rel=1e-5)


def test_grad_norm_is_that_before_clipping() -> None:
    norms = []
    for clip in (0.0, 1e-3):
        engine = engine_for(small_model("gpt"), Place(), micro=12, optimizer={"clip": clip}, kind="plain")
        norms.append(one_step(engine, 0, micro=12).grad_norm)
    assert norms[0] == norms[1] > 0.05


def test_noise_is_seeded_by_the_row_and_the_step() -> None:
    """With dropout: the same step twice gives the same loss; another step, seed or first row another mask."""
    assert len({noise_seed(s, t, i) for s in range(12) for t in range(12) for i in range(12)}) == 12**3
    assert all(0 <= noise_seed(s, 1, 1) < 2**63 for s in range(100))
    assert noise_seed(0, 12, 3) != noise_seed(0, 1, 23)
    curves = []
    for _ in range(2):
        torch.manual_seed(torch.seed() % 1000)
        engine = engine_for(small_model("gpt", dropout=0.5), Place(), micro=12, kind="plain")
        curves.append(train(engine, range(3), micro=12))
    assert curves[0] == curves[1]
    again = engine_for(small_model("gpt", dropout=0.5), Place(), micro=12, kind="plain")
    (batch,) = batches_of(0, micro=12)
    total = float(batch.weight_BT.sum())
    assert again.step([batch], total_weight=total, lr=0.0, step=1).nats / total != curves[0][0]


def test_recomputed_activations_change_nothing() -> None:
    """The same bits with dropout: the masks are replayed."""
    curves = []
    for flag in (False, True, "attention", "mlp"):
        engine = engine_for(small_model("gpt"), Place(), micro=6, kind="plain", activation_checkpointing=flag)
        curves.append(train(engine, range(4), micro=6))
    assert all(curve == curves[0] for curve in curves)
    with pytest.raises(ConfigError, match=r"activation_checkpointing = mlp, but lmtrain\.models\.rnn has no such part"):
        engine_for(small_model("rnn"), Place(), micro=6, kind="plain", activation_checkpointing="mlp")


def test_bf16_has_fp32_masters() -> None:
    """Steps far below a bf16 weight's spacing add up in the master weights."""
    model = small_model("gpt")
    engine = engine_for(model, Place(), micro=12, kind="plain", precision="bf16")
    low = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert {p.dtype for p in low.values()} == {torch.bfloat16}
    before = Reader(engine.fragments())
    for step in range(30):
        (batch,) = batches_of(step, micro=12)
        engine.step([batch], total_weight=float(batch.weight_BT.sum()), lr=1e-7, step=step)
    after = Reader(engine.fragments())
    key = ("blocks.0.mlp.up.weight", "weight")
    assert after.tensors[key].dtype == torch.float32
    moved = (after.tensors[key] - before.tensors[key]).abs()
    assert 1e-6 < float(moved.max()) < 1e-5
    unchanged = (dict(model.named_parameters())[key[0]] == low[key[0]]).float().mean()
    assert unchanged > 0.95


def test_groups_go_by_name_and_shape() -> None:
    model = small_model("gpt", tied=False, positions="learned")
    named = list(model.named_parameters())
    sizes = {n: p.dim() for n, p in named}
    for kind, decay_embeddings in (("adamw", True), ("adamw", False), ("muon", True), ("muon", False)):
        aside = {"adamw_lr": 0.001} if kind == "muon" else {}
        config = OptimizerConfig(kind=kind, lr=0.02, decay_embeddings=decay_embeddings, **aside)
        grouped = groups(config, named)
        names = [n for g in grouped for n in g["names"]]
        assert sorted(names) == sorted(sizes), "every parameter once"
        for g in grouped:
            for n in g["names"]:
                matrix = sizes[n] >= 2
                table = "embed" in n or "lm_head" in n
                assert g["muon"] == (kind == "muon" and matrix and not table)
                assert g["weight_decay"] == (0.1 if matrix and (decay_embeddings or "embed" not in n) else 0.0)
                assert g["rate"] == (1.0 if kind == "adamw" or g["muon"] else 0.05)


@pytest.mark.parametrize(
    ("name", "shape", "matrix"),
    [
        ("a.weight", (4, 3), True),
        ("a.weight", (1, 3), True),
        ("a.weight", (8, 1, 3, 3), True),  # a kernel over one channel
        ("a.out_weight", (5, 2, 3), True),
        ("bias.weight", (4, 3), True),  # the parameter's own word counts, not the module's
        ("a.weight", (4,), False),
        ("a", (), False),
        ("a.length", (8, 1, 1, 1), False),  # a gain a channel, as weight normalisation has it
        ("a.length", (8, 1), False),
        ("a.bias", (4,), False),
        ("a.out_bias", (5, 2), False),  # a bias a position and output
        ("a.gain", (5, 2), False),
    ],
)
def test_what_is_decayed_and_orthogonalised(name: str, shape: tuple[int, ...], matrix: bool) -> None:
    p = torch.nn.Parameter(torch.zeros(shape))
    (group,) = groups(OptimizerConfig(), [(name, p)])
    assert group["weight_decay"] == (0.1 if matrix else 0.0)
    (group,) = groups(OptimizerConfig(kind="muon"), [(name, p)])
    assert (group["muon"], group["weight_decay"]) == (matrix, 0.1 if matrix else 0.0)


def test_tied_parameters_are_one() -> None:
    engine = engine_for(small_model("gpt", tied=True), Place(), micro=12, kind="plain")
    names = [f.name for f in engine.fragments() if f.kind == "weight"]
    assert len(names) == len(set(names))
    assert not any("lm_head" in n for n in names)


def test_momentum_warms_up_as_a_function_of_the_step() -> None:
    config = OptimizerConfig(kind="muon", momentum_start=0.8, momentum=0.9, momentum_warmup=10)
    assert [momentum(config, s) for s in (0, 5, 10, 99)] == pytest.approx([0.8, 0.85, 0.9, 0.9])


def test_what_plain_refuses() -> None:
    config, optimizer = EngineConfig(kind="plain"), OptimizerConfig()

    def start(model: Model, config: EngineConfig = config, place: Place = Place()) -> Any:  # noqa: B008
        return make(config, model, optimizer=optimizer, place=place, micro_batch=1, accumulation=1, seed=0)

    with pytest.raises(ConfigError, match=r"is one process, but 2 ranks were started; use engine\.kind = zero"):
        start(small_model("rnn"), place=Place(world=2))

    class Bare(Model):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(3))

    with pytest.raises(ConfigError, match="does not offer it"):
        start(Bare(), EngineConfig(kind="plain", activation_checkpointing=True))
    if not torch.cuda.is_available():
        with pytest.raises(EngineError, match="finds no CUDA device"):
            start(small_model("rnn"), EngineConfig(kind="plain", device="cuda"))


def test_restore_refuses_what_is_not_there() -> None:
    scalars = {"optimizer_steps": 0, "skipped_steps": 0, "loss_scale": None}
    saved = Reader(engine_for(small_model("gpt"), Place(), micro=12, kind="plain").fragments())
    muon = engine_for(small_model("gpt"), Place(), micro=12, kind="plain", optimizer={"kind": "muon"})
    before = Reader(muon.fragments()).digest()
    with pytest.raises(CheckpointError, match=r"no momentum of .*optimizer\.kind"):
        muon.restore(saved, scalars=scalars)
    assert Reader(muon.fragments()).digest() == before
    wide = engine_for(small_model("gpt", width=32), Place(), micro=12, kind="plain")
    with pytest.raises(CheckpointError, match=r"embed\.weight has shape \[29, 24\] in the checkpoint, \[29, 32\]"):
        wide.restore(saved, scalars=scalars)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"kind": "adam"}, "kind"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"clip": -1}, "clip"),
        ({"lr": 0}, "lr"),
        ({"momentum": 0.5}, "optimizer.momentum is for kind = muon"),
    ],
)
def test_optimizers_that_cannot_be(tree: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OptimizerConfig(**tree)


def test_sums_over_one_rank_are_the_values() -> None:
    engine = engine_for(small_model("rnn"), Place(), micro=12, kind="plain")
    values = np.array([1.5, math.pi])
    assert engine.add(values).tolist() == values.tolist()
    assert engine.add(values) is not values
    assert engine.agree(3) == 3
