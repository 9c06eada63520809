"""Files without loss under a run's model: what is coded, what is refused, what is written. docs/compression.md.

Shapes in names: U units (symbols of a text, or records), D symbols of a unit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from lmtrain.config import Config, read_yaml
from lmtrain.corpora import spec_of, told_classes
from lmtrain.errors import CheckpointError, EngineError, InputError, TokenizerError
from lmtrain.inference import coding
from lmtrain.inference.coding import Layout, Progress, Reading
from lmtrain.inference.reopen import Plan
from lmtrain.likelihood import container, rasters, rivals
from lmtrain.likelihood.container import BLOCK_HEAD, HASH, SUFFIX, Header, Kind
from lmtrain.runfolder import CONFIG
from lmtrain.use import Opened, open_run

LANE_SYMBOLS = 4096
"""A text gets a lane for so many symbols: a lane begins without context and ends with a state of 8 bytes."""
MOST_LANES = 64
BLOCK_SYMBOLS = 1 << 16
STORED_BLOCK = 1 << 20
"""Bytes of a block of a file that is kept as it is."""


class CompressConfig(Config):
    """How a file is cut for the model; the decoder finds all of it in the file."""

    lanes: int | None = Field(
        None, ge=1, le=4096, description="coded side by side; null = one for 4,096 symbols (or a record), at most 64"
    )
    stride: int | None = Field(
        None, ge=1, description="text, bounded models: symbols between two openings; null = half the context"
    )
    block: int = Field(BLOCK_SYMBOLS, ge=1, description="symbols of a block, about: each has a checksum of its own")
    label: int | None = Field(None, ge=0, description="class of the records, for a model that is told one")
    pixels: bool = Field(False, description="keep the pixels of an image file, not the file")


@dataclass(frozen=True, slots=True)
class _Given:
    """What is to be coded. raw: the bytes that come back. x_UD: symbols, None where no tokenizer can write them."""

    kind: Kind
    raw: bytes
    x_UD: np.ndarray | None
    side: bytes = b""
    spread: bool = False
    why: str = ""


def model_hash(opened: Opened, folder: Path) -> bytes:
    """Of the architecture as the run recorded it, of what the model was told of its corpus, and of every weight."""
    spec = spec_of(opened.corpus, opened.config)
    facts = [read_yaml(folder / CONFIG)["model"], [spec.alphabet, spec.context, spec.bos, spec.grid, spec.labels]]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name, tensor in sorted(opened.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.digest()[:HASH]


def _hash(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:HASH]


# ---- compressing -----------------------------------------------------------------------------------------------------


def compress_file(
    folder: Path,
    file: Path,
    out: Path | None = None,
    *,
    config: CompressConfig,
    checkpoint: str = "last",
    weights: str | None = None,
    force: bool = False,
    verify: bool = False,
    compare: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write `file` coded by a run's model to `out` (FILE.lmz); what it cost, as a JSON mapping.

    verify: decode in a fresh process before the file is put in place. compare: also the sizes of other compressors.
    Raises InputError (a file, a label, a model that cannot code), and what `open_run` does.
    """
    out = out or file.with_name(file.name + SUFFIX)
    data = _read(file)
    _free(out, force)
    opened = open_run(folder, checkpoint=checkpoint, weights=weights)
    began = time.perf_counter()
    packed = compress_bytes(opened, folder, data, config=config, where=str(file), progress=progress)
    told = {**packed.told, "seconds": time.perf_counter() - began, "file": str(file), "out": str(out)}
    aside = _write_aside(out, packed.data)
    try:
        if verify:
            _verify(folder, aside, opened=opened, packed=packed)
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
    told["verified"] = verify
    if compare:
        told["rivals"] = rivals.sizes(packed.raw) | ({"the image file": len(data)} if config.pixels else {})
    return told


@dataclass(frozen=True, slots=True)
class Packed:
    """data: the coded file. raw: the bytes that it stands for. told: what it cost, as a JSON mapping."""

    data: bytes
    raw: bytes
    told: dict[str, Any]


