"""Folds of a prepared corpus: as if prepared for each fold; every document is test once; what a tokenizer saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmtrain.config import build
from lmtrain.data.corpus import open_corpus
from lmtrain.data.folds import refold, seen_by_tokenizer
from lmtrain.data.loader import DataConfig
from lmtrain.data.prepare import PrepareConfig, prepare
from lmtrain.errors import ConfigError, CorpusError
from lmtrain.inference.score import EvalConfig, evaluate
from tests.house import texts
from tests.inference.hand_models import Bigram


def made(folder: Path, name: str, **more: Any) -> Any:
    """A corpus of the house's texts, opened."""
    source = {"kind": "files", "paths": [str(texts(folder / "text", documents=60))]}
    tree = {"source": source, "tokenizer": {"kind": "bytes"}, "split": {"kind": "hash"}, **more}
    prepare(build(PrepareConfig, tree, where="prepare"), folder / name)
    return open_corpus(folder / name)


def everything(corpus: Any, name: str) -> np.ndarray:
    split = corpus.split(name)
    return np.asarray(split.read(0, split.symbols))


def test_a_fold_is_what_preparing_for_that_fold_gives(tmp_path: Path) -> None:
    whole = made(tmp_path, "whole")
    for fold in (1, 4):
        own = made(tmp_path, f"own{fold}", split={"kind": "hash", "folds": 4, "fold": fold})
        folded = refold(whole, folds=4, fold=fold)
        for name in ("train", "valid", "test"):
            np.testing.assert_array_equal(everything(folded, name), everything(own, name))
            assert folded.manifest["counts"][name] == own.manifest["counts"][name]


def test_every_document_is_test_once_and_valid_once_and_never_twice_in_a_fold(tmp_path: Path) -> None:
    whole = made(tmp_path, "whole")
    total = sum(count["documents"] for count in whole.manifest["counts"].values())
    symbols = sum(count["symbols"] for count in whole.manifest["counts"].values())
    assert total == 60
    folds = [refold(whole, folds=5, fold=fold) for fold in range(1, 6)]
    for name in ("valid", "test"):
        assert sum(one.split(name).documents for one in folds) == total
    for one in folds:
        assert sum(one.split(name).symbols for name in ("train", "valid", "test")) == symbols
    assert len({one.fingerprint for one in [*folds, whole]}) == 6, "a run cannot go on with another fold"
    for before, after in zip(folds, [*folds[1:], folds[0]], strict=True):
        np.testing.assert_array_equal(everything(before, "test"), everything(after, "valid"))


def test_what_cannot_be_cut_into_folds_is_refused(tmp_path: Path) -> None:
    tail = made(tmp_path, "tail", split={"kind": "tail", "valid": 0.1})
    with pytest.raises(CorpusError, match="split by its tail"):
        refold(tail, folds=3, fold=1)
    whole = made(tmp_path, "whole")
    held = {int(row["bucket"]) for block in range(whole.blocks) for row in whole.documents(block)}
    fold = next(at for at in range(2, 1000) if at - 1 not in held and at - 2 in held)
    with pytest.raises(CorpusError, match=rf"fold {fold} of 1000 of .* leaves split 'test' without a document"):
        refold(whole, folds=1000, fold=fold)
    dropped = made(tmp_path, "dropped", drop="leakage", drop_share=0.99)
    with pytest.raises(CorpusError, match="drop = leakage"):
        refold(dropped, folds=3, fold=1)
    for wrong in ({"folds": 3}, {"fold": 1}, {"folds": 3, "fold": 4}):
        with pytest.raises(ConfigError, match="give both, fold from 1 to folds"):
            build(DataConfig, {"corpus": "a", **wrong}, where="data")


def test_a_held_out_bucket_that_the_tokenizer_saw_is_told(tmp_path: Path) -> None:
    trained = made(tmp_path, "trained", tokenizer={"kind": "characters"})
    assert seen_by_tokenizer(trained.manifest, "valid") is None, "it was trained on train alone"
    assert seen_by_tokenizer(trained.manifest, "train") is not None
    told = [seen_by_tokenizer(refold(trained, folds=4, fold=fold).manifest, "test") for fold in range(1, 5)]
    # Buckets from 100 on are train; folds are quarters of the thousand.
    assert all(one is not None for one in told)
    assert "150 of the 250 buckets of split 'test'" in (told[0] or "")
    assert "250 of the 250 buckets of split 'test'" in (told[1] or "")
    plain = made(tmp_path, "plain")
    assert seen_by_tokenizer(refold(plain, folds=4, fold=2).manifest, "test") is None, "bytes were not trained"
    again = made(tmp_path, "again", tokenizer={"path": str(tmp_path / "trained" / "tokenizer")})
    assert seen_by_tokenizer(again.manifest, "valid") is None
    other = made(
        tmp_path,
        "other",
        split={"kind": "hash", "valid": 0.2},
        tokenizer={"path": str(tmp_path / "trained" / "tokenizer")},
    )
    assert "100 of the 200 buckets of split 'valid'" in (seen_by_tokenizer(other.manifest, "valid") or "")


def test_a_score_of_what_the_tokenizer_saw_carries_the_warning(tmp_path: Path) -> None:
    trained = made(tmp_path, "trained", tokenizer={"kind": "characters"})
    model = Bigram(trained.alphabet, seed=0)

    def scored(corpus: Any, split: str) -> Any:
        return evaluate(model, corpus.split(split), corpus, config=EvalConfig(), context=16)

    plain, seen = scored(trained, "valid"), scored(refold(trained, folds=4, fold=2), "test")
    assert plain.warning is None
    assert "WARNING" not in plain.describe()
    assert "may be too good" in seen.describe()
    assert seen.to_json()["warning"] == seen.warning
