"""What a person looks at of a cross-validation: a table, learning curves, and the grid as a picture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lmtrain.data.layout import write_file
from lmtrain.likelihood import plots
from lmtrain.likelihood.crossval import RESULT, UNITS, curves
from lmtrain.likelihood.learning import Curve, mean_curve

TABLE = "table.txt"
CURVES = "curves"
GRID = "grid.png"
TEST_NAMES = {
    **UNITS,
    "log_likelihood": "log-likelihood, model's units",
    "log_likelihood_data_units": "..., data's units",
}


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def table(result: Mapping[str, Any]) -> str:
    """A plain table: the candidates, the choice, and the test split of the chosen one."""
    unit, folds = UNITS[result["unit"]], result["folds"]
    lines = [
        f"{result['way_is']}{'' if folds is None else f' ({folds})'}; {result['checkpoint']} checkpoint of each run"
    ]
    wide = max(9, *(len(row["label"]) for row in result["candidates"]))
    spread = "over folds" if folds else "of the valid split's records or documents"
    lines.append(
        f"valid, {unit}; SE {spread}; gap = valid - train at the best step; best step: where overfitting starts"
    )
    lines.append(f"  {'candidate':<{wide}} {'mean':>10} {'SD':>8} {'SE':>8} {'gap':>8}  best step")
    for row in result["candidates"]:
        valid, of, gap = row["valid"], curves(result, row["label"]), _gap(result, row["label"])
        steps = sorted(step for step in row["best_steps"] if step is not None)
        shown = "-" if not steps else str(steps[0]) if len(set(steps)) == 1 else f"{steps[0]} - {steps[-1]}"
        late = sum(not curve.overfits for curve in of)
        shown += (
            f" (the last one of {late} of {len(of)})" if late and len(of) > 1 else " (the last one)" if late else ""
        )
        marks = [word for word, key in (("best", "best"), ("chosen", "chosen")) if row["label"] == result[key]]
        numbers = f"{_number(valid['mean']):>10} {_number(valid['sd']):>8} {_number(valid['se']):>8} {_number(gap):>8}"
        lines.append(
            f"  {row['label']:<{wide}} {numbers}  {shown}{'  <- ' + ', '.join(marks) if marks else ''}".rstrip()
        )
        lines += [f"    diverged: {text}" for text in row["failed"]]
    if len(result["candidates"]) > 1:
        best = next(row for row in result["candidates"] if row["label"] == result["best"])
        if result["rule"] == "one-se" and best["valid"]["se"] is None:
            lines.append("  chosen: the lowest mean, for want of a standard error (fewer than 10 documents or blocks)")
        elif result["rule"] == "one-se":
            lines.append(f"  chosen: the simplest with a mean of at most {result['limit']:.4f}, the best's plus one SE")
        else:
            lines.append("  chosen: the lowest mean")
    lines += _tests(result)
    lines += [f"WARNING: {text}" for text in result["warnings"]]
    return "\n".join(lines)


def _tests(result: Mapping[str, Any]) -> list[str]:
    test = result["test"]
    if test is None:
        return ["test: the corpus has no test split"]
    lines = [f"test of `{result['chosen']}`; SE {result['test_se_is']}"]
    for key, name in TEST_NAMES.items():
        if key in test and (key == result["unit"] or key.startswith(("log_", "nats_per_record", "bits_per"))):
            one = test[key]
            pooled = f"  sum over sum {one['pooled']:.4f}" if len(one["values"]) > 1 and "pooled" in one else ""
            spread = f"SD {_number(one['sd']):>8}  SE {_number(one['se']):>8}"
            lines.append(f"  {name:<32} mean {one['mean']:>10.4f}  {spread}{pooled}")
    values = test[result["unit"]]["values"]
    if len(values) > 1:
        lines.append("  every fold: " + " ".join(f"{value:.4f}" for value in values))
    return lines


def write(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """The table and the pictures into the folder; all paths, the result's first."""
    write_file(folder / TABLE, (table(result) + "\n").encode())
    out = [folder / RESULT, folder / TABLE]
    for row in result["candidates"]:
        of = [curve for curve in curves(result, row["label"]) if curve.steps]
        if not of:
            continue
        name = CURVES if row["label"] == result["chosen"] else f"{CURVES}-{_slug(row['label'])}"
        out.append(folder / f"{name}.png")
        _draw_curves(out[-1], of, title=row["label"], unit=UNITS[result["unit"]])
    if len(result["candidates"]) > 1:
        out.append(folder / GRID)
        _draw_grid(out[-1], result)
    return out


