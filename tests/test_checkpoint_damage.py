"""Bit flips, truncations, missing and swapped files: each is found, named, and an older checkpoint is taken."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from lmtrain.checkpoint import CheckpointConfig, Checkpoints, Reader, faults
from lmtrain.checkpoint.manifest import MANIFEST
from lmtrain.errors import CheckpointError
from tests.fake_ranks import engines, on_all

CASES = 320


def flip(rng: random.Random, files: list[Path], older: Path) -> set[str]:
    path = rng.choice(files)
    raw = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(raw))
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)
    return {path.name}


def flip_in_the_manifest(rng: random.Random, files: list[Path], older: Path) -> set[str]:
    return flip(rng, [path for path in files if path.name == MANIFEST], older)


def cut(rng: random.Random, files: list[Path], older: Path) -> set[str]:
    path = rng.choice(files)
    raw = path.read_bytes()
    path.write_bytes(raw[: rng.randrange(len(raw))])
    return {path.name}


def lengthen(rng: random.Random, files: list[Path], older: Path) -> set[str]:
    path = rng.choice(files)
    path.write_bytes(path.read_bytes() + bytes(rng.randrange(1, 9)))
    return {path.name}


def zero(rng: random.Random, files: list[Path], older: Path) -> set[str]:
    """A block that a file system lost."""
    path = rng.choice(files)
    raw = bytearray(path.read_bytes())
    at = rng.randrange(len(raw) - 64)
    while not any(raw[at : at + 64]):
        at = rng.randrange(len(raw) - 64)
    raw[at : at + 64] = bytes(64)
    path.write_bytes(raw)
    return {path.name}


def lose(rng: random.Random, files: list[Path], older: Path) -> set[str]:
    path = rng.choice(files)
    path.unlink()
    return {path.name}


def swap(rng: random.Random, files: list[Path], older: Path) -> set[str]:
    one, other = rng.sample([path for path in files if path.name != MANIFEST], 2)
    a, b = one.read_bytes(), other.read_bytes()
    one.write_bytes(b)
    other.write_bytes(a)
    return {one.name, other.name}


def take_from_older(rng: random.Random, files: list[Path], older: Path) -> set[str]:
    path = rng.choice(files)
    path.write_bytes((older / path.name).read_bytes())
    return {path.name}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of three ranks, of unequal contents."""
    folder = tmp_path_factory.mktemp("checkpoints")
    ranks = engines(3)
    for step in (1, 2):
        for engine in ranks:
            engine.advance(step)
        on_all(ranks, lambda e, s=step: Checkpoints(folder, CheckpointConfig()).save(e, step=s, state={"at": s}))
    return folder


def test_every_damage_is_found_and_named_and_the_older_one_is_taken(folder: Path) -> None:
    kinds = (flip, flip_in_the_manifest, flip, cut, lengthen, zero, lose, swap, take_from_older, flip)
    rng = random.Random(20)
    newer, older = folder / "step-00000002", folder / "step-00000001"
    content = {path: path.read_bytes() for path in newer.iterdir()}
    assert len(content) == 4
    missed = []
    for case in range(CASES):
        damage = kinds[case % len(kinds)]
        hurt = damage(rng, sorted(content), older)
        found = faults(newer)
        named = {path.name for path in content if any(str(path) in line for line in found)}
        notes: list[str] = []
        taken = Checkpoints(folder, CheckpointConfig(), note=notes.append).newest()
        reported = len(notes) == 1 and any(f"{newer.name}/{name}" in notes[0] for name in hurt)
        if named != hurt or not reported or taken is None or taken.step != 1:
            missed.append((case, damage.__name__, hurt, found, notes, taken))
        if not _reading_fails(newer, hurt):
            missed.append((case, damage.__name__, hurt, "read without complaint"))
        for path, raw in content.items():
            path.write_bytes(raw)
    assert missed == []
    assert faults(newer) == []


def _reading_fails(path: Path, hurt: set[str]) -> bool:
    """Whether a lazy reader refuses, naming a hurt file, before it gives any element of it away."""
    try:
        reader = Reader(path)
    except CheckpointError as error:
        return MANIFEST in hurt and MANIFEST in str(error)
    refused = True
    for record in reader.manifest.tensors:
        if not {file for file, _, _ in record.pieces} & hurt:
            reader.read(record.name, record.kind, 0, record.numel)
            continue
        try:
            reader.read(record.name, record.kind, 0, record.numel)
            refused = False
        except CheckpointError as error:
            refused &= any(name in str(error) for name in hurt)
    return refused


def test_damage_is_seen_by_all_ranks_of_a_resume(folder: Path, tmp_path: Path) -> None:
    rng = random.Random(3)
    for case in range(12):
        copy = tmp_path / str(case)
        shutil.copytree(folder, copy)
        hurt = (flip, cut, lose, swap)[case % 4](rng, sorted((copy / "step-00000002").iterdir()), copy)
        notes: list[str] = []

        def resume(engine: object, at: Path = copy, told: list[str] = notes) -> object:
            return Checkpoints(at, CheckpointConfig(), note=told.append).restore(engine)  # type: ignore[arg-type]

        found = on_all(engines(2), resume)
        assert found == [(1, {"at": 1})] * 2
        assert any(name in notes[0] for name in hurt)
