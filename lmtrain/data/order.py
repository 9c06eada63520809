"""The order of a run is a pure function: position n -> (corpus, epoch, index) -> row. No array of N, no state.

A corpus by integer weights: one period of a table in which every prefix is within one sample of its share (Tijdeman).
A row by a keyed permutation of (seed, source, epoch): a Feistel network over an even number of bits, walked along its
cycle until it falls inside [0, N).

References
[1] M. Luby, C. Rackoff: How to construct pseudorandom permutations from pseudorandom functions. SIAM J. Comput. 1988.
[2] J. Black, P. Rogaway: Ciphers with arbitrary finite domains. CT-RSA 2002. (Cycle walking.)
[3] R. Tijdeman: The chairman assignment problem. Discrete Mathematics 32, 1980.
[4] D. Stafford: Better bit mixing, variant 13, as in SplitMix64. (The 64-bit finaliser.)

Shapes: N positions, C corpora, W the sum of the weights.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Sequence

import numpy as np

from lmtrain.errors import ConfigError

VERSION = 1
"""Goes up when the same seed would give another order."""

ROUNDS, ROUNDS_SMALL = 6, 12
"""Rounds of the network; more below 9 bits, where the halves are so small that six leave a measurable bias."""

LONGEST_PERIOD = 10_000

_GOLDEN = np.array([0x9E3779B97F4A7C15], np.uint64)
_ONE, _TWO = np.array([0xBF58476D1CE4E5B9], np.uint64), np.array([0x94D049BB133111EB], np.uint64)
_BLOCKS, _INSIDE = np.array([0xD1B54A32D192ED03], np.uint64), np.array([0x8CB92BA72F3D8DD7], np.uint64)


def _mix(x_N: np.ndarray) -> np.ndarray:
    """uint64 finaliser [4]: every bit of the result depends on every bit of x. Always a new array."""
    x_N = x_N ^ (x_N >> np.uint64(30))
    x_N *= _ONE
    x_N ^= x_N >> np.uint64(27)
    x_N *= _TWO
    x_N ^= x_N >> np.uint64(31)
    return x_N


def _round_keys(key_N: np.ndarray, rounds: int) -> list[np.ndarray]:
    return [_mix(key_N + np.uint64(number) * _GOLDEN) for number in range(1, rounds + 1)]


def _half(size: int) -> int:
    """Half the width, in bits, of the smallest even-width domain that holds [0, size)."""
    return max(1, ((size - 1).bit_length() + 1) // 2)


def _walk(value_N: np.ndarray, size: int, key_N: np.ndarray, *, back: bool) -> np.ndarray:
    half = _half(size)
    mask, shift = np.uint64((1 << half) - 1), np.uint64(half)

    def network(value: np.ndarray, key: np.ndarray, keys: list[np.ndarray]) -> np.ndarray:
        # Over 4 bits and more every Feistel network is an even permutation. Exchanging 0 and 1 under half of the keys
        # makes the odd ones as likely; without it small sources (5, 6, ... rows) see some orders 8 % more often.
        exchange = key & np.uint64(1)
        if not back:
            value = value ^ ((value < 2) & exchange.astype(np.bool_))
        left, right = value >> shift, value & mask
        for round_key in reversed(keys) if back else keys:
            if back:
                left, right = (right ^ _mix(left + round_key)) & mask, left
            else:
                left, right = right, (left ^ _mix(right + round_key)) & mask
        value = (left << shift) | right
        return value ^ ((value < 2) & exchange.astype(np.bool_)) if back else value

    keys = _round_keys(key_N, ROUNDS if half > 4 else ROUNDS_SMALL)
    out = network(value_N.astype(np.uint64), key_N, keys)
    outside = np.flatnonzero(out >= size)
    while outside.size:
        if key_N.size == 1:
            again = network(out[outside], key_N, keys)
        else:
            again = network(out[outside], key_N[outside], [key[outside] for key in keys])
        out[outside] = again
        outside = outside[again >= size]
    return out.astype(np.int64)


def permute(index_N: np.ndarray, size: int, key_N: np.ndarray) -> np.ndarray:
    """int64 [N]: where a keyed permutation of [0, size) sends index_N. key_N: uint64, [1] for all or [N] for each."""
    return _walk(index_N, size, key_N, back=False) if size > 1 else np.zeros(len(index_N), np.int64)


def unpermute(index_N: np.ndarray, size: int, key_N: np.ndarray) -> np.ndarray:
    """The inverse of `permute`."""
    return _walk(index_N, size, key_N, back=True) if size > 1 else np.zeros(len(index_N), np.int64)


class Shuffle:
    """Epoch after epoch of the rows of one source, each in another order.

    size: rows of the source. block: rows that stay together (1 = fully random): blocks come in random order, and the
    rows of a block come one after the other, in random order too, so that reading stays local. The last block may be
    shorter. source: what tells sources apart, the corpus's fingerprint.
    """

    def __init__(self, size: int, *, block: int, seed: int, source: str) -> None:
        if size < 1 or block < 1:
            raise ConfigError(f"an order of {size} rows in blocks of {block}; both must be at least 1")
        self.size = size
        self.block = min(block, size)
        self._blocks = -(-size // self.block)
        digest = hashlib.sha256(f"lmtrain order {VERSION}\n{seed}\n{source}".encode()).digest()
        self._key = np.frombuffer(digest[:8], "<u8").astype(np.uint64)

    def rows(self, position_N: np.ndarray) -> np.ndarray:
        """int64 [N]: the rows at positions of the endless sequence of epochs; any positions, in any order."""
        epoch_N, index_N = np.divmod(np.asarray(position_N, np.int64), self.size)
        if epoch_N.size and (epoch_N == epoch_N[0]).all():
            epoch_N = epoch_N[:1]  # one key for all: half the work
        key_N = _mix(self._key + (epoch_N.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
        if self.block == 1:
            return permute(index_N, self.size, key_N)
        return self._in_blocks(index_N, key_N)

    def _in_blocks(self, index_N: np.ndarray, key_N: np.ndarray) -> np.ndarray:
        order_N = _mix(key_N ^ _BLOCKS)
        last = self.size - (self._blocks - 1) * self.block  # rows of the last block, 1 .. block
        # The last block stands where the permutation puts it; what comes after it is moved by what it lacks.
        place_N = unpermute(np.full(len(order_N), self._blocks - 1), self._blocks, order_N)
        after_N = index_N >= place_N * self.block + last
        turn_N, inside_N = np.divmod(index_N + after_N * (self.block - last), self.block)
        block_N = permute(turn_N, self._blocks, order_N)
        inner_N = _mix((key_N ^ _INSIDE) + block_N.astype(np.uint64) * _GOLDEN)
        out_N = np.empty(len(index_N), np.int64)
        short_N = block_N == self._blocks - 1
        for these_N, size in ((short_N, last), (~short_N, self.block)):
            out_N[these_N] = permute(inside_N[these_N], size, inner_N[these_N])
        out_N += block_N * self.block
        return out_N


class Mixture:
    """Which corpus each position of the run reads, by integer weights.

    In every prefix of the run the count of each corpus differs from its share by less than one sample: at most
    1 - 1 / (2 C - 2) [3]. The table is one period; every later period repeats it, so a position costs O(1).
    """

    def __init__(self, weights: Sequence[int]) -> None:
        if not weights or any(weight < 1 for weight in weights):
            raise ConfigError(f"data.corpus weights {list(weights)}; wanted whole numbers of at least 1")
        common = math.gcd(*weights)
        self.weights_C = np.array([weight // common for weight in weights], np.int64)
        self.period = int(self.weights_C.sum())
        if self.period > LONGEST_PERIOD:
            raise ConfigError(
                f"data.corpus weights {list(weights)} repeat after {self.period} rows; "
                f"use smaller whole numbers, with a sum of at most {LONGEST_PERIOD}"
            )
        self.table_W = _chairmen(self.weights_C.tolist())
        self._before_W = np.zeros(self.period, np.int64)  # how often the same corpus stands earlier in the period
        for corpus in range(len(weights)):
            (at,) = np.nonzero(self.table_W == corpus)
            self._before_W[at] = np.arange(len(at))

    def locate(self, position_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(corpus, position in that corpus's own sequence of epochs) of positions of the run, int64 [N] each."""
        turn_N, at_N = np.divmod(np.asarray(position_N, np.int64), self.period)
        corpus_N = self.table_W[at_N]
        return corpus_N, turn_N * self.weights_C[corpus_N] + self._before_W[at_N]


