"""Saving, finding, keeping and restoring, with threads for ranks; every failure is known to all of them."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import nn

from lmtrain.checkpoint import (
    CheckpointConfig,
    Checkpoints,
    Reader,
    differences,
    faults,
    load_weights,
    same_run,
    tensorfile,
    verify,
)
from lmtrain.checkpoint import ranks as words
from lmtrain.checkpoint import reader as reading
from lmtrain.checkpoint.manifest import MANIFEST
from lmtrain.checkpoint.tensorfile import Outgoing
from lmtrain.errors import CheckpointError
from lmtrain.protocol import Fragment, FragmentReader
from tests.fake_ranks import FakeEngine, Small, World, engines, on_all, same

STATE = {"progress": {"step": 3, "best": 1.5}, "order": {"fingerprint": "abc", "seed": 1}}


def store(folder: Path, **settings: Any) -> Checkpoints:
    return Checkpoints(folder, CheckpointConfig(**settings), note=lambda text: None)


def save(folder: Path, ranks: list[FakeEngine], *, step: int = 3, best: bool = False, **settings: Any) -> Path:
    made = on_all(ranks, lambda e: store(folder, **settings).save(e, step=step, state=STATE, best=best))
    assert len(set(made)) == 1, made
    assert isinstance(made[0], Path)
    return made[0]


# ---- save and restore -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_by", [1, 2, 5])
@pytest.mark.parametrize("read_by", [1, 3, 5])
def test_what_was_saved_comes_back_bit_equal_for_any_number_of_ranks(
    tmp_path: Path, saved_by: int, read_by: int
) -> None:
    ranks = engines(saved_by, steps=3)
    wanted = ranks[0].everything()
    save(tmp_path, ranks)
    others = engines(read_by, seed=9)
    found = on_all(others, lambda e: store(tmp_path).restore(e))
    assert found == [(3, STATE)] * read_by
    for engine in others:
        assert same(engine.everything(), wanted)


@pytest.mark.parametrize("limit", [8, 12, 60, 100, 2**20])
def test_no_file_is_larger_than_the_limit_and_large_fragments_are_cut(tmp_path: Path, limit: int) -> None:
    ranks = engines(2, steps=1)
    wanted = ranks[0].everything()

    def run(engine: FakeEngine) -> Path | None:
        config = CheckpointConfig().model_copy(update={"file_mib": limit / 2**20})
        return Checkpoints(tmp_path, config).save(engine, step=3, state=STATE)

    path = on_all(ranks, run)[0]
    sizes = []
    for file in path.glob("*.safetensors"):
        tensors = safetensors.torch.load_file(file)
        sizes.append(sum(t.nbytes for t in tensors.values()))
    given = sum(f.tensor.nbytes for engine in ranks for f in engine.fragments())
    assert sum(sizes) == given
    assert max(sizes) <= limit
    assert len(sizes) == 2 if limit == 2**20 else len(sizes) >= given / limit
    verify(path)
    (fresh,) = engines(1, seed=9)
    store(tmp_path).restore(fresh)
    assert same(fresh.everything(), wanted)


def test_the_files_are_safetensors_that_the_library_reads(tmp_path: Path) -> None:
    ranks = engines(2, steps=2)
    path = save(tmp_path, ranks)
    found: dict[str, torch.Tensor] = {}
    for file in path.glob("*.safetensors"):
        found |= safetensors.torch.load_file(file)
    for engine in ranks:
        for f in engine.fragments():
            assert torch.equal(found.pop(f"{f.kind}:{f.start}:{f.name}"), f.tensor)
    assert not found


def test_tied_weights_are_saved_once_and_all_of_the_record_is_there(tmp_path: Path) -> None:
    manifest = verify(save(tmp_path, engines(2)))
    assert set(manifest.shapes("weight")) == {"embed.weight", "body.weight", "body.bias", "scale"}
    assert set(manifest.shapes("buffer")) == {"count", "mask"}
    assert manifest.shapes("exp_avg")["embed.weight"] == (7, 5)
    assert manifest.made_by["world"] == 2
    assert manifest.made_by["torch"] == str(torch.__version__)
    assert manifest.made_by["threads"] == torch.get_num_threads()
    assert set(manifest.made_by) >= {"engine", "device", "machine", "cpu_capability", "python", "deepspeed"}


def test_another_number_of_ranks_is_noted_once(tmp_path: Path) -> None:
    save(tmp_path, engines(2))
    notes: list[str] = []

    def restore(engine: FakeEngine) -> None:
        Checkpoints(tmp_path, CheckpointConfig(), note=notes.append).restore(engine)

    on_all(engines(2), restore)
    assert notes == []
    on_all(engines(3), restore)
    assert len(notes) == 1
    assert "world: 2 then, 3 now" in notes[0]


def test_a_range_reads_the_same_as_the_tensor_cut(tmp_path: Path) -> None:
    ranks = engines(4, steps=2)
    path = save(tmp_path, ranks)
    whole = ranks[0].model.embed.weight.detach().reshape(-1)
    reader = Reader(path)
    for start in range(36):
        for stop in range(start, 36):
            assert torch.equal(reader.read("embed.weight", "weight", start, stop - start), whole[start:stop])


@pytest.mark.parametrize(("start", "numel"), [(-1, 2), (0, 36), (36, 0), (2, -1)])
def test_a_range_outside_the_tensor_is_refused(tmp_path: Path, start: int, numel: int) -> None:
    reader = Reader(save(tmp_path, engines(1)))
    with pytest.raises(CheckpointError, match=r"of weight of 'embed.weight' were asked for; it has 35"):
        reader.read("embed.weight", "weight", start, numel)


def test_what_was_not_saved_is_named_with_its_neighbour(tmp_path: Path) -> None:
    reader = Reader(save(tmp_path, engines(1)))
    with pytest.raises(CheckpointError, match=r"no weight of 'embed\.weigth' .*nearest name is 'embed\.weight'"):
        reader.shape("embed.weigth", "weight")
    with pytest.raises(CheckpointError, match="its kinds are buffer, exp_avg, exp_avg_sq, weight"):
        reader.read("embed.weight", "momentum", 0, 1)
    assert not reader.has("embed.weight", "momentum")


def test_a_file_is_hashed_before_its_data_are_used_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, engines(2))
    events: list[str] = []
    check, read = reading.check_file, tensorfile.read_into

    def spy_check(file: Path, record: Any) -> None:
        events.append(f"check {file.name}")
        check(file, record)

    def spy_read(file: Path, *args: Any, **kw: Any) -> None:
        events.append(f"read {file.name}")
        read(file, *args, **kw)

    monkeypatch.setattr(reading, "check_file", spy_check)
    monkeypatch.setattr(tensorfile, "read_into", spy_read)
    reader = Reader(path)
    assert events == []
    for _ in range(2):
        reader.read("body.weight", "weight", 0, 15)
    one, other = "r00000-000.safetensors", "r00001-000.safetensors"
    assert events == [f"check {one}", f"read {one}", f"check {other}", f"read {other}", f"read {one}", f"read {other}"]


# ---- a plain model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_load_into_a_plain_model(tmp_path: Path, dtype: torch.dtype) -> None:
    ranks = engines(3, steps=2)
    path = save(tmp_path, ranks)
    model = Small(5).to(dtype)
    model.scratch.fill_(7)
    assert load_weights(path, model).step == 3
    wanted = ranks[0].model.state_dict()
    for name, found in model.state_dict().items():
        assert torch.equal(found, wanted[name].to(found.dtype)), name
    assert model.lm_head.weight is model.embed.weight
    assert model.scratch.tolist() == [7, 7]


def test_weights_load_into_a_transposed_parameter(tmp_path: Path) -> None:
    ranks = engines(1)
    path = save(tmp_path, ranks)
    model = Small(5)
    model.body.weight = nn.Parameter(torch.zeros(5, 3).t())
    load_weights(path, model)
    assert torch.equal(model.body.weight, ranks[0].model.body.weight)


def change_shape(model: Small) -> None:
    model.body = nn.Linear(5, 4)


def add_parameter(model: Small) -> None:
    model.extra = nn.Parameter(torch.zeros(2))


def drop_parameter(model: Small) -> None:
    del model.scale


def drop_buffer(model: Small) -> None:
    del model.mask


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_shape, r"weight 'body.weight' has shape \[3, 5\], the model's has \[4, 5\]"),
        (add_parameter, "weight 'extra' is not in the checkpoint"),
        (drop_parameter, "weight 'scale' is not in the model"),
        (drop_buffer, "buffer 'mask' is not in the model"),
    ],
)
def test_another_model_is_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    path = save(tmp_path, engines(2))
    model = Small()
    change(model)
    with pytest.raises(CheckpointError, match=message):
        load_weights(path, model)
    found = on_all([FakeEngine(model)], lambda e: store(tmp_path).restore(e))
    with pytest.raises(CheckpointError, match=message):
        raise found[0]


# ---- which are kept, which are found ----------------------------------------------------------------------------


def steps(folder: Path) -> list[int]:
    return [saved.step for saved in store(folder).list()]


def test_the_newest_the_best_and_every_mth_are_kept(tmp_path: Path) -> None:
    checkpoints = store(tmp_path, keep=2, keep_every=5)
    (engine,) = engines(1)
    kept = []
    for step in range(1, 14):
        checkpoints.save(engine, step=step, state={}, best=step in (3, 8))
        kept.append(steps(tmp_path))
    best = {s: 8 if s >= 8 else 3 for s in range(3, 14)}
    for step, found in enumerate(kept, start=1):
        wanted = {s for s in (step, step - 1) if s > 0} | {s for s in (5, 10) if s <= step}
        assert found == sorted(wanted | ({best[step]} if step in best else set())), step
    assert checkpoints.find("best").step == 8
    assert checkpoints.find(5).step == 5
    assert checkpoints.find().step == 13
    assert not [p for p in tmp_path.iterdir() if not p.name.startswith("step-") or "." in p.name]


def test_a_new_process_keeps_what_the_old_one_would_have(tmp_path: Path) -> None:
    (engine,) = engines(1)
    for step in range(1, 9):
        store(tmp_path, keep=3).save(engine, step=step, state={}, best=step == 2)
    assert steps(tmp_path) == [2, 6, 7, 8]


def test_nothing_is_removed_before_the_new_one_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (engine,) = engines(1)
    checkpoints = store(tmp_path)
    for step in (1, 2):
        checkpoints.save(engine, step=step, state={})
    seen: list[list[int]] = []
    rename = os.rename

    def spy(a: Any, b: Any) -> None:
        seen.append(steps(tmp_path))
        rename(a, b)

    monkeypatch.setattr(os, "rename", spy)
    checkpoints.save(engine, step=3, state={})
    assert seen == [[1, 2], [1, 2, 3]]
    assert steps(tmp_path) == [2, 3]


def test_the_same_step_again_replaces_it_without_a_gap(tmp_path: Path) -> None:
    ranks = engines(2, steps=1)
    save(tmp_path, ranks)
    for engine in ranks:
        engine.advance(1)
    second = save(tmp_path, ranks)
    assert second.name == "step-00000003.2"
    assert steps(tmp_path) == [3]
    third = save(tmp_path, ranks)
    assert third.name == "step-00000003.3"
    assert store(tmp_path).find(3).path == third
    fresh = engines(2, seed=4)
    on_all(fresh, lambda e: store(tmp_path).restore(e, 3))
    assert same(fresh[0].everything(), ranks[0].everything())


def test_foreign_files_are_ignored_and_left_alone(tmp_path: Path) -> None:
    (engine,) = engines(1)
    foreign = ["step-5", "step-00000009.writing", "notes.txt", "step-00000007.bak", "step-00000007.0", "latest"]
    for name in foreign:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000008").write_text("a file")
    assert not store(tmp_path).any()
    for step in range(1, 5):
        store(tmp_path).save(engine, step=step, state={})
    assert steps(tmp_path) == [3, 4]
    assert {p.name for p in tmp_path.iterdir()} == {*foreign, "step-00000008", "step-00000003", "step-00000004"}


def test_left_overs_of_killed_processes_are_ignored_then_removed(tmp_path: Path) -> None:
    (engine,) = engines(1)
    store(tmp_path).save(engine, step=1, state={})
    for ending in ("writing", "removing"):
        shutil.copytree(tmp_path / "step-00000001", tmp_path / f"step-00000002.00000000abcd.{ending}")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("x")
    (tmp_path / "step-00000002.00000000abce.writing").symlink_to(elsewhere)
    assert store(tmp_path).find().step == 1
    store(tmp_path).save(engine, step=2, state={})
    assert (elsewhere / "precious").exists()
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"step-00000001", "step-00000002", "elsewhere", "step-00000002.00000000abce.writing"}


def test_an_empty_or_missing_folder_has_nothing(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        checkpoints = store(folder)
        assert not checkpoints.any()
        assert checkpoints.list() == []
        assert checkpoints.newest() is None
        assert checkpoints.best() is None
        with pytest.raises(CheckpointError, match="has no checkpoint; train first"):
            checkpoints.find()
        (error,) = on_all(engines(1), lambda e, c=checkpoints: c.restore(e))
        assert isinstance(error, CheckpointError)


def test_asking_for_what_is_not_there_names_what_is(tmp_path: Path) -> None:
    save(tmp_path, engines(1))
    with pytest.raises(CheckpointError, match="no checkpoint of step 7; its steps are 3"):
        store(tmp_path).find(7)
    with pytest.raises(CheckpointError, match="saved as the best; its steps are 3"):
        store(tmp_path).find("best")
    found = on_all(engines(3), lambda e: store(tmp_path).restore(e, 7))
    assert len({str(error) for error in found}) == 1
    assert "no checkpoint of step 7" in str(found[2])


def spoil(path: Path) -> None:
    file = next(p for p in sorted(path.glob("*.safetensors")) if p.stat().st_size > 8)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)


def test_the_newest_that_verifies_is_resumed_and_a_bad_one_is_named(tmp_path: Path) -> None:
    ranks = engines(2)
    trajectory = {}
    for step in (1, 2, 3):
        for engine in ranks:
            engine.advance(step)
        trajectory[step] = ranks[0].everything()
        save(tmp_path, ranks, step=step, keep=3)
    spoil(tmp_path / "step-00000003")
    (tmp_path / "step-00000002" / MANIFEST).unlink()
    notes: list[str] = []
    fresh = engines(3, seed=2)
    found = on_all(fresh, lambda e: Checkpoints(tmp_path, CheckpointConfig(), note=notes.append).restore(e))
    assert [f[0] for f in found] == [1, 1, 1]
    assert all(same(e.everything(), trajectory[1]) for e in fresh)
    assert len(notes) == 3
    assert "step-00000003 is passed over" in notes[0]
    assert "r00000-000.safetensors is damaged" in notes[0]
    assert "step-00000002/manifest.json is missing" in notes[1]
    assert "was saved elsewhere" in notes[2]


def test_the_damage_is_found_whichever_rank_reads_the_file(tmp_path: Path) -> None:
    ranks = engines(3, steps=1)
    for step in (1, 2):
        save(tmp_path, ranks, step=step)
    for file in sorted((tmp_path / "step-00000002").glob("*.safetensors")):
        good = file.read_bytes()
        file.write_bytes(good[:-1] + bytes([good[-1] ^ 128]))
        found = on_all(engines(3), lambda e: store(tmp_path).restore(e)[0])
        assert found == [1, 1, 1]
        file.write_bytes(good)
    assert on_all(engines(3), lambda e: store(tmp_path).restore(e)[0]) == [2, 2, 2]


def test_a_named_step_that_is_damaged_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, engines(2), step=step, best=step == 2)
    spoil(tmp_path / "step-00000002")
    for which in (2, "best"):
        found = on_all(engines(2), lambda e, w=which: store(tmp_path).restore(e, w))
        assert [type(f) for f in found] == [CheckpointError] * 2
        assert "step-00000002/r00000-000.safetensors is damaged" in str(found[1])
        with pytest.raises(CheckpointError, match="is damaged"):
            store(tmp_path).find(which)


def test_when_nothing_verifies_nothing_is_resumed(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, engines(2), step=step)
        spoil(tmp_path / f"step-{step:08d}")
    found = on_all(engines(2), lambda e: store(tmp_path).restore(e))
    assert [type(f) for f in found] == [CheckpointError] * 2
    assert r"no checkpoint verifies (its steps are 1, 2)" in str(found[1])
    assert store(tmp_path).any()


def test_going_back_sets_the_later_ones_aside(tmp_path: Path) -> None:
    ranks = engines(2)
    for step in (1, 2, 3, 4):
        for engine in ranks:
            engine.advance(step)
        save(tmp_path, ranks, step=step, best=step == 2, keep=4)
    fresh = engines(2, seed=1)

    def go_on(engine: FakeEngine) -> list[Any]:
        checkpoints = store(tmp_path, keep=4)
        step, _ = checkpoints.restore(engine, "best")
        before = [saved.step for saved in checkpoints.list()]
        engine.advance(100)
        checkpoints.save(engine, step=step + 1, state=STATE)
        return before

    assert on_all(fresh, go_on) == [[1, 2, 3, 4]] * 2
    assert steps(tmp_path) == [1, 2, 3]
    aside = sorted(p.name for p in tmp_path.iterdir() if p.name.endswith(".aside"))
    assert [name[:13] for name in aside] == ["step-00000003", "step-00000004"]
    third = engines(1, seed=3)[0]
    assert store(tmp_path).restore(third)[0] == 3
    assert same(third.everything(), fresh[0].everything())


def test_a_damaged_one_does_not_count_among_those_kept(tmp_path: Path) -> None:
    (engine,) = engines(1)
    for step in (1, 2, 3):
        store(tmp_path, keep=3).save(engine, step=step, state={})
    (tmp_path / "step-00000003" / "r00000-000.safetensors").unlink()
    store(tmp_path, keep=2).save(engine, step=4, state={})
    assert steps(tmp_path) == [2, 3, 4]
    store(tmp_path, keep=2).save(engine, step=5, state={})
    assert steps(tmp_path) == [4, 5]


def test_an_error_while_pruning_is_noted_and_the_save_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (engine,) = engines(1)
    notes: list[str] = []
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), note=notes.append)
    for step in (1, 2):
        checkpoints.save(engine, step=step, state={})

    def refuse(path: Any, **kw: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    checkpoints.save(engine, step=3, state={})
    assert steps(tmp_path) == [2, 3]
    assert len(notes) == 1
    assert "could not be removed" in notes[0]


# ---- failures while saving --------------------------------------------------------------------------------------


def check_failed_save(tmp_path: Path, ranks: list[FakeEngine], results: list[Any], message: str) -> None:
    """All ranks know, nothing is left of the new one, the old one verifies and can be restored."""
    assert [type(r) for r in results] == [CheckpointError] * len(ranks), results
    assert len({str(r) for r in results}) == 1
    assert message in str(results[0])
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    verify(tmp_path / "step-00000001")
    assert on_all(engines(2), lambda e: store(tmp_path).restore(e)[0]) == [1, 1]


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("after", [0, 3, 100])
def test_an_engine_that_fails_on_one_rank_fails_the_save_on_all(tmp_path: Path, victim: int, after: int) -> None:
    ranks = engines(3)
    save(tmp_path, ranks, step=1)
    good = ranks[victim].fragments

    def broken() -> Iterator[Fragment]:
        yield from itertools.islice(good(), after)
        raise RuntimeError("device lost")

    ranks[victim].fragments = broken  # type: ignore[method-assign]
    results = on_all(ranks, lambda e: store(tmp_path).save(e, step=2, state=STATE))
    check_failed_save(tmp_path, ranks, results, f"rank {victim}: RuntimeError: device lost")
    ranks[victim].fragments = good  # type: ignore[method-assign]
    assert save(tmp_path, ranks, step=2).name == "step-00000002"


@pytest.mark.parametrize("victim", [0, 1])
def test_a_full_disk_on_one_rank_fails_the_save_on_all(
    tmp_path: Path, victim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = engines(2)
    save(tmp_path, ranks, step=1)
    write = tensorfile.write

    def full(path: Path, tensors: Any, **kw: Any) -> Any:
        if path.name.startswith(f"r{victim:05d}"):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, tensors, **kw)

    monkeypatch.setattr(tensorfile, "write", full)
    results = on_all(ranks, lambda e: store(tmp_path).save(e, step=2, state=STATE))
    monkeypatch.setattr(tensorfile, "write", write)
    check_failed_save(tmp_path, ranks, results, f"rank {victim}: No space left on device")


@pytest.mark.parametrize("call", ["mkdir", "rename", "fsync"])
def test_a_refusal_of_the_file_system_on_rank_0_fails_the_save_on_all(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = engines(2)
    save(tmp_path, ranks, step=1)

    def refuse(*args: Any, **kw: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "there")

    monkeypatch.setattr(os, call, refuse)
    results = on_all(ranks, lambda e: store(tmp_path).save(e, step=2, state=STATE))
    monkeypatch.undo()
    check_failed_save(tmp_path, ranks, results, "rank 0: Read-only file system: there")


def gap(f: Fragment) -> Iterator[Fragment]:
    yield replace(f, start=f.start + 1, tensor=f.tensor[1:])


def doubled(f: Fragment) -> Iterator[Fragment]:
    yield f
    yield f


def overlap(f: Fragment) -> Iterator[Fragment]:
    yield f
    yield replace(f, start=f.start + f.tensor.numel() - 1, tensor=f.tensor[-1:])


def short(f: Fragment) -> Iterator[Fragment]:
    yield replace(f, tensor=f.tensor[:-1])


def forgotten(f: Fragment) -> Iterator[Fragment]:
    return iter(())


def other_shape(f: Fragment) -> Iterator[Fragment]:
    yield replace(f, shape=(5, 7))


def other_dtype(f: Fragment) -> Iterator[Fragment]:
    yield replace(f, tensor=f.tensor.double())


def two_dimensions(f: Fragment) -> Iterator[Fragment]:
    yield replace(f, tensor=f.tensor.view(1, -1))


def complex_numbers(f: Fragment) -> Iterator[Fragment]:
    yield replace(f, tensor=f.tensor.to(torch.complex64))


@pytest.mark.parametrize(
    ("wrong", "world", "message"),
    [
        (gap, 1, "weight of 'embed.weight': no rank wrote elements 0 to 0 of 35"),
        (gap, 2, "weight of 'embed.weight': no rank wrote elements 11 to 11 of 35"),
        (doubled, 2, "weight of 'embed.weight': the engine gave the fragment at 11 twice"),
        (overlap, 2, "weight of 'embed.weight': elements 34 to 34 were written twice"),
        (short, 2, "weight of 'embed.weight': 34 of 35 elements were written"),
        (forgotten, 2, "weight of 'embed.weight': 11 of 35 elements were written"),
        (forgotten, 1, "no rank gave the weight 'embed.weight' (1 are missing)"),
        (other_shape, 1, "the weight 'embed.weight' has shape [7, 5], it was given as [5, 7]"),
        (other_shape, 2, "weight of 'embed.weight': no rank wrote elements 0 to 10 of 35"),
        (other_dtype, 2, "weight of 'embed.weight'"),
        (two_dimensions, 2, "a fragment is one-dimensional and on the CPU"),
        (complex_numbers, 2, "a tensor of torch.complex64 cannot be saved"),
    ],
)
def test_fragments_that_do_not_make_whole_tensors_are_refused(
    tmp_path: Path, wrong: Any, world: int, message: str
) -> None:
    ranks = engines(world)
    save(tmp_path, ranks, step=1)
    last = ranks[-1]
    good = last.fragments

    def bad() -> Iterator[Fragment]:
        for f in good():
            yield from wrong(f) if (f.name, f.kind) == ("embed.weight", "weight") else [f]

    last.fragments = bad  # type: ignore[method-assign]
    results = on_all(ranks, lambda e: store(tmp_path).save(e, step=2, state=STATE))
    check_failed_save(tmp_path, ranks, results, message)


def test_two_ranks_that_write_the_same_elements_are_refused(tmp_path: Path) -> None:
    ranks = engines(2)
    save(tmp_path, ranks, step=1)
    ranks[1].share = ranks[0].share  # type: ignore[method-assign]
    results = on_all(ranks, lambda e: store(tmp_path).save(e, step=2, state=STATE))
    check_failed_save(tmp_path, ranks, results, "exp_avg of 'body.bias': elements 0 to 0 were written twice")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, torch.zeros(1)])
def test_state_that_is_no_json_is_refused(tmp_path: Path, value: Any) -> None:
    ranks = engines(2)
    save(tmp_path, ranks, step=1)
    results = on_all(ranks, lambda e: store(tmp_path).save(e, step=2, state={"best": value}))
    check_failed_save(tmp_path, ranks, results, "cannot be saved as JSON")


def test_ranks_that_disagree_on_scalars_are_refused(tmp_path: Path) -> None:
    ranks = engines(2)
    save(tmp_path, ranks, step=1)
    ranks[1].optimizer_steps = 5
    results = on_all(ranks, lambda e: store(tmp_path).save(e, step=2, state=STATE))
    check_failed_save(tmp_path, ranks, results, "ranks 0 and 1 disagree on the scalars")


def test_a_host_that_does_not_see_the_folder_is_told_so(tmp_path: Path) -> None:
    ranks = engines(2)
    for engine in ranks:
        (tmp_path / str(engine.rank)).mkdir()
    results = on_all(ranks, lambda e: store(tmp_path / str(e.rank)).save(e, step=2, state=STATE))
    assert [type(r) for r in results] == [CheckpointError] * 2
    assert "do all hosts see the run's folder at the same path?" in str(results[0])
    assert list(tmp_path.glob("*/*")) == []


# ---- the manifest and the files are checked, not trusted --------------------------------------------------------


def tamper(path: Path, what: str) -> None:
    tree = json.loads((path / MANIFEST).read_text())["manifest"]
    tensors, files = tree["tensors"], tree["files"]
    first = next(t for t in tensors if t["name"] == "embed.weight" and t["kind"] == "weight")
    name = next(iter(files))
    if what == "a path":
        files["../../" + name] = files.pop(name)
    elif what == "an absolute path":
        first["pieces"] = [["/etc/passwd", 0, 35]]
    elif what == "an unknown file":
        first["pieces"] = [["r00009-000.safetensors", 0, 35]]
    elif what == "a huge shape":
        first["shape"] = [2**40, 2**20]
        first["pieces"] = [[name, 0, 2**60]]
    elif what == "a negative start":
        first["pieces"] = [[name, -1, 36]]
    elif what == "a float":
        first["pieces"] = [[name, 0, 35.0]]
    elif what == "an unknown dtype":
        first["dtype"] = "PICKLE"
    elif what == "another dtype":
        first["dtype"] = "I32"
    elif what == "a tensor twice":
        tensors.append(first)
    elif what == "an extra key":
        tree["reduce"] = "os.system"
    elif what == "a newer format":
        tree["format"] = 2
    elif what == "no files":
        del tree["files"]
    else:
        assert what == "another place"
        moved = next(t for t in tensors if t["name"] == "embed.weight" and t["kind"] == "exp_avg")
        moved["name"], first["name"] = "body.weight", "embed.weight"
        tensors[:] = [t for t in tensors if (t["name"], t["kind"]) != ("body.weight", "exp_avg")] + [moved]
    body = json.dumps(tree, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    (path / MANIFEST).write_text(f'{{"sha256": "{digest}", "manifest":\n{body}\n}}\n')


def read_all(path: Path) -> None:
    reader = Reader(path)
    for kind in reader.kinds():
        for name in reader.names(kind):
            list(reader.stream(name, kind))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a path", "manifest.json is not valid: files"),
        ("an absolute path", "manifest.json is not valid: tensors"),
        ("an unknown file", "r00009-000.safetensors holds fragments and is not among the files"),
        ("a huge shape", "bytes, its fragments would take"),
        ("a negative start", "manifest.json is not valid: tensors"),
        ("a float", "manifest.json is not valid: tensors"),
        ("an unknown dtype", "unknown dtype 'PICKLE'"),
        ("another dtype", "are not where the manifest says"),
        ("a tensor twice", "is listed twice"),
        ("an extra key", "manifest.json is not valid: reduce"),
        ("a newer format", "is of format 2; this version reads 1"),
        ("no files", "manifest.json is not valid: files"),
        ("another place", "of exp_avg of 'body.weight' are not where the manifest says"),
    ],
)
def test_a_manifest_that_was_made_up_is_refused(tmp_path: Path, what: str, message: str) -> None:
    path = save(tmp_path, engines(1))
    tamper(path, what)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_all(path)
    assert str(path) in str(caught.value)


def test_a_checkpoint_in_the_wrong_folder_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, engines(1))
    other = path.rename(tmp_path / "step-00000004")
    assert faults(other) == [f"{other}/manifest.json is of step 3, its folder's name says 4"]
    assert faults(other.rename(tmp_path / "copied-elsewhere")) == []


def test_a_file_of_another_size_is_told_by_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without reading what may be very much."""
    path = save(tmp_path, engines(1))
    file = path / "r00000-000.safetensors"
    size = file.stat().st_size
    os.truncate(file, 2**40)
    monkeypatch.setattr(tensorfile, "sha256", lambda path: pytest.fail("it was read"))
    wanted = f"{file} has {2**40} bytes, the manifest says {size}: cut or replaced"
    assert faults(path) == [wanted]
    with pytest.raises(CheckpointError, match=re.escape(wanted)):
        Reader(path).read("scale", "weight", 0, 1)


