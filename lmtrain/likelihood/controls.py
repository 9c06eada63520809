"""What can be said of a unit without any model: how long PNG and xz make it, and how bright it is on average.

A detector that does no better than these has learnt nothing of use; so they stand beside every score.

Shapes in names: U units, D symbols of a unit, H, W, C the grid of an image.
"""

from __future__ import annotations

import lzma

import numpy as np

from lmtrain.data import images, pictures
from lmtrain.likelihood.sets import Set

_LEAST_DICTIONARY = 4096


def png_bytes(held: Set) -> np.ndarray | None:
    """float64 [U]: the length of each image as an optimised PNG of 8 bits a channel; None where there are no images."""
    corpus = held.corpus
    if not pictures.can_show(corpus) or not 0 < corpus.alphabet <= 256:
        return None
    return np.array([len(images.encode(pictures.show(held.read(n)[None], corpus)[0])) for n in held.numbers_N.tolist()],
                    np.float64)  # fmt: skip


def xz_bytes(held: Set) -> np.ndarray | None:
    """float64 [U]: the length of each unit's bytes under xz (`xz_length`); of records a byte (or two) a symbol."""
    if held.corpus.record is None:
        return np.array([xz_length(held.raw(n)) for n in held.numbers_N.tolist()], np.float64)
    if not held.corpus.alphabet:
        return None
    dtype = np.min_scalar_type(held.corpus.alphabet - 1)
    return np.array([xz_length(held.read(n).astype(dtype).tobytes()) for n in held.numbers_N.tolist()], np.float64)


def xz_length(data: bytes) -> int:
    """Bytes of the LZMA2 stream that `xz -9e` would put into its container, without the container.

    The dictionary is as long as the data, which changes nothing but the memory.
    """
    size = max(_LEAST_DICTIONARY, len(data))
    chain = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": size}]
    return len(lzma.compress(data, format=lzma.FORMAT_RAW, filters=chain))


def mean_intensity(held: Set) -> np.ndarray:
    """float64 [U]: mean symbol over the largest one, 0 to 1; of text the mean byte / 255; of reals their mean."""
    if held.corpus.record is None:
        return np.array([np.frombuffer(held.raw(n) or b"\0", np.uint8).mean() / 255 for n in held.numbers_N.tolist()])
    top = max(held.corpus.alphabet - 1, 1)
    return np.array([np.asarray(held.read(n), np.float64).mean() / top for n in held.numbers_N.tolist()])