def _chairmen(weights: list[int]) -> np.ndarray:
    """One period of Tijdeman's assignment [3], in whole numbers.

    With deviation D = 1 - 1/m, m = 2 C - 2, the j-th turn of a corpus of share w / W may come from step
    ceil((j - D) W / w) on and must have come by step floor((j - 1 + D) W / w) + 1; the earliest deadline goes first.
    """
    if len(weights) == 1:
        return np.zeros(weights[0], np.int64)
    total, m = sum(weights), 2 * len(weights) - 2
    waiting: list[tuple[int, int, int]] = []  # (from step, corpus, turn)
    ready: list[tuple[int, int, int]] = []  # (by step, corpus, turn)

    def enter(corpus: int, turn: int) -> None:
        step = -(-total * (m * turn - m + 1) // (m * weights[corpus]))
        heapq.heappush(waiting, (step, corpus, turn))

    for corpus in range(len(weights)):
        enter(corpus, 1)
    table = []
    for step in range(1, total + 1):
        while waiting and waiting[0][0] <= step:
            _, corpus, turn = heapq.heappop(waiting)
            by = total * (m * turn - 1) // (m * weights[corpus]) + 1
            heapq.heappush(ready, (by, corpus, turn))
        by, corpus, turn = heapq.heappop(ready)
        assert by >= step, "Tijdeman's theorem: no deadline is ever missed"
        table.append(corpus)
        enter(corpus, turn + 1)
    return np.array(table, np.int64)
