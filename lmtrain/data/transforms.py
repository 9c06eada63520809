"""What the loader does to records: pure functions of the records and of noise that is a function of (seed, place).

The place of a row is its position in the run when training (fresh noise every epoch), and its number in the split when
evaluating. Every purpose has noise of its own, so that switching one transform on changes no other.

Shapes: B rows, D symbols of a record, H, W, C its grid.

[1] Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011 (Philox: random numbers by their place).
[2] Uria, Murray, Larochelle: RNADE, NeurIPS 2013; Theis et al., A note on the evaluation of generative models,
    ICLR 2016 (uniform noise makes densities of symbols, whose expected logarithm bounds that of the probability).
[3] Ren et al.: Likelihood Ratios for Out-of-Distribution Detection, NeurIPS 2019, section 3.2 (a background model is
    trained on mutated inputs; there the draw is among the other symbols).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def noise(key: str, seed: int, place_B: np.ndarray, count: int) -> np.ndarray:
    """float64 [B, count] in [0, 1), multiples of 2^-53: a function of (key, seed, place) for each row [1]."""
    words = np.frombuffer(hashlib.sha256(f"{key}/{seed}".encode()).digest()[:16], np.uint64)
    out = np.empty((len(place_B), count))
    for row, place in zip(out, np.asarray(place_B, np.int64).tolist(), strict=True):
        # The counter's upper words hold the place, its lowest one counts on: no two rows share a number.
        counter = np.array([0, 0, place & (1 << 64) - 1, 0], np.uint64)
        np.random.Generator(np.random.Philox(key=words, counter=counter)).random(out=row)
    return out


def fewer_levels(x_BD: np.ndarray, *, alphabet: int, levels: int) -> np.ndarray:
    """`levels` grey levels of `alphabet`: floor(x * levels / alphabet), bins as equal as they can be."""
    out: np.ndarray = x_BD * levels // alphabet
    return out


def threshold(x_BD: np.ndarray, *, alphabet: int, at: float) -> np.ndarray:
    """int64: 1 where x / (alphabet - 1) >= at, else 0."""
    out: np.ndarray = (x_BD / (alphabet - 1) >= at).astype(np.int64)
    return out


def bernoulli(x_BD: np.ndarray, *, alphabet: int, noise_BD: np.ndarray) -> np.ndarray:
    """int64: 1 with probability x / (alphabet - 1)."""
    out: np.ndarray = (noise_BD < x_BD / (alphabet - 1)).astype(np.int64)
    return out


def dequantise(x_BD: np.ndarray, *, alphabet: int, noise_BD: np.ndarray) -> np.ndarray:
    """float64 (x + noise) / alphabet in [0, 1): symbol x is the interval [x, x + 1) / alphabet [2]."""
    out: np.ndarray = (x_BD + noise_BD) / alphabet
    return out


def flip(x_BD: np.ndarray, *, grid: Sequence[int], noise_B: np.ndarray) -> np.ndarray:
    """Rows whose noise is below 1/2 with left and right exchanged."""
    x_BHWC = x_BD.reshape(-1, *grid)
    return np.where((noise_B < 0.5)[:, None, None, None], x_BHWC[:, :, ::-1], x_BHWC).reshape(x_BD.shape)


def shift(x_BD: np.ndarray, *, grid: Sequence[int], most: int, noise_B2: np.ndarray) -> np.ndarray:
    """Every image moved by -most .. most pixels down and to the right, zeros coming in."""
    height, width, _ = grid
    moved_B2 = np.floor(noise_B2 * (2 * most + 1)).astype(np.int64) - most
    out = np.zeros_like(x_BD).reshape(-1, *grid)
    for to, image, (down, right) in zip(out, x_BD.reshape(-1, *grid), moved_B2.tolist(), strict=True):
        rows = slice(max(down, 0), height + min(down, 0)), slice(max(-down, 0), height - max(down, 0))
        columns = slice(max(right, 0), width + min(right, 0)), slice(max(-right, 0), width - max(right, 0))
        to[rows[0], columns[0]] = image[rows[1], columns[1]]
    return out.reshape(x_BD.shape)


def corrupt(x_BT: np.ndarray, *, alphabet: int, rate: float, noise_B2T: np.ndarray) -> np.ndarray:
    """int64: each symbol replaced, with probability `rate`, by a uniform draw from the whole alphabet [3].

    noise_B2T: [B, 2T], the first half to choose the symbols, the second to draw. The draw may be the symbol itself, so
    that a share of rate * (1 - 1 / alphabet) changes.
    """
    chosen_BT, drawn_BT = np.split(noise_B2T, 2, axis=1)
    return np.where(chosen_BT < rate, np.floor(drawn_BT * alphabet).astype(np.int64), x_BT)


def float32_below(x_BD: np.ndarray, bound: float) -> np.ndarray:
    """float32, none of which was rounded up to `bound`."""
    most = np.nextafter(np.float32(bound), np.float32(-np.inf))
    out: np.ndarray = np.minimum(x_BD.astype(np.float32), most)
    return out
