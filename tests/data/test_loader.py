"""The loader: a pure function of (step, rank, world) that covers every epoch exactly once."""

import json
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch

from lmtrain.config import build
from lmtrain.data.loader import DataConfig, Loader, compare_order
from lmtrain.data.shards import open_corpus
from lmtrain.errors import ConfigError, CorpusError
from tests.data.small import documents_of, one_split, random_documents, write

CONTEXT = 16


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A corpus of several blocks, 3 splits, some dropped documents; the last row of `train` is padded."""
    folder = tmp_path_factory.mktemp("corpora") / "small"
    write(folder, [random_documents(60, seed=seed, longest=90) for seed in (1, 2)], dropped=["0:3", "1:0"])
    assert open_corpus(folder).split("train").symbols % CONTEXT
    return folder


def load(*folders, seed=0, masking=None, weights=None, **config):
    shares = [{"path": str(f), "weight": w} for f, w in zip(folders, weights or [1] * len(folders), strict=True)]
    config = DataConfig(**{"corpus": shares, "context": CONTEXT, "global_batch": 12, **config})
    return Loader([open_corpus(folder) for folder in folders], config, seed=seed, masking=masking)


def flat(batch):
    """All that a batch says, row by row, as hashable values."""
    first = batch.cond.first_BT.tolist() if batch.cond.first_BT is not None else [None] * len(batch.x_BT)
    columns = (
        batch.x_BT.tolist(),
        batch.weight_BT.tolist(),
        batch.cond.start_B.tolist(),
        batch.position_B.tolist(),
        first,
    )
    return [json.dumps(row) for row in zip(*columns, strict=True)]


def whole_step(loader, step, world):
    """The rows of the global batch in order, put together from all ranks."""
    found = {}
    for rank in range(world):
        for batch in loader.batch(step, rank, world):
            assert batch.index not in found
            found[batch.index] = flat(batch)
    rows = []
    for index in sorted(found):
        assert index == len(rows)
        rows += found[index]
    return rows


# ---- coverage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 2**16 + 1])
@pytest.mark.parametrize(("global_batch", "block"), [(5, 1), (8, 1), (6, 1000)])
def test_every_epoch_reads_every_symbol_once(tmp_path, rows, global_batch, block):
    """Rows of one symbol: N rows are N symbols. Epochs begin wherever they do inside a batch."""
    one_split(tmp_path, [np.random.default_rng(0).integers(0, 256, rows - 1).astype(np.uint8).tobytes()])
    global_batch *= 50 if rows > 1000 else 1
    loader = load(tmp_path, context=1, global_batch=global_batch, block_windows=block)
    split = open_corpus(tmp_path).split("train")
    assert split.rows(1) == rows
    epochs = 2 if rows > 1000 else 7
    steps = -(-epochs * rows // global_batch)
    positions, symbols = [], []
    for step in range(steps):
        (batch,) = loader.batch(step, 0, 1)
        positions.append(batch.position_B.numpy())
        symbols.append(batch.x_BT.numpy()[:, 0])
    positions, symbols = np.concatenate(positions), np.concatenate(symbols)
    assert np.array_equal(symbols, split.read(0, rows)[positions])
    orders = positions[: epochs * rows].reshape(epochs, rows)
    assert np.array_equal(np.sort(orders, axis=1), np.tile(np.arange(rows), (epochs, 1)))
    if rows > 3:
        assert not np.array_equal(orders[0], orders[1])


def test_an_epoch_of_rows_is_the_split(small):
    loader = load(small, global_batch=1)
    corpus = open_corpus(small)
    split = corpus.split("train")
    raws = documents_of(
        [random_documents(60, seed=seed, longest=90) for seed in (1, 2)],
        lambda _, b: b < 700,
        dropped=["0:3", "1:0"],
    )
    whole = np.concatenate([[*raw, 256] for raw in raws])
    rows = split.rows(CONTEXT)
    out = np.full(rows * CONTEXT, -1)
    for step in range(rows):
        (batch,) = loader.batch(step, 0, 1)
        at, n = int(batch.position_B), int(batch.weight_BT.sum())
        assert batch.weight_BT[0, :n].all()
        assert (out[at : at + n] == -1).all()
        out[at : at + n] = batch.x_BT[0, :n]
        assert batch.cond.start_B[0] == (whole[at - 1] if at else 256)
    assert np.array_equal(out[: len(whole)], whole)
    assert (out[len(whole) :] == -1).all()


# ---- a pure function -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masking", [False, True])
def test_the_union_over_ranks_is_the_same_for_every_world(small, masking):
    for step in (0, 3, 10**6):
        reference = whole_step(load(small, global_batch=48, masking=masking), step, 1)
        assert len(reference) == 48
        for world in (1, 2, 3, 8):
            for micro in (None, 1, 2):
                loader = load(small, global_batch=48, micro_batch=micro, masking=masking)
                assert whole_step(loader, step, world) == reference


def test_micro_batches_go_round_the_ranks(small):
    loader = load(small, global_batch=24, micro_batch=2)
    assert loader.layout(3) == (2, 4)
    assert loader.micro_batches(3) == 4
    for rank in range(3):
        assert [batch.index for batch in loader.batch(5, rank, 3)] == [2 * (a * 3 + rank) for a in range(4)]
    one = load(small, global_batch=24)
    assert one.layout(3) == (8, 1)
    assert [batch.index for batch in one.batch(5, 2, 3)] == [16]


@pytest.mark.parametrize("block", [1, 7])
def test_any_step_at_any_time_by_any_loader(small, block):
    """Backwards, in a new loader, in between others: a step has one batch."""
    steps = [*range(30), 8191, 8192, 700_000, 10**9]
    one = load(small, block_windows=block)
    first = {step: whole_step(one, step, 1) for step in steps}
    two = load(small, block_windows=block)
    for step in reversed(steps):
        assert whole_step(two, step, 1) == first[step]
        assert whole_step(one, step, 2) == first[step]
    assert len({json.dumps(rows) for rows in first.values()}) == len(steps)
    assert whole_step(load(small, seed=1, block_windows=block), 0, 1) != first[0]
    with pytest.raises(ConfigError, match="no step -1"):
        one.batch(-1, 0, 1)


@pytest.mark.parametrize("context", [1, 16, 100_000])
def test_the_total_weight_is_that_of_the_rows(small, context):
    loader = load(small, context=context, global_batch=6)
    totals = []
    for step in range(40 if context < 1000 else 3):
        total = sum(float(batch.weight_BT.double().sum()) for r in range(3) for batch in loader.batch(step, r, 3))
        assert loader.total_weight(step) == total
        totals.append(total)
    if context == 16:
        assert min(totals) < max(totals) == 96.0  # the padded row was met
    if context == 100_000:
        assert totals[0] == 6 * open_corpus(small).split("train").symbols


def test_masking_marks_the_beginnings_of_documents(small):
    split = open_corpus(small).split("train")
    begins = set(np.append(0, split.document_ends()[:-1]).tolist())
    loader = load(small, document_masking=True)
    marked = 0
    for step in range(20):
        (batch,) = loader.batch(step, 0, 1)
        for at, first in zip(batch.position_B.tolist(), batch.cond.first_BT, strict=True):
            found = {at + t for t in torch.nonzero(first)[:, 0].tolist()}
            assert found == {p for p in begins if at <= p < min(at + CONTEXT, split.symbols)}
            marked += len(found)
    assert marked > 20
    (plain,) = load(small).batch(0, 0, 1)
    assert plain.cond.first_BT is None
    (masked,) = load(small, masking=True).batch(0, 0, 1)
    assert torch.equal(plain.x_BT, masked.x_BT)


# ---- divisibility ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "micro", "world", "message"),
    [
        (50, None, 8, "data.global_batch = 50 does not divide among 8 ranks; use 48 or 56"),
        (4, None, 8, "data.global_batch = 4 does not divide among 8 ranks; use 8"),
        (
            50,
            5,
            8,
            "data.global_batch = 50 does not divide into data.micro_batch = 5 x 8 ranks = 40 rows; use 40 or 80",
        ),
        (
            48,
            16,
            2,
            "data.global_batch = 48 does not divide into data.micro_batch = 16 x 2 ranks = 32 rows; "
            "use 32 or 64, or data.micro_batch = 12",
        ),
    ],
)
def test_what_does_not_divide_names_what_would(small, rows, micro, world, message):
    loader = load(small, global_batch=rows, micro_batch=micro)
    for call in (loader.layout, lambda w: loader.batch(0, 0, w), loader.micro_batches):
        with pytest.raises(ConfigError) as error:
            call(world)
        assert str(error.value) == message


@pytest.mark.parametrize("rows", range(1, 30))
def test_the_numbers_that_are_named_do(rows):
    for world in range(1, 9):
        for micro in (None, *(m for m in range(1, rows + 1) if rows % m == 0)):
            config = DataConfig(corpus="x", global_batch=rows, micro_batch=micro)
            try:
                found, accumulation = config.layout(world)
                assert found * accumulation * world == rows
                assert micro in (None, found)
            except ConfigError as error:
                advice = str(error).split("; use ")[1].replace(",", "").split()
                assert rows % ((micro or 1) * world)
                for number in (
                    int(word)
                    for word in advice[: advice.index("data.micro_batch") if "data.micro_batch" in advice else None]
                    if word.isdigit()
                ):
                    DataConfig(corpus="x", global_batch=number, micro_batch=micro).layout(world)
                if "data.micro_batch" in advice:
                    DataConfig(corpus="x", global_batch=rows, micro_batch=int(advice[-1])).layout(world)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({}, "corpus is not given"),
        ({"corpus": 5}, r"corpus.* = 5"),
        ({"corpus": []}, "names? .*at least one corpus"),
        (
            {"corpus": "x", "global_batch": 50, "micro_batch": 8},
            "50 is no multiple of data.micro_batch = 8; use 48 or 56",
        ),
        ({"corpus": "x", "contxt": 3}, "did you mean 'context'"),
        ({"corpus": [{"path": "a", "wieght": 3}]}, "did you mean 'weight'"),
        ({"corpus": [{"path": "a", "weight": 0}]}, "weight = 0"),
        ({"corpus": [{"path": "a"}, {"path": "./a/"}]}, "names a more than once"),
        ({"corpus": "x", "context": 0}, "context = 0"),
        ({"corpus": "x", "block_windows": 0}, "block_windows = 0"),
        ({"corpus": "x", "micro_batch": 0}, "micro_batch = 0"),
    ],
)
def test_bad_sections_are_one_line(tree, message):
    with pytest.raises(ConfigError, match=message) as error:
        build(DataConfig, tree, where="c.yaml")
    assert "\n" not in str(error.value)


# ---- mixtures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Corpora of which every row tells its source: bytes 0-9, 10-19, 20-29; sizes very different."""
    folder = tmp_path_factory.mktemp("three")
    for number, count in enumerate((400, 37, 5)):
        random = np.random.default_rng(number)
        raws = [random.integers(10 * number, 10 * number + 10, 31).astype(np.uint8).tobytes() for _ in range(count)]
        one_split(folder / str(number), raws, label=str(number))
    return [folder / str(number) for number in range(3)]


