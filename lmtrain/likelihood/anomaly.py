"""Telling what is outside of a run's data by its likelihood: every score beside model-free controls, both ways round.

Shapes in names: U units of a set, N calibrating units.

A direction is a run, its background model if there is one, a set inside, a set outside, and calibrating units from
inside which neither training nor the test has seen. Half of those, by hash, say what is usual (the entropy, the ranks);
the other half sets the thresholds, so that a threshold's promise does not lean on its own units.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lmtrain.errors import CheckpointError, InputError
from lmtrain.inference import anomaly
from lmtrain.inference.cut import mix
from lmtrain.likelihood import controls, scorefile, sets
from lmtrain.likelihood.scoring import score_set
from lmtrain.likelihood.sets import Set
from lmtrain.use import Opened

MODEL, CONTROL = "model", "control"
LEAST = 20
"""Calibrating units without which nothing is promised."""


@dataclass(frozen=True, slots=True)
class Settings:
    """batches: sizes for typicality. fpr: the share of inside that thresholds may flag. tpr: where FPR is read off."""

    batches: tuple[int, ...] = (1, 10)
    fpr: float = 0.05
    tpr: float = 0.95
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Looked:
    """What was computed of each unit of a set. nats_U: what the run says; background_U: what the background says."""

    held: Set
    nats_U: np.ndarray
    symbols_U: np.ndarray
    background_U: np.ndarray | None
    png_U: np.ndarray | None
    xz_U: np.ndarray | None
    mean_U: np.ndarray

    @property
    def cost_U(self) -> np.ndarray:
        """What typicality is about: nats of a record; of text, whose lengths differ, nats a symbol."""
        return np.asarray(self.nats_U if self.held.corpus.record is not None else self.nats_U / self.symbols_U)

    def some(self, chosen_U: np.ndarray) -> Looked:
        """These units alone."""

        def cut(value_U: np.ndarray | None) -> np.ndarray | None:
            return None if value_U is None else value_U[chosen_U]

        return Looked(
            held=self.held,
            nats_U=self.nats_U[chosen_U],
            symbols_U=self.symbols_U[chosen_U],
            background_U=cut(self.background_U),
            png_U=cut(self.png_U),
            xz_U=cut(self.xz_U),
            mean_U=self.mean_U[chosen_U],
        )


@dataclass(frozen=True, slots=True)
class Usual:
    """What calibrating units say is usual. cost: their mean cost, the estimate of the entropy. nats_N: sorted."""

    cost: float
    nats_N: np.ndarray


@dataclass(frozen=True, slots=True)
class Direction:
    """What came of one: a row a score, and every unit's own scores by set."""

    run: str
    inside: str
    outside: str
    entropy: float
    calibrating: tuple[int, int]
    rows: list[dict[str, Any]] = field(default_factory=list)
    units: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON values, without the units."""
        return {
            "run": self.run,
            "inside": self.inside,
            "outside": self.outside,
            "entropy_nats": self.entropy,
            "calibrating_units": {"usual": self.calibrating[0], "thresholds": self.calibrating[1]},
            "scores": self.rows,
        }


def look(opened: Opened, held: Set, *, background: Opened | None = None, batch: int | None = None) -> Looked:
    """Each unit of a set, alone, under the run and its background, and under what needs no model."""
    mine = score_set(opened, held, alone=True, batch=batch)
    theirs = None if background is None else score_set(background, _seen_by(background, held), alone=True, batch=batch)
    return Looked(
        held=held,
        nats_U=mine.nats_U,
        symbols_U=mine.symbols_U,
        background_U=None if theirs is None else theirs.nats_U,
        png_U=controls.png_bytes(held),
        xz_U=controls.xz_bytes(held),
        mean_U=controls.mean_intensity(held),
    )


def _seen_by(background: Opened, held: Set) -> Set:
    """CheckpointError when the background model reads other symbols than those of the set."""
    if background.corpus.meaning != held.corpus.meaning:
        raise CheckpointError(
            f"the background model reads {background.corpus.meaning}, and {held.name} is {held.corpus.meaning}; train "
            "it on the run's own corpus, with the same data.view but for `corrupt`"
        )
    return held


def scores_of(looked: Looked, usual: Usual, settings: Settings) -> dict[str, tuple[str, np.ndarray]]:
    """Every score there is for these units, by name: (model or control, its values; larger is stranger)."""
    found = {
        "nll": (MODEL, looked.nats_U),
        "nll per symbol": (MODEL, looked.nats_U / looked.symbols_U),
    }
    for size in settings.batches:
        found[f"typicality, batches of {size}"] = (
            MODEL,
            anomaly.typicality(looked.cost_U, entropy=usual.cost, batch=size),
        )
    if looked.background_U is not None:
        found["likelihood ratio"] = (MODEL, anomaly.likelihood_ratio(looked.nats_U, looked.background_U))
    for name, length_U in (("PNG", looked.png_U), ("xz", looked.xz_U)):
        if length_U is not None:
            found[f"nll - {name}"] = (MODEL, anomaly.complexity_corrected(looked.nats_U, length_U))
    found["rank p-value"] = (MODEL, -anomaly.rank_p(looked.nats_U, usual.nats_N))
    for name, length_U in (("PNG length", looked.png_U), ("xz length", looked.xz_U)):
        if length_U is not None:
            found[name] = (CONTROL, length_U)
    found["mean intensity"] = (CONTROL, looked.mean_U)
    return found


def direction(run: str, inside: Looked, outside: Looked, calibrating: Looked, *, settings: Settings) -> Direction:
    """All scores of one direction, with thresholds and in both signs.

    Raises InputError when calibrating units are too few, or are those that are to be told.
    """
    _apart(inside.held, calibrating.held)
    count = len(calibrating.nats_U)
    if count < LEAST:
        raise InputError(f"{calibrating.held.name} has {count} units to calibrate with; wanted {LEAST} or more")
    usual_N, rest_N = halves(calibrating.held.numbers_N)
    known, kept = calibrating.some(usual_N), calibrating.some(rest_N)
    usual = Usual(float(known.cost_U.mean()), np.sort(known.nats_U))
    told = Direction(run, inside.held.name, outside.held.name, usual.cost, (len(usual_N), len(rest_N)))
    by_set = {name: scores_of(each, usual, settings)
              for name, each in (("inside", inside), ("outside", outside), ("kept", kept))}  # fmt: skip
    for name, (kind, inside_U) in by_set["inside"].items():
        values = inside_U, by_set["outside"][name][1], by_set["kept"][name][1]
        if not min(map(len, values)):
            raise InputError(f"{name}: fewer units than a batch; give smaller batches or more units")
        told.rows.append({"score": name, "kind": kind, **_row(*values, settings=settings)})
    for role, each in (("inside", inside), ("outside", outside)):
        told.units[role] = _units(each, by_set[role])
    return told


def halves(number_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of places 0 .. N - 1, by a hash of the units' numbers: a set may be sorted by class."""
    order_N = np.argsort(mix(number_N), kind="stable")
    middle = len(order_N) // 2
    return np.sort(order_N[:middle]), np.sort(order_N[middle:])


