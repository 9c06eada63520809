"""Image files as symbols and back, byte for byte: PGM and PPM (P5, P6), arrays in .npy, and pixels of other files.

Shapes in names: N records, D symbols of a record, H, W, C the grid.

A file is its own header (`side`) and its raster. The values of the raster are the model's symbols 0 .. V - 1, or, where
V levels are spread over the bytes 0 .. 255 as in pictures of samples, those. What would not come back byte for byte
is refused.
"""

from __future__ import annotations

import io
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lmtrain.data import images, pictures
from lmtrain.errors import CorpusError, InputError
from lmtrain.protocol import Corpus

_NPY = b"\x93NUMPY"
_PNM = re.compile(rb"P([56])" + 3 * rb"(?:\s|#[^\n]*\n)+(\d+)" + rb"\s")
_USUAL = (
    b"(1, 3, 'descr': '<i8', 'fortran_order': True, P5\n8 8\n16\nP6\n32 32\n255\n"
    + b" " * 70
    + (b"\n\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (28, 28, 1), }" + b" " * 50 + b"\n")
)
"""What headers mostly hold: the dictionary that they are deflated with. Part of the format."""


@dataclass(frozen=True, slots=True)
class Raster:
    """Symbols of a file. side: its own header, deflated. spread: see the module. raw: what comes back."""

    x_ND: np.ndarray
    side: bytes
    spread: bool
    raw: bytes


def read(data: bytes, corpus: Corpus, *, where: str) -> Raster:
    """The symbols of a P5, P6 or .npy file of images (or records) as the model reads them; InputError otherwise."""
    if data.startswith(_NPY):
        header, values = _npy(data, corpus, where=where)
    elif _PNM.match(data):
        header, values = _pnm(data, corpus, where=where)
    else:
        raise InputError(
            f"{where} is neither PGM or PPM (P5, P6) nor .npy, which {corpus.unit}s are read from byte for byte"
            + ("; give --pixels to keep the pixels of another image file" if corpus.grid else "")
        )
    x_ND, spread = _symbols(values, corpus, where=where)
    raster = Raster(x_ND, _deflate(header), spread, data)
    if restore(raster.x_ND, side=raster.side, spread=spread, corpus=corpus) != data:
        raise InputError(f"{where} would not come back byte for byte: its values are stored in an unusual way")
    return raster


def read_pixels(data: bytes, corpus: Corpus, *, where: str) -> Raster:
    """The pixels of any image file that the model's grid and levels can hold; InputError otherwise."""
    if corpus.grid is None:
        raise InputError(f"--pixels is for images, and the run reads {corpus.unit}s of {corpus.path}")
    try:
        pixels_HWC = images.exact(data, where=where)
    except CorpusError as error:
        raise InputError(str(error)) from None
    if corpus.grid[2] == 1 and pixels_HWC.shape[2] == 3 and (pixels_HWC == pixels_HWC[..., :1]).all():
        pixels_HWC = pixels_HWC[..., :1]
    _same_grid(pixels_HWC.shape, corpus, where=where)
    x_ND, spread = _symbols(pixels_HWC.reshape(1, -1), corpus, where=where)
    return Raster(x_ND, b"", spread, pixels_HWC.tobytes())


def restore(x_ND: np.ndarray, *, side: bytes, spread: bool, corpus: Corpus) -> bytes:
    """The file whose symbols and header these are."""
    header = _inflate(side)
    values = pictures.shade(x_ND, alphabet=corpus.alphabet, grid=(1, 1, x_ND.shape[1])) if spread else x_ND
    if not header.startswith(_NPY):
        return header + values.astype(np.uint8).tobytes()
    _, dtype = _npy_header(io.BytesIO(header))
    return header + values.astype(dtype).tobytes()


def write_pixels(raw: bytes, corpus: Corpus, out: Path) -> bytes:
    """A file of the raster: PGM, PPM or .npy when `out` is called so, else PNG."""
    assert corpus.grid is not None
    height, width, channels = corpus.grid
    pixels_HWC = np.frombuffer(raw, np.uint8).reshape(corpus.grid)
    suffix = out.suffix.lower()
    if suffix == ".npy":
        file = io.BytesIO()
        np.save(file, pixels_HWC, allow_pickle=False)
        return file.getvalue()
    if suffix in (".pgm", ".ppm", ".pnm"):
        return f"P{5 if channels == 1 else 6}\n{width} {height}\n255\n".encode() + raw
    return images.encode(pixels_HWC)


