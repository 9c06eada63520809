"""The table of all ranks: exact, the same everywhere, and naming the rank that the others wait for."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmtrain.fleet import COLUMNS, MEASURED, Fleet, WatchConfig, gather, hosts, own_seconds, ratios
from lmtrain.protocol import Place
from tests.engine.jobs import engine_for, one_step, small_model
from tests.fake_ranks import engines, on_all
from tests.spawn import spawn


class Diary:
    def __init__(self) -> None:
        self.tables: list[tuple[int, dict[str, Any]]] = []
        self.alerts: list[str] = []

    def ranks(self, table: dict[str, Any], *, step: int) -> None:
        self.tables.append((step, table))

    def alert(self, title: str, text: str) -> None:
        self.alerts.append(f"{title}: {text}")


def record(step: int, *, seconds: float = 0.1, talk: float = 0.0, wait: float = 0.0) -> dict[str, Any]:
    return {"step": step, "step_seconds": seconds, "communication": talk, "data_wait": wait}


def test_a_gathered_table_is_exact() -> None:
    ranks = engines(3)
    rows = [[math.pi * 10.0 ** (9 * rank - 9), -0.1 - rank, math.nan if rank == 1 else 1e300] for rank in range(3)]
    for table in on_all(ranks, lambda e: gather(e, rows[e.rank])):
        np.testing.assert_array_equal(table, np.array(rows))


def test_hosts_are_gathered_whatever_their_names() -> None:
    names = ["a", "nœud-2.example.org", "x" * 70]
    ranks = engines(3)
    assert on_all(ranks, lambda e: hosts(e, names[e.rank])) == [["a", "nœud-2.example.org", "x" * 64]] * 3


def run(times: list[list[float]], **config: Any) -> list[Diary]:
    """Each step takes the slowest rank's own seconds; the others wait in collectives. times[step][rank]."""
    ranks = engines(len(times[0]))
    diaries = [Diary() for _ in ranks]
    fleets = [Fleet(WatchConfig(**config), diary, host=f"host-{i}") for i, diary in enumerate(diaries)]

    def act(engine: Any) -> None:
        for step, own in enumerate(times, 1):
            mine = own[engine.rank]
            fleets[engine.rank](engine, record(step, seconds=max(own), talk=max(own) - mine, wait=mine / 4))

    assert on_all(ranks, act) == [None] * len(ranks)
    return diaries


def test_a_straggler_is_named_by_rank_host_and_ratio_once_until_it_keeps_up() -> None:
    even, slow = [0.2, 0.2, 0.2], [0.2, 0.2, 0.5]
    diaries = run([slow, even, even, slow, slow, slow, slow, even, even, slow, slow], every=2, straggler=1.5)
    first = diaries[0]
    assert [step for step, _ in first.tables] == [2, 4, 6, 8, 10]
    assert [[(late["rank"], late["host"]) for late in table["stragglers"]] for _, table in first.tables] == [
        [],  # the first step is left out
        [(2, "host-2")],
        [(2, "host-2")],
        [(2, "host-2")],
        [(2, "host-2")],
    ]
    found = [table["stragglers"][0]["ratio"] for _, table in first.tables[1:]]
    assert found == pytest.approx([1.75, 2.5, 1.75, 1.75])
    assert first.alerts == [
        "straggler: rank 2 on host-2 takes 1.75 times the median: 0.35 s of its own a step, 0.0875 s of them waiting "
        "for data (median 0.2 s). All ranks wait for it"
    ]
    for other in diaries[1:]:
        assert [(s, t["stragglers"], t["ranks/ratio"]) for s, t in other.tables] == [
            (s, t["stragglers"], t["ranks/ratio"]) for s, t in first.tables
        ]
    again = run([even, even, slow, slow, even, even, slow, slow], every=2, straggler=1.5)[1]
    assert [len(table["stragglers"]) for _, table in again.tables] == [0, 1, 0, 1]
    assert len(again.alerts) == 2


