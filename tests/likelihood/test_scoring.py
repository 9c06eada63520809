"""`lmtrain score` and `lmtrain compare-scores`: units add up to what `eval` says, files hold them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from lmtrain import use
from lmtrain.corpora import spec_of
from lmtrain.data import images, pictures
from lmtrain.errors import InputError
from lmtrain.inference.records import surprisal
from lmtrain.inference.reopen import Plan, log_probs
from lmtrain.likelihood import scorefile
from lmtrain.likelihood.scoring import score_set
from lmtrain.likelihood.sets import made_of, open_set, records_set
from lmtrain.protocol import LN2
from tests.house import TINY, lmtrain, texts

DIGITS = {
    "prepare": {"source": {"kind": "digits"}},
    "train": {"steps": 2, "eval_every": 2, "save_every": 2},
    "data": {"global_batch": 8, "view": {"levels": 5}},
    "model": {"kind": "made", "width": 16},
    "engine": {"kind": "plain"},
    "eval": {"max_symbols": 640},
    "wandb": {"mode": "disabled"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`text` reads bytes; `digits` and `other` (another seed) images through a view; `wine` real numbers."""
    folder = tmp_path_factory.mktemp("scoring")
    texts(folder / "text")
    text = {**TINY, "prepare": {**TINY["prepare"], "source": {"kind": "files", "paths": [str(folder / "text")]}}}
    wine = {"prepare": {"source": {"kind": "wine"}}, "model": {"kind": "rnade", "width": 8}}
    view = {"global_batch": 8, "view": {"standardise": True}}
    for name, tree, corpus, seed in (
        ("run-text", {**text, "train": {**text["train"], "steps": 2}}, "corpus-text", 1),
        ("digits", DIGITS, "corpus-digits", 1),
        ("other", DIGITS, "corpus-digits", 2),
        ("wine", {**DIGITS, **wine, "data": view}, "corpus-wine", 1),
    ):
        data = {**tree["data"], "corpus": str(folder / corpus)}
        run = {"dir": str(folder), "name": name}
        whole = {**tree, "data": data, "run": run, "train": {**tree["train"], "seed": seed}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))
        ran = lmtrain("train", folder / f"{name}.yaml")
        assert ran.code == 0, ran.err
    return folder


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_images_add_up_and_are_those_of_the_model(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    ran = lmtrain("score", runs / "digits", "own:test", "--out", out, "--per-symbol", "--histogram", tmp_path / "h.png")
    assert ran.code == 0, ran.err
    head, *rows = lines(out)
    told = json.loads(lmtrain("eval", runs / "digits", "--split", "test", "--json").out)["test"]
    assert sum(row["nats"] for row in rows) == pytest.approx(told["nats"], rel=1e-9)
    assert head["sets"][0]["nats"] == pytest.approx(told["nats"], rel=1e-12)
    opened = use.open_run(runs / "digits")
    part = opened.corpus.split("test")
    x_ND = part.read(0, part.symbols).reshape(-1, 64)
    nats_ND = surprisal(opened.model, x_ND, spec=spec_of(opened.corpus, opened.config))
    assert [row["symbol"] for row in rows] == x_ND.tolist()
    np.testing.assert_allclose([row["symbol_nats"] for row in rows], nats_ND, atol=1e-5)
    np.testing.assert_allclose([row["bits_per_dim"] for row in rows], nats_ND.mean(1) / LN2, rtol=1e-6)
    assert f"{told['bits_per_dim']:.4f}" in ran.out
    assert images.decode((tmp_path / "h.png").read_bytes(), channels=3, where="h").shape[2] == 3


def test_parquet_holds_what_the_lines_hold(runs: Path, tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.parquet"):
        args = ("own:test", "own:valid", "--limit", 20, "--per-symbol", "--temperature", 2, "--out", tmp_path / name)
        assert lmtrain("score", runs / "digits", *args).code == 0
    assert scorefile.heads(tmp_path / "a.jsonl") == scorefile.heads(tmp_path / "a.parquet")
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == lines(tmp_path / "a.jsonl")[1:]
    assert len(lines(tmp_path / "a.jsonl")) == 41


def test_batches_change_nothing(runs: Path) -> None:
    for run, given in (("digits", "own:test"), ("run-text", "own:test")):
        opened = use.open_run(runs / run)
        one, many = (score_set(opened, open_set(opened, given, split="x"), batch=b, alone=True) for b in (1, 33))
        np.testing.assert_allclose(one.nats_U, many.nats_U, rtol=1e-5)
        np.testing.assert_array_equal(one.symbols_U, many.symbols_U)


def test_groups_of_units_add_up_to_the_whole(runs: Path) -> None:
    """What intervals and comparisons are made of: nats, symbols, and the bytes of a text."""
    for run in ("digits", "run-text", "wine"):
        opened = use.open_run(runs / run)
        found = score_set(opened, open_set(opened, "own:test", split="x"))
        whole = found.result.score
        assert found.groups_GJ.sum(0).tolist() == pytest.approx([whole.nats, whole.symbols, whole.bytes], rel=1e-12)


def test_a_text_run_is_compared_in_bits_per_byte(runs: Path) -> None:
    """Against itself: both sides are what `eval` says, and nothing is gained."""
    ran = lmtrain("compare-scores", runs / "run-text", runs / "run-text", "--split", "test", "--json")
    assert ran.code == 0, ran.err
    (told,) = json.loads(ran.out)
    own = json.loads(lmtrain("eval", runs / "run-text", "--split", "test", "--json").out)["test"]
    assert told["measure"] == "bits per byte"
    for side in ("a", "b"):
        assert told[side][0]["value"] == pytest.approx(own["bits_per_byte"], rel=1e-9)
    assert told["gain"] == 0


def test_a_document_alone_is_read_from_its_own_beginning(runs: Path) -> None:
    """Against streams, which read one symbol at a time; the documents are longer than the context."""
    opened = use.open_run(runs / "run-text")
    for stride in (16, 4):
        config = opened.config.model_copy(
            update={"eval": opened.config.eval.model_copy(update={"mode": "sliding", "stride": stride})}
        )
        opened = use.Opened(config, opened.corpus, opened.saved, opened.model)
        held = open_set(opened, "own:test", split="x", limit=2)
        found = score_set(opened, held, alone=True)
        assert len(found.nats_U) == 2
        for u, number in enumerate(found.number_U.tolist()):
            x_1T = torch.from_numpy(held.read(number))[None]
            start_B = torch.tensor([opened.corpus.bos])
            slow = -log_probs(opened.model, x_1T, start_B=start_B, plan=Plan(16, stride)).double().sum()
            assert found.nats_U[u] == pytest.approx(float(slow), rel=1e-5)
            assert found.bytes_U[u] == len(held.raw(number))


def test_text_in_pieces(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"0123456789" * 7 + b"rest")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "short.txt").write_bytes(b"abc")
    (tmp_path / "b" / "long.txt").write_bytes(b"x" * 40)
    opened = use.open_run(runs / "run-text")
    held = open_set(opened, str(tmp_path / "a.txt"), split="x", piece=30)
    assert [held.raw(i) for i in range(held.split.documents)] == [b"0123456789" * 3] * 2
    held = open_set(opened, str(tmp_path / "b"), split="x", piece=30)
    assert [held.raw(i) for i in range(held.split.documents)] == [b"x" * 30, b"abc"]


def test_images_in_files_are_those_of_the_corpus(runs: Path, tmp_path: Path) -> None:
    opened = use.open_run(runs / "digits")
    own = open_set(opened, "own:test", split="x", limit=6)
    wanted = score_set(opened, own)
    inner = opened.corpus.corpus.split("test")
    x_ND = np.stack([inner.read(i * 64, (i + 1) * 64) for i in own.numbers_N.tolist()])
    np.save(tmp_path / "six.npy", x_ND.reshape(-1, 8, 8).astype(np.uint8))
    (tmp_path / "folder").mkdir()
    for i, pixels in enumerate(pictures.shade(x_ND, alphabet=17, grid=(8, 8, 1))):
        (tmp_path / "folder" / f"{i}.png").write_bytes(images.encode(pixels))
    for given in ("six.npy", "folder"):
        found = score_set(opened, open_set(opened, str(tmp_path / given), split="x"))
        np.testing.assert_allclose(found.nats_U, wanted.nats_U, rtol=1e-6)


def test_made_up_sets(runs: Path, tmp_path: Path) -> None:
    opened = use.open_run(runs / "digits")
    own = open_set(opened, "own:test", split="x", limit=8)
    for kind in ("@permuted", "@constant", "@noise"):
        made = made_of(kind, own, opened, seed=0)
        again = made_of(kind, own, opened, seed=0)
        other = made_of(kind, own, opened, seed=1)
        pairs = list(zip(own.numbers_N.tolist(), range(8), strict=True))
        for number, i in pairs:
            x_D = made.read(i)
            np.testing.assert_array_equal(x_D, again.read(i))
            if kind == "@permuted":
                np.testing.assert_array_equal(np.sort(x_D), np.sort(own.read(number)))
            if kind == "@constant":
                assert len(set(x_D.tolist())) == 1
            assert x_D.max() < 5
        assert any((made.read(i) != other.read(i)).any() for i in range(8))
        assert len(score_set(opened, made).nats_U) == 8
    reader = use.open_run(runs / "run-text")
    (tmp_path / "a.txt").write_text("one two three four five six seven eight nine ten")
    whole = open_set(reader, str(tmp_path / "a.txt"), split="x")
    shuffled = made_of("@shuffled", whole, reader, seed=0).raw(0)
    assert sorted(shuffled.split()) == sorted(whole.raw(0).split())
    assert shuffled != whole.raw(0)
    for kind, run, held in (("@shuffled", opened, own), ("@noise", reader, whole), ("@other", opened, own)):
        with pytest.raises(InputError, match="@shuffled"):
            made_of(kind, held, run, seed=0)


def test_comparisons_of_folders_and_files_agree(runs: Path, tmp_path: Path) -> None:
    for name in ("digits", "other"):
        lmtrain("score", runs / name, "own:test", "--out", tmp_path / f"{name}.jsonl")
    by_files = lmtrain("compare-scores", tmp_path / "digits.jsonl", tmp_path / "other.jsonl", "--json")
    by_runs = lmtrain("compare-scores", runs / "digits", runs / "other", "--split", "test", "--json")
    assert by_files.code == by_runs.code == 0, by_files.err + by_runs.err
    (files,), (folders,) = json.loads(by_files.out), json.loads(by_runs.out)
    assert files["gain"] == folders["gain"]
    assert files["low"] == folders["low"] < files["gain"] < files["high"]
    told = [json.loads(lmtrain("eval", runs / n, "-s", "test", "--json").out)["test"] for n in ("digits", "other")]
    assert files["gain"] == pytest.approx(told[1]["bits_per_dim"] - told[0]["bits_per_dim"], abs=1e-12)
    several = lmtrain("compare-scores", runs / "digits", runs / "other", "--b", runs / "digits", "--split", "test")
    assert "B  spread over 2 seeds" in several.out
    assert "units and seeds" in several.out
    densities = lmtrain("compare-scores", runs / "wine", runs / "wine", "--json")
    assert json.loads(densities.out)[0]["measure"] == "nats per record"


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (("score", "digits", "missing.png"), "no such file or folder"),
        (("score", "digits", "text.txt"), "not an image"),
        (("score", "digits", "small.npy"), "wanted one or more records of 8x8x1"),
        (("score", "digits", "high.npy"), "has the symbols 99 to 99; the run reads 0 to 16"),
        (("score", "digits", "corpus-wine:test"), "prepare it alike"),
        (("score", "run-text", "corpus-digits:test"), "prepare it alike"),
        (("score", "run-text", "empty.txt"), "not one byte to score"),
        (("score", "digits", "own:test", "own:test"), "given twice"),
        (("score", "digits", "own:test", "--piece", "9"), "--piece 9 cuts text"),
        (("score", "digits", "--per-symbol"), "say where to by --out"),
        (("score", "digits", "--out", "a.csv"), "says no format"),
        (("score", "wine", "--temperature", "2"), "density of real numbers"),
        (("score", "digits", "--set", "train.steps=3"), "only keys of eval"),
        (("compare-scores", "digits", "wine"), "did not score the same units"),
        (("score", "digits", "none.npy"), "there is nothing in it to be scored"),
        (("score", "digits", "--histogram", "a.txt"), "a name that ends in .png"),
        (("compare-scores", "digits", "text.txt"), "text.txt is no file of scores"),
        (("compare-scores", "digits", "nowhere"), "nowhere is no file of scores"),
        (("compare-scores", "headless.jsonl", "headless.jsonl"), "is no file of scores"),
        (("compare-scores", "hollow.jsonl", "hollow.jsonl"), "is no file of scores"),
        (("compare-scores", "digits", "bad.jsonl"), "is no file of scores"),
    ],
    ids=lambda v: "-".join(v)[:40] if isinstance(v, tuple) else "",
)
def test_what_is_refused(args: tuple[str, ...], match: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    Path("text.txt").write_text("no image")
    Path("empty.txt").write_text("")
    Path("bad.jsonl").write_text('{"a": 1}\n')
    Path("headless.jsonl").write_text('{"lmtrain_scores": 1, "sets": [{"set": "a"}]}\n')
    Path("hollow.jsonl").write_text('{"lmtrain_scores": 1, "sets": []}\n')
    np.save("none.npy", np.zeros((0, 64), np.uint8))
    np.save("small.npy", np.zeros((3, 5), np.uint8))
    np.save("high.npy", np.full((3, 64), 99, np.uint8))
    ran = lmtrain(*args)
    assert ran.code in (2, 3, 7), ran.out + ran.err
    assert match in ran.err
    assert len(ran.err.strip().splitlines()) == 1


def test_scores_that_are_not_numbers_are_refused(runs: Path) -> None:
    opened = use.open_run(runs / "digits")
    with torch.no_grad():
        next(opened.model.parameters()).fill_(float("nan"))
    with pytest.raises(Exception, match="not numbers"):
        score_set(opened, records_set(opened, "zeros", np.zeros((2, 64), np.uint8)))
