"""Exported weights are what the safetensors library reads, in one file or in parts, in bounded memory."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch

from lmtrain.checkpoint import CheckpointConfig, Checkpoints, export, tensorfile
from lmtrain.checkpoint.exporting import INDEX, WEIGHTS
from lmtrain.errors import CheckpointError
from tests.fake_ranks import FakeEngine, engines, on_all


@pytest.fixture
def ranks() -> list[FakeEngine]:
    return engines(3, steps=2)


@pytest.fixture
def path(ranks: list[FakeEngine], tmp_path: Path) -> Path:
    made = on_all(ranks, lambda e: Checkpoints(tmp_path / "run", CheckpointConfig()).save(e, step=2, state={}))
    return Path(made[0])


def wanted(ranks: list[FakeEngine]) -> dict[str, torch.Tensor]:
    kept = dict(ranks[0].model.state_dict())
    del kept["lm_head.weight"]  # tied to embed.weight
    return kept


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_one_file_holds_every_weight(path: Path, ranks: list[FakeEngine], tmp_path: Path, dtype: str) -> None:
    config = {"kind": "gpt", "layers": 2}
    files = export(path, tmp_path / "a" / "out", config=config, dtype=dtype)
    assert [f.name for f in files] == [WEIGHTS, "config.json"]
    assert sorted(p.name for p in (tmp_path / "a" / "out").iterdir()) == ["config.json", WEIGHTS]
    assert json.loads(files[1].read_text()) == config
    found = safetensors.torch.load_file(files[0])
    model = wanted(ranks)
    assert found.keys() == model.keys()
    to = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for name, tensor in model.items():
        tensor = tensor.to(to) if tensor.is_floating_point() else tensor
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), name
    with safetensors.safe_open(files[0], "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]


@pytest.mark.parametrize("part_bytes", [1, 64, 100, 200, 215, 216, 219, 226, 227, 10**6])
def test_parts_and_their_index_hold_every_weight_once(
    path: Path, ranks: list[FakeEngine], tmp_path: Path, part_bytes: int
) -> None:
    files = export(path, tmp_path / "out", part_bytes=part_bytes)
    model = wanted(ranks)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in model.items()}
    total = sum(sizes.values())
    assert total == 140 + 60 + 12 + 4 + 8 + 3
    if total <= part_bytes:
        assert [f.name for f in files] == [WEIGHTS]
        return
    parts = [f.name for f in files[:-1]]
    assert files[-1].name == INDEX
    assert parts == [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    index = json.loads(files[-1].read_text())
    assert index["metadata"] == {"total_size": total}
    assert index["weight_map"].keys() == model.keys()
    assert set(index["weight_map"].values()) == set(parts)
    seen = set()
    for file in files[:-1]:
        found = safetensors.torch.load_file(file)
        assert sum(sizes[name] for name in found) <= part_bytes or len(found) == 1
        for name, tensor in found.items():
            assert index["weight_map"][name] == file.name
            assert torch.equal(tensor, model[name])
            assert name not in seen
            seen.add(name)
    assert seen == model.keys()


def test_averaged_weights_have_the_names_of_the_weights(tmp_path: Path) -> None:
    (engine,) = engines(1, steps=2)
    store = Checkpoints(tmp_path / "run", CheckpointConfig())
    bare = store.save(engine, step=1, state={})
    with pytest.raises(CheckpointError, match=r"step-00000001 has no averaged weights: its run had no optimizer\.ema"):
        export(bare, tmp_path / "out", weights="ema")
    halves = {name: p.detach() / 2 for name, p in engine.model.named_parameters()}
    engine.moments["ema"] = halves
    for file in export(store.save(engine, step=2, state={}), tmp_path / "ema", weights="ema"):
        found = safetensors.torch.load_file(file)
    assert found.keys() == wanted([engine]).keys()
    assert all(torch.equal(found[name], half) for name, half in halves.items())
    assert torch.equal(found["mask"], engine.model.mask)
    raw = safetensors.torch.load_file(export(store.find().path, tmp_path / "raw")[0])
    assert all(torch.equal(raw[name], p) for name, p in engine.model.named_parameters())
    engine.moments["ema"] = {name: half for name, half in halves.items() if name != "body.bias"}
    with pytest.raises(CheckpointError, match=r"has averaged weights, but none of 'body\.bias'"):
        export(store.save(engine, step=3, state={}), tmp_path / "out", weights="ema")
    for moments in engine.moments.values():
        moments.pop("body.bias", None)  # a frozen parameter has neither moments nor an average: its value stands
    part = safetensors.torch.load_file(export(store.save(engine, step=4, state={}), tmp_path / "f", weights="ema")[0])
    assert torch.equal(part["body.bias"], engine.model.body.bias)
    assert torch.equal(part["body.weight"], halves["body.weight"])
    assert [p.name for p in tmp_path.iterdir() if p.name == "out"] == []


def test_an_empty_folder_may_be_given_a_used_one_not(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    export(path, out)
    before = (out / WEIGHTS).read_bytes()
    with pytest.raises(CheckpointError, match="out exists and is not an empty folder; give a new one"):
        export(path, out)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file exists and is not an empty folder"):
        export(path, tmp_path / "file")
    assert (out / WEIGHTS).read_bytes() == before


def test_a_damaged_checkpoint_is_not_exported(path: Path, tmp_path: Path) -> None:
    file = path / "r00002-000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 4
    file.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"r00002-000.safetensors is damaged"):
        export(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


def test_a_full_disk_leaves_nothing(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, tensors: Any, **kw: Any) -> Any:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(tensorfile, "write", full)
    with pytest.raises(CheckpointError, match="out was not written: No space left on device"):
        export(path, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("call", ["rename", "fsync", "mkdir"])
def test_it_is_all_there_or_not_at_all(path: Path, tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kw: Any) -> None:
        assert not (tmp_path / "out").exists()
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(CheckpointError, match="out was not written: Read-only file system"):
        export(path, tmp_path / "out", part_bytes=100)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize("argument", [{"dtype": "fp8"}, {"config": {"lr": math.nan}}, {"config": {"lr": {1}}}])
def test_what_cannot_be_written_is_refused(path: Path, tmp_path: Path, argument: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"fp8.*wanted one of fp32, bf16, fp16|config.json cannot be written"):
        export(path, tmp_path / "out", **argument)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]


@pytest.mark.slow
def test_memory_is_bounded_whatever_the_size_of_a_tensor(tmp_path: Path) -> None:
    """A tensor of 256 MiB is verified and exported in a process that may hold 64 MiB more."""
    script = """
        import resource, sys
        from pathlib import Path
        import torch
        from torch import nn
        from lmtrain.checkpoint import CheckpointConfig, Checkpoints, export, verify
        from tests.fake_ranks import FakeEngine

        def used():
            with open("/proc/self/status") as file:
                return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmData"))

        folder = Path(sys.argv[1])
        if sys.argv[2] == "save":
            model = nn.Module()
            model.big = nn.Parameter(torch.arange(2**26, dtype=torch.float32), requires_grad=False)
            engine = FakeEngine(model)
            engine.moments = {}
            Checkpoints(folder, CheckpointConfig()).save(engine, step=1, state={})
        else:
            limit = used() + 64 * 2**20
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
            try:
                torch.ones(2**25)
                raise SystemExit("the limit does not bite")
            except RuntimeError:
                pass
            verify(folder / "step-00000001")
            export(folder / "step-00000001", folder / "bf16", dtype="bf16")
            export(folder / "step-00000001", folder / "out", dtype="fp32")
    """
    for what in ("save", "export"):
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(script), str(tmp_path), what],
            check=True,
            cwd=Path(__file__).parent.parent,
            timeout=300,
        )
    with safetensors.safe_open(tmp_path / "out" / WEIGHTS, "pt") as file:
        big = file.get_slice("big")
        assert big.get_shape() == [2**26]
        for at in (0, 4 * 2**20 - 1, 2**25, 2**26 - 5):
            assert big[at : at + 5].tolist() == torch.arange(at, at + 5, dtype=torch.float32).tolist()