def compress_bytes(
    opened: Opened,
    folder: Path,
    data: bytes,
    *,
    config: CompressConfig,
    where: str = "the input",
    progress: Progress | None = None,
    store: bool = True,
) -> Packed:
    """Code `data` under a run's model. store: keep text as it is where the model would take more bytes than it has."""
    model, corpus = opened.model.cpu(), opened.corpus
    coding.check(model, alphabet=corpus.alphabet)
    label, plan = _label(opened, config.label), _plan(opened, config.stride)
    given = _given(opened, data, config, where=where)
    x_UD = np.zeros((0, 1), np.int64) if given.x_UD is None else given.x_UD
    layout = _layout(x_UD, config, record=corpus.record is not None)
    reading = Reading(corpus.bos, plan, record=corpus.record is not None, label=label)
    coded = coding.encode(model, x_UD, layout=layout, reading=reading, progress=progress)
    payloads, kind, why = container.with_states(coded.blocks, coded.state_B), given.kind, given.why
    if store and kind == "bytes" and not why and sum(map(len, payloads)) > len(data):
        why = "the model would take more than the bytes themselves"
    if why:
        kind, plan, layout = "stored", None, Layout(len(data), 1, 1, STORED_BLOCK)
        payloads = [data[at : at + STORED_BLOCK] for at in range(0, len(data), STORED_BLOCK)]
    header = Header(
        kind=kind,
        weights=opened.config.eval.weights,
        spread=given.spread,
        label=label,
        step=opened.saved.step,
        raw_bytes=len(given.raw),
        layout=layout,
        context=0 if plan is None else plan.context,
        stride=0 if plan is None else plan.stride,
        model=model_hash(opened, folder),
        meaning=_hash(corpus.meaning.encode()),
        checksum=_hash(given.raw),
        machine=container.this_machine(),
        side=given.side,
    )
    told = {
        "kind": kind,
        "why": why or None,
        "raw_bytes": len(given.raw),
        "symbols": x_UD.size,
        "records": len(x_UD) if corpus.record is not None else None,
        "lanes": layout.lanes,
        "blocks": len(payloads),
        "context": header.context or None,
        "stride": header.stride or None,
        "label": label,
        "step": header.step,
        "weights": header.weights,
    }
    file = container.pack(header, payloads)
    lengths = _lengths(coded, payloads, file_bytes=len(file), written=given.x_UD is not None)
    bits = lengths["payload_bits"]
    told |= lengths | {
        "bits_per_byte": bits / len(given.raw) if given.raw else None,
        "bits_per_dim": bits / x_UD.size if corpus.symbol_dims and x_UD.size else None,
    }
    return Packed(file, given.raw, told)


def _lengths(coded: coding.Coded, payloads: list[bytes], *, file_bytes: int, written: bool) -> dict[str, Any]:
    """written: whether the symbols of the file are known, so that the model has a length for it."""
    payload = sum(map(len, payloads))
    return {
        "float_bits": coded.float_bits if written and math.isfinite(coded.float_bits) else None,
        "table_bits": coded.table_bits if written else None,
        "coded_bits": coded.payload_bits if written else None,
        "payload_bits": 8 * payload,
        "overhead_bytes": file_bytes - payload,
        "header_bytes": file_bytes - payload - BLOCK_HEAD * len(payloads),
        "file_bytes": file_bytes,
    }


def _given(opened: Opened, data: bytes, config: CompressConfig, *, where: str) -> _Given:
    corpus = opened.corpus
    if corpus.record is None:
        if config.pixels:
            raise InputError("--pixels is for images, and the run reads text")
        try:
            x_N = corpus.encode(data)
        except TokenizerError as error:
            return _Given("bytes", data, None, why=str(error))
        if corpus.decode(x_N.tolist()) != data:
            return _Given("bytes", data, None, why="the tokenizer does not give these bytes back")
        return _Given("bytes", data, x_N[:, None])
    if config.stride is not None:
        raise InputError(f"--stride is for text, and the run reads {corpus.unit}s")
    read = rasters.read_pixels if config.pixels else rasters.read
    raster = read(data, corpus, where=where)
    return _Given("pixels" if config.pixels else "raster", raster.raw, raster.x_ND, raster.side, raster.spread)


