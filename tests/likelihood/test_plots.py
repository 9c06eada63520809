"""Plots: what was given is to be seen, the same numbers give the same file, and what cannot be drawn is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lmtrain.data import images
from lmtrain.errors import InputError
from lmtrain.likelihood.plots import Curve, Panel, histogram, lines, maps

BLUE, RED, GREEN = (0, 114, 178), (213, 94, 0), (0, 158, 115)


def read(path: Path) -> np.ndarray:
    return images.decode(path.read_bytes(), channels=3, where=str(path))


def where(pixels_HWC: np.ndarray, colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the pixels of exactly this colour (a few of them are the legend's)."""
    return np.nonzero((pixels_HWC == np.array(colour, np.uint8)).all(-1))


def test_curves_lie_where_their_points_are(tmp_path: Path) -> None:
    x_N = np.arange(10.0)
    path = tmp_path / "below" / "a.png"
    lines(path, Panel({"low": Curve(x_N, x_N * 0), "high": Curve(x_N, x_N * 0 + 1)}))
    low, _ = where(read(path), BLUE)
    high, _ = where(read(path), RED)
    assert len(low) > 100
    assert len(high) > 100
    assert np.median(low) > np.median(high) + 100  # rows of a picture are counted from the top
    first = path.read_bytes()
    lines(path, Panel({"low": Curve(x_N, x_N * 0), "high": Curve(x_N, x_N * 0 + 1)}))
    assert path.read_bytes() == first
    assert not list(tmp_path.rglob("*.part"))


def test_panels_stand_side_by_side(tmp_path: Path) -> None:
    x_N = np.arange(1.0, 5)
    one = Panel({"a": Curve(x_N, x_N, x_N - 1, x_N + 1, points=True)}, title="one", log_x=True)
    two = Panel({"b": Curve(x_N, x_N), "c": Curve(x_N, -x_N)}, marks={"here": 2.5})
    lines(tmp_path / "p.png", one, two, title="both")
    drawn = read(tmp_path / "p.png")
    _, columns = where(drawn, RED)
    assert len(columns) > 20
    assert np.median(columns) > drawn.shape[1] / 2


def test_histograms_of_sets_that_do_not_meet(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sets = {"left": rng.normal(-5, 1, 500), "right": rng.normal(5, 1, 50), "middle": np.zeros(7)}
    histogram(tmp_path / "h.png", sets, x_label="nats", marks={"threshold": 0.0})
    drawn = read(tmp_path / "h.png")
    middles = [float(np.median(where(drawn, colour)[1])) for colour in (BLUE, GREEN, RED)]
    assert middles == sorted(middles)
    assert middles[2] - middles[0] > drawn.shape[1] / 4
    histogram(tmp_path / "one.png", {"all alike": [2.0] * 20})
    assert len(where(read(tmp_path / "one.png"), BLUE)[0]) > 100


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'b' is empty or has values that are not finite"):
        histogram(tmp_path / "x.png", {"a": [1.0], "b": [np.inf]})
    with pytest.raises(InputError, match="'c' is empty"):
        histogram(tmp_path / "x.png", {"c": []})
    with pytest.raises(InputError, match="nothing to plot"):
        lines(tmp_path / "x.png")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        histogram(tmp_path / "file" / "x.png", {"a": [1.0, 2.0]})
    assert not (tmp_path / "x.png").exists()


def test_planes_share_one_scale_and_stand_upright(tmp_path: Path) -> None:
    low, high = np.zeros((20, 20)), np.zeros((20, 20))
    low[:, :] = 0.5
    high[:10] = 1.0  # the rows of small y, which are drawn below
    maps(tmp_path / "a.png", {"half": low, "lower": high}, extent=(0, 1, 0, 1))
    pixels_HWC = read(tmp_path / "a.png").astype(int)

    def near(colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        return np.nonzero((np.abs(pixels_HWC - np.array(colour)) <= 4).all(-1))

    full, none, half = near((253, 231, 37)), near((68, 1, 84)), near((33, 145, 140))  # viridis at 1, 0 and 1/2
    assert min(map(len, (full[0], none[0], half[0]))) > 1000
    assert full[0].mean() > none[0].mean(), "row 0 is at the bottom"
    assert full[1].min() > half[1].max(), "side by side, on one scale"
    with pytest.raises(InputError, match="nothing to plot"):
        maps(tmp_path / "b.png", {}, extent=(0, 1, 0, 1))


def test_words_in_the_place_of_numbers(tmp_path: Path) -> None:
    curve = Curve([0, 1], [1.0, 2.0])
    lines(tmp_path / "a.png", Panel({"a": curve}))
    lines(tmp_path / "b.png", Panel({"a": curve}, ticks=["few", "many"]))
    same = read(tmp_path / "a.png") == read(tmp_path / "b.png")
    assert same[: same.shape[0] * 3 // 4].mean() > 0.95
    assert not same.all()
