"""Images without loss: PGM, PPM and .npy byte for byte, other files by their pixels, and what is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from lmtrain import use
from lmtrain.data import images
from lmtrain.errors import InputError
from lmtrain.inference.records import surprisal
from lmtrain.likelihood import rasters
from lmtrain.protocol import LN2, Spec
from tests.house import lmtrain

RUN = {
    "prepare": {"source": {"kind": "digits"}},
    "train": {"steps": 3, "seed": 3, "eval_every": 3, "samples": 0},
    "data": {"global_batch": 8},
    "model": {
        "kind": "gated_pixelcnn", "layers": 1, "width": 8, "head_width": 8, "first_kernel": 3, "conditional": True
    },
    "engine": {"kind": "plain"},
    "wandb": {"mode": "disabled"},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    tree = {**RUN, "data": {**RUN["data"], "corpus": str(folder / "corpus")}, "run": {"dir": str(folder), "name": "r"}}
    (folder / "c.yaml").write_text(yaml.safe_dump(tree))
    ran = lmtrain("train", folder / "c.yaml")
    assert ran.code == 0, ran.err
    return folder / "r"


@pytest.fixture(scope="module")
def digits(run: Path) -> np.ndarray:
    """uint8 [5, 8, 8, 1], levels 0 to 16."""
    part = use.open_run(run).corpus.split("valid")
    return part.read(0, 5 * 64).reshape(5, 8, 8, 1).astype(np.uint8)


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def test_files_come_back_byte_for_byte_at_the_models_length(run: Path, digits: np.ndarray, tmp_path: Path) -> None:
    cases = {
        "a.pgm": b"P5\n# 8 by 8 #\n8 8\n16\n" + digits[0].tobytes(),
        "odd.pgm": b"P5 8\t#c\n 8\r\n255 " + digits[1].tobytes(),
        "spread.pgm": b"P5 8 8 255\n" + np.rint(digits[2] / 16 * 255).astype(np.uint8).tobytes(),
        "five.npy": npy(digits),
        "wide.npy": npy(digits[:2, :, :, 0].astype(">i8")),
        "flat.npy": npy(digits[0].reshape(64)),
        "none.npy": npy(digits[:0]),
    }
    opened = use.open_run(run)
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        ran = lmtrain("compress", run, tmp_path / name, "--label", 3, "--json", "--no-compare")
        assert ran.code == 0, (name, ran.err)
        told = json.loads(ran.out)
        assert told["kind"] == "raster"
        assert told["overhead_bytes"] <= 256 + 8 * told["blocks"], name
        assert told["payload_bits"] <= told["table_bits"] + 96 * told["lanes"]
        ran = lmtrain("decompress", run, tmp_path / f"{name}.lmz", tmp_path / "back", "--force")
        assert ran.code == 0, (name, ran.err)
        assert (tmp_path / "back").read_bytes() == data, name
        if name == "five.npy":
            assert (told["records"], told["lanes"]) == (5, 5)
            spec = Spec(17, 64, 17, grid=(8, 8, 1), labels=10)
            x_ND = digits.reshape(5, 64).astype(np.int64)
            nats = surprisal(opened.model, x_ND, spec=spec, label_N=np.full(5, 3)).sum()
            assert told["float_bits"] == pytest.approx(nats / LN2, rel=1e-5)
            assert told["bits_per_dim"] == pytest.approx(told["payload_bits"] / 320)


def test_pixels_of_other_files_come_back(run: Path, digits: np.ndarray, tmp_path: Path) -> None:
    pixels = np.rint(digits[0] / 16 * 255).astype(np.uint8)
    palette = Image.fromarray(pixels[..., 0]).convert("P")
    for name, image in (("l.png", Image.fromarray(pixels[..., 0])), ("p.png", palette), ("b.bmp", palette)):
        image.save(tmp_path / name)
        ran = lmtrain("compress", run, tmp_path / name, "--pixels", "--label", 0, "--json")
        assert ran.code == 0, (name, ran.err)
        told = json.loads(ran.out)
        assert told["rivals"]["the image file"] == (tmp_path / name).stat().st_size
        for out in ("x.png", "x.npy", "x.pgm"):
            ran = lmtrain("decompress", run, tmp_path / f"{name}.lmz", tmp_path / out, "--force")
            assert ran.code == 0, ran.err
        assert np.array_equal(images.decode((tmp_path / "x.png").read_bytes(), channels=None, where="x"), pixels)
        assert np.array_equal(np.load(tmp_path / "x.npy"), pixels)
        assert (tmp_path / "x.pgm").read_bytes() == b"P5\n8 8\n255\n" + pixels.tobytes()
    (tmp_path / "b.png").unlink(missing_ok=True)
    assert lmtrain("decompress", run, tmp_path / "b.bmp.lmz").code == 0
    assert (tmp_path / "b.png").exists()  # what is written is a PNG, and is called so


def test_what_cannot_be_coded_is_one_line(run: Path, digits: np.ndarray, tmp_path: Path) -> None:
    pixels = np.rint(digits[0, ..., 0] / 16 * 255).astype(np.uint8)
    Image.fromarray(np.zeros((8, 8, 4), np.uint8)).save(tmp_path / "rgba.png")
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(pixels + np.uint8(1)).save(tmp_path / "between.png")
    Image.fromarray(pixels).save(tmp_path / "good.png")
    Image.fromarray(pixels[:7]).save(tmp_path / "low.png")
    label, reals = ("--label", 1), np.zeros((8, 8), np.float32)
    for name, data, more, words in (
        ("a.txt", b"no image", label, "neither PGM or PPM (P5, P6) nor .npy"),
        ("good.png", None, label, "give --pixels"),
        ("a.pgm", b"P5 8 8 16\n" + bytes(63), label, "63 bytes of pixels"),
        ("a.pgm", b"P5 8 8 16\n" + bytes(65), label, "holds more than one image"),
        ("a.pgm", b"P5 8 8 999\n" + bytes(128), label, "two bytes each"),
        ("a.pgm", b"P5 9 8 16\n" + bytes(72), label, "9 x 8 pixels of 1 channels, the run reads 8 x 8 of 1"),
        ("a.ppm", b"P6 8 8 16\n" + bytes(192), label, "8 x 8 pixels of 3 channels"),
        ("a.pgm", b"P5 8 8 16\n" + bytes([17] * 64), label, "the value 17; the run reads the levels 0 to 16"),
        ("a.npy", npy(reals), label, "wanted whole numbers"),
        ("a.npy", npy(np.full((8, 8), -1)), label, "the value -1"),
        ("a.npy", npy(np.zeros((3, 9), np.uint8)), label, "shape [3, 9]; the run reads [N, 64]"),
        ("a.npy", npy(digits[0])[:-1], label, "63 bytes of values, its shape says 64"),
        ("a.npy", b"\x93NUMPY\x01\x00\x05\x00abc{}", label, "no .npy that can be coded"),
        ("a.npy", npy(digits[0]), (), "no --label was given, and the model is told the class"),
        ("a.npy", npy(digits[0]), ("--label", 10), "--label 10 was given"),
        ("a.npy", npy(digits[0]), (*label, "--stride", 4), "--stride is for text"),
        ("rgba.png", None, (*label, "--pixels"), "pixels of kind RGBA"),
        ("deep.png", None, (*label, "--pixels"), "pixels of kind I;16"),
        ("low.png", None, (*label, "--pixels"), "8 x 7 pixels"),
        ("between.png", None, (*label, "--pixels"), "the value"),
        ("a.npy", b"no image", (*label, "--pixels"), "is not an image"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        ran = lmtrain("compress", run, tmp_path / name, *more)
        assert (ran.code, len(ran.err.splitlines())) == (7, 1), (name, words, ran.err)
        assert words in ran.err
    assert not list(tmp_path.glob("*.lmz"))


def test_rows_of_bits_are_read_too() -> None:
    corpus = SimpleNamespace(grid=None, record=5, alphabet=2, unit="record", path="table")
    data = npy(np.random.default_rng(0).random((7, 5)) < 0.5)
    raster = rasters.read(data, corpus, where="x")
    assert (raster.x_ND.shape, raster.spread, len(raster.side) < 60) == ((7, 5), False, True)
    assert rasters.restore(raster.x_ND, side=raster.side, spread=False, corpus=corpus) == data
    odd = bytearray(data)
    odd[-1] = 7  # a truth value that is neither 0 nor 1 would come back as another byte
    with pytest.raises(InputError, match=r"the value|byte for byte"):
        rasters.read(bytes(odd), corpus, where="x")
    for fault, words in ((b"P5 1 5 1\n" + bytes(5), "is an image"), (b"x", "neither PGM")):
        with pytest.raises(InputError, match=words):
            rasters.read(fault, corpus, where="x")
