"""Real engines in real processes: saved at any ZeRO stage on any number of ranks, resumed at any other.

Ranks are started once a world size and optimizer, and go through the stages one after the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint_jobs import ROWS, STEPS
from tests.data.small import one_split, random_documents
from tests.spawn import spawn

WORLDS = (1, 2, 4)
STAGES = (0, 1, 2, 3)
MIDDLE = 3

Case = tuple[int | None, int, int | None, int]
"""(stage that saves, ranks that save, stage that resumes, ranks that resume); stage None is the plain engine."""

EVERY: list[Case] = list(itertools.product(STAGES, WORLDS, STAGES, WORLDS))
PLAIN: list[Case] = [(None, 1, s, w) for s in STAGES for w in (1, 2)] + [
    (s, w, None, 1) for s in STAGES for w in (1, 2)
]


def pairwise(every: Sequence[Case]) -> list[Case]:
    """Few cases in which every value of a factor meets every value of every other; greedy, always the same."""

    def pairs(case: Case) -> set[Any]:
        return set(itertools.combinations(enumerate(case), 2))

    missing = set().union(*map(pairs, every))
    chosen = []
    while missing:
        best = max(every, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


class Matrix:
    """Runs cases with few processes and keeps what the ranks told."""

    def __init__(self, folder: Path, optimizer: str) -> None:
        self.folder, self.optimizer = folder, optimizer
        one_split(folder / "corpus", random_documents(60, seed=4, longest=60))
        self.common = {"corpus": str(folder / "corpus"), "out": str(folder / "saved"), "optimizer": optimizer}
        self.saved: dict[tuple[int | None, int], list[dict[str, Any]]] = {}

    def save(self, savers: set[tuple[int | None, int]]) -> None:
        for world in sorted({world for _, world in savers}):
            stages = sorted((s for s, w in savers if w == world), key=lambda s: -1 if s is None else s)
            told = spawn("tests.checkpoint_jobs:save_all", world=world, stages=stages, timeout=500, **self.common)
            for i, stage in enumerate(stages):
                self.saved[stage, world] = [rank[i] for rank in told]

    def resume(self, cases: Sequence[tuple[Case, int]]) -> dict[tuple[Case, int], list[dict[str, Any]]]:
        """What each rank told of (case, step), the cases of one stage one after the other."""
        found = {}
        for world in sorted({case[3] for case, _ in cases}):
            ours = sorted((c for c in cases if c[0][3] == world), key=lambda c: -1 if c[0][2] is None else c[0][2])
            orders = [[case[2], case[0], case[1], step] for case, step in ours]
            told = spawn("tests.checkpoint_jobs:resume_all", world=world, cases=orders, timeout=500, **self.common)
            for i, key in enumerate(ours):
                found[key] = [rank[i] for rank in told]
        return found

    def check(self, cases: Sequence[tuple[Case, int]]) -> None:
        """Same batches, same losses as the run that was never interrupted; bit-equal on the same ranks and stage."""
        reference = self.saved[None, 1][0]["curve"]
        rows = [sorted(step) for step in self.saved[None, 1][0]["places"]]
        assert [len(step) for step in rows] == [ROWS] * STEPS
        assert len({tuple(step) for step in rows}) == STEPS
        for key, told in self.saved.items():
            assert told[0]["curve"] == pytest.approx(reference, rel=1e-5), key
        for (case, step), told in self.resume(cases).items():
            what = f"{case} from step {step}"
            saved = self.saved[case[0], case[1]]
            for rank in told:
                assert rank["curve"] == pytest.approx(reference[step:], rel=1e-5), what
            together = zip(*(rank["places"] for rank in told), strict=True)
            read = [sorted(itertools.chain.from_iterable(ranks)) for ranks in together]
            assert read == rows[step:], what
            if case[:2] == case[2:]:
                assert [rank["restored"] for rank in told] == [rank["digests"][step] for rank in saved], what
                assert [rank["end"] for rank in told] == [rank["digests"][STEPS] for rank in saved], what
                assert [rank["curve"] for rank in told] == [rank["curve"][step:] for rank in saved], what


def test_the_cover_is_pairwise() -> None:
    cover = pairwise(EVERY)
    for i, j in itertools.combinations(range(4), 2):
        assert {(c[i], c[j]) for c in cover} == {(c[i], c[j]) for c in EVERY}
    assert len(cover) <= 20
    assert len(EVERY) == 144


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_saved_at_one_stage_and_world_resumed_at_another(tmp_path: Path) -> None:
    """A pairwise cover of stages and worlds, and the plain engine beside them."""
    matrix = Matrix(tmp_path, "adamw")
    cases = [*pairwise(EVERY), *PLAIN[::3]]
    matrix.save({case[:2] for case in cases} | {(None, 1)})
    matrix.check([(case, MIDDLE) for case in cases])


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("world", "optimizer"), [(1, "adamw"), (2, "adamw"), pytest.param(2, "muon", marks=pytest.mark.exhaustive)]
)
def test_resumed_from_any_step_it_is_bit_equal(tmp_path: Path, world: int, optimizer: str) -> None:
    """Parameters, moments and losses, at every stage, with dropout, from every step of a short run."""
    matrix = Matrix(tmp_path, optimizer)
    stages = [None, *STAGES] if world == 1 else list(STAGES)
    matrix.save({(stage, world) for stage in stages} | {(None, 1)})
    # the middle first: into a fresh engine; muon differs in its moments alone
    steps = [MIDDLE, *(step for step in range(STEPS) if step != MIDDLE)][: 1 if optimizer == "muon" else None]
    matrix.check([((stage, world, stage, world), step) for stage in stages for step in steps])


@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_every_stage_and_world_to_every_other(tmp_path: Path, optimizer: str) -> None:
    matrix = Matrix(tmp_path, optimizer)
    cases = [*EVERY, *PLAIN, (None, 1, None, 1)]
    matrix.save({case[:2] for case in cases})
    matrix.check([(case, MIDDLE) for case in cases])