def _apart(inside: Set, calibrating: Set) -> None:
    same = (inside.content, inside.split.name) == (calibrating.content, calibrating.split.name)
    if same and np.intersect1d(inside.numbers_N, calibrating.numbers_N).size:
        raise InputError(
            f"{calibrating.name} would calibrate thresholds for the very units that are to be told; give another "
            "set by --calibrate"
        )


def _row(inside_U: np.ndarray, outside_U: np.ndarray, kept_N: np.ndarray, *, settings: Settings) -> dict[str, Any]:
    signs = {}
    for name, sign in (("as it is", 1.0), ("negated", -1.0)):
        found = anomaly.detect(sign * inside_U, sign * outside_U, tpr=settings.tpr)
        at = anomaly.threshold(sign * kept_N, fpr=settings.fpr)
        signs[name] = {
            **asdict(found),
            "threshold": at if math.isfinite(at) else None,
            "flagged_inside": float((sign * inside_U > at).mean()),
            "flagged_outside": float((sign * outside_U > at).mean()),
        }
    return signs


def _units(looked: Looked, found: Mapping[str, tuple[str, np.ndarray]]) -> list[dict[str, Any]]:
    whole = {name: value_U for name, (_, value_U) in found.items() if len(value_U) == len(looked.nats_U)}
    return [
        {"set": looked.held.name, "unit": number, **{name: float(value_U[u]) for name, value_U in whole.items()}}
        for u, number in enumerate(looked.held.numbers_N.tolist())
    ]


