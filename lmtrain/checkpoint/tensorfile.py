"""safetensors files written and read as streams: never more of a tensor in memory than one piece of it.

Format: eight bytes (the header's length, little-endian), a JSON header {key: {dtype, shape, data_offsets}}, then the
tensors' bytes without gaps. Source: the format's specification, https://github.com/huggingface/safetensors.
The library itself writes only what is whole in memory and maps what it reads; a file truncated under a map kills the
process, here it is an error that names the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmtrain.errors import CheckpointError

CHUNK = 16 * 2**20
"""Bytes read or written at a time."""

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100 * 2**20


def dtype_name(dtype: torch.dtype) -> str:
    """The format's name of a dtype; CheckpointError for one that it has no name for."""
    if dtype not in _NAMES:
        raise CheckpointError(f"a tensor of {dtype} cannot be saved; wanted one of {', '.join(map(str, _NAMES))}")
    return _NAMES[dtype]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A tensor to write: `pieces` are CPU tensors of `dtype` whose elements in order are the tensor's."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[Tensor]

    @property
    def bytes(self) -> int:
        """Length of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies: `offset` counts from the file's beginning."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


def head(tensors: Sequence[Outgoing], *, metadata: Mapping[str, str] | None = None) -> tuple[list[Outgoing], bytes]:
    """(the tensors in the order in which they lie in a file, all that stands before them in it).

    Wider dtypes come first, so that every tensor is aligned. Their pieces are not looked at.
    """
    ordered = sorted(tensors, key=lambda t: (-t.dtype.itemsize, t.key))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for tensor in ordered:
        assert tensor.key not in header, f"two tensors of one key {tensor.key!r}"
        begin, end = end, end + tensor.bytes
        header[tensor.key] = {
            "dtype": dtype_name(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return ordered, struct.pack("<Q", len(text)) + text


def write(path: Path, tensors: Sequence[Outgoing], *, metadata: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Write a new file, fsynced; returns (bytes, SHA-256 of what was meant to be written).

    Raises OSError (FileExistsError, no space, ...).
    """
    ordered, before = head(tensors, metadata=metadata)
    digest = hashlib.sha256()
    written = 0
    with path.open("xb") as file:

        def put(data: bytes | memoryview) -> None:
            nonlocal written
            digest.update(data)
            file.write(data)
            written += len(data)

        put(before)
        for tensor in ordered:
            begin = written
            for piece in tensor.pieces:
                assert piece.dtype == tensor.dtype, f"{tensor.key}: a piece of {piece.dtype}, not {tensor.dtype}"
                data = _raw(piece)
                for at in range(0, len(data), CHUNK):
                    put(data[at : at + CHUNK])
            assert written - begin == tensor.bytes, f"{tensor.key}: {written - begin} bytes, not {tensor.bytes}"
        file.flush()
        os.fsync(file.fileno())
    return written, digest.hexdigest()


def _raw(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def read_header(path: Path) -> dict[str, Stored]:
    """What a file holds. Every number in it is checked, so that reading it later cannot leave the file.

    Raises CheckpointError naming the file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, _LONGEST_HEADER):
                raise CheckpointError(f"{path}: no safetensors file: a header of {length} bytes in a file of {size}")
            tree = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path}: no safetensors file: its header is not JSON") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: no safetensors file: its header is no mapping")
    tree.pop("__metadata__", None)
    spans = []
    found = {}
    for key, entry in tree.items():
        stored, begin, end = _entry(path, key, entry)
        found[key] = Stored(stored.dtype, stored.shape, 8 + length + begin)
        spans.append((begin, end))
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            raise CheckpointError(f"{path}: no safetensors file: its tensors leave a gap or overlap at byte {at}")
        at = end
    if at != size - 8 - length:
        raise CheckpointError(f"{path}: no safetensors file: {at} bytes of tensors in {size - 8 - length} bytes")
    return found


def _entry(path: Path, key: str, entry: Any) -> tuple[Stored, int, int]:
    def natural(value: Any) -> bool:
        return type(value) is int and value >= 0

    if isinstance(entry, dict) and set(entry) == {"dtype", "shape", "data_offsets"}:
        dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
        if (
            isinstance(dtype, str)
            and dtype in DTYPES
            and isinstance(shape, list)
            and all(natural(n) for n in shape)
            and isinstance(span, list)
            and len(span) == 2
            and all(natural(n) for n in span)
            and span[1] - span[0] == math.prod(shape) * DTYPES[dtype].itemsize
        ):
            return Stored(DTYPES[dtype], tuple(shape), 0), span[0], span[1]
    raise CheckpointError(f"{path}: no safetensors file: the header's entry {key!r} is not valid")


def read_into(path: Path, stored: Stored, out: Tensor, *, start: int) -> None:
    """Fill `out` (one-dimensional, contiguous, on the CPU) with elements [start, start + numel) of a stored tensor.

    Raises CheckpointError naming the file when it is unreadable or ends too early.
    """
    assert out.dtype == stored.dtype
    assert out.dim() == 1
    assert out.is_contiguous()
    assert 0 <= start <= start + out.numel() <= math.prod(stored.shape)
    view = out.view(torch.uint8).numpy().data
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(stored.offset + start * out.dtype.itemsize)
            at = 0
            while at < len(view):
                got = file.readinto(view[at : at + CHUNK])
                if not got:
                    raise CheckpointError(f"{path}: ends {len(view) - at} bytes too early; the file was cut")
                at += got
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def chunks(numel: int, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """(start, numel) of the pieces of CHUNK bytes that a tensor of `numel` elements is copied by."""
    step = CHUNK // dtype.itemsize
    for start in range(0, numel, step):
        yield start, min(step, numel - start)


def sha256(path: Path) -> str:
    """SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