def test_a_file_that_is_no_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, engines(1))
    (path / "r00000-000.safetensors").unlink()
    os.mkfifo(path / "r00000-000.safetensors")
    assert faults(path) == [f"{path}/r00000-000.safetensors is missing or no file"]
    (path / MANIFEST).unlink()
    os.mkfifo(path / MANIFEST)
    assert faults(path) == [f"{path}/manifest.json is damaged: its content and its SHA-256 disagree"]


# ---- records of runs --------------------------------------------------------------------------------------------


def test_differences_name_every_leaf() -> None:
    a = {"order": {"seed": 1, "mix": [1, 2], "name": "x"}, "only": None}
    b = {"order": {"seed": 2, "mix": [1, 3], "name": "x"}, "extra": 4}
    assert differences(a, b) == [
        "extra: null then, 4 now",
        "order.mix[1]: 2 then, 3 now",
        "order.seed: 1 then, 2 now",
    ]
    assert differences([1], [1, 2]) == ["value: [1] then, [1, 2] now"]
    assert differences(a, json.loads(json.dumps(a))) == []
    same_run({"shape": (1, 2)}, {"shape": [1, 2]}, where="x")
    with pytest.raises(CheckpointError, match=r"step-3 belongs to another run: extra: null then, 4 now; order\.mix"):
        same_run(a, b, where="step-3")


