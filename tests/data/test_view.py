"""The view: every transform against its definition, by position when training, by row when evaluating."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmtrain.config import build
from lmtrain.data import transforms
from lmtrain.data.loader import DataConfig, Loader, compare_order
from lmtrain.data.prepare import prepare
from lmtrain.data.shards import PreparedCorpus, open_corpus
from lmtrain.data.view import Fit, View, ViewConfig, view_of
from lmtrain.errors import ConfigError, CorpusError
from lmtrain.protocol import Batch
from tests.data.making import config
from tests.data.small import one_split


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpora of digits, of wine, and of real numbers of which one never changes."""
    place = tmp_path_factory.mktemp("views")
    for kind in ("digits", "wine"):
        prepare(config({"source": {"kind": kind}}), place / kind)
    x = np.random.default_rng(0).normal(size=(40, 3))
    x[:, 1] = 7
    np.savez(place / "flat.npz", x=x)
    flat = {"kind": "npz", "paths": str(place / "flat.npz"), "arrays": "x"}
    prepare(config({"source": flat, "split": {"valid": 0.3}}), place / "flat")
    one_split(place / "text", [b"some text"])
    return place


def settings(**keys: Any) -> ViewConfig:
    return build(ViewConfig, keys, where="data.view")


def seen(corpus: PreparedCorpus, **keys: Any) -> View:
    (view,) = view_of([corpus], settings(**keys))
    assert isinstance(view, View)
    return view


def whole(corpus: Any, split: str = "valid") -> np.ndarray:
    part = corpus.split(split)
    return part.fetch(np.arange(part.documents), corpus.record).x_BT.numpy()


def loader(corpus: PreparedCorpus, *, seed: int = 0, rows: int = 8, **keys: Any) -> Loader:
    data = DataConfig(corpus="x", global_batch=rows, view=settings(**keys))
    return Loader(view_of([corpus], data.view), data, seed=seed)


def put_together(source: Loader, step: int, world: int) -> np.ndarray:
    batches: list[Batch] = [batch for rank in range(world) for batch in source.batch(step, rank, world)]
    return np.concatenate([batch.x_BT.numpy() for batch in sorted(batches, key=lambda batch: batch.index)])


def test_noise_is_a_function_of_purpose_seed_and_place() -> None:
    places = np.array([0, 1, 5, 2**40])
    found = transforms.noise("a", 3, places, 4000)
    assert (found == transforms.noise("a", 3, places[::-1], 4000)[::-1]).all()
    assert (found[:, :7] == transforms.noise("a", 3, places, 7)).all()
    others = [transforms.noise("b", 3, places, 4000), transforms.noise("a", 4, places, 4000), found[::-1]]
    for other in others:
        assert not np.isclose(found, other).all(axis=1).any()
        assert abs(np.corrcoef(found.ravel(), other.ravel())[0, 1]) < 0.05
    ordered = np.sort(found.ravel())
    assert np.abs(ordered - (np.arange(16000) + 0.5) / 16000).max() < 1.63 / math.sqrt(16000), "uniform, at 1 %"


def test_levels_and_binarisation(folder: Path) -> None:
    digits = open_corpus(folder / "digits")
    x = whole(digits)
    at = seen(digits, binarise="threshold", threshold=0.4)
    assert (whole(at) == (x / 16 >= 0.4)).all()
    assert (at.alphabet, at.bos, at.symbol_dims, at.measure.kind) == (2, 2, 1, "exact")
    few = seen(digits, levels=4)
    assert (whole(few) == np.floor(x * 4 / 17)).all()
    assert (few.alphabet, few.bos) == (4, 4)
    assert (few.split("valid").fetch(np.array([0, -1]), 64).cond.start_B == 4).all()
    drawn = np.stack([whole(seen(digits, binarise="draw", seed=seed)) for seed in range(60)])
    assert set(np.unique(drawn)) == {0, 1}
    p = x / 16
    deviation = (drawn.mean(axis=0) - p) / np.sqrt(np.maximum(p * (1 - p), 1e-9) / 60)
    assert (drawn[:, p == 0] == 0).all()
    assert (drawn[:, p == 1] == 1).all()
    assert abs(deviation[(p > 0) & (p < 1)].mean()) < 0.1
    assert 0.9 < deviation[(p > 0) & (p < 1)].std() < 1.1