def _pnm(data: bytes, corpus: Corpus, *, where: str) -> tuple[bytes, np.ndarray]:
    """(header, values [1, D]). A comment after the last number would be data, so there is none."""
    found = _PNM.match(data)
    assert found is not None
    width, height, most = (int(found[i][:9]) for i in (2, 3, 4))
    channels = 1 if found[1] == b"5" else 3
    if not 1 <= most <= 255:
        raise InputError(f"{where} has values up to {most}, two bytes each; one byte each can be coded (up to 255)")
    _same_grid((height, width, channels), corpus, where=where)
    header, raster = data[: found.end()], data[found.end() :]
    if len(raster) != height * width * channels:
        raise InputError(
            f"{where} has {len(raster)} bytes of pixels, {width} x {height} x {channels} are "
            f"{width * height * channels}: it is cut, or holds more than one image; store several in one .npy"
        )
    return header, np.frombuffer(raster, np.uint8).reshape(1, -1)


def _npy_header(file: io.BytesIO) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype.kind not in "biu" or (fortran and len(shape) > 1):
        raise ValueError(f"{dtype} in {'Fortran' if fortran else 'C'} order, wanted whole numbers in C order")
    return shape, dtype


def _npy(data: bytes, corpus: Corpus, *, where: str) -> tuple[bytes, np.ndarray]:
    """(header, values [N, D]) of an array [N, H, W, C], [N, D] or a single record; C may be left out when it is 1."""
    file = io.BytesIO(data)
    try:
        shape, dtype = _npy_header(file)
    except (ValueError, SyntaxError, TypeError) as error:
        raise InputError(f"{where} is no .npy that can be coded: {' '.join(str(error).split())}") from None
    record, grid = corpus.record, corpus.grid
    assert record is not None
    known = [(record,)] + ([] if grid is None else [grid]) + ([grid[:2]] if grid is not None and grid[2] == 1 else [])
    if not any(shape in (one, (shape[:1] + one)) for one in known):
        wanted = " or ".join(f"[N, {', '.join(map(str, one))}]" for one in known)
        raise InputError(f"{where} is an array of shape {list(shape)}; the run reads {wanted}, or one of them")
    header, raster = data[: file.tell()], data[file.tell() :]
    count = int(np.prod(shape, dtype=np.int64))
    if len(raster) != count * dtype.itemsize:
        raise InputError(f"{where} has {len(raster)} bytes of values, its shape says {count * dtype.itemsize}")
    return header, np.frombuffer(raster, dtype).reshape(-1, record)


def _same_grid(shape: tuple[int, ...], corpus: Corpus, *, where: str) -> None:
    if corpus.grid is None:
        raise InputError(f"{where} is an image, and the run reads {corpus.unit}s of {corpus.path}; give a .npy of them")
    if tuple(shape) != corpus.grid:
        (height, width, channels), (high, wide, own) = shape, corpus.grid
        raise InputError(
            f"{where} has {width} x {height} pixels of {channels} channels, the run reads {wide} x {high} of {own}"
        )


def _symbols(values_ND: np.ndarray, corpus: Corpus, *, where: str) -> tuple[np.ndarray, bool]:
    """(int64 symbols, whether they are levels spread over 0 .. 255)."""
    V = corpus.alphabet
    if not values_ND.size or (values_ND.min() >= 0 and values_ND.max() < V):
        return values_ND.astype(np.int64), False
    if values_ND.dtype == np.uint8 and V < 256:
        x_ND = pictures.symbols(values_ND.reshape(len(values_ND), 1, -1, 1), alphabet=V)
        back_ND = pictures.shade(x_ND, alphabet=V, grid=(1, 1, x_ND.shape[1])).reshape(x_ND.shape)
        if np.array_equal(back_ND, values_ND):
            return x_ND, True
    wrong = values_ND[(values_ND < 0) | (values_ND >= V)][0]
    raise InputError(
        f"{where} holds the value {wrong}; the run reads the levels 0 to {V - 1}"
        + (f", or those spread evenly over 0 to 255 (every {255 / (V - 1):.3g})" if V < 256 else "")
    )


def _deflate(header: bytes) -> bytes:
    if not header:
        return b""
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=_USUAL)
    return squeeze.compress(header) + squeeze.flush()


def _inflate(side: bytes) -> bytes:
    return zlib.decompressobj(-15, zdict=_USUAL).decompress(side) if side else b""
