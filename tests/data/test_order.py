"""The order: a bijection for every size, without pattern, different for every seed, source and epoch."""

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmtrain.data.order import LONGEST_PERIOD, Mixture, Shuffle, permute, unpermute
from lmtrain.errors import ConfigError

SIZES = [1, 2, 3, 4, 5, 7, 16, 17, 255, 256, 257, 1000, 2**12 + 1, 2**16 - 1, 2**16, 2**16 + 1, 2**18 + 1]
P_VALUE = 1e-4
GOLDEN = [
    [3, 7, 5, 8, 0, 9, 1, 6, 4, 2],
    [3, 2, 0, 1, 5, 6, 7, 4, 9, 8],
    [801767976659, 1089249278918, 967249999538, 575246072226],
    [0, 2, 0, 1, 0, 2],
]


def key(number):
    return np.array([number], np.uint64)


def epoch_of(shuffle, epoch):
    return shuffle.rows(np.arange(shuffle.size) + epoch * shuffle.size)


def chi_square(counts, expected):
    """p-value of counts against equal expectation (regularised upper incomplete gamma function)."""
    counts = np.asarray(counts, float)
    statistic = float(((counts - expected) ** 2 / expected).sum())
    half = torch.tensor([(len(counts) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


# ---- a bijection -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block", [1, 2, 3, 64, 1000, 10**9])
def test_every_epoch_covers_every_row_once(size, block):
    shuffle = Shuffle(size, block=block, seed=4, source="corpus")
    for epoch in (0, 1, 12_345):
        rows = epoch_of(shuffle, epoch)
        assert rows.dtype == np.int64
        assert np.array_equal(np.sort(rows), np.arange(size))


@settings(max_examples=150, deadline=None)
@given(size=st.integers(1, 3000), block=st.integers(1, 3100), seed=st.integers(0, 2**63), epoch=st.integers(0, 10**9))
def test_any_size_any_block(size, block, seed, epoch):
    rows = epoch_of(Shuffle(size, block=block, seed=seed, source="x"), epoch)
    assert np.array_equal(np.sort(rows), np.arange(size))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 2**16 + 1, 10**12 + 7])
def test_the_inverse(size):
    index = np.unique(np.append(np.random.default_rng(0).integers(0, size, 500), [0, size - 1]))
    for number in range(5):
        assert np.array_equal(unpermute(permute(index, size, key(number)), size, key(number)), index)
        assert np.array_equal(permute(unpermute(index, size, key(number)), size, key(number)), index)


def test_one_key_for_all_or_each_its_own_is_the_same():
    index = np.arange(1000)
    keys = np.random.default_rng(0).integers(0, 2**63, 1000).astype(np.uint64)
    together = permute(index, 1000, keys)
    assert together.tolist() == [int(permute(index[i : i + 1], 1000, keys[i : i + 1])[0]) for i in range(1000)]


@pytest.mark.parametrize("block", [1, 5])
def test_a_row_depends_on_its_position_alone(block):
    """Asked singly, in another order, or across epochs: the same row."""
    shuffle = Shuffle(13, block=block, seed=1, source="x")
    whole = shuffle.rows(np.arange(100))
    assert [int(shuffle.rows(np.array([n]))[0]) for n in range(100)] == whole.tolist()
    some = np.random.default_rng(0).integers(0, 100, 300)
    assert np.array_equal(shuffle.rows(some), whole[some])
    assert shuffle.rows(np.arange(0)).size == 0


def test_rows_beyond_32_bits():
    size = 10**12
    for block in (1, 4096):
        shuffle = Shuffle(size, block=block, seed=1, source="x")
        rows = shuffle.rows(np.arange(20_000) + 7 * size + size // 3)
        assert len(np.unique(rows)) == 20_000
        assert rows.min() >= 0
        assert rows.max() < size
        assert len(np.unique(rows // block)) == -(-20_000 // block) + (block > 1)  # and a block cut at both ends
        if block == 1:
            cells = np.bincount(rows * 20 // size, minlength=20)
            assert chi_square(cells, 1000) > P_VALUE


def test_the_order_of_a_seed_stays_what_it_was():
    """Literal values: if they change, runs cannot be resumed, and `order.VERSION` must go up."""
    assert epoch_of(Shuffle(10, block=1, seed=0, source="a"), 0).tolist() == GOLDEN[0]
    assert epoch_of(Shuffle(10, block=4, seed=0, source="a"), 3).tolist() == GOLDEN[1]
    assert Shuffle(2**40, block=1, seed=5, source="b").rows(np.arange(4) + 2**50).tolist() == GOLDEN[2]
    assert Mixture([3, 1, 2]).table_W.tolist() == GOLDEN[3]


# ---- blocks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "block"), [(100, 10), (103, 10), (7, 3), (10, 9), (5, 5), (2**12 + 1, 64)])
def test_rows_of_a_block_stay_together(size, block):
    shuffle = Shuffle(size, block=block, seed=0, source="x")
    for epoch in range(6):
        rows = epoch_of(shuffle, epoch)
        changes = np.count_nonzero(np.diff(rows // block))
        assert changes == -(-size // block) - 1  # each block is entered once and left once


def test_blocks_their_insides_and_the_short_one_move():
    shuffle = Shuffle(103, block=10, seed=0, source="x")
    orders, insides, short = set(), set(), set()
    for epoch in range(300):
        rows = epoch_of(shuffle, epoch)
        blocks = rows[np.append(True, np.diff(rows // 10) != 0)] // 10
        orders.add(tuple(blocks.tolist()))
        short.add(blocks.tolist().index(10))
        insides |= {tuple((rows[rows // 10 == b] % 10).tolist()) for b in range(10)}
    assert len(orders) == 300
    assert len(insides) > 2980  # of 10! = 3,628,800
    assert short == set(range(11))


# ---- no pattern ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_small_sources_see_all_orders_equally_often(size):
    epochs = 40_000
    rows = Shuffle(size, block=1, seed=7, source="x").rows(np.arange(size * epochs)).reshape(epochs, size)
    seen = Counter(map(tuple, rows.tolist()))
    counts = [seen[order] for order in permutations(range(size))]
    assert sum(counts) == epochs
    assert chi_square(counts, epochs / math.factorial(size)) > P_VALUE


@pytest.mark.parametrize("size", [16, 17, 50, 257, 300])
def test_pairs_of_positions_go_to_all_pairs_of_rows(size):
    """Over epochs: where neighbours, the ends, and positions one high bit apart are sent, jointly."""
    epochs = 60_000
    base = np.arange(epochs) * size
    high = 1 << ((size - 1).bit_length() - 1)
    shuffle = Shuffle(size, block=1, seed=11, source="x")
    cells = min(size, 12)
    for one, two in ((0, 1), (0, size - 1), (1, min(1 + high, size - 1)), (size // 2, size // 2 + 1)):
        a, b = shuffle.rows(base + one), shuffle.rows(base + two)
        assert not (a == b).any()
        assert chi_square(np.bincount(a, minlength=size), epochs / size) > P_VALUE
        assert chi_square(np.bincount((b - a) % size, minlength=size)[1:], epochs / (size - 1)) > P_VALUE
        if size <= 50:  # every ordered pair
            pairs = np.bincount(a * size + b, minlength=size * size).reshape(size, size)
            off = pairs[~np.eye(size, dtype=bool)]
            assert chi_square(off, epochs / (size * (size - 1))) > P_VALUE
        else:
            joint = np.bincount((a * cells // size) * cells + b * cells // size, minlength=cells * cells)
            assert (
                np.abs(joint - epochs / cells**2) < 6 * math.sqrt(epochs / cells**2) + epochs / cells**2 * 0.15
            ).all()


@pytest.mark.parametrize("size", [2**16, 2**16 + 1, 50_000])
def test_no_bits_of_the_row_follow_bits_of_the_position(size):
    """Every parity of one or two position bits against every parity of one or two row bits: no correlation.

    (A known loader's permutation has an output parity that two input bits determine: a correlation of 1.)
    """
    bits = (size - 1).bit_length()
    masks = [1 << i | 1 << j for i in range(bits) for j in range(i + 1)]
    index = np.arange(size)
    rows = epoch_of(Shuffle(size, block=1, seed=3, source="x"), 0)

    def signs(values):
        return np.stack([1 - 2 * (np.bitwise_count(values & mask) & 1).astype(np.float32) for mask in masks])

    def centred(s):
        s = s - s.mean(axis=1, keepdims=True)
        return s / np.maximum(np.linalg.norm(s, axis=1, keepdims=True), 1e-9)

    correlation = centred(signs(index)) @ centred(signs(rows)).T
    assert np.abs(correlation).max() * math.sqrt(size) < 5.5  # 18,496 normals: the largest is about 4.1
    assert np.abs(np.corrcoef(index[:-1], np.diff(rows))).min() < 0.02


def test_epochs_seeds_and_sources_give_unrelated_orders():
    size, runs = 1009, []
    for seed in range(6):
        for source in ("a", "b"):
            for epoch in range(6):
                runs.append(epoch_of(Shuffle(size, block=1, seed=seed, source=source), epoch))
    runs = np.array(runs)
    fixed = (runs[:, None, :] == runs[None, :, :]).sum(-1)[~np.eye(len(runs), dtype=bool)]
    assert fixed.max() <= 10  # rows at equal positions in two unrelated orders: Poisson(1)
    assert abs(fixed.mean() - 1.0) < 0.1
    shifted = (runs[:, None, 1:] == runs[None, :, :-1]).sum(-1)
    assert shifted.max() <= 10


def test_a_seed_and_the_next_epoch_never_collide():
    """seed + epoch as a key would make epoch 1 of seed 0 the epoch 0 of seed 1."""
    seen = {}
    for seed in range(40):
        shuffle = Shuffle(64, block=1, seed=seed, source="x")
        for epoch in range(40):
            order = tuple(epoch_of(shuffle, epoch).tolist())
            assert order not in seen, (seed, epoch, seen[order])
            seen[order] = (seed, epoch)


# ---- mixtures --------------------------------------------------------------------------------------------------------


WEIGHTS = [
    [1],
    [5],
    [1, 1],
    [1, 2],
    [7, 2, 1],
    [1] * 9,
    [100, 1],
    [9_000, 999, 1],
    [3, 5, 7, 11, 13],
    [4, 2],
    [1, 0x400],
]


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_prefix_is_within_one_sample_of_its_shares(weights):
    mixture = Mixture(weights)
    position = np.arange(3 * mixture.period + 5)
    corpus, _ = mixture.locate(position)
    seen = np.cumsum(corpus[:, None] == np.arange(len(weights)), axis=0)
    share = (position[:, None] + 1) * np.array(weights) / sum(weights)
    bound = 1 - 1 / (2 * len(weights) - 2) if len(weights) > 1 else 0
    assert np.abs(seen - share).max() <= bound + 1e-9 < 1 + 1e-9


@settings(max_examples=100, deadline=None)
@given(weights=st.lists(st.integers(1, 60), min_size=1, max_size=12))
def test_any_weights(weights):
    mixture = Mixture(weights)
    position = np.arange(2 * mixture.period)
    corpus, own = mixture.locate(position)
    seen = np.cumsum(corpus[:, None] == np.arange(len(weights)), axis=0)
    share = (position[:, None] + 1) * np.array(weights) / sum(weights)
    assert np.abs(seen - share).max() < 1
    for number in range(len(weights)):  # each corpus is read from its beginning, without gaps
        assert own[corpus == number].tolist() == list(range(int((corpus == number).sum())))


def test_a_position_far_away_costs_the_same():
    mixture = Mixture([7, 2, 1])
    far = 10**15
    corpus, own = mixture.locate(np.arange(far, far + 10))
    near, from_start = mixture.locate(np.arange(10))
    assert corpus.tolist() == near.tolist()
    assert (own - from_start).tolist() == (far // 10 * np.array([7, 2, 1])[corpus]).tolist()


def test_weights_that_cannot_be_are_refused():
    for weights in ([], [0, 1], [-1]):
        with pytest.raises(ConfigError, match="at least 1"):
            Mixture(weights)
    with pytest.raises(ConfigError, match=f"repeat after 10001 rows; .* at most {LONGEST_PERIOD}"):
        Mixture([10_000, 1])
    assert Mixture([20_000, 10_000]).period == 3
    for size, block in ((0, 1), (5, 0)):
        with pytest.raises(ConfigError, match="at least 1"):
            Shuffle(size, block=block, seed=0, source="x")
