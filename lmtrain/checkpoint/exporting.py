"""A checkpoint's weights as plain safetensors files, without a running engine, a bounded piece at a time."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmtrain.checkpoint import tensorfile
from lmtrain.checkpoint.reader import BUFFER, Reader
from lmtrain.checkpoint.saving import sync_folder
from lmtrain.checkpoint.tensorfile import Outgoing
from lmtrain.errors import CheckpointError
from lmtrain.protocol import Weights

PART_BYTES = 5 * 10**9
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
EXPORT_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(
    path: Path,
    out: Path,
    *,
    config: Mapping[str, Any] | None = None,
    dtype: str = "fp32",
    weights: Weights = "raw",
    part_bytes: int = PART_BYTES,
) -> list[Path]:
    """Write the weights and buffers of the checkpoint `path` into the new folder `out`; returns the files.

    One `model.safetensors`, or, when it would be larger than `part_bytes`, `model-00001-of-0000N.safetensors` and
    `model.safetensors.index.json` (the Hugging Face layout; a tensor is never cut). `config` becomes `config.json`.
    dtype: of floating-point weights, fp32, bf16 or fp16; buffers keep theirs. Tied weights are there once. weights:
    "ema" writes the averaged ones under the same names.
    Raises CheckpointError: damaged files (each is verified before it is read), `out` in use, no space.
    """
    if dtype not in EXPORT_DTYPES:
        raise CheckpointError(f"export to {dtype!r}; wanted one of {', '.join(EXPORT_DTYPES)}")
    if out.exists() and (not out.is_dir() or next(out.iterdir(), None) is not None):
        raise CheckpointError(f"{out} exists and is not an empty folder; give a new one")
    reader = Reader(path)
    kinds = dict.fromkeys(reader.names(BUFFER), BUFFER)
    tensors = [*_tensors(reader, reader.weights(weights), EXPORT_DTYPES[dtype]), *_tensors(reader, kinds, None)]
    parts = _divide(tensors, part_bytes)
    aside = out.parent / f".{out.name}.{secrets.randbits(48):012x}.writing"
    try:
        aside.mkdir(parents=True)
        names = []
        for number, part in enumerate(parts, start=1):
            name = WEIGHTS if len(parts) == 1 else f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            tensorfile.write(aside / name, part, metadata={"format": "pt"})
            names.append(name)
        if len(parts) > 1:
            weight_map = {t.key: name for name, part in zip(names, parts, strict=True) for t in part}
            total = sum(t.bytes for part in parts for t in part)
            _write_json(aside / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
            names.append(INDEX)
        if config is not None:
            _write_json(aside / "config.json", config)
            names.append("config.json")
        sync_folder(aside)
        os.rename(aside, out)
        sync_folder(out.parent)
    except OSError as error:
        raise CheckpointError(f"{out} was not written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return [out / name for name in names]


def _tensors(reader: Reader, kinds: Mapping[str, str], dtype: torch.dtype | None) -> Iterator[Outgoing]:
    for name, kind in kinds.items():
        saved = reader.dtype(name, kind)
        to = dtype if dtype is not None and saved.is_floating_point else saved
        yield Outgoing(name, to, reader.shape(name, kind), _Pieces(reader, name, kind, to))


class _Pieces:
    """The pieces of a saved tensor in another dtype, read when they are asked for."""

    def __init__(self, reader: Reader, name: str, kind: str, dtype: torch.dtype) -> None:
        self._reader, self._name, self._kind, self._dtype = reader, name, kind, dtype

    def __iter__(self) -> Iterator[Tensor]:
        buffer = torch.empty(0, dtype=self._dtype)
        for piece in self._reader.stream(self._name, self._kind):
            if piece.dtype == self._dtype:
                yield piece
                continue
            if buffer.numel() < piece.numel():
                buffer = torch.empty(piece.numel(), dtype=self._dtype)
            yield buffer[: piece.numel()].copy_(piece)


def _divide(tensors: list[Outgoing], part_bytes: int) -> list[list[Outgoing]]:
    """Consecutive parts of at most `part_bytes`; a tensor that is larger has a part of its own."""
    parts: list[list[Outgoing]] = [[]]
    room = part_bytes
    for tensor in tensors:
        if tensor.bytes > room and parts[-1]:
            parts.append([])
            room = part_bytes
        parts[-1].append(tensor)
        room -= tensor.bytes
    return parts


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(tree, indent=2, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be written as JSON: {error}") from None
    with path.open("x", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
