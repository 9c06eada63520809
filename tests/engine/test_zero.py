"""What is around the steps: meeting, waiting, leaving, and what the zero engine refuses."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from lmtrain.errors import ConfigError, EngineError
from lmtrain.protocol import Place
from tests.engine.jobs import engine_for, one_step, small_model, together, train
from tests.spawn import free_port, spawn


def alone(place: Place, folder: Path) -> dict[str, Any]:
    """One rank: no rendezvous, no word on stdout, and refusals in our own words."""
    torch.set_num_threads(1)
    out: dict[str, Any] = {}
    engine = engine_for(small_model("rnn"), place, micro=12)
    listening = [c for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN]
    out["rendezvous"] = place.port in {c.laddr.port for c in listening}
    train(engine, range(2), micro=12)
    engine.close()
    engine.close()  # a second time is harmless
    out["groups"] = torch.distributed.is_initialized()
    for name, settings in {
        "fp16": {"precision": "fp16"},
        "value": {"deepspeed": {"zero_optimization": {"reduce_bucket_size": "many"}}},
        "recompute": {"activation_checkpointing": True},
    }.items():
        model = small_model("rnn")
        if name == "recompute":
            model.checkpoint_activations = None
        try:
            engine_for(model, place, micro=12, **settings)
        except (ConfigError, EngineError) as error:
            out[name] = f"{type(error).__name__}: {error}"
    again = engine_for(small_model("rnn"), place, micro=12, zero_stage=2)  # after failures the process can go on
    train(again, range(1), micro=12)
    again.close()
    return out


def test_one_rank_alone(tmp_path: Path) -> None:
    (out,) = spawn("tests.engine.test_zero:alone", world=1, folder=tmp_path)
    assert out["rendezvous"] is False, "a single rank opened the rendezvous port"
    assert out["groups"] is False
    assert out["fp16"] == "EngineError: engine.precision = fp16 is not supported on cpu; use fp32, or bf16 on a GPU"
    assert out["value"].startswith("ConfigError: DeepSpeed refuses its configuration: ")
    assert "reduce_bucket_size" in out["value"]
    assert "does not offer it" in out["recompute"]
    assert (tmp_path / "rank0.out").read_text() == ""


def pause(place: Place, folder: Path, *, stage: int, seconds: float) -> dict[str, Any]:
    """Rank 1 does not come to step 1. How long rank 0 waits for it, and where rank 0 listens."""
    torch.set_num_threads(1)
    engine = engine_for(small_model("rnn"), place, micro=6, zero_stage=stage, timeout=seconds)
    listening = [
        c.laddr.ip
        for c in psutil.Process().net_connections("inet")
        if c.status == psutil.CONN_LISTEN and c.laddr.port == place.port
    ]
    train(engine, range(1), micro=6)
    flag = folder / "done"
    if place.rank == 1:
        end = time.monotonic() + 20 * seconds
        while not flag.exists() and time.monotonic() < end:
            time.sleep(0.05)
        os._exit(0) if not _said(place, folder) else None
    began = time.monotonic()
    try:
        one_step(engine, 1, micro=6)
    except RuntimeError as error:
        waited, said = time.monotonic() - began, str(error)
    else:
        waited, said = -1.0, "no error"
    flag.touch()
    engine.close()
    return {"waited": waited, "said": said, "listening": listening}


def _said(place: Place, folder: Path) -> bool:
    (folder / f"rank{place.rank}.json").write_text("null")
    return False


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, pytest.param(2, marks=pytest.mark.exhaustive), 3])
def test_no_rank_waits_longer_than_the_time_out(stage: int) -> None:
    """DeepSpeed's own groups included: they wait 30 minutes unless told."""
    first, _ = spawn("tests.engine.test_zero:pause", world=2, stage=stage, seconds=6.0)
    assert 3 < first["waited"] < 30, first["said"]
    assert first["listening"] == ["127.0.0.1"], "the rendezvous listens on more than its address"