def test_keep_below_two_is_refused() -> None:
    with pytest.raises(ValidationError):
        CheckpointConfig(keep=1)


# ---- the parts --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(list(tensorfile.DTYPES)), st.lists(st.integers(0, 4), max_size=3)), max_size=6),
    st.integers(1, 64),
)
def test_our_files_are_what_the_library_reads_and_the_other_way_round(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[tuple[str, list[int]]], chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("files")
    generator = torch.Generator().manual_seed(chunk)
    tensors = {}
    for i, (dtype, shape) in enumerate(kinds):
        values = torch.randint(0, 100, shape, generator=generator)
        tensors[f"name {i} é"] = values.to(tensorfile.DTYPES[dtype])
    tensorfile.write(
        folder / "ours",
        [Outgoing(k, t.dtype, tuple(t.shape), list(t.reshape(-1).split(chunk))) for k, t in tensors.items()],
        metadata={"format": "pt"},
    )
    theirs = safetensors.torch.load_file(folder / "ours")
    safetensors.torch.save_file(tensors, folder / "theirs", metadata={"format": "pt"})
    assert theirs.keys() == tensors.keys()
    for file in ("ours", "theirs"):
        header = tensorfile.read_header(folder / file)
        assert header.keys() == tensors.keys()
        for key, tensor in tensors.items():
            assert header[key].dtype == tensor.dtype
            assert header[key].shape == tuple(tensor.shape)
            assert torch.equal(theirs[key], tensor)
            assert theirs[key].dtype == tensor.dtype
            out = torch.empty(tensor.numel(), dtype=tensor.dtype)
            tensorfile.read_into(folder / file, header[key], out, start=0)
            assert torch.equal(out, tensor.reshape(-1))


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',
        b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}',
        b'{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "X", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, '
        b'"b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_a_made_up_header_is_refused(tmp_path: Path, header: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"12345678")
    with pytest.raises(CheckpointError, match=r"x.safetensors: no safetensors file"):
        tensorfile.read_header(path)


