"""Records as pictures and back: grey levels to bytes, sheets of many images, maps of what each pixel cost.

Shapes in names: N images, H, W, C their grid, K cells of a sheet.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from lmtrain.data import images
from lmtrain.data.view import View
from lmtrain.errors import InputError
from lmtrain.protocol import Corpus

_GAP = 1
"""Pixels between two images of a sheet, before scaling."""
_SHEET = 640
"""Pixels that a sheet is scaled up to, about, with whole factors: a small image is looked at too."""
_HEAT = np.array([(0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164)], np.float64)
"""Colours of growing lightness, so that the map can be read in grey too."""


def shade(x_ND: np.ndarray, *, alphabet: int, grid: tuple[int, int, int]) -> np.ndarray:
    """uint8 [N, H, W, C]: symbols 0 .. alphabet - 1 spread over 0 .. 255; alphabet 0: reals, [0, 1) the same way."""
    share_ND = x_ND / (alphabet - 1) if alphabet > 1 else np.floor(np.asarray(x_ND, np.float64) * 256) / 255
    return np.asarray(np.clip(np.rint(share_ND * 255), 0, 255).astype(np.uint8).reshape(-1, *grid))


def symbols(pixels_NHWC: np.ndarray, *, alphabet: int) -> np.ndarray:
    """int64 [N, H*W*C]: the nearest of `alphabet` grey levels of bytes; what `shade` made comes back.

    alphabet 0: float32, the middle of each byte's share of [0, 1).
    """
    if not alphabet:
        return ((pixels_NHWC.astype(np.float32) + 0.5) / 256).reshape(len(pixels_NHWC), -1)
    level = np.rint(pixels_NHWC.astype(np.float64) / 255 * (alphabet - 1))
    return level.astype(np.int64).reshape(len(pixels_NHWC), -1)


def sheet(images_NHWC: np.ndarray, *, columns: int | None = None) -> np.ndarray:
    """uint8 [height, width, C]: images side by side, row by row, a grey line between them, enlarged when small."""
    N, H, W, C = images_NHWC.shape
    columns = min(N, columns or math.ceil(math.sqrt(N * H / W)))
    rows = -(-N // columns)
    out = np.full((rows * (H + _GAP) + _GAP, columns * (W + _GAP) + _GAP, C), 128, np.uint8)
    for k, image in enumerate(images_NHWC):
        top, left = (k // columns) * (H + _GAP) + _GAP, (k % columns) * (W + _GAP) + _GAP
        out[top : top + H, left : left + W] = image
    scale = max(1, _SHEET // max(out.shape[:2]))
    return np.asarray(out.repeat(scale, axis=0).repeat(scale, axis=1))


def heat(bits_NHW: np.ndarray, *, top: float) -> np.ndarray:
    """uint8 [N, H, W, 3]: 0 bits (or fewer) black, `top` bits or more white, red and yellow between."""
    place = np.clip(bits_NHW / top, 0, 1) * (len(_HEAT) - 1)
    low = np.minimum(place.astype(np.int64), len(_HEAT) - 2)
    part = (place - low)[..., None]
    return np.asarray(np.rint(_HEAT[low] * (1 - part) + _HEAT[low + 1] * part).astype(np.uint8))


def colour(images_NHWC: np.ndarray) -> np.ndarray:
    """Three channels, of one or three."""
    return images_NHWC if images_NHWC.shape[-1] == 3 else images_NHWC.repeat(3, axis=-1)


def can_show(corpus: Corpus) -> bool:
    """Whether records are grey or RGB images."""
    return corpus.grid is not None and corpus.grid[2] in (1, 3)


def grid_of(corpus: Corpus) -> tuple[int, int, int]:
    """(H, W, C); InputError when the records are no grey or RGB images."""
    if corpus.grid is None:
        raise InputError(f"{corpus.path} holds {corpus.unit}s without a grid, not images")
    if not can_show(corpus):
        raise InputError(f"{corpus.path} holds images of {corpus.grid[2]} channels; pictures have 1 or 3")
    return corpus.grid


def show(x_ND: np.ndarray, corpus: Corpus) -> np.ndarray:
    """uint8 [N, H, W, C] of records as the model reads them; InputError when they are no grey or RGB images."""
    return shade(numbers(x_ND, corpus), alphabet=corpus.alphabet, grid=grid_of(corpus))


def numbers(x_ND: np.ndarray, corpus: Corpus) -> np.ndarray:
    """Records in the units of the data."""
    if isinstance(corpus, View) and corpus.fit is not None:
        return np.asarray(x_ND * np.array(corpus.fit.std) + np.array(corpus.fit.mean))
    return x_ND


def write(path: Path, pixels_HWC: np.ndarray) -> None:
    """A PNG, aside first and then in place."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".part")
        aside.write_bytes(images.encode(pixels_HWC))
        aside.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