def _label(opened: Opened, label: int | None) -> int | None:
    if not told_classes(opened.config):
        if label is not None:
            raise InputError(f"--label {label}: the model is not told classes (model.conditional is false)")
        return None
    classes = opened.corpus.labels
    if label is None or label >= classes:
        given = "no --label" if label is None else f"--label {label}"
        raise InputError(
            f"{given} was given, and the model is told the class of what it reads: one of 0 to {classes - 1}"
        )
    return label


def _plan(opened: Opened, stride: int | None) -> Plan | None:
    if opened.corpus.record is not None:
        return None
    if opened.model.context is None:
        if stride is not None:
            raise InputError(f"--stride {stride}: {type(opened.model).__name__} carries its state on; leave it out")
        return None
    context = opened.config.data.row_length(opened.corpus)
    return Plan(context, max(1, context // 2) if stride is None else stride)


def _layout(x_UD: np.ndarray, config: CompressConfig, *, record: bool) -> Layout:
    units, size = x_UD.shape
    each = 1 if record else LANE_SYMBOLS
    lanes = config.lanes or min(units // each, MOST_LANES)
    lanes = max(1, min(lanes, units))
    return Layout(units, size, lanes, max(1, config.block // lanes))


# ---- decompressing ---------------------------------------------------------------------------------------------------


def decompress_file(
    folder: Path,
    file: Path,
    out: Path | None = None,
    *,
    any_machine: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The file back, to `out` (FILE without .lmz); written only when its checksum is right.

    any_machine: begin although versions or CPU differ from those that coded. Raises InputError naming header or block
    (damage), EngineError (another machine), CheckpointError (another model).
    """
    data = _read(file)
    header, payloads = container.unpack(data, where=str(file))
    out = out or _out(file, header)
    _free(out, force)
    if not any_machine:
        container.check_machine(header, where=str(file))
    if header.kind == "stored":
        raw = written = b"".join(payloads)
        _check_raw(raw, header, where=str(file))
    else:
        opened = open_run(folder, checkpoint=str(header.step), weights=header.weights)
        raw = decompress_bytes(opened, folder, header, payloads, where=str(file), progress=progress)
        written = rasters.write_pixels(raw, opened.corpus, out) if header.kind == "pixels" else raw
    aside = _write_aside(out, written)
    try:
        os.replace(aside, out)
    finally:
        aside.unlink(missing_ok=True)
    return {"file": str(file), "out": str(out), "kind": header.kind, "raw_bytes": len(raw), "file_bytes": len(data)}


def decompress_bytes(
    opened: Opened,
    folder: Path,
    header: Header,
    payloads: list[bytes],
    *,
    where: str = "the file",
    progress: Progress | None = None,
) -> bytes:
    """The raw bytes (of pixels: the raster) of an unpacked file that the model coded; errors as `decompress_file`."""
    model, corpus = opened.model.cpu(), opened.corpus
    if _hash(corpus.meaning.encode()) != header.meaning:
        raise CheckpointError(f"{where} was coded with another tokenizer or kind of record than {folder} reads")
    if model_hash(opened, folder) != header.model:
        raise CheckpointError(
            f"{where} was coded by another model than step {opened.saved.step} of {folder}; give the run that coded it"
        )
    layout = header.layout
    plan = Plan(header.context, header.stride) if header.context else None
    reading = Reading(corpus.bos, plan, record=corpus.record is not None, label=header.label)
    words, state_B = container.without_states(payloads, lanes=layout.lanes, where=where)
    if not payloads:
        state_B = np.full(layout.lanes, coding.START, np.uint64)
    try:
        x_UD = coding.decode(model, words, state_B, layout=layout, reading=reading, progress=progress)
    except EngineError as error:
        raise EngineError(f"{where}: {error}") from None
    if corpus.record is None:
        raw = corpus.decode(x_UD[:, 0].tolist())
    else:
        raw = rasters.restore(x_UD, side=header.side, spread=header.spread, corpus=corpus)
    _check_raw(raw, header, where=where)
    return raw


def _check_raw(raw: bytes, header: Header, *, where: str) -> None:
    if len(raw) != header.raw_bytes or _hash(raw) != header.checksum:
        raise EngineError(f"{where}: what was decoded is not what was coded (its SHA-256 differs); nothing was written")


def _out(file: Path, header: Header) -> Path:
    if file.suffix != SUFFIX:
        raise InputError(f"{file} is not called *{SUFFIX}; say where its content goes: lmtrain decompress RUN FILE OUT")
    out = file.with_suffix("")
    return out if header.kind != "pixels" or out.suffix.lower() == ".png" else out.with_suffix(".png")


# ---- files -----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _free(out: Path, force: bool) -> None:
    if out.is_dir():
        raise InputError(f"{out} is a folder; give the name of a file")
    if out.exists() and not force:
        raise InputError(f"{out} is there already; give another name, or --force to replace it")


def _write_aside(out: Path, data: bytes) -> Path:
    aside = out.with_name(f".{out.name}.{secrets.token_hex(4)}.part")
    try:
        with aside.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise InputError(f"{out} cannot be written: {error.strerror}") from None
    return aside


def _verify(folder: Path, coded: Path, *, opened: Opened, packed: Packed) -> None:
    """Decode in a process of its own and compare; EngineError when something else comes out."""
    back = coded.with_name(coded.name + ".npy")  # of pixels: the raster in the plainest form
    pixels = packed.told["kind"] == "pixels"
    wanted = rasters.write_pixels(packed.raw, opened.corpus, back) if pixels else packed.raw
    command = [sys.executable, "-m", "lmtrain", "decompress", str(folder), str(coded), str(back), "--quiet"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise EngineError(f"--verify: a fresh process could not decode it: {done.stderr.strip()[-500:]}")
        if back.read_bytes() != wanted:
            raise EngineError("--verify: a fresh process decoded other bytes; nothing was written")
    finally:
        back.unlink(missing_ok=True)


def describe(told: dict[str, Any]) -> str:
    """What compressing cost, for a reader."""
    raw = told["raw_bytes"]
    lines = [f"{told['file']}: {raw:,} bytes -> {told['out']}: {told['file_bytes']:,} bytes"]
    if told["why"]:
        lines.append(f"kept as it is: {told['why']}")
    unit, count = ("dim", told["symbols"]) if told["bits_per_dim"] is not None else ("byte", raw)

    def row(name: str, bits: float) -> str:
        return f"  {name:<34s}{bits / 8:>14,.1f} bytes" + (f"{bits / count:>10.4f} bits/{unit}" if count else "")

    if told["float_bits"] is not None:
        lines.append(row("model, -log2 p", told["float_bits"]))
    if told["table_bits"] is not None:
        lines.append(row("by tables of 2^30", told["table_bits"]))
    lines.append(row(f"payload ({told['lanes']} lanes)", told["payload_bits"]))
    lines.append(row(f"container ({told['blocks']} blocks)", 8 * told["overhead_bytes"]))
    lines.append(row("the file", 8 * told["file_bytes"]))
    lines += [row(name, 8 * size) for name, size in told.get("rivals", {}).items()]
    rate = told["symbols"] / told["seconds"] if told["seconds"] else 0.0
    lines.append(
        f"step {told['step']}, {told['weights']} weights; {told['symbols']:,} symbols in {told['seconds']:.1f} s "
        f"({rate:,.0f} a second){'; decoded in a fresh process: the same bytes' if told['verified'] else ''}"
    )
    return "\n".join(lines)