def test_dequantised_symbols_fill_their_intervals(folder: Path) -> None:
    digits = open_corpus(folder / "digits")
    view, x = seen(digits, dequantise=True), whole(digits)
    found = whole(view)
    assert (view.alphabet, view.bos, found.dtype) == (0, 0, np.float32)
    assert (np.floor(found.astype(np.float64) * 17 + 1e-5) >= x).all()
    inside = found.astype(np.float64) * 17 - x
    assert -1e-5 < inside.min() < 0.001
    assert 0.999 < inside.max() < 1 + 1e-5
    assert abs(inside.mean() - 0.5) < 0.01
    assert view.measure.offset == pytest.approx(64 * math.log(17))
    assert view.measure.kind == "bound"
    edge = transforms.dequantise(np.full((1, 3), 255), alphabet=256, noise_BD=np.full((1, 3), 1 - 2**-53))
    assert transforms.float32_below(edge, 1.0).max() < 1


def test_standardisation_is_numpys(folder: Path) -> None:
    wine = open_corpus(folder / "wine")
    train = whole(wine, "train").astype(np.float64)
    view = seen(wine, standardise=True)
    assert view.fit is not None
    np.testing.assert_allclose(view.fit.mean, train.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(view.fit.std, train.std(axis=0), rtol=1e-12)
    wanted = (whole(wine) - train.mean(axis=0)) / train.std(axis=0)
    np.testing.assert_allclose(whole(view), wanted, rtol=1e-5, atol=1e-6)
    assert view.measure.offset == pytest.approx(np.log(train.std(axis=0)).sum())
    assert Fit.from_json(json.loads(json.dumps(view.fit.to_json()))) == view.fit, "every bit is kept"

    digits = open_corpus(folder / "digits")
    both = seen(digits, dequantise=True, standardise=True)
    assert both.fit is not None
    many = np.concatenate([whole(seen(digits, dequantise=True, seed=seed), "train") for seed in range(5)])
    np.testing.assert_allclose(both.fit.mean, many.mean(axis=0), atol=2e-3)
    np.testing.assert_allclose(both.fit.std, many.std(axis=0), atol=2e-3)
    assert both.measure.offset == pytest.approx(64 * math.log(17) + np.log(both.fit.std).sum())
    with pytest.raises(CorpusError, match=r"dimension 1 of .*flat is the same in the whole train split"):
        seen(open_corpus(folder / "flat"), standardise=True)
    with pytest.raises(ConfigError, match=r"standardised over 64 dimensions, and a record of .*wine has 13"):
        View(wine, settings(standardise=True), fit=both.fit)


def test_a_fit_over_a_mixture_weighs_its_corpora(folder: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(0).normal(3, 2, size=(60, 13))
    np.savez(tmp_path / "m.npz", x=x)
    source = {"kind": "npz", "paths": str(tmp_path / "m.npz"), "arrays": "x"}
    prepare(config({"source": source, "split": {"valid": 0.2}}), tmp_path / "m")
    two = [open_corpus(folder / "wine"), open_corpus(tmp_path / "m")]
    (first, second) = view_of(two, settings(standardise=True), weights=[3, 1])
    assert isinstance(first, View)
    assert isinstance(second, View)
    assert first.fit is second.fit is not None
    parts = [whole(corpus, "train").astype(np.float64) for corpus in two]
    shares = zip(parts, (0.75, 0.25), strict=True)
    weight = np.concatenate([np.full(len(part), share / len(part)) for part, share in shares])
    together = np.concatenate(parts)
    mean = weight @ together
    np.testing.assert_allclose(first.fit.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(first.fit.std, np.sqrt(weight @ (together - mean) ** 2), rtol=1e-12)


def test_flips_and_shifts_move_pixels_in_training_alone(folder: Path) -> None:
    digits = open_corpus(folder / "digits")
    assert (whole(seen(digits, flip=True, shift=2)) == whole(digits)).all()
    assert (whole(seen(digits, flip=True, shift=2), "train") == whole(digits, "train")).all()
    plain, flipping = loader(digits), loader(digits, flip=True)
    seen_both = set()
    for step in range(6):
        pairs = zip(put_together(plain, step, 1), put_together(flipping, step, 1), strict=True)
        for x, y in pairs:
            mirrored = np.fliplr(x.reshape(8, 8)).ravel()
            assert (y == x).all() or (y == mirrored).all()
            seen_both.add(bool((y == x).all()))
    assert seen_both == {True, False}
    moved = set()
    for step in range(12):
        for x, y in zip(put_together(plain, step, 1), put_together(loader(digits, shift=1), step, 1), strict=True):
            padded = np.pad(x.reshape(8, 8), 1)
            windows = {(a, b): padded[1 - a : 9 - a, 1 - b : 9 - b] for a in (-1, 0, 1) for b in (-1, 0, 1)}
            fits = [at for at, window in windows.items() if (window == y.reshape(8, 8)).all()]
            assert fits
            moved.add(fits[0])
    assert len(moved) == 9


VIEWS: list[dict[str, Any]] = [
    {"binarise": "draw"},
    {"dequantise": True},
    {"dequantise": True, "standardise": True},
    {"levels": 5, "flip": True, "shift": 1},
]


@pytest.mark.parametrize("view", VIEWS)
def test_training_noise_is_a_function_of_the_position(view: dict[str, Any], folder: Path) -> None:
    digits = open_corpus(folder / "digits")
    source = loader(digits, rows=12, **view)
    for step in (0, 7, 200):  # 1,405 rows: step 200 is in the second epoch
        whole_batch = put_together(source, step, 1)
        for world in (2, 3):
            assert (put_together(loader(digits, rows=12, **view), step, world) == whole_batch).all()
    other = put_together(loader(digits, rows=12, seed=1, **view), 0, 1)
    assert (other != put_together(source, 0, 1)).any()


def test_noise_is_fresh_each_epoch_and_the_same_in_every_evaluation(folder: Path) -> None:
    digits = open_corpus(folder / "digits")
    plain, drawing = loader(digits, rows=281), loader(digits, rows=281, binarise="draw")
    first: dict[bytes, bytes] = {}
    again = []
    for step in range(10):  # two epochs of 5 steps
        for x, y in zip(put_together(plain, step, 1), put_together(drawing, step, 1), strict=True):
            if (key := x.tobytes()) in first:
                again.append(first[key] == y.tobytes())
            first[key] = y.tobytes()
    assert len(again) == 1405
    assert not any(again)
    part = seen(digits, binarise="draw").split("valid")
    everything = part.fetch(np.arange(20), 64).x_BT
    for size in (1, 3, 7):
        cut = [part.fetch(np.arange(20)[at : at + size], 64).x_BT for at in range(0, 20, size)]
        assert (torch.cat(cut) == everything).all()
    assert (part.read(64 * 2 + 5, 64 * 4 + 1) == everything.numpy().ravel()[64 * 2 + 5 : 64 * 4 + 1]).all()
    other = seen(digits, binarise="draw", seed=1).split("valid").fetch(np.arange(20), 64).x_BT
    assert (other != everything).any()
    padded = part.fetch(np.array([4, -1]), 64)
    assert (padded.x_BT[0] == everything[4]).all()
    assert (padded.x_BT[1] == 0).all()
    assert padded.weight_BT.sum(dim=1).tolist() == [64, 0]


def test_another_view_is_another_order(folder: Path) -> None:
    digits = open_corpus(folder / "digits")
    record = json.loads(json.dumps(loader(digits, dequantise=True).order_record()))
    compare_order(record, loader(digits, dequantise=True).order_record())
    for keys in ({}, {"dequantise": True, "flip": True}, {"binarise": "draw"}):
        with pytest.raises(ConfigError, match=r"data.view was .* when this run began and is"):
            compare_order(record, loader(digits, **keys).order_record())
    assert "data.view" not in loader(digits).order_record(), "runs from before there were views go on"


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("text", {"flip": True}, "data.view.flip = True: .*text holds no records; leave it out"),
    ("wine", {"dequantise": True}, "holds real numbers, and this is for symbols"),
    ("wine", {"shift": 1}, "holds no images"),
    ("digits", {"levels": 18}, "has 17 levels only"),
    ("digits", {"shift": 8}, "would move out of sight"),
    ("digits", {"standardise": True}, "dequantise makes such of them"),
    ("digits", {"binarise": "draw", "dequantise": True}, "choose one"),
    ("digits", {"threshold": 0.3}, "belongs to binarise = threshold"),
]


@pytest.mark.parametrize(("name", "keys", "match"), REFUSED)
def test_what_does_not_fit_is_refused(name: str, keys: dict[str, Any], match: str, folder: Path) -> None:
    with pytest.raises(ConfigError, match=match):
        seen(open_corpus(folder / name), **keys)


# ---- corruption ------------------------------------------------------------------------------------------------------


def test_corruption_replaces_that_share_by_uniform_draws(folder: Path) -> None:
    corpus = open_corpus(folder / "digits")
    plain, corrupted = loader(corpus, rows=64), loader(corpus, rows=64, corrupt=0.3)
    before = np.concatenate([put_together(plain, step, 1) for step in range(20)])
    after = np.concatenate([put_together(corrupted, step, 1) for step in range(20)])
    changed, n = before != after, before.size
    share, wanted = changed.mean(), 0.3 * (1 - 1 / 17)  # a draw may be the symbol itself
    assert abs(share - wanted) < 4 * math.sqrt(wanted * (1 - wanted) / n)
    count = np.bincount(after[changed & (before == 0)], minlength=17)[1:]  # of zeros: every other symbol alike
    assert ((count - count.mean()) ** 2 / count.mean()).sum() < 45  # chi-square of 15 degrees of freedom, p = 1e-4
    assert not np.array_equal(put_together(corrupted, 0, 1), put_together(loader(corpus, seed=1, corrupt=0.3), 0, 1))


def test_corruption_is_a_function_of_the_position(folder: Path) -> None:
    corpus = open_corpus(folder / "digits")
    source = loader(corpus, corrupt=0.3, binarise="threshold")
    np.testing.assert_array_equal(put_together(source, 5, 1), put_together(source, 5, 4))
    assert put_together(source, 5, 1).max() == 1  # drawn among the symbols that the model reads
    (same,) = view_of([corpus], settings(corrupt=0.3))
    np.testing.assert_array_equal(whole(same), whole(corpus))  # what is held out stays as it is
    assert same.meaning == corpus.meaning  # so that both models can be asked about the same sets


def test_corruption_of_text(folder: Path) -> None:
    corpus = open_corpus(folder / "text")
    data = DataConfig(corpus="x", context=4, global_batch=2, view=settings(corrupt=0.5))
    clean = DataConfig(corpus="x", context=4, global_batch=2)
    batches = [Loader([corpus], each, seed=0).batch(step, 0, 1)[0] for each in (clean, data) for step in range(40)]
    before, after = (torch.cat([b.x_BT for b in some]) for some in (batches[:40], batches[40:]))
    weight = torch.cat([b.weight_BT for b in batches[:40]]) > 0
    assert 0.35 < (before != after)[weight].float().mean() < 0.65
    assert int(after.max()) < corpus.alphabet
    assert not after[~weight].any()
    assert int((~weight).sum()) > 0


def test_corruption_belongs_to_the_order_and_is_for_symbols(folder: Path) -> None:
    corpus = open_corpus(folder / "digits")
    record = loader(corpus, corrupt=0.3).order_record()
    with pytest.raises(ConfigError, match=r"data\.view"):
        compare_order(loader(corpus).order_record(), record)
    assert "corrupt" not in json.dumps(
        loader(corpus, binarise="threshold").order_record()
    )  # as runs have it that stand
    with pytest.raises(ConfigError, match=r"data\.view\.corrupt = 0\.2 draws symbols"):
        loader(open_corpus(folder / "wine"), corrupt=0.2)