# ---- a whole question ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Side:
    """A run and its background model, opened, and how they are called."""

    name: str
    opened: Opened
    background: Opened | None = None


def ask(
    side: Side,
    *,
    inside: str,
    outside: Sequence[str],
    calibrate: str,
    split: str,
    settings: Settings,
    piece: int | None = None,
    limit: int | None = None,
) -> Iterable[Direction]:
    """The directions from one inside to each outside, each as soon as it is there. Sets as sets.py has them."""
    opened = side.opened

    def one(given: str, most: int | None = limit) -> Set:
        return sets.open_set(opened, given, split=split, piece=piece, limit=most)

    held, calibrating = one(inside), one(calibrate)
    _apart(held, calibrating)
    others = [
        sets.made_of(given, held, opened, seed=settings.seed) if given.startswith("@") else one(given)
        for given in outside
    ]
    looked = [look(opened, each, background=side.background) for each in (held, calibrating)]
    for other in others:
        beyond = look(opened, other, background=side.background)
        yield direction(side.name, looked[0], beyond, looked[1], settings=settings)


def names_swapped(opened: Opened, inside: str, split: str) -> str:
    """The set inside as another run has to call it: `own` is the corpus of this one."""
    head, _, tail = inside.partition(":")
    if head == sets.OWN and not Path(inside).exists():
        return f"{opened.corpus.path}:{tail or split}"
    return inside


def write_units(path: Path, found: Sequence[Direction]) -> None:
    """Every unit's scores in every direction, as a .jsonl or .parquet file with the summaries at its head."""
    rows = [
        {"run": told.run, "role": role, **row} for told in found for role, units in told.units.items() for row in units
    ]
    scorefile.write_rows(path, {"lmtrain_anomaly": 1, "directions": [told.to_json() for told in found]}, rows)


def nats_by_set(found: Sequence[Direction]) -> dict[str, list[float]]:
    """Nats of each unit under the first direction's run, by set: its inside, and whatever was outside."""
    mine = [told for told in found if told.run == found[0].run]
    out = {f"inside {mine[0].inside}": [row["nll"] for row in mine[0].units["inside"]]}
    return out | {f"outside {told.outside}": [row["nll"] for row in told.units["outside"]] for told in mine}


def table(found: Direction, settings: Settings) -> str:
    """One direction as a reader sees it: a line a score, controls below a rule."""
    first = found.rows[0]["as it is"]
    wide = max(len(row["score"]) for row in found.rows)
    head = (
        f"{'':<{wide}}  {'AUROC':<22}{'AUPRC':<7} {f'FPR@{settings.tpr:.0%}':<8} | negated: "
        f"{'AUROC':<7}{'AUPRC':<7}{f'FPR@{settings.tpr:.0%}':<8} | flagged at {settings.fpr:.0%}: inside  outside"
    )
    lines = [
        f"{found.run}: inside {found.inside} ({first['inside']:,} units), outside {found.outside} "
        f"({first['outside']:,} units)",
        head,
    ]
    before = MODEL
    for row in found.rows:
        if row["kind"] != before:
            lines.append("-" * wide + "  without a model")
            before = row["kind"]
        one, other = row["as it is"], row["negated"]
        bounds = one["auroc_interval"]
        inside = "" if bounds is None else f" [{bounds[0]:.3f}, {bounds[1]:.3f}]"
        shown = f"{one['auroc']:.3f}{inside}"
        lines.append(
            f"{row['score']:<{wide}}  {shown:<22}{one['auprc']:<7.3f} {one['fpr']:<8.3f} |"
            f" {'':<8} {other['auroc']:<7.3f}{other['auprc']:<7.3f}{other['fpr']:<8.3f} | {'':<15}"
            f"{one['flagged_inside']:<7.3f} {one['flagged_outside']:.3f}"
        )
    return "\n".join(line.rstrip() for line in lines)