def stranded(place: Place, folder: Path, *, case: str) -> str:
    """A rank whose peers never come, or whose port is taken."""
    torch.set_num_threads(1)
    with socket.socket() as other:
        if case == "taken":
            other.bind(("127.0.0.1", place.port))
            other.listen()
        began = time.monotonic()
        try:
            engine_for(small_model("rnn"), replace(place, world=2), micro=6, timeout=3.0)
        except EngineError as error:
            assert time.monotonic() - began < 60
            return str(error)
    return "no error"


@pytest.mark.slow
@pytest.mark.parametrize(("case", "word"), [("missing", "are all ranks started"), ("taken", "is the port free")])
def test_ranks_that_do_not_meet(case: str, word: str) -> None:
    (said,) = spawn("tests.engine.test_zero:stranded", world=1, case=case)
    assert said.startswith("rank 0 of 2 did not meet the others at 127.0.0.1:")
    assert word in said


def agreeing(place: Place, folder: Path) -> dict[str, Any]:
    """Sums and flags of three ranks, and a step on an address that this host does not have by name."""
    import numpy as np

    torch.set_num_threads(1)
    named = replace(place, address="localhost")
    engine = engine_for(small_model("rnn"), named, micro=4, zero_stage=0)
    tiny = 2.0**-40
    out = {
        "sum": engine.add(np.array([1.0 + tiny, place.rank])).tolist(),
        "most": engine.agree([0, 5, 3][place.rank]),
    }
    engine.close()
    return out


@pytest.mark.slow
def test_sums_are_float64_and_flags_the_largest() -> None:
    for out in spawn("tests.engine.test_zero:agreeing", world=3):
        assert out == {"sum": [3.0 + 3 * 2.0**-40, 3.0], "most": 5}


def test_free_ports_are_free() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", free_port()))


def half(place: Place, folder: Path) -> list[dict[str, Any]]:
    """fp16 at stages 1 to 3. DeepSpeed refuses it on a CPU, torch can do it; so here it is let in."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    known = CPU_Accelerator.supported_dtypes
    CPU_Accelerator.is_fp16_supported = lambda self: True
    CPU_Accelerator.supported_dtypes = lambda self: [*known(self), torch.half]
    torch.set_num_threads(1)
    out = []
    for stage in (1, 2, 3):
        settings = {"zero_stage": stage, "precision": "fp16"}
        settings["deepspeed"] = {"fp16": {"initial_scale_power": 30, "hysteresis": 1}}
        engine = engine_for(small_model("gpt"), place, micro=3, **settings)
        before = together(engine, folder, f"half{stage}")
        skipped = 0
        while not one_step(engine, skipped, micro=3).applied:
            skipped += 1
            assert together(engine, folder, f"half{stage}").digest() == before.digest()
        curve = train(engine, range(skipped + 1, skipped + 4), micro=3)
        scalars, saved = engine.scalars(), together(engine, folder, f"half{stage}")
        onward = train(engine, range(skipped + 4, skipped + 7), micro=3)
        engine.close()
        other = engine_for(small_model("gpt", seed=2), place, micro=3, **settings)
        other.restore(saved, scalars=scalars)
        assert other.scalars() == scalars
        assert train(other, range(skipped + 4, skipped + 7), micro=3) == onward
        norm = one_step(other, skipped + 7, micro=3).grad_norm
        other.close()
        scale = scalars["loss_scale"]["cur_scale"]
        out.append({"skipped": skipped, "curve": curve + onward, "scale": scale, "norm": norm})
    return out


@pytest.mark.slow
def test_fp16_scales_its_loss() -> None:
    """Overflows halve the scale and change nothing; then the course is fp32's, and a restored run keeps the scale."""
    ranks = spawn("tests.engine.test_zero:half", world=2)
    assert ranks[0] == ranks[1]
    for got in ranks[0]:
        skipped = got["skipped"]
        assert 5 < skipped < 20
        assert got["scale"] == 2.0 ** (30 - skipped)
        plain = engine_for(small_model("gpt"), Place(), micro=3, kind="plain")
        want = train(plain, range(skipped, skipped + 7), micro=3)[1:]
        assert got["curve"] == pytest.approx(want, rel=2e-3)
        assert got["norm"] == pytest.approx(one_step(plain, skipped + 7, micro=3).grad_norm, rel=0.02)
