"""Reading a checkpoint, whatever rank, world size and ZeRO stage wrote it: by tensor name and element range."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lmtrain.checkpoint import tensorfile
from lmtrain.checkpoint.manifest import FileRecord, Manifest, TensorRecord, read_manifest
from lmtrain.checkpoint.tensorfile import DTYPES, Stored
from lmtrain.errors import CheckpointError
from lmtrain.protocol import Weights

WEIGHT, BUFFER, AVERAGE = "weight", "buffer", "ema"


def fragment_key(name: str, kind: str, start: int) -> str:
    """The key of a fragment in its safetensors file."""
    return f"{kind}:{start}:{name}"


def check_file(path: Path, record: FileRecord) -> None:
    """CheckpointError naming the file when its size or its SHA-256 is not the recorded one."""
    try:
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise CheckpointError(f"{path} is missing or no file")
        if size != record.bytes:
            raise CheckpointError(f"{path} has {size} bytes, the manifest says {record.bytes}: cut or replaced")
        found = tensorfile.sha256(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    if found != record.sha256:
        raise CheckpointError(f"{path} is damaged: its SHA-256 is {found[:12]}..., wanted {record.sha256[:12]}...")


def faults(path: Path, *, contents: bool = True, part: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with the checkpoint in folder `path`, a line for each file; empty when it verifies.

    contents: read every byte against its hash; otherwise manifest and sizes alone. part: (i, n): hash the i-th of n
    shares of the files, so that ranks can divide the work.
    """
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    found = []
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].bytes, name))
    for i, name in enumerate(by_size):
        record = manifest.files[name]
        try:
            if contents and i % part[1] == part[0]:
                check_file(path / name, record)
            elif not (path / name).is_file() or (path / name).stat().st_size != record.bytes:
                found.append(f"{path / name} is missing, or has not the recorded {record.bytes} bytes")
        except CheckpointError as error:
            found.append(str(error))
        except OSError as error:
            found.append(f"{path / name} cannot be read: {error.strerror or error}")
    return found


def verify(path: Path) -> Manifest:
    """Read every byte of a checkpoint against its hashes; CheckpointError naming the damaged files."""
    found = faults(path)
    if found:
        more = f" (and {len(found) - 3} more files)" if len(found) > 3 else ""
        raise CheckpointError("; ".join(found[:3]) + more)
    return read_manifest(path)


class Reader:
    """A FragmentReader over a checkpoint folder. The manifest is checked at once, a file before its first byte is used.

    verified: the caller has just verified the whole folder; hashes are not computed again.
    Raises CheckpointError naming the file or the tensor.
    """

    def __init__(self, path: Path, *, verified: bool = False) -> None:
        self.path = path
        self.manifest = read_manifest(path)
        self._tensors = {(t.name, t.kind): t for t in self.manifest.tensors}
        self._verified = verified
        self._headers: dict[str, dict[str, Stored]] = {}

    def has(self, name: str, kind: str) -> bool:
        """Whether such a tensor was saved."""
        return (name, kind) in self._tensors

    def shape(self, name: str, kind: str) -> tuple[int, ...]:
        """Its full shape."""
        return self._record(name, kind).shape

    def dtype(self, name: str, kind: str) -> torch.dtype:
        """The dtype it was saved in."""
        return DTYPES[self._record(name, kind).dtype]

    def names(self, kind: str) -> list[str]:
        """All tensors of a kind, sorted."""
        return sorted(t.name for t in self.manifest.tensors if t.kind == kind)

    def kinds(self) -> list[str]:
        """All kinds, sorted."""
        return sorted({t.kind for t in self.manifest.tensors})

    def weights(self, which: Weights) -> dict[str, str]:
        """Name of every weight -> the kind to read for it. "ema": the average, for a frozen parameter its own value.

        Raises CheckpointError when there is no average, or not of every trained parameter.
        """
        names = self.names(WEIGHT)
        if which == "raw":
            return dict.fromkeys(names, WEIGHT)
        averaged = set(self.names(AVERAGE))
        if not averaged:
            raise CheckpointError(
                f"{self.path} has no averaged weights: its run had no optimizer.ema then; use raw weights"
            )
        trained = {t.name for t in self.manifest.tensors if t.kind not in {WEIGHT, BUFFER, AVERAGE}}
        if trained - averaged:
            raise CheckpointError(f"{self.path} has averaged weights, but none of {min(trained - averaged)!r}")
        return {name: AVERAGE if name in averaged else WEIGHT for name in names}

    def read(self, name: str, kind: str, start: int, numel: int) -> Tensor:
        """A one-dimensional CPU tensor of the saved dtype: elements [start, start + numel) of the flattened tensor."""
        record = self._record(name, kind)
        if start < 0 or numel < 0 or start + numel > record.numel:
            raise CheckpointError(
                f"{self.path}: elements {start} to {start + numel - 1} of {kind} of {name!r} were asked for; "
                f"it has {record.numel} (shape {list(record.shape)})"
            )
        out = torch.empty(numel, dtype=DTYPES[record.dtype])
        self._fill(record, start, out)
        return out

    def stream(self, name: str, kind: str) -> Iterator[Tensor]:
        """The whole tensor as consecutive one-dimensional pieces of bounded size; each is overwritten by the next."""
        record = self._record(name, kind)
        buffer = torch.empty(0, dtype=DTYPES[record.dtype])
        for start, numel in tensorfile.chunks(record.numel, buffer.dtype):
            if not start:  # one buffer: an allocator that is given large pieces in turn leaves holes between them
                buffer = torch.empty(numel, dtype=buffer.dtype)
            piece = buffer[:numel]
            self._fill(record, start, piece)
            yield piece

    def _fill(self, record: TensorRecord, start: int, out: Tensor) -> None:
        stop = start + out.numel()
        for file, first, count in record.pieces:
            low, high = max(start, first), min(stop, first + count)
            if low < high:
                stored = self._stored(record, file, first, count)
                tensorfile.read_into(self.path / file, stored, out[low - start : high - start], start=low - first)

    def _record(self, name: str, kind: str) -> TensorRecord:
        record = self._tensors.get((name, kind))
        if record is None:
            names = self.names(kind)
            near = difflib.get_close_matches(name, names, n=1)
            if near:
                hint = f"the nearest name is {near[0]!r}"
            else:
                hint = f"it has {len(names)} of that kind" if names else f"its kinds are {', '.join(self.kinds())}"
            raise CheckpointError(f"{self.path}: no {kind} of {name!r} was saved; {hint}")
        return record

    def _stored(self, record: TensorRecord, file: str, start: int, numel: int) -> Stored:
        """Where a fragment lies, its file verified and its header found to say what the manifest says."""
        if file not in self._headers:
            if not self._verified:
                check_file(self.path / file, self.manifest.files[file])
            self._headers[file] = tensorfile.read_header(self.path / file)
        stored = self._headers[file].get(fragment_key(record.name, record.kind, start))
        if stored is None or stored.dtype != DTYPES[record.dtype] or stored.shape != (numel,):
            raise CheckpointError(
                f"{self.path / file}: elements {start} to {start + numel - 1} of {record.kind} of {record.name!r} "
                "are not where the manifest says"
            )
        return stored


