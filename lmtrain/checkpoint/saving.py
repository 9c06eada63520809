"""Writing one checkpoint: every rank its fragments, rank 0 the manifest last, all of it aside and fsynced."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from lmtrain.checkpoint import tensorfile
from lmtrain.checkpoint.manifest import FORMAT, MANIFEST, FileRecord, Manifest, TensorRecord, canonical, explain, seal
from lmtrain.checkpoint.reader import WEIGHT, fragment_key, full_shape
from lmtrain.checkpoint.tensorfile import Outgoing
from lmtrain.errors import CheckpointError
from lmtrain.protocol import Engine, Fragment


def write_share(engine: Engine, folder: Path, *, file_bytes: int, state: Mapping[str, Any]) -> None:
    """Write this rank's fragments, and the list of them for rank 0. No collective; raises CheckpointError, OSError."""
    need_folder(folder)
    files: dict[str, dict[str, Any]] = {}
    lines: list[list[Any]] = []
    for number, fragments in enumerate(divide(engine.fragments(), file_bytes)):
        name = file_name(engine.rank, number)
        size, digest = tensorfile.write(folder / name, outgoing(fragments))
        files[name] = {"bytes": size, "sha256": digest}
        lines += [line(fragment, name) for fragment in fragments]
    tree = {"files": files, "fragments": lines, "scalars": engine.scalars(), "state": state}
    (folder / list_name(engine.rank)).write_text(canonical(tree, where="the state"), encoding="utf-8")


def need_folder(folder: Path) -> None:
    """CheckpointError when this host does not see the folder that rank 0 made."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not there; do all hosts see the run's folder at the same path?")


def divide(fragments: Iterable[Fragment], file_bytes: int) -> Iterator[list[Fragment]]:
    """The fragments in lists, one a file: at most `file_bytes` bytes of tensors, a larger fragment cut in several.

    They wait until they fill a file; empty ones that no other rank owns are left out. Raises CheckpointError.
    """
    waiting: list[Fragment] = []
    room = file_bytes
    for whole in fragments:
        _check(whole)
        if whole.tensor.numel() == 0 and whole.shape != () and 0 not in whole.shape:
            continue
        for part in _cut(whole, file_bytes):
            if waiting and part.tensor.nbytes > room:
                yield waiting
                waiting, room = [], file_bytes
            waiting.append(part)
            room -= part.tensor.nbytes
    if waiting:
        yield waiting


def _cut(whole: Fragment, file_bytes: int) -> Iterator[Fragment]:
    step = max(1, file_bytes // whole.tensor.itemsize)
    for at in range(0, max(1, whole.tensor.numel()), step):
        yield replace(whole, start=whole.start + at, tensor=whole.tensor[at : at + step])


def _check(fragment: Fragment) -> None:
    tensor, what = fragment.tensor, f"{fragment.kind} of {fragment.name!r}"
    if tensor.dim() != 1 or tensor.device.type != "cpu":
        raise CheckpointError(
            f"{what}: a fragment is one-dimensional and on the CPU, not {tensor.shape} {tensor.device}"
        )


def line(fragment: Fragment, file: str) -> list[Any]:
    """A fragment in the list of its rank: all but its values."""
    dtype = tensorfile.dtype_name(fragment.tensor.dtype)
    return [fragment.name, fragment.kind, dtype, list(fragment.shape), file, fragment.start, fragment.tensor.numel()]


def outgoing(fragments: list[Fragment]) -> list[Outgoing]:
    """What a file of fragments is written from; CheckpointError when one of them is there twice."""
    out = {}
    for f in fragments:
        key = fragment_key(f.name, f.kind, f.start)
        if key in out:
            raise CheckpointError(f"{f.kind} of {f.name!r}: the engine gave the fragment at {f.start} twice")
        out[key] = Outgoing(key, f.tensor.dtype, (f.tensor.numel(),), (f.tensor,))
    return list(out.values())


def file_name(rank: int, number: int) -> str:
    """A rank's file of fragments."""
    return f"r{rank:05d}-{number:03d}.safetensors"


def list_name(rank: int) -> str:
    """Where a rank tells rank 0 what it wrote: {files, fragments, scalars, state}."""
    return f"r{rank:05d}.json"


def write_manifest(engine: Engine, folder: Path, *, step: int, best: bool) -> Manifest:
    """Rank 0, after all ranks have written: prove that every element of every tensor was written once, then say so.

    Scalars and state are those of the lists: the engine may have gone on since.
    Raises CheckpointError naming what is missing, doubled or contradictory.
    """
    files: dict[str, FileRecord] = {}
    pieces: dict[tuple[str, str, str, tuple[int, ...]], list[tuple[str, int, int]]] = {}
    lists = [folder / list_name(rank) for rank in range(engine.world)]
    said: str | None = None
    for rank, path in enumerate(lists):
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"rank {rank} wrote its fragments where rank 0 cannot see them (no {path}); "
                "the run's folder must be on a file system that all hosts share"
            ) from None
        files |= {name: FileRecord(**record) for name, record in tree["files"].items()}
        for name, kind, dtype, shape, file, start, numel in tree["fragments"]:
            found = pieces.setdefault((name, kind, dtype, tuple(shape)), [])
            if numel:
                found.append((file, start, numel))
        mine = canonical([tree["scalars"], tree["state"]], where="the state")
        if said is not None and mine != said:
            raise CheckpointError(f"ranks 0 and {rank} disagree on the scalars to save: {said} and {mine}")
        said = mine
    try:
        manifest = Manifest(
            format=FORMAT,
            step=step,
            best=best,
            files=files,
            tensors=tuple(
                TensorRecord(name=name, kind=kind, dtype=dtype, shape=shape, pieces=tuple(sorted(found, key=_place)))
                for (name, kind, dtype, shape), found in sorted(pieces.items())
            ),
            scalars=tree["scalars"],
            state=tree["state"],
            made_by=made_by(engine),
        )
    except ValidationError as error:
        raise CheckpointError(f"the fragments do not make whole tensors: {explain(error)}") from None
    _check_complete(engine, manifest)
    with (folder / MANIFEST).open("xb") as file:
        file.write(seal(manifest))
        file.flush()
        os.fsync(file.fileno())
    for path in lists:
        path.unlink()
    sync_folder(folder)
    return manifest


def _place(piece: tuple[str, int, int]) -> tuple[int, int]:
    return piece[1], piece[2]


def _check_complete(engine: Engine, manifest: Manifest) -> None:
    """What no rank gave must not be found out at the next resume."""
    wanted = {name: full_shape(p) for name, p in engine.model.named_parameters()}
    saved = manifest.shapes(WEIGHT)
    missing = sorted(set(wanted) - set(saved))
    if missing:
        raise CheckpointError(f"no rank gave the weight {missing[0]!r} ({len(missing)} are missing)")
    for name, shape in wanted.items():
        if saved[name] != shape:
            raise CheckpointError(f"the weight {name!r} has shape {list(shape)}, it was given as {list(saved[name])}")


def made_by(engine: Engine) -> dict[str, Any]:
    """What must be equal, besides the run's own settings, for a resumed run to be bit-equal."""
    device = engine.device
    return {
        "world": engine.world,
        "engine": type(engine).__name__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "deepspeed": _version("deepspeed"),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