@pytest.mark.parametrize("raw", [b"", b"123", b"\xff" * 8, b"\xff" * 20])
def test_a_header_of_impossible_length_is_refused(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"x.safetensors: no safetensors file: a header of"):
        tensorfile.read_header(path)


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    tensorfile.write(path, [Outgoing("a", torch.float32, (10,), [torch.arange(10.0)])])
    stored = tensorfile.read_header(path)["a"]
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 4)
    with pytest.raises(CheckpointError, match=r"x.safetensors: ends 4 bytes too early"):
        tensorfile.read_into(path, stored, torch.empty(10), start=0)


def test_texts_are_shared_among_ranks() -> None:
    texts = ["", "two: é", "x" * 3000, "a\0b"]
    found = on_all(engines(4), lambda e: words.share(e, texts[e.rank]))
    assert found == [["", "two: é", "x" * 2000, "a?b"]] * 4
    assert on_all(engines(3), lambda e: words.share(e, "")) == [[""] * 3] * 3
    assert on_all(engines(3), lambda e: words.tell(e, (e.rank + 2**50, 7))) == [(2**50, 7)] * 3


def test_the_reader_is_what_the_protocol_asks_for(tmp_path: Path) -> None:
    reader: FragmentReader = Reader(save(tmp_path, engines(1)))
    assert reader.has("scale", "weight")
    assert reader.shape("scale", "weight") == ()
    assert reader.read("scale", "weight", 0, 1).shape == (1,)


def test_a_world_of_more_ranks_than_elements(tmp_path: Path) -> None:
    meeting = World(3)
    ranks = []
    for r in range(3):
        model = nn.Module()
        model.one = nn.Parameter(torch.tensor([4.0]))
        model.none = nn.Parameter(torch.empty(0, 3))
        ranks.append(FakeEngine(model, rank=r, world=meeting))
    for engine in ranks:
        give = engine.fragments

        def all_of_them(e: FakeEngine = engine, g: Any = give) -> Iterator[Fragment]:
            yield from g()
            yield Fragment("none", "weight", (0, 3), 0, torch.empty(0))

        engine.fragments = all_of_them  # type: ignore[method-assign]
    manifest = verify(save(tmp_path, ranks))
    assert manifest.shapes("weight") == {"one": (1,), "none": (0, 3)}
