"""Cross-validation through the command line: its figures are those of the runs, and what was done is not done again."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from lmtrain.data.corpus import open_corpus
from lmtrain.likelihood.crossval import interval_se
from lmtrain.likelihood.crossval import test_of as score_of
from tests.house import config, lmtrain, texts

KEYS = (
    "engine.kind=plain",
    "train.steps=4",
    "train.eval_every=2",
    "data.global_batch=4",
    "prepare.split.valid=null",
    "prepare.split.test=null",
)


def crossval(path: Path, *more: object) -> Any:
    ran = lmtrain("crossval", path, *KEYS, "--json", *more)
    assert ran.code == 0, ran.err
    return json.loads(ran.out), ran.err


def test_all_folds_together_are_weighed_by_what_they_hold() -> None:
    folds = [
        {"nats": 20.0, "symbols": 10, "records": 2, "bits_per_dim": 2 / math.log(2) + 1, "nats_per_record": 10.0},
        {"nats": 90.0, "symbols": 30, "records": 6, "bits_per_dim": 3 / math.log(2) + 1, "nats_per_record": 15.0},
    ]
    found = score_of(folds)
    assert found["nats_per_record"]["pooled"] == pytest.approx(110 / 8)
    assert found["bits_per_dim"]["pooled"] == pytest.approx(110 / 40 / math.log(2) + 1), "the units of the data stay"


def evaluated(run: Path, split: str) -> Any:
    ran = lmtrain("eval", run, "--split", split, "--checkpoint", "best", "--json")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)[split]


@pytest.mark.exhaustive
def test_folds_are_trained_once_resumed_inside_and_summed_up(tmp_path: Path) -> None:
    texts(tmp_path / "text", documents=60)
    path, out = config(tmp_path), tmp_path / "out"
    result, _ = crossval(path, "--folds", 3, "--out", out)
    assert (result["way"], result["unit"], result["warnings"]) == ("buckets", "bits_per_byte", [])
    (row,) = result["candidates"]
    runs = [out / "runs" / name for name in row["runs"]]
    own = {split: [evaluated(run, split) for run in runs] for split in ("valid", "test")}
    for split, found in (("valid", row["valid"]), ("test", result["test"]["bits_per_byte"])):
        values = [one["bits_per_byte"] for one in own[split]]
        assert found["values"] == pytest.approx(values, rel=1e-12)
        assert found["mean"] == pytest.approx(statistics.fmean(values))
        assert found["sd"] == pytest.approx(statistics.stdev(values))
        assert found["se"] == pytest.approx(statistics.stdev(values) / 3**0.5)
    assert sum(one["documents"] for one in own["test"]) == 60, "every document is held out once"
    assert [curve["steps"] for curve in row["curves"]] == [[2, 4]] * 3
    assert all(curve["train"] for curve in row["curves"])
    assert {Path(name).name for name in result["files"]} == {"crossval.json", "table.txt", "curves.png"}
    assert "every fold:" in (out / "table.txt").read_text()
    kept = json.loads((out / "crossval.json").read_text())
    assert {key: value for key, value in result.items() if key != "files"} == kept

    # Asked again, nothing is trained; a fold whose result is gone is measured again without a step more.
    logs = {log: log.read_bytes() for log in (out / "jobs").glob("*.log")}
    again, said = crossval(path, "--folds", 3, "--out", out)
    assert again == result
    assert "3 of 3 trainings are finished already" in said
    assert {log: log.read_bytes() for log in (out / "jobs").glob("*.log")} == logs

    # Stopped inside a fold, it goes on there, and comes to the same to the last bit.
    other, name = tmp_path / "other", runs[1].name
    shutil.copytree(out, other)
    (other / "crossval.json").unlink()
    (other / "jobs" / f"{name}.json").unlink()
    shutil.rmtree(other / "runs" / name)
    (other / "runs" / name).mkdir()
    (other / "runs" / name / "STOP").touch()
    ran = lmtrain("crossval", path, *KEYS, "--folds", 3, "--out", other)
    assert ran.code == 75, ran.err
    assert "the same command goes on" in ran.err
    assert not (other / "crossval.json").exists()
    whole, said = crossval(path, "--folds", 3, "--out", other)
    assert "2 of 3 trainings are finished already" in said
    assert "resumed step 1" in (other / "jobs" / f"{name}.log").read_text()
    assert {**whole, "files": None} == {**result, "files": None}


@pytest.mark.slow
def test_a_grid_on_the_published_split_chooses_on_valid_and_scores_test_once(tmp_path: Path) -> None:
    texts(tmp_path / "text", documents=100)
    path, out = config(tmp_path), tmp_path / "out"
    grid = ("prepare.split.valid=0.4", "prepare.split.test=0.1", "--grid", "optimizer.lr=1e-2,1e-9")
    result, _ = crossval(path, "--published", *grid, "--out", out, "--parallel", 2)
    trained, still = result["candidates"]
    assert trained["valid"]["mean"] < still["valid"]["mean"], "nothing is learnt at a rate of 1e-9"
    assert result["best"] == trained["label"]
    own = evaluated(out / "runs" / trained["runs"][0], "valid")
    assert trained["valid"]["se"] == pytest.approx(interval_se(own, "bits_per_byte"))
    assert result["limit"] == pytest.approx(trained["valid"]["mean"] + trained["valid"]["se"])
    chosen = still if still["valid"]["mean"] <= result["limit"] else trained
    assert result["chosen"] == chosen["label"]
    tested = [json.loads(file.read_text()) for file in (out / "jobs").glob("*.json")]
    assert [one["name"] for one in tested if "test" in one] == chosen["runs"]
    assert result["test"]["bits_per_byte"]["values"] == pytest.approx(
        [evaluated(out / "runs" / chosen["runs"][0], "test")["bits_per_byte"]]
    )
    assert {Path(name).name for name in result["files"]} >= {"grid.png", "curves.png"}
    best, _ = crossval(path, "--published", *grid, "--rule", "best", "--out", out)
    assert best["chosen"] == trained["label"]


@pytest.mark.slow
def test_each_fold_trains_its_own_tokenizer_and_one_that_saw_the_held_out_is_told(tmp_path: Path) -> None:
    """Every document has a letter of its own: an alphabet names the documents that it is of."""
    letters = [chr(0x4E00 + at) for at in range(60)]
    for file, letter in zip(sorted(texts(tmp_path / "text", documents=60).iterdir()), letters, strict=True):
        file.write_text(f"{letter} {file.read_text()}", encoding="utf-8")
    path = config(tmp_path)
    own = "prepare.tokenizer.kind=characters"
    result, said = crossval(path, own, "--folds", 3, "--out", tmp_path / "out")
    assert (result["way"], result["warnings"]) == ("tokenizer", [])
    assert "warning" not in said
    held: list[str] = []
    for fold, value in enumerate(result["test"]["bits_per_byte"]["values"], start=1):
        corpus = open_corpus(tmp_path / f"corpus-fold{fold}of3")
        has = {
            name: {one for one in letters if one in corpus.decode(part.read(0, part.symbols).tolist()).decode("utf-8")}
            for name in ("train", "valid", "test")
            for part in [corpus.split(name)]
        }
        seen = {chr(point) for point in json.loads(corpus.tokenizer.content)["code_points"]} & set(letters)
        assert seen == has["train"], "the alphabet is that of the fold's train split alone"
        run = tmp_path / "out" / "runs" / result["candidates"][0]["runs"][fold - 1]
        assert evaluated(run, "test")["bits_per_byte"] == pytest.approx(value, rel=1e-12)
        held += has["test"]
    assert sorted(held) == letters, "every document is held out once"

    ready = [
        own,
        f"prepare.tokenizer.path={tmp_path / 'corpus-fold1of3' / 'tokenizer'}",
        f"data.corpus={tmp_path / 'ready'}",
    ]
    result, said = crossval(path, *ready, "--folds", 3, "--out", tmp_path / "other")
    assert result["way"] == "buckets"
    assert [words.partition(":")[0] for words in result["warnings"]] == ["fold 2", "fold 3"]
    assert said.count("warning: fold") == 2
    assert "warning" in evaluated(tmp_path / "other" / "runs" / result["candidates"][0]["runs"][2], "test")


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    texts(tmp_path / "text")
    path = config(tmp_path)
    for arguments, words in (
        ((), "give --folds K, or --published"),
        (("--folds", "3", "--published"), "give --folds K, or --published"),
        (("--published",), "give --grid key=value"),
        (("--folds", "3", "--rule", "luck"), "give one-se or best"),
        (("--folds", "3", "--checkpoint", "7"), "give best or last"),
        (("--folds", "3", "--grid", "model.widht=1,2"), "unknown key 'widht'; did you mean 'width'?"),
        (("--folds", "2"), "data.folds = 2"),
        (("--folds", "3", "--out", str(path / "below")), "give --out another folder"),
    ):
        ran = lmtrain("crossval", path, "--out", tmp_path / "out", *arguments)
        assert ran.code in (2, 7), ran.err
        assert words in ran.err
        assert len(ran.err.strip().splitlines()[-1:]) == 1