def test_a_mixture_gives_each_corpus_its_share_and_its_epochs(three):
    weights = [5, 3, 1]
    loader = load(*three, weights=weights, global_batch=4, context=8)
    sources, places = [], [[], [], []]
    for step in range(900):
        (batch,) = loader.batch(step, 0, 1)
        assert loader.total_weight(step) == float(batch.weight_BT.sum())
        for row, position in zip(batch.x_BT.tolist(), batch.position_B.tolist(), strict=True):
            (source,) = {symbol // 10 for symbol in row if symbol < 256}
            sources.append(source)
            places[source].append(position // 8)
    sources = np.array(sources)
    seen = np.cumsum(sources[:, None] == np.arange(3), axis=0)
    share = np.arange(1, len(sources) + 1)[:, None] * np.array(weights) / 9
    assert np.abs(seen - share).max() < 1
    for number, folder in enumerate(three):
        rows = open_corpus(folder).split("train").rows(8)
        done = len(places[number]) // rows
        assert done >= 1
        for epoch in range(done):
            assert sorted(places[number][epoch * rows : (epoch + 1) * rows]) == list(range(rows))


def test_a_mixture_over_ranks_and_with_masking(three):
    reference = whole_step(load(*three, weights=[5, 3, 1], global_batch=24, masking=True), 9, 1)
    assert len({json.loads(row)[0][0] // 10 for row in reference}) == 3
    for world in (2, 3, 8):
        assert whole_step(load(*three, weights=[5, 3, 1], global_batch=24, masking=True), 9, world) == reference


def test_a_corpus_in_a_mixture_is_read_in_the_order_it_has_alone(three):
    alone, mixed = load(three[1]), load(*three, weights=[5, 3, 1])
    expected = [row for step in range(3) for row in flat(alone.batch(step, 0, 1)[0])]
    found = []
    for step in range(40):
        (batch,) = mixed.batch(step, 0, 1)
        found += [row for row, x in zip(flat(batch), batch.x_BT.tolist(), strict=True) if min(x) // 10 == 1]
    assert found[: len(expected)] == expected


def test_corpora_that_do_not_belong_together_are_refused_by_name(tmp_path, three):
    one_split(tmp_path / "wide", [b"abc"], alphabet=300, label="wide")
    with pytest.raises(CorpusError, match=r"wide cannot be mixed with .*0: its alphabet is 300, the other's is 257"):
        load(three[0], tmp_path / "wide")
    one_split(tmp_path / "end", [b"abc"], alphabet=257, end=0, label="end")
    with pytest.raises(CorpusError, match=r"end cannot be mixed .* start symbol is 0"):
        load(three[0], tmp_path / "end")
    one_split(tmp_path / "twin", [b"abc"], label="t")
    one_split(tmp_path / "copy", [b"abc"], label="t")
    with pytest.raises(CorpusError, match=r"twin and .*copy are the same corpus"):
        load(tmp_path / "twin", tmp_path / "copy")
    other = open_corpus(tmp_path / "twin")
    other.manifest["tokenizer"]["sha256"] = "f" * 64
    config = DataConfig(corpus=[{"path": "a"}, {"path": "b"}])
    with pytest.raises(CorpusError, match=r"twin cannot be mixed with .*0: its meaning of symbols is tokenizer ffff"):
        Loader([open_corpus(three[0]), other], config, seed=0)
    with pytest.raises(ConfigError, match=r"1 corpora were opened, data\.corpus names 2"):
        Loader([open_corpus(three[0])], config, seed=0)
    with pytest.raises(CorpusError, match="no split 'valid'; it has train"):
        Loader([open_corpus(three[0])], DataConfig(corpus="a"), seed=0, split="valid")


# ---- the record ------------------------------------------------------------------------------------------------------


def test_the_record_names_the_key_that_changed(small, three):
    before = json.loads(json.dumps(load(small).order_record()))
    compare_order(before, load(small).order_record())
    compare_order(before, load(small, micro_batch=2, document_masking=True, prefetch=False).order_record())
    for key, changed in (
        ("train.seed was 0 when this run began and is 5 now", load(small, seed=5)),
        ("data.context was 16 when this run began and is 32 now", load(small, context=32)),
        ("data.global_batch was 12 .* is 24 now", load(small, global_batch=24)),
        ("data.block_windows was 1 .* is 4 now", load(small, block_windows=4)),
        ("data.corpus was .* now", load(three[0])),
        ("data.corpus was .* now", load(small, three[0])),
    ):
        with pytest.raises(ConfigError, match=key):
            compare_order(before, changed.order_record())
    mixed = load(small, three[0], weights=[2, 4]).order_record()
    compare_order(mixed, load(small, three[0], weights=[1, 2]).order_record())  # the same shares, the same order
    with pytest.raises(ConfigError, match=r"data.corpus was \[.* x 1, .* x 2\] .* x 1, .* x 1\] now"):
        compare_order(mixed, load(small, three[0]).order_record())
    with pytest.raises(ConfigError, match=r"data\.order"):
        compare_order({**before, "data.order": 0}, before)
    with pytest.raises(ConfigError, match="None"):
        compare_order({}, before)


@pytest.mark.parametrize("change", [{"seed": 5}, {"context": 32}, {"global_batch": 24}, {"block_windows": 4}])
def test_what_is_recorded_fixes_the_order(small, change):
    """Each key of the record does change the batches: none is there for nothing."""
    base, other = load(small), load(small, **change)
    assert [whole_step(base, step, 1) for step in range(3)] != [whole_step(other, step, 1) for step in range(3)]


# ---- prefetch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [True, False])
def test_prefetching_changes_nothing(small, prefetch):
    loader = load(small, prefetch=prefetch)
    before = threading.active_count()
    with loader.prefetching() as ahead:
        for step in (0, 1, 2, 9, 10, 3, 4, 4, 5):  # jumps and repeats too
            assert [flat(b) for b in ahead.batch(step, 1, 2)] == [flat(b) for b in load(small).batch(step, 1, 2)]
            assert ahead.total_weight(step) == loader.total_weight(step)
        assert threading.active_count() - before == int(prefetch)
    assert threading.active_count() == before
    assert 0 < ahead.waited <= ahead.waited_in_all
    assert [flat(b) for b in ahead.batch(7, 0, 1)] == [flat(b) for b in loader.batch(7, 0, 1)]  # works on, without it
    ahead.close()


def test_the_next_step_is_read_meanwhile(small):
    loader = load(small)
    asked, inner = [], loader.batch

    def slow(step, rank, world):
        asked.append((step, threading.current_thread() is threading.main_thread()))
        time.sleep(0.2)
        return inner(step, rank, world)

    loader.batch = slow
    with loader.prefetching() as ahead:
        ahead.batch(0, 0, 1)
        cold = ahead.waited
        deadline = time.monotonic() + 20
        while len(asked) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        ahead._next[1].result()  # the step's computation takes longer than the reading
        ahead.batch(1, 0, 1)
        assert ahead.waited < cold
        assert ahead.waited_in_all >= cold >= 0.2
    assert asked[:2] == [(0, True), (1, False)]


def test_errors_of_the_thread_reach_the_caller(small, tmp_path):
    one_split(tmp_path, random_documents(300, seed=3))
    path = tmp_path / "tokens-00000.bin"
    with load(tmp_path).prefetching() as ahead:
        ahead.batch(0, 0, 1)
    loader = load(tmp_path)
    path.write_bytes(b"\xff" + path.read_bytes()[1:])
    with loader.prefetching() as ahead, pytest.raises(CorpusError, match=r"tokens-00000\.bin is damaged"):
        ahead.batch(0, 0, 1)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lmtrain-data")]

    loader = load(small)
    inner = loader.batch

    def failing(step, rank, world):
        if step == 2:
            raise CorpusError("tokens-00007.bin is damaged")
        return inner(step, rank, world)

    loader.batch = failing
    with loader.prefetching() as ahead:
        ahead.batch(0, 0, 1)
        ahead.batch(1, 0, 1)  # step 2 fails in the thread, and only its asker is told
        with pytest.raises(CorpusError, match="tokens-00007"):
            ahead.batch(2, 0, 1)
        assert len(ahead.batch(3, 0, 1)) == 1


def test_threads_and_steps_do_not_mix_up(small):
    """Several threads ask one loader for steps far apart: every batch is the one of its step."""
    loader = load(small)
    steps = [0, 5, 700, 701, 5000, 123_456, 10**7]
    expected = {step: whole_step(load(small), step, 1) for step in steps}
    wrong = Counter()

    def work(seed):
        for step in np.random.default_rng(seed).choice(steps, 60).tolist():
            wrong[whole_step(loader, step, 1) != expected[step]] += 1

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == {False: 240}
