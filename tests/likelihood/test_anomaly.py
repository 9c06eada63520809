"""`lmtrain anomaly` on a tiny run: what is printed is what the scores say, and what makes no sense is refused."""

from __future__ import annotations

import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn.metrics import roc_auc_score

from lmtrain import use
from lmtrain.data import images, pictures
from lmtrain.errors import CheckpointError
from lmtrain.likelihood import controls
from lmtrain.likelihood.anomaly import halves, look
from lmtrain.likelihood.sets import open_set
from tests.house import TINY, lmtrain, texts


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`digits` reads images, `background` corrupted ones, `levels` fewer grey levels; `words` reads bytes."""
    folder = tmp_path_factory.mktemp("anomaly")
    texts(folder / "text")
    text = {**TINY, "prepare": {**TINY["prepare"], "source": {"kind": "files", "paths": [str(folder / "text")]}}}
    digits: dict[str, Any] = {
        **TINY,
        "prepare": {"source": {"kind": "digits"}},
        "data": {"global_batch": 16},
        "model": {"kind": "made", "width": 24},
    }
    for name, tree, view in (
        ("digits", digits, {}),
        ("background", digits, {"corrupt": 0.5}),
        ("levels", digits, {"levels": 5}),
        ("words", text, None),
    ):
        data = {**tree["data"], "corpus": str(folder / ("corpus-text" if view is None else "corpus-digits"))}
        data |= {} if view is None else {"view": view}
        train = {"steps": 10, "eval_every": 10, "save_every": 10, "seed": 1}
        whole = {**tree, "data": data, "train": train, "run": {"dir": str(folder), "name": name}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(whole))
        ran = lmtrain("train", folder / f"{name}.yaml")
        assert ran.code == 0, ran.err
    return folder


@pytest.fixture(scope="module")
def asked(runs: Path) -> tuple[list[dict[str, Any]], Path]:
    out = runs / "scores.jsonl"
    ran = lmtrain(
        *("anomaly", runs / "digits", "--outside", "@noise", "--outside", "@constant", "--outside", "@permuted"),
        *("--background", runs / "background", "--limit", 60, "--json", "--out", out),
    )
    assert ran.code == 0, ran.err
    return json.loads(ran.out), out


def test_figures_are_those_of_the_scores_in_the_file(asked: tuple[list[dict[str, Any]], Path]) -> None:
    found, out = asked
    assert [each["outside"] for each in found] == ["@noise", "@constant", "@permuted"]
    head, *rows = (json.loads(line) for line in out.read_text().splitlines())
    assert head["directions"] == found
    names = [row["score"] for row in found[0]["scores"]]
    for wanted in ("nll", "likelihood ratio", "nll - PNG", "nll - xz", "rank p-value", "PNG length", "mean intensity"):
        assert wanted in names
    inside = [row for row in rows if row["role"] == "inside"][:60]
    for each in found:
        outside = [row for row in rows if row["set"] == each["outside"]]
        assert len(inside) == len(outside) == 60
        for row in each["scores"]:
            if row["score"] == "typicality, batches of 10":
                assert row["as it is"]["inside"] == 6
                continue
            score = [unit[row["score"]] for unit in inside + outside]
            auroc = roc_auc_score([0] * 60 + [1] * 60, score)
            assert row["as it is"]["auroc"] == pytest.approx(auroc, abs=1e-9)
            assert row["negated"]["auroc"] == pytest.approx(1 - auroc, abs=1e-9)
            at = row["as it is"]["threshold"]
            flagged = sum(unit[row["score"]] > at for unit in inside) / 60
            assert row["as it is"]["flagged_inside"] == pytest.approx(flagged)


def test_noise_is_strange_and_short_pictures_are_not(asked: tuple[list[dict[str, Any]], Path]) -> None:
    noise, constant, _ = ({row["score"]: row["as it is"]["auroc"] for row in each["scores"]} for each in asked[0])
    assert noise["nll"] > 0.95
    assert noise["PNG length"] > 0.95
    assert constant["PNG length"] < 0.05


def test_a_table_for_readers_and_the_way_back(runs: Path) -> None:
    ran = lmtrain(
        *("anomaly", runs / "digits", "--outside", f"{runs / 'corpus-digits'}:valid", "--reverse", runs / "digits"),
        *("--calibrate", "own:train", "--limit", 40, "--batch", 4, "--histogram", runs / "h.png"),
    )
    # Reversed, the set inside is the one that calibrates: own:valid of the other run.
    assert ran.code == 7
    assert "the very units that are to be told" in ran.err
    np.save(runs / "dark.npy", np.zeros((30, 64), np.uint8) + np.arange(30)[:, None].astype(np.uint8) % 3)
    ran = lmtrain(
        *("anomaly", runs / "digits", "--outside", runs / "dark.npy", "--reverse", runs / "background"),
        *("--limit", 40, "--batch", 4, "--histogram", runs / "h.png"),
    )
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert sum("inside own:test (40 units), outside" in line for line in lines) == 1
    assert sum("inside " + str(runs / "dark.npy") in line and "corpus-digits:test (40" in line for line in lines) == 1
    assert sum("without a model" in line for line in lines) == 2
    assert sum(line.startswith("typicality, batches of 4") for line in lines) == 2
    assert images.decode((runs / "h.png").read_bytes(), channels=3, where="h").size


def test_text_against_shuffled_words(runs: Path) -> None:
    (runs / "code.txt").write_text("".join(f"def f{i}(x):\n    return x[{i}:] + {{}}\n" for i in range(60)))
    ran = lmtrain(
        *("anomaly", runs / "words", "--outside", "@shuffled", "--outside", runs / "code.txt", "--piece", 60),
        *("--limit", 40, "--json"),
    )
    assert ran.code == 0, ran.err
    shuffled, code = json.loads(ran.out)
    names = [row["score"] for row in shuffled["scores"]]
    assert "nll - xz" in names
    assert "PNG length" not in names
    assert {row["score"]: row["as it is"]["auroc"] for row in code["scores"]}["nll per symbol"] > 0.9
    # The same bytes in another order: nothing that counts them is told.
    near = {row["score"]: row["as it is"]["auroc"] for row in shuffled["scores"]}
    assert 0.3 < near["mean intensity"] < 0.7


def test_controls_against_their_definitions(runs: Path) -> None:
    opened = use.open_run(runs / "digits")
    held = open_set(opened, "own:test", split="x", limit=7)
    looked = look(opened, held, batch=2)
    again = look(opened, held, batch=5)
    np.testing.assert_allclose(looked.nats_U, again.nats_U, rtol=1e-6)
    assert looked.png_U is not None
    assert looked.xz_U is not None
    for u, number in enumerate(held.numbers_N.tolist()):
        x_D = held.read(number)
        png = images.encode(pictures.shade(x_D[None], alphabet=17, grid=(8, 8, 1))[0])
        assert looked.png_U[u] == len(png)
        np.testing.assert_array_equal(
            images.decode(png, channels=1, where="x")[..., 0].ravel(), np.rint(x_D / 16 * 255)
        )
        assert looked.mean_U[u] == pytest.approx(x_D.mean() / 16)
        assert looked.xz_U[u] == controls.xz_length(bytes(x_D.tolist()))


def test_xz_is_the_container_without_its_frame() -> None:
    rng = np.random.default_rng(0)
    for data in (b"", b"a", b"abc" * 5000, rng.bytes(3000), Path(__file__).read_bytes()):
        whole = len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME, check=lzma.CHECK_NONE))
        assert 24 <= whole - controls.xz_length(data) <= 64


def test_calibrating_halves_share_nothing() -> None:
    number_N = np.arange(1000) * 3
    one, other = halves(number_N)
    np.testing.assert_array_equal(np.sort(np.r_[one, other]), np.arange(1000))
    assert abs(one.mean() - other.mean()) < 60  # neither is the beginning


@pytest.mark.parametrize(
    ("args", "match"),
    [
        (("--outside", "@noise", "--calibrate", "own:test"), "the very units that are to be told"),
        (("--outside", "@noise", "--limit", "10"), "wanted 20 or more"),
        (("--outside", "@nothing"), "is none of"),
        (("--outside", "@shuffled"), "is for text"),
        (("--outside", "code.txt"), "not an image"),
        (("--outside", "gone.png"), "no such file or folder"),
        (("--outside", "empty"), "holds no .png"),
        (("--outside", "@noise", "--reverse", "digits"), "is made up"),
        (("--outside", "@noise", "--reverse-background", "digits"), "belongs to --reverse"),
        (("--outside", "@noise", "--fpr", "1.5"), "no rate between 0 and 1"),
        (("--outside", "@noise", "--background", "levels"), "the background model reads"),
        (("--outside", "@noise", "--background", "words"), "the background model reads"),
        (("--outside", "@noise", "--batch", "50", "--limit", "40"), "fewer units than a batch"),
        (("--outside", "@noise", "--out", "a.csv"), "says no format"),
        (("--outside", "@noise", "--piece", "5"), "--piece 5 cuts text"),
        (("--outside", "@noise", "--histogram", "a.pdf"), "a name that ends in .png"),
    ],
    ids=lambda v: " ".join(v[1:])[:30] if isinstance(v, tuple) else "",
)
def test_what_is_refused(args: tuple[str, ...], match: str, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs)
    Path("code.txt").write_text("no image")
    Path("empty").mkdir(exist_ok=True)
    ran = lmtrain("anomaly", "digits", "--limit", "30", *args)
    assert ran.code in (2, 3, CheckpointError.exit_code, 7), ran.out + ran.err
    assert match in ran.err
    assert len(ran.err.strip().splitlines()) == 1
