"""A run that reads images: sheets of samples, completions that keep what was given, maps whose bits are the score's."""

import json

import numpy as np
import pytest
import yaml

from lmtrain import seeing, use
from lmtrain.data import images, pictures
from lmtrain.inference.records import draw as draw_records
from lmtrain.journal import METRICS, read
from lmtrain.seeing import map_bits
from tests.house import lmtrain

RUN = {
    "prepare": {"source": {"kind": "digits"}},
    "train": {"steps": 3, "seed": 3, "eval_every": 3, "samples": 4},
    "data": {"global_batch": 8},
    "model": {"kind": "gpt", "layers": 1, "width": 16, "heads": 2},
    "engine": {"kind": "plain"},
    "wandb": {"mode": "disabled"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeing")
    tree = {
        **RUN,
        "data": {**RUN["data"], "corpus": str(folder / "corpus")},
        "run": {"dir": str(folder), "name": "run"},
    }
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    ran = lmtrain("train", folder / "c.yaml")
    assert ran.code == 0, ran.err
    return folder / "run"


@pytest.fixture
def digit(run, tmp_path):
    """An image of the corpus, as a file, and its pixels."""
    opened = use.open_run(run)
    pixels = pictures.show(opened.corpus.split("valid").read(0, 64)[None], opened.corpus)[0]
    path = tmp_path / "digit.png"
    path.write_bytes(images.encode(pixels))
    return path, pixels


def cells(path, columns, side=8):
    """The images of a sheet."""
    sheet = images.decode(path.read_bytes(), channels=None, where=str(path))
    scale = sheet.shape[1] // (columns * (side + 1) + 1)
    small = sheet[::scale, ::scale]
    rows = small.shape[0] // (side + 1)
    return [
        small[r * (side + 1) + 1 : (r + 1) * (side + 1), c * (side + 1) + 1 : (c + 1) * (side + 1)]
        for r in range(rows)
        for c in range(columns)
    ]


def test_training_ends_with_a_picture(run):
    (row,) = [row for row in read(run / METRICS) if row["kind"] == "picture"]
    assert row["step"] == 3
    assert len(cells(run / row["path"], 2)) == 4


def test_samples_are_a_sheet_and_numbers(run, tmp_path):
    ran = lmtrain("sample", run, "-n", 4, "--seed", 1, "--json", "--out", tmp_path / "s.png")
    assert ran.code == 0, ran.err
    drawn = json.loads(ran.out)
    shown = cells(tmp_path / "s.png", 2)
    corpus = use.open_run(run).corpus
    for one, cell in zip(drawn, shown, strict=True):
        assert np.array_equal(pictures.show(np.array([one["values"]]), corpus)[0], cell)
        assert one["log_prob"] < 0
    again = json.loads(lmtrain("sample", run, "-n", 2, "--seed", 1, "--json").out)
    assert [one["values"] for one in again] == [one["values"] for one in drawn[:2]]


@pytest.mark.parametrize("by", ["keep", "mask"])
def test_given_pixels_stay_as_they_are(run, digit, tmp_path, by):
    path, pixels = digit
    given = np.zeros((8, 8, 1), bool)
    given[:2] = True
    more = ["--keep", 0.25]
    if by == "mask":
        given = np.random.default_rng(0).random((8, 8, 1)) < 0.5
        (tmp_path / "mask.png").write_bytes(images.encode(given.astype(np.uint8) * 255))
        more = ["--mask", tmp_path / "mask.png"]
    ran = lmtrain("complete", run, path, *more, "-n", 7, "--json", "--out", tmp_path / "c.png")
    assert ran.code == 0, ran.err
    told = json.loads(ran.out)
    assert (told["given"], told["filled"]) == (given.sum(), 64 - given.sum())
    whole, masked, *filled = cells(tmp_path / "c.png", 3)
    assert np.array_equal(whole, pixels)
    assert (masked[~given] == 128).all()
    assert len(filled) == 7
    for one in filled:
        assert np.array_equal(one[given], pixels[given])
    assert any(not np.array_equal(one, filled[0]) for one in filled)


def test_bits_are_those_of_the_evaluation(run, tmp_path):
    result = json.loads(lmtrain("eval", run, "--json").out)["valid"]
    every = map_bits(use.open_run(run), run, n=10**6, out=tmp_path / "b.png")
    assert sum(every["bits"]) * np.log(2) == pytest.approx(result["nats"], rel=1e-5)
    assert every["bits_per_dim"] == pytest.approx(result["bits_per_dim"], rel=1e-5)


def test_bits_of_a_file_are_those_of_the_record(run, digit, tmp_path):
    of_split = map_bits(use.open_run(run), run, n=1, out=tmp_path / "a.png")
    of_file = map_bits(use.open_run(run), run, [digit[0]], out=tmp_path / "b.png")
    assert of_file["bits"] == pytest.approx(of_split["bits"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_what_cannot_be_done_is_one_line(run, digit, tmp_path):
    (tmp_path / "wide.png").write_bytes(images.encode(np.zeros((8, 9, 1), np.uint8)))
    (tmp_path / "text.png").write_text("no image")
    for arguments, words in (
        (("complete", run, tmp_path / "wide.png"), "9 x 8 pixels, the run reads 8 x 8"),
        (("complete", run, tmp_path / "text.png"), "not an image"),
        (("complete", run, tmp_path / "none.png"), "cannot be read"),
        (("complete", run, digit[0], "--keep", 1.0), "nothing is left"),
        (("complete", run, digit[0], "--label", 3), "not told classes"),
        (("sample", run, "--prompt", "x"), "--prompt is for text"),
        (("sample", run, "--label", 1), "not told classes"),
        (("sample", run, "--out", tmp_path / "text.png" / "x.png"), "cannot be written"),
    ):
        ran = lmtrain(*arguments)
        assert ran.code != 0
        assert words in ran.err
        assert len(ran.err.strip().splitlines()) == 1, ran.err


def test_bytes_of_real_numbers_come_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    x_ND = pictures.symbols(pixels, alphabet=0)
    assert 0 < x_ND.min() < x_ND.max() < 1
    assert np.array_equal(pictures.shade(x_ND, alphabet=0, grid=(16, 16, 1)), pixels)


def test_real_images_are_completed_from_the_numbers_of_their_pixels(tmp_path, monkeypatch):
    """What the model is told of a file is what it was trained on, through the run's view."""
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "x.npz", x=draw.random((60, 4, 4)).astype(np.float32))
    tree = {
        **RUN,
        "prepare": {"source": {"kind": "npz", "paths": str(tmp_path / "x.npz"), "arrays": "x"}},
        "data": {"global_batch": 8, "corpus": str(tmp_path / "corpus"), "view": {"standardise": True}},
        "model": {"kind": "rnade", "width": 8, "components": 2},
        "run": {"dir": str(tmp_path), "name": "run"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    assert lmtrain("train", tmp_path / "c.yaml").code == 0
    pixels = draw.integers(256, size=(4, 4, 1), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(images.encode(pixels))
    seen = []
    monkeypatch.setattr(seeing, "draw", lambda *a, **k: seen.append(k["x_NT"]) or draw_records(*a, **k))
    ran = lmtrain("complete", tmp_path / "run", tmp_path / "a.png", "-n", 2, "--out", tmp_path / "done.png")
    assert ran.code == 0, ran.err
    opened = use.open_run(tmp_path / "run")
    told = pictures.numbers(seen[0], opened.corpus)
    np.testing.assert_allclose(told, np.tile((pixels.reshape(1, -1) + 0.5) / 256, (2, 1)), atol=1e-5)


def test_what_is_no_picture_is_not_drawn(tmp_path):
    """Five channels: training ends without a picture, who asks for one is told. A mixture has no bits of a pixel."""
    np.savez(tmp_path / "x.npz", x=np.random.default_rng(0).integers(2, size=(60, 3, 3, 5), dtype=np.uint8))
    made = {"kind": "made", "width": 8, "masks": 2, "ordering": "drawn", "orderings": "each"}
    for name, source, words in (
        ("five", {"kind": "npz", "paths": str(tmp_path / "x.npz"), "arrays": "x"}, "images of 5 channels"),
        ("digits", {"kind": "digits"}, "is a mixture over orderings"),
    ):
        tree = {
            **RUN,
            "prepare": {"source": source},
            "data": {"global_batch": 8, "corpus": str(tmp_path / f"corpus-{name}")},
            "model": made if name == "digits" else {"kind": "made", "width": 8},
            "run": {"dir": str(tmp_path), "name": name},
        }
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
        ran = lmtrain("train", tmp_path / "c.yaml")
        assert ran.code == 0, ran.err
        ran = lmtrain("bits", tmp_path / name)
        assert ran.code == 7, ran.err
        assert words in ran.err
    ran = lmtrain("sample", tmp_path / "five", "-n", 2)
    assert ran.code == 0, ran.err
    assert not list((tmp_path / "five").rglob("*.png"))
    ran = lmtrain("train", tmp_path / "c.yaml", "model.masks=1", "run.name=other")
    assert ran.code == 2
    assert "give masks > 1 and ordering = drawn" in ran.err