def test_a_row_says_what_a_rank_did() -> None:
    diary = run([[0.3, 0.4], [0.3, 0.4], [0.1, 0.2]], every=3)[1]
    (step, table) = diary.tables[0]
    assert step == 3
    assert table["columns"] == COLUMNS
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    assert [(row["rank"], row["host"]) for row in rows] == [(0, "host-0"), (1, "host-1")]
    assert [row["step_seconds"] for row in rows] == pytest.approx([0.3, 0.3])
    assert [row["own_seconds"] for row in rows] == pytest.approx([0.2, 0.3])
    assert [row["communication_seconds"] for row in rows] == pytest.approx([0.1, 0.0], abs=1e-12)
    assert [row["data_wait_seconds"] for row in rows] == pytest.approx([0.05, 0.075])
    assert [row["ratio"] for row in rows] == pytest.approx([1.0, 1.5])
    assert all(row["memory_bytes"] > 1e6 for row in rows)
    assert all(row[name] is None for row in rows for name in ("gpu_memory_bytes", "gpu_peak_bytes", "gpu_utilisation"))
    assert table["ranks/ratio"] == pytest.approx(1.5)
    assert table["ranks/communication"] == pytest.approx(1 / 6)
    assert table["ranks/data_wait"] == pytest.approx(0.25)


def test_small_differences_of_tiny_steps_name_nobody() -> None:
    diary = run([[0.0001, 0.004]] * 5, every=2)[0]
    assert [table["stragglers"] for _, table in diary.tables] == [[], []]
    assert diary.alerts == []


def test_none_is_none() -> None:
    assert run([[0.1, 0.9]] * 5, every=0)[0].tables == []


def test_the_median_of_two_is_the_faster_one() -> None:
    assert ratios([0.5, 1.5]) == [1.0, 3.0]
    assert ratios([0.0, 0.0, 1.0]) == [1.0, 1.0, 1.0]
    table = np.zeros((1, len(MEASURED)))
    table[0, MEASURED.index("step_seconds")] = 1.0
    table[0, MEASURED.index("communication_seconds")] = 3.0  # overlapping
    assert own_seconds(table) == [0.0]


def uneven(place: Place, folder: Path, *, slow: int, seconds: float) -> list[dict[str, Any]]:
    """Real engines, stages 0 to 3; rank `slow` sleeps in every forward pass. What this rank thinks of all."""
    torch.set_num_threads(1)
    found = []
    for stage in range(4):
        model = small_model("rnn")
        if place.rank == slow:
            model.register_forward_hook(lambda *_: time.sleep(seconds))
        engine = engine_for(model, place, micro=6, zero_stage=stage)
        diary = Diary()
        fleet = Fleet(WatchConfig(every=3), diary, host=f"node-{place.rank}")
        for step in range(3):
            began, talked = time.perf_counter(), engine.communicated
            one_step(engine, step, micro=6)
            took = time.perf_counter() - began
            fleet(engine, record(step + 1, seconds=took, talk=engine.communicated - talked))
        engine.close()
        found += [{**table, "stage": stage, "alerts": diary.alerts} for _, table in diary.tables]
    return found


@pytest.mark.slow
def test_a_rank_that_is_slow_is_told_from_those_that_wait_for_it() -> None:
    """A step takes equally long on every rank; the clock around DeepSpeed's collectives tells who is to blame."""
    ranks = spawn("tests.test_fleet:uneven", world=2, timeout=500, slow=1, seconds=0.6)
    assert ranks[0] == ranks[1]
    assert [table["stage"] for table in ranks[0]] == [0, 1, 2, 3]
    for table in ranks[0]:
        waits, sleeps = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
        assert sleeps["own_seconds"] >= 0.6, table
        assert waits["step_seconds"] >= 0.6, table
        assert waits["communication_seconds"] > 0.2, table  # not all of the 0.6 s: a busy machine delays everyone
        assert [late["rank"] for late in table["stragglers"]] == [1], table
        assert "rank 1 on node-1 takes" in table["alerts"][0]
