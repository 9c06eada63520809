"""The file that `lmtrain compress` writes: a header, and blocks with a checksum each; byte by byte in
docs/compression.md.

A flipped bit, a cut or what was put behind the end is an InputError that names the header or the block, found before a
model is opened.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from lmtrain import __version__
from lmtrain.data.layout import crc32c
from lmtrain.errors import EngineError, InputError
from lmtrain.inference.coding import Layout
from lmtrain.inference.rans import WORD
from lmtrain.protocol import Weights

MAGIC = b"\x89LMZ\r\n\x1a\n"
"""Not ASCII, both line ends, an end-of-file mark: what careless copying changes is found at once."""
VERSION = 1
SUFFIX = ".lmz"
HASH = 16
"""Bytes kept of each SHA-256."""
BLOCK_HEAD = 8
"""Bytes before a block's payload: its length and its CRC32C, uint32 each."""

Kind = Literal["bytes", "raster", "pixels", "stored"]
KINDS: tuple[Kind, ...] = get_args(Kind)
_WEIGHTS: tuple[Weights, ...] = get_args(Weights)
_FIXED = struct.Struct("<8sBBHBBiQQQIIIII16s16s16sBH")
_CRC = struct.Struct("<I")
_BLOCK = struct.Struct("<II")
_NUMBER = struct.Struct("<II")


@dataclass(frozen=True, slots=True)
class Header:
    """What a decoder has to know. `Layout.block` steps make a block; of a stored file, bytes.

    raw_bytes: length of what was given (of pixels: of the raster). checksum: of the same bytes. model: hash of weights
    and architecture. meaning: hash of what the symbols stand for (the tokenizer). context, stride: the plan, or 0.
    spread: symbols are levels spread over 0 .. 255. side: the file's own header, deflated. machine: what the arithmetic
    depends on.
    """

    kind: Kind
    weights: Weights
    spread: bool
    label: int | None
    step: int
    raw_bytes: int
    layout: Layout
    context: int
    stride: int
    model: bytes
    meaning: bytes
    checksum: bytes
    machine: str
    side: bytes = b""

    def pack(self) -> bytes:
        """The header's bytes."""
        machine, layout = self.machine.encode()[:255], self.layout
        size = _FIXED.size + len(machine) + len(self.side) + _CRC.size
        if size > 0xFFFF:
            raise InputError(f"the file's own header takes {len(self.side)} bytes; at most 65,000 can be kept")
        fixed = _FIXED.pack(
            MAGIC,
            VERSION,
            KINDS.index(self.kind),
            size,
            _WEIGHTS.index(self.weights),
            int(self.spread),
            -1 if self.label is None else self.label,
            self.step,
            self.raw_bytes,
            layout.units,
            layout.size,
            layout.lanes,
            layout.block,
            self.context,
            self.stride,
            self.model,
            self.meaning,
            self.checksum,
            len(machine),
            len(self.side),
        )
        body = fixed + machine + self.side
        return body + _CRC.pack(crc32c(body))


def this_machine() -> str:
    """What the last bits of probabilities depend on: versions, and the instructions that torch and numpy choose."""
    found = np.show_config(mode="dicts")["SIMD Extensions"]["found"]
    return (
        f"lmtrain {__version__}, torch {torch.__version__} {torch.backends.cpu.get_cpu_capability()}, "
        f"numpy {np.__version__} {found[-1] if found else 'baseline'}, {platform.machine()}"
    )


def check_machine(header: Header, *, where: str) -> None:
    """EngineError when a file was coded with other versions, or on a CPU of other capability."""
    here = this_machine()
    if header.kind != "stored" and header.machine != here:
        raise EngineError(
            f"{where} was coded with {header.machine}, and here is {here}: one last bit of a probability that differs "
            "would lose it; decode it where it was coded, or give --try (what comes out is checked)"
        )


def pack(header: Header, payloads: Sequence[bytes]) -> bytes:
    """The whole file."""
    parts = [header.pack()]
    for number, payload in enumerate(payloads):
        parts += [_BLOCK.pack(len(payload), _block_crc(number, payload)), payload]
    return b"".join(parts)


def _block_crc(number: int, payload: bytes) -> int:
    return crc32c(_NUMBER.pack(number, len(payload)) + payload)


