"""Plots as PNG files: curves with bands, panels side by side, histograms of several sets (matplotlib's only import).

Nothing of matplotlib's global state is touched: no pyplot, no window, no style; the file has no dates and no versions
in it, so the same numbers give the same picture.

Shapes in names: N points of a curve or members of a set.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lmtrain.errors import InputError

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe & Ito's, which readers who do not see red and green apart can tell; with dashes after seven."""
_DASHES = ("-", "--", ":", "-.")
_DPI = 110


@dataclass(frozen=True, slots=True)
class Curve:
    """Points (x, y) joined by a line. low_N, high_N: a band around it; points: also draw each point."""

    x_N: Sequence[float] | np.ndarray
    y_N: Sequence[float] | np.ndarray
    low_N: Sequence[float] | np.ndarray | None = None
    high_N: Sequence[float] | np.ndarray | None = None
    points: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes. curves: by the name in the legend. marks: vertical lines, by name (where something begins).

    ticks: words in the place of the numbers 0, 1, 2, ... on the x axis.
    """

    curves: Mapping[str, Curve]
    title: str = ""
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False
    marks: Mapping[str, float] = field(default_factory=dict)
    ticks: Sequence[str] = ()


def check_name(path: Path) -> None:
    """InputError for a name that does not end in .png."""
    if path.suffix.lower() != ".png":
        raise InputError(f"{path}: pictures are PNG files; give a name that ends in .png")


def lines(path: Path, *panels: Panel, title: str = "") -> None:
    """Panels side by side, written to `path` as PNG. InputError when there is no panel, or the file cannot be written.

    Values that are not finite leave a gap.
    """
    if not panels:
        raise InputError(f"{path}: there is nothing to plot")
    figure, axes = _figure(len(panels), title)
    for axis, panel in zip(axes, panels, strict=True):
        for number, (name, curve) in enumerate(panel.curves.items()):
            look = _look(number)
            axis.plot(curve.x_N, curve.y_N, label=name, marker="o" if curve.points else None, markersize=3.5, **look)
            if curve.low_N is not None and curve.high_N is not None:
                axis.fill_between(curve.x_N, curve.low_N, curve.high_N, color=look["color"], alpha=0.18, linewidth=0)
        for number, (name, at) in enumerate(panel.marks.items()):
            axis.axvline(at, label=name, color="#777777", linewidth=1, linestyle=_DASHES[(number + 1) % len(_DASHES)])
        if panel.log_x:
            axis.set_xscale("log")
        if panel.log_y:
            axis.set_yscale("log")
        if panel.ticks:
            axis.set_xticks(range(len(panel.ticks)), labels=panel.ticks)
        _words(axis, panel.title, panel.x_label, panel.y_label, legend=len(panel.curves) + len(panel.marks) > 1)
    _write(path, figure)


def maps(
    path: Path,
    pictures: Mapping[str, np.ndarray],
    *,
    extent: tuple[float, float, float, float],
    title: str = "",
    x_label: str = "",
    y_label: str = "",
) -> None:
    """Planes [rows, columns] side by side on one scale of colours, row 0 at the bottom; such as densities on a plane.

    extent: left, right, bottom, top. InputError when there is none, or one has values that are not finite.
    """
    if not pictures or not all(np.isfinite(plane).all() for plane in pictures.values()):
        raise InputError(f"{path}: there is nothing to plot, or values are not finite")
    top = max(float(plane.max()) for plane in pictures.values())
    figure, axes = _figure(len(pictures), title)
    for axis, (name, plane) in zip(axes, pictures.items(), strict=True):
        axis.imshow(plane, origin="lower", extent=extent, vmin=0.0, vmax=top, cmap="viridis", aspect="auto")
        _words(axis, name, x_label, y_label, legend=False)
        axis.grid(False)
    _write(path, figure)


def histogram(
    path: Path,
    sets: Mapping[str, Sequence[float] | np.ndarray],
    *,
    title: str = "",
    x_label: str = "",
    bins: int | None = None,
    spread: float = 0.995,
    marks: Mapping[str, float] | None = None,
) -> None:
    """Several sets against each other in common bins, each as shares of its own set (they sum to 1).

    bins: default 12 to 60, two times the cube root of the smallest set (Rice's rule). spread: bins reach from the least
    to the largest `spread` quantile of the sets; what lies beyond is counted in the outermost bin, so that one outlier
    does not flatten the picture. marks: vertical lines, by name.
    Raises InputError for an empty set, or one with values that are not finite.
    """
    if not sets:
        raise InputError(f"{path}: there is nothing to plot")
    held = {name: np.asarray(values, np.float64).ravel() for name, values in sets.items()}
    for name, value_N in held.items():
        if not len(value_N) or not np.isfinite(value_N).all():
            raise InputError(f"{path}: the set {name!r} is empty or has values that are not finite; leave it out")
    low = min(float(np.quantile(value_N, 1 - spread)) for value_N in held.values())
    high = max(float(np.quantile(value_N, spread)) for value_N in held.values())
    if not high > low:
        low, high = low - 0.5, high + 0.5
    if bins is None:
        bins = round(min(max(2 * min(map(len, held.values())) ** (1 / 3), 12), 60))
    edges = np.linspace(low, high, bins + 1)
    figure, (axis,) = _figure(1, "")
    for number, (name, value_N) in enumerate(held.items()):
        count, _ = np.histogram(np.clip(value_N, low, high), bins=edges)
        share, look = count / len(value_N), _look(number)
        axis.stairs(share, edges, fill=True, color=look["color"], alpha=0.18)
        axis.stairs(share, edges, label=f"{name} ({len(value_N):,})", **look)
    for number, (name, at) in enumerate((marks or {}).items()):
        axis.axvline(at, label=name, color="#777777", linewidth=1, linestyle=_DASHES[(number + 1) % len(_DASHES)])
    _words(axis, title, x_label, "share of the set", legend=True)
    _write(path, figure)


def _look(number: int) -> dict[str, Any]:
    dashes = _DASHES[number // len(_COLOURS) % len(_DASHES)]
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": dashes, "linewidth": 1.6}


def _figure(panels: int, title: str) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0 if panels == 1 else 5.4 * panels, 4.4), dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure, [figure.add_subplot(1, panels, number + 1) for number in range(panels)]


def _words(axis: Any, title: str, x_label: str, y_label: str, *, legend: bool) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    if legend:
        axis.legend(frameon=False, fontsize=8.5)


def _write(path: Path, figure: Any) -> None:
    """Aside first and then in place."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(path.name + ".part")
        aside.write_bytes(drawn.getvalue())
        aside.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
