"""Two runs, or several seeds of each, on the same units: which one is better, and by how much.

Shapes in names: G groups of units, S runs of a side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lmtrain.errors import InputError
from lmtrain.inference.comparison import Comparison, compare
from lmtrain.likelihood import scorefile
from lmtrain.likelihood.scoring import score_set
from lmtrain.likelihood.sets import open_set
from lmtrain.protocol import LN2
from lmtrain.use import open_run

Head = Mapping[str, Any]


def head_of_run(
    folder: Path,
    *,
    given: str,
    split: str,
    checkpoint: str,
    overrides: Sequence[str],
    piece: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """A run scored on a set, as the head of its file of scores would say."""
    opened = open_run(folder, checkpoint=checkpoint, overrides=overrides)
    held = open_set(opened, given, split=split, piece=piece, limit=limit)
    return scorefile.head_of(score_set(opened, held, alone=piece is not None), run=str(folder), step=opened.saved.step)


def compare_sides(
    a: Sequence[Path], b: Sequence[Path], *, score: Callable[[Path], dict[str, Any]]
) -> list[dict[str, Any]]:
    """For each set: A's runs against B's, as a JSON mapping. A and B: run folders, which `score` scores, or files.

    Raises InputError naming the two that did not score the same units.
    """
    sides = [[_heads(path, score) for path in side] for side in (a, b)]
    first = sides[0][0]
    for path, heads in zip([*a, *b], [*sides[0], *sides[1]], strict=True):
        if len(heads) != len(first):
            raise InputError(f"{path} has scores of {len(heads)} sets, and {a[0]} of {len(first)}; give like with like")
    told = []
    for number, head in enumerate(first):
        mine, theirs = ([heads[number] for heads in side] for side in sides)
        for path, other in zip([*a, *b], [*mine, *theirs], strict=True):
            _same_units(head, other, str(a[0]), str(path))
        told.append(_told(mine, theirs))
    return told


def _heads(path: Path, score: Callable[[Path], dict[str, Any]]) -> list[dict[str, Any]]:
    return [score(path)] if path.is_dir() else scorefile.heads(path)


def _same_units(one: Head, other: Head, one_name: str, other_name: str) -> None:
    """InputError unless both scored the same things, cut into the same units."""

    def refuse(what: str, todo: str) -> InputError:
        return InputError(f"{one_name} and {other_name} did not score the same units: {what}; {todo}")

    if one["content"] != other["content"]:
        given = ", ".join(f"{head['set']} ({head['content'][:12]})" for head in (one, other))
        raise refuse(given, "score both on the same data (give it by --data)")
    for key in ("split", "share", "measure"):
        if one[key] != other[key]:
            raise refuse(f"{key} {one[key]} and {other[key]}", "score both alike")
    column = 2 if one["bytes"] else 1
    ours, its = (np.array(head["groups"], np.float64)[:, column] for head in (one, other))
    if one["unit"] != other["unit"] or one["units"] != other["units"] or not np.array_equal(ours, its):
        raise refuse(
            f"{one['units']:,} x {one['unit']} and {other['units']:,} x {other['unit']} of other sizes",
            "where tokenizers differ, --piece N cuts both into the same pieces (at least 30)",
        )


def _told(a: Sequence[Head], b: Sequence[Head]) -> dict[str, Any]:
    head = a[0]
    below_G = _below(head)
    found = compare(
        np.stack([_nats(each) for each in a]), np.stack([_nats(each) for each in b]), below_G, units=head["units"]
    )
    return {
        "set": head["set"],
        "measure": head["measure"],
        "gain": found.gain,
        "low": found.low,
        "high": found.high,
        "verdict": found.verdict,
        "a": [{"run": each["run"], "how": each["how"], "value": v} for each, v in zip(a, found.a_S, strict=True)],
        "b": [{"run": each["run"], "how": each["how"], "value": v} for each, v in zip(b, found.b_S, strict=True)],
        "spread_a": found.spread_a,
        "spread_b": found.spread_b,
        "unit": head["unit"],
        "units": head["units"],
        "freedom": found.freedom,
        "interval_note": _note(found, head, seeds=len(a) + len(b) > 2),
    }


def _nats(head: Head) -> np.ndarray:
    """float64 [G]: with the units of the data made good, where the model reads scaled numbers."""
    groups = np.array(head["groups"], np.float64)
    return np.asarray(groups[:, 0] + head["offset_per_record"] * groups[:, 1] * head["units"] / head["symbols"])


def _below(head: Head) -> np.ndarray:
    groups = np.array(head["groups"], np.float64)
    if head["measure"] == "bits per byte":
        return np.asarray(groups[:, 2] * LN2)
    if head["measure"] == "bits per dim":
        return np.asarray(groups[:, 1] * LN2)
    return np.asarray(groups[:, 1] * (head["units"] / head["symbols"] if head["measure"] == "nats per record" else 1))


def _note(found: Comparison, head: Head, *, seeds: bool) -> str:
    if found.low is None:
        return f"no interval: {head['units']} units, or figures that are not finite"
    if seeds:
        return f"95 %, units and seeds drawn anew, {found.freedom:.1f} degrees of freedom"
    return "95 %, paired bootstrap over units; test-set sampling only, one seed a side"


def describe(told: Mapping[str, Any]) -> str:
    """A few lines for a reader."""
    measure, digits = told["measure"], 4
    lines = [f"{told['set']}, {measure}, {told['units']:,} x {told['unit']}"]
    for side in ("a", "b"):
        for one in told[side]:
            lines.append(f"  {side.upper()}  {one['value']:.{digits}f}  {one['run']} ({one['how']})")
        if told[f"spread_{side}"] is not None:
            lines.append(f"  {side.upper()}  spread over {len(told[side])} seeds {told[f'spread_{side}']:.{digits}f}")
    verdict = {"a": "A is better", "b": "B is better", "undecided": "undecided"}[told["verdict"]]
    bounds = "" if told["low"] is None else f" [{told['low']:.{digits}f}, {told['high']:.{digits}f}]"
    lines.append(f"  {verdict}: A saves {told['gain']:.{digits}f}{bounds} {measure} against B")
    lines.append(f"  {told['interval_note']}")
    return "\n".join(lines)