def unpack(data: bytes, *, where: str) -> tuple[Header, list[bytes]]:
    """(header, payload of each block), everything verified; InputError naming header or block of the file `where`."""
    header, at = _unpack_header(data, where=where)
    payloads = []
    blocks = header.layout.blocks
    for number in range(blocks):
        name = f"{where}: block {number} of {blocks}"
        if len(data) < at + BLOCK_HEAD:
            raise InputError(f"{name} is missing: the file is cut at byte {len(data)}")
        size, crc = _BLOCK.unpack_from(data, at)
        payload = data[at + BLOCK_HEAD : at + BLOCK_HEAD + size]
        if len(payload) != size:
            raise InputError(f"{name} says {size} bytes and has {len(payload)}: the file is cut, or damaged there")
        if _block_crc(number, payload) != crc:
            raise InputError(f"{name} is damaged: its content and its CRC32C disagree")
        payloads.append(payload)
        at += BLOCK_HEAD + size
    if at != len(data):
        raise InputError(f"{where}: {len(data) - at} bytes follow the last of {blocks} blocks; it is damaged")
    return header, payloads


def _unpack_header(data: bytes, *, where: str) -> tuple[Header, int]:
    if not data.startswith(MAGIC):
        raise InputError(
            f"{where} is no file of `lmtrain compress`, or its header is damaged: it does not begin with its mark"
        )
    if len(data) < _FIXED.size:
        raise InputError(f"{where}: the header is cut: {len(data)} bytes, wanted at least {_FIXED.size}")
    (_, version, kind, size, weights, spread, label, step, raw_bytes, units, per_unit, lanes, block, context, stride,
     model, meaning, checksum, machine_bytes, side_bytes) = _FIXED.unpack_from(data)  # fmt: skip
    if len(data) < size:
        raise InputError(f"{where}: the header is cut, or damaged: {len(data)} bytes, it says {size}")
    whole = size == _FIXED.size + machine_bytes + side_bytes + _CRC.size
    if not whole or crc32c(data[: size - _CRC.size]) != _CRC.unpack_from(data, size - _CRC.size)[0]:
        raise InputError(f"{where}: the header is damaged: its content and its CRC32C disagree")
    if version != VERSION:
        raise InputError(f"{where} is of format {version}; this version reads {VERSION}: use the one that wrote it")
    sound = kind < len(KINDS) and weights < len(_WEIGHTS) and min(per_unit, lanes, block) >= 1
    if not sound or lanes > max(units, 1) or not (stride <= context):
        raise InputError(f"{where}: the header holds numbers that no file has; it was not made by `lmtrain compress`")
    at = _FIXED.size
    return Header(
        kind=KINDS[kind],
        weights=_WEIGHTS[weights],
        spread=bool(spread),
        label=None if label < 0 else label,
        step=step,
        raw_bytes=raw_bytes,
        layout=Layout(units, per_unit, lanes, block),
        context=context,
        stride=stride,
        model=model,
        meaning=meaning,
        checksum=checksum,
        machine=data[at : at + machine_bytes].decode("utf-8", "replace"),
        side=data[at + machine_bytes : at + machine_bytes + side_bytes],
    ), size


def with_states(blocks: Sequence[np.ndarray], state_B: np.ndarray) -> list[bytes]:
    """Payloads of coded blocks: the lanes' states before the words of the first."""
    payloads = [block.tobytes() for block in blocks]
    if payloads:
        payloads[0] = state_B.astype("<u8").tobytes() + payloads[0]
    return payloads


def without_states(payloads: Sequence[bytes], *, lanes: int, where: str) -> tuple[list[np.ndarray], np.ndarray]:
    """(words of each block, states of the lanes); the inverse of `with_states`."""
    if not payloads:
        return [], np.zeros(0, np.uint64)
    size = 8 * lanes
    if len(payloads[0]) < size or any(len(payload) % 2 for payload in payloads):
        raise InputError(f"{where}: block 0 has no room for the states of {lanes} lanes, or a block has half a word")
    rest = [payloads[0][size:], *payloads[1:]]
    return [np.frombuffer(payload, WORD) for payload in rest], np.frombuffer(payloads[0][:size], "<u8")
