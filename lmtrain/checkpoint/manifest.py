"""The manifest of a checkpoint: which files it has, where every element of every tensor lies, and the scalars.

`manifest.json` seals itself: its first line holds the SHA-256 of the rest, so that a flipped bit in a scalar shows as
well as one in a tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, model_validator

from lmtrain.checkpoint.tensorfile import DTYPES
from lmtrain.errors import CheckpointError

FORMAT = 1
MANIFEST = "manifest.json"
_HEAD = '{{"sha256": "{}", "manifest":\n'
_TAIL = "\n}\n"
_LARGEST = 2**30

Natural = Annotated[StrictInt, Field(ge=0, lt=2**63)]
FileName = Annotated[str, Field(pattern=r"^r[0-9]{5,9}-[0-9]{3,9}\.safetensors$")]
"""A plain name: nothing in a manifest can point out of its folder."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileRecord(_Record):
    """A file of fragments."""

    bytes: Natural
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TensorRecord(_Record):
    """One tensor of one kind; `pieces` are (file, start, numel), ascending, without gap or overlap."""

    name: Annotated[str, Field(min_length=1)]
    kind: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]
    dtype: str
    shape: tuple[Natural, ...]
    pieces: tuple[tuple[FileName, Natural, Natural], ...]

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @model_validator(mode="after")
    def _covered_once(self) -> TensorRecord:
        what = f"{self.kind} of {self.name!r}"
        if self.dtype not in DTYPES:
            raise ValueError(f"{what} has the unknown dtype {self.dtype!r}")
        at = 0
        for file, start, numel in self.pieces:
            if start > at:
                raise ValueError(f"{what}: no rank wrote elements {at} to {start - 1} of {self.numel}")
            if start < at:
                raise ValueError(f"{what}: elements {start} to {at - 1} were written twice, again in {file}")
            at += numel
        if at != self.numel:
            raise ValueError(f"{what}: {at} of {self.numel} elements were written")
        return self


class Manifest(_Record):
    """All that is known of a checkpoint besides the tensors' values.

    scalars: the engine's own. state: the caller's. made_by: world size, threads, versions: what bit-equality needs.
    """

    format: StrictInt
    step: Natural
    best: bool
    files: dict[FileName, FileRecord]
    tensors: tuple[TensorRecord, ...]
    scalars: dict[str, Any]
    state: dict[str, Any]
    made_by: dict[str, Any]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        held: Counter[str] = Counter()
        seen = set()
        for tensor in self.tensors:
            if (tensor.name, tensor.kind) in seen:
                raise ValueError(f"{tensor.kind} of {tensor.name!r} is listed twice")
            seen.add((tensor.name, tensor.kind))
            for file, _, numel in tensor.pieces:
                held[file] += numel * DTYPES[tensor.dtype].itemsize
        for file, size in held.items():
            if file not in self.files:
                raise ValueError(f"{file} holds fragments and is not among the files")
            if size > self.files[file].bytes:
                raise ValueError(f"{file} has {self.files[file].bytes} bytes, its fragments would take {size}")
        return self

    @property
    def bytes(self) -> int:
        """Size of all fragment files."""
        return sum(file.bytes for file in self.files.values())

    def shapes(self, kind: str) -> dict[str, tuple[int, ...]]:
        """Name -> full shape of all tensors of a kind."""
        return {t.name: t.shape for t in self.tensors if t.kind == kind}


def canonical(value: Any, *, where: str) -> str:
    """JSON with sorted keys; CheckpointError for what JSON has no word for (NaN, infinity, objects)."""
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where} cannot be saved as JSON: {error}; use numbers, texts, lists, null") from None


def seal(manifest: Manifest) -> bytes:
    """The bytes of manifest.json."""
    return _wrap(canonical(manifest.model_dump(mode="json"), where="the manifest"))


def _wrap(body: str) -> bytes:
    return (_HEAD.format(hashlib.sha256(body.encode()).hexdigest()) + body + _TAIL).encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint folder, its seal and every number in it checked.

    Raises CheckpointError naming the file: missing, damaged, of a newer format, of another step than the folder's name.
    """
    path = folder / MANIFEST
    try:
        size = path.stat().st_size
        raw = path.read_bytes() if path.is_file() and size <= _LARGEST else b""
    except FileNotFoundError:
        problem = "is missing: no whole checkpoint" if folder.is_dir() else "is missing: there is no such checkpoint"
        raise CheckpointError(f"{path} {problem}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    try:
        text = raw.decode()
        body = text[len(_HEAD.format("0" * 64)) : -len(_TAIL)]
        if _wrap(body) != raw:
            raise ValueError
        tree = json.loads(body)
    except (ValueError, RecursionError):
        raise CheckpointError(f"{path} is damaged: its content and its SHA-256 disagree") from None
    found = tree.get("format") if isinstance(tree, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path} is of format {found!r}; this version reads {FORMAT}: use the one that wrote it")
    try:
        manifest = Manifest.model_validate_json(body)
    except ValidationError as error:
        raise CheckpointError(f"{path} is not valid: {explain(error)}") from None
    match = re.match(r"step-([0-9]+)", folder.name)
    if match and int(match[1]) != manifest.step:
        raise CheckpointError(f"{path} is of step {manifest.step}, its folder's name says {int(match[1])}")
    return manifest


def explain(error: ValidationError) -> str:
    """The first fault of a validation, in one line."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    message = str(first["msg"]).removeprefix("Value error, ")
    return f"{place}: {message}" if place else message


def differences(recorded: Any, present: Any, *, at: str = "") -> list[str]:
    """`a.b: 3 then, 4 now` for every leaf in which two JSON values differ."""
    if isinstance(recorded, Mapping) and isinstance(present, Mapping):
        found = []
        for key in sorted({*recorded, *present}, key=str):
            found += differences(recorded.get(key), present.get(key), at=f"{at}.{key}" if at else str(key))
        return found
    if isinstance(recorded, list | tuple) and isinstance(present, list | tuple) and len(recorded) == len(present):
        pairs = enumerate(zip(recorded, present, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, at=f"{at}[{i}]")]
    if recorded == present:
        return []
    return [f"{at or 'value'}: {_short(recorded)} then, {_short(present)} now"]


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def same_run(recorded: Any, present: Any, *, where: str) -> None:
    """CheckpointError that names every difference between what a checkpoint recorded of its run and the present run."""
    found = differences(recorded, present)
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise CheckpointError(
            f"{where} belongs to another run: {'; '.join(found[:5])}{more}. Restore these settings, or start a new run"
        )