def mismatches(saved: Manifest, model: nn.Module) -> list[str]:
    """A line for every weight and buffer in which a checkpoint and a model differ, by name or shape."""
    weights = {name: full_shape(p) for name, p in model.named_parameters()}
    buffers = {name: tuple(b.shape) for name, b in model.named_buffers()}
    persistent = {name for name in model.state_dict(keep_vars=True) if name in buffers}
    found = _compare(saved.shapes(WEIGHT), weights, set(weights), WEIGHT)
    return found + _compare(saved.shapes(BUFFER), buffers, persistent, BUFFER)


def _compare(
    saved: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]], needed: set[str], kind: str
) -> list[str]:
    lines = [f"{kind} {name!r} is not in the checkpoint" for name in sorted(needed - set(saved))]
    lines += [f"{kind} {name!r} is not in the model" for name in sorted(set(saved) - set(wanted))]
    for name in sorted(set(saved) & set(wanted)):
        if saved[name] != wanted[name]:
            lines.append(f"{kind} {name!r} has shape {list(saved[name])}, the model's has {list(wanted[name])}")
    return lines


def full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """A parameter's shape, also where ZeRO-3 has left it empty and remembers the shape beside it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def check_fits(path: Path, saved: Manifest, model: nn.Module) -> None:
    """CheckpointError naming the weights in which checkpoint and model differ."""
    found = mismatches(saved, model)
    if found:
        more = f" (and {len(found) - 4} more)" if len(found) > 4 else ""
        raise CheckpointError(f"{path} is of another model: {'; '.join(found[:4])}{more}. Use the config of its run")


@torch.no_grad()
def load_weights(path: Path, model: nn.Module, *, weights: Weights = "raw") -> Manifest:
    """Put a checkpoint's weights ("ema": their average) and buffers into a plain model, in one process, piece by piece.

    The weights are converted to the model's dtype. Raises CheckpointError naming damaged files, or the names and shapes
    that do not fit; the model is then untouched or half loaded: do not use it.
    """
    reader = Reader(path)
    check_fits(path, reader.manifest, model)
    buffers = dict(model.named_buffers())
    kinds = reader.weights(weights)
    targets: list[tuple[str, str, Tensor]] = [(name, kinds[name], p) for name, p in model.named_parameters()]
    targets += [(name, BUFFER, buffers[name]) for name in reader.names(BUFFER)]
    for name, kind, target in targets:
        whole = (
            target.data if target.is_contiguous() else torch.empty_like(target, memory_format=torch.contiguous_format)
        )
        flat, at = whole.view(-1), 0
        for piece in reader.stream(name, kind):
            flat[at : at + piece.numel()].copy_(piece)
            at += piece.numel()
        if whole.data_ptr() != target.data_ptr():
            target.copy_(whole)
    return reader.manifest
