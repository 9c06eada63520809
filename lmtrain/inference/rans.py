"""An entropy coder: many lanes side by side, each a range asymmetric numeral system with integer tables.

Shapes in names: B lanes, V symbols of the alphabet, T steps.

The frequencies of a step are integers that sum to 2^30, made from float32 log-probabilities by arithmetic in float64
that both sides repeat; from there on everything is integers. 2^30 and not the usual 2^24: with 50,000 symbols, each of
which needs a frequency of at least one, 24 bits would cost 0.2 % of the file.

A lane's state x is a number in [2^47, 2^63). Coding a symbol of frequency f after cumulated c is
x -> floor(x / f) * 2^30 + c + x mod f [1], before which 16-bit words leave x until the result fits. x / f is at least
2^17 then, so that rounding costs less than 1.1e-5 bits a symbol, and 6e-7 on average.

A numeral system gives back last what it took first. So the encoder takes the steps from the last to the first, and the
decoder reads the words in the order of the steps.

[1] Duda, Asymmetric numeral systems: entropy coding combining speed of Huffman coding with compression rate of
arithmetic coding, 2013. [2] Giesen, Interleaved entropy coders, 2014 (lanes side by side).
"""

from __future__ import annotations

import numpy as np

from lmtrain.errors import InputError

BITS = 30
TOTAL = 1 << BITS
"""Sum of the frequencies of a step."""
WORD = np.dtype("<u2")
_LOW = np.uint64(1 << 47)
_OUT = np.uint64(63 - BITS)
_WORD_BITS = np.uint64(16)
_WORD = np.uint64(0xFFFF)
_MASK = np.uint64(TOTAL - 1)


def frequencies(logp_BV: np.ndarray) -> np.ndarray:
    """uint64 [B, V]: every symbol at least 1, each row sums to TOTAL; of log-probabilities in nats, float32 [B, V].

    What rounding leaves over goes to the likeliest symbol (of equals, the first). Raises InputError for probabilities
    that are not numbers, and for more symbols than TOTAL / 2.
    """
    V = logp_BV.shape[1]
    if V > TOTAL // 2:
        raise InputError(f"an alphabet of {V} symbols is too large to be coded; at most {TOTAL // 2}")
    p_BV = np.exp(logp_BV.astype(np.float64))
    sum_B1 = p_BV.sum(axis=1, keepdims=True)
    if not (np.isfinite(sum_B1).all() and (sum_B1 > 0).all()):
        raise InputError("the model's probabilities are not finite: nothing can be coded with them")
    f_BV = np.floor(p_BV * ((TOTAL - V) / sum_B1)).astype(np.int64) + 1
    at_B = p_BV.argmax(axis=1)
    rows_B = np.arange(len(f_BV))
    f_BV[rows_B, at_B] += TOTAL - f_BV.sum(axis=1)
    assert (f_BV > 0).all()
    return np.asarray(f_BV.astype(np.uint64))


def intervals(f_BV: np.ndarray, x_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(frequency, cumulated frequency before it), uint64 [B] each, of the symbols x_B."""
    rows_B = np.arange(len(x_B))
    upto_BV = f_BV.cumsum(axis=1)
    frequency_B = f_BV[rows_B, x_B]
    return frequency_B, upto_BV[rows_B, x_B] - frequency_B


class Encoder:
    """Takes the intervals of steps from the last to the first; what it gave out is read in the opposite order."""

    def __init__(self, lanes: int) -> None:
        self.state_B = np.full(lanes, _LOW, dtype=np.uint64)

    def push(self, frequency_B: np.ndarray, before_B: np.ndarray, *, lanes: int | None = None) -> np.ndarray:
        """The words that leave, uint16, in the order in which the decoder wants them.

        lanes: the step has symbols for the first so many lanes alone.
        """
        state_B = self.state_B[:lanes]
        first_B = state_B >= (frequency_B << _OUT)
        low_B = (state_B & _WORD).astype(WORD)
        state_B[first_B] >>= _WORD_BITS
        # A frequency under 2^14 may need room for two words (not three: x / 2^32 < 2^31). The decoder takes the later
        # one of a lane first, in one round with the words of the lanes that gave one.
        second_B = state_B >= (frequency_B << _OUT)
        words = np.where(second_B, (state_B & _WORD).astype(WORD), low_B)[first_B]
        state_B[second_B] >>= _WORD_BITS
        if second_B.any():
            words = np.concatenate([words, low_B[second_B]])
        quotient_B, rest_B = np.divmod(state_B, frequency_B)
        state_B[:] = (quotient_B << np.uint64(BITS)) + rest_B + before_B
        return words


class Decoder:
    """Gives back the steps from the first to the last. state_B: what the encoder's states were in the end."""

    def __init__(self, state_B: np.ndarray) -> None:
        self.state_B = state_B.astype(np.uint64)

    def peek(self, *, lanes: int | None = None) -> np.ndarray:
        """uint64 [B]: where in [0, TOTAL) the next symbols' intervals lie."""
        return np.asarray(self.state_B[:lanes] & _MASK)

    def pop(
        self, frequency_B: np.ndarray, before_B: np.ndarray, words: np.ndarray, at: int, *, lanes: int | None = None
    ) -> int:
        """Take the symbols of these intervals off; words[at:] comes next. Returns the place after what was read.

        Raises IndexError when the words run out: they are not what the encoder gave.
        """
        state_B = self.state_B[:lanes]
        state_B[:] = frequency_B * (state_B >> np.uint64(BITS)) + (state_B & _MASK) - before_B
        while (short_B := state_B < _LOW).any():
            count = int(short_B.sum())
            if at + count > len(words):
                raise IndexError("the words ran out")
            state_B[short_B] = (state_B[short_B] << _WORD_BITS) | words[at : at + count].astype(np.uint64)
            at += count
        return at


def symbols_at(f_BV: np.ndarray, place_B: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(symbol, frequency, cumulated frequency before it) of the intervals in which `place_B` lies."""
    upto_BV = f_BV.cumsum(axis=1)
    x_B = (upto_BV <= place_B[:, None]).sum(axis=1)
    rows_B = np.arange(len(x_B))
    frequency_B = f_BV[rows_B, x_B]
    return x_B, frequency_B, upto_BV[rows_B, x_B] - frequency_B