def _slug(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "-", text)


def _draw_curves(path: Path, of: list[Curve], *, title: str, unit: str) -> None:
    """Train and held-out values against steps, mean and range over folds, and where overfitting starts."""
    mean = mean_curve(of)
    if not mean.steps:  # folds that ended early have no step in common
        of, mean = of[:1], of[0]
    shown = {"held out": _banded(of, mean.steps, mean.held, "held")}
    if mean.train is not None:
        shown = {"train": _banded(of, mean.steps, mean.train, "train"), **shown}
    marks: dict[str, float] = {}
    if mean.best_step is not None:
        words = "overfitting starts at" if mean.overfits else "still falling at the last evaluation,"
        gap = f", gap {mean.gap:.4f}" if math.isfinite(mean.gap) else ""
        marks[f"{words} step {mean.best_step}{gap}"] = mean.best_step
    over = f", mean and range of {len(of)} folds" if len(of) > 1 else ""
    panel = plots.Panel(shown, title=f"{title}{over}", x_label="step", y_label=unit, marks=marks)
    plots.lines(path, panel)


def _banded(of: list[Curve], steps: Sequence[int], mean: Sequence[float], name: str) -> plots.Curve:
    """The mean of some curves, with a band from the lowest to the highest of them."""
    rows = [[getattr(curve, name)[curve.steps.index(step)] for step in steps] for curve in of]
    low, high = ([of_all(column) for column in zip(*rows, strict=True)] for of_all in (min, max))
    return plots.Curve(steps, mean, low if len(of) > 1 else None, high if len(of) > 1 else None, points=len(steps) < 60)


def _draw_grid(path: Path, result: Mapping[str, Any]) -> None:
    """Held-out value (with a standard error either way) and training value of each candidate against the first key; a
    panel for each value of the second."""
    axes = result["grid"]
    rows = {tuple(_key(row["values"][axis["key"]]) for axis in axes): row for row in result["candidates"]}
    places = list(range(len(axes[0]["values"])))
    panels = []
    for second in axes[1]["values"] if len(axes) > 1 else [None]:
        these = [rows[tuple(map(_key, (first, second)[: len(axes)]))] for first in axes[0]["values"]]
        held = [math.nan if row["valid"]["mean"] is None else row["valid"]["mean"] for row in these]
        error = [row["valid"]["se"] or 0.0 for row in these]
        low, high = ([h + sign * e for h, e in zip(held, error, strict=True)] for sign in (-1, 1))
        shown = {"held out, one SE either way": plots.Curve(places, held, low, high, points=True)}
        gaps = [_gap(result, row["label"]) for row in these]
        if any(gap is not None for gap in gaps):
            train = [math.nan if gap is None else value - gap for value, gap in zip(held, gaps, strict=True)]
            shown["train, at the same steps"] = plots.Curve(places, train, points=True)
        known = next(row["valid"]["se"] for row in result["candidates"] if row["label"] == result["best"]) is not None
        if result["rule"] == "one-se" and known:
            shown["best + one SE"] = plots.Curve([0, max(places[-1], 1)], [result["limit"]] * 2)
        here = [place for place, row in enumerate(these) if row["label"] == result["chosen"]]
        panels.append(
            plots.Panel(
                shown,
                title="" if second is None else f"{axes[1]['key']} = {second}",
                x_label=f"{axes[0]['key']}: from complex to simple",
                y_label=UNITS[result["unit"]],
                marks={"chosen": here[0]} if here else {},
                ticks=[str(value) for value in axes[0]["values"]],
            )
        )
    plots.lines(path, *panels, title=f"chosen: {result['chosen']}")


def _gap(result: Mapping[str, Any], label: str) -> float | None:
    """Held out minus train at the best steps, mean over folds; None where train was not evaluated."""
    gaps = [curve.gap for curve in curves(result, label) if math.isfinite(curve.gap)]
    return math.fsum(gaps) / len(gaps) if gaps else None


def _key(value: Any) -> str:
    return repr(value)
