"""Writing one checkpoint: every rank its fragments, rank 0 the manifest last, all of it aside and fsynced."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
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
    """Write this rank's fragments, and the list of them for rank 0. No collective; raises CheckpointError, OSError.

    Fragments wait in memory until they fill a file of `file_bytes`.
    """
    files: dict[str, dict[str, Any]] = {}
    lines: list[list[Any]] = []
    waiting: list[Fragment] = []
    size = 0

    def flush() -> None:
        nonlocal size
        if waiting:
            name = f"r{engine.rank:05d}-{len(files):03d}.safetensors"
            files[name] = _write_file(folder / name, waiting)
            lines.extend(_line(fragment, name) for fragment in waiting)
        waiting.clear()
        size = 0

    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not there; do all hosts see the run's folder at the same path?")
    for fragment in engine.fragments():
        _check(fragment)
        if fragment.tensor.numel() == 0 and fragment.shape != () and 0 not in fragment.shape:
            continue
        waiting.append(fragment)
        size += fragment.tensor.nbytes
        if size >= file_bytes:
            flush()
    flush()
    tree = {"files": files, "fragments": lines, "scalars": engine.scalars(), "state": state}
    (folder / _list_name(engine.rank)).write_text(canonical(tree, where="the state"), encoding="utf-8")


def _check(fragment: Fragment) -> None:
    tensor, what = fragment.tensor, f"{fragment.kind} of {fragment.name!r}"
    if tensor.dim() != 1 or tensor.device.type != "cpu":
        raise CheckpointError(
            f"{what}: a fragment is one-dimensional and on the CPU, not {tensor.shape} {tensor.device}"
        )


def _line(fragment: Fragment, file: str) -> list[Any]:
    dtype = tensorfile.dtype_name(fragment.tensor.dtype)
    return [fragment.name, fragment.kind, dtype, list(fragment.shape), file, fragment.start, fragment.tensor.numel()]


def _write_file(path: Path, fragments: list[Fragment]) -> dict[str, Any]:
    out = {}
    for f in fragments:
        key = fragment_key(f.name, f.kind, f.start)
        if key in out:
            raise CheckpointError(f"{f.kind} of {f.name!r}: the engine gave the fragment at {f.start} twice")
        out[key] = Outgoing(key, f.tensor.dtype, (f.tensor.numel(),), (f.tensor,))
    size, digest = tensorfile.write(path, list(out.values()))
    return {"bytes": size, "sha256": digest}


def _list_name(rank: int) -> str:
    return f"r{rank:05d}.json"


def write_manifest(engine: Engine, folder: Path, *, step: int, best: bool, state: Mapping[str, Any]) -> None:
    """Rank 0, after all ranks have written: prove that every element of every tensor was written once, then say so.

    Raises CheckpointError naming what is missing, doubled or contradictory.
    """
    files: dict[str, FileRecord] = {}
    pieces: dict[tuple[str, str, str, tuple[int, ...]], list[tuple[str, int, int]]] = {}
    lists = [folder / _list_name(rank) for rank in range(engine.world)]
    scalars: str | None = None
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
        if scalars is not None and mine != scalars:
            raise CheckpointError(f"ranks 0 and {rank} disagree on the scalars to save: {scalars} and {mine}")
        scalars = mine
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
            scalars=engine.scalars(),
            state=dict(state),
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
