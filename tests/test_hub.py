"""Who is named when a rank has waited for too long, case by case; and that nobody is named when no rank has."""

import socket

import pytest

from lmtrain import section
from lmtrain.hub import Hub, Rank

LIMIT = 10.0
NOW = 1000.0


def judged(ranks, world=None):
    """The verdict on ranks of which (host, moves, waits, waited, seconds since it showed, since its keeper spoke)."""
    with socket.socket() as unused:
        hub = Hub(unused, world or len(ranks), "", limit=LIMIT, patience=60.0, beat=1.0)
        for number, (host, moves, waits, waited, shown, heard, *more) in enumerate(ranks):
            one = Rank(host, 100 + number, NOW - heard, NOW - shown, moves, waits, waited, begun=True, section="step 7")
            for name in more:
                setattr(one, name, not getattr(one, name))
            hub._ranks[number] = one
        hub._due = NOW - 2.0
        hub._judge(NOW)
        return hub.verdict


WAITS = ("a", 20, True, 11.0, 0.5, 0.5)
CASES = {
    "stopped in the same collective": ([WAITS, ("b", 20, True, 0.4, 10.6, 0.5)], 1, "it was stopped"),
    "stopped before it": ([WAITS, ("b", 17, False, 0.0, 11.4, 0.5)], 1, "it was stopped"),
    "stopped before it could say that it ended the first step": (
        [WAITS, ("b", 17, False, 0.0, 11.4, 0.5, "begun")],
        1,
        "it was stopped",
    ),
    "rank 0 stopped": ([("a", 19, False, 0.0, 11.0, 0.5), ("b", 20, True, 11.0, 0.5, 0.5)], 0, "it was stopped"),
    "host down": ([WAITS, ("b", 20, True, 0.1, 11.0, 11.0)], 1, "its host has given no sign of life for 11.0 s"),
    "host down, ahead": ([WAITS, ("b", 21, False, 0.0, 11.0, 11.0)], 1, "or its link, is down"),
    "host down, another behind that waits for it too": (
        [WAITS, ("b", 18, True, 11.2, 0.5, 0.5), ("c", 17, False, 0.0, 11.0, 11.0)],
        2,
        "or its link, is down",
    ),
    "rank 0 cut off": (
        [WAITS, ("b", 20, True, 0.0, 11.0, 11.0), ("c", 20, True, 0.0, 11.0, 11.0)],
        0,
        "hears nothing from any other host",
    ),
    "hangs before the collective": ([WAITS, ("b", 19, False, 0.0, 0.5, 0.5)], 1, "makes no progress"),
    "hangs at its door": ([WAITS, ("b", 20, False, 0.0, 0.5, 0.5)], 1, "makes no progress"),
    "hangs, and a healthy one was not heard for a while": (
        [WAITS, ("b", 19, False, 0.0, 0.5, 0.5), ("c", 20, True, 5.0, 6.0, 0.5)],
        1,
        "makes no progress",
    ),
    "waits in an earlier collective": ([WAITS, ("b", 18, True, 11.5, 0.5, 0.5)], 1, "makes no progress"),
    "left": ([WAITS, ("b", 19, False, 0.0, 0.5, 0.5, "bye")], 1, "has left; others have waited for it for 11.0 s"),
    "all wait": ([WAITS, ("b", 20, True, 10.5, 0.5, 0.5)], -1, "the network between them has failed"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_one_that_others_wait_for_is_named(case):
    ranks, guilty, words = CASES[case]
    verdict = judged(ranks)
    assert verdict is not None
    assert (verdict["rank"], verdict["code"]) == (guilty, 5)
    assert words in verdict["text"]
    assert "step 7" in verdict["text"]
    if guilty >= 0:
        assert f"rank {guilty} of {len(ranks)} on {ranks[guilty][0]} (pid {100 + guilty})" in verdict["text"]


def test_a_rank_that_never_came_is_named():
    verdict = judged([("a", 20, True, 61.0, 0.5, 0.5)], world=2)
    assert verdict is not None
    assert verdict["text"].startswith("rank 1 of 2 has not come")


@pytest.mark.parametrize(
    "ranks",
    [
        [("a", 20, False, 0.0, 500.0, 500.0), ("b", 20, False, 0.0, 0.5, 0.5)],  # silent, and nobody waits
        [("a", 20, False, 0.0, 0.5, 0.5), ("b", 300, True, 9.9, 0.5, 0.5)],  # far behind, within the limit
        [WAITS, ("b", 20, True, 0.5, 0.5, 0.5)],  # has just come: the next sign of life of both shows it
        [("a", 5, True, 59.0, 0.5, 0.5, "begun"), ("b", 4, False, 0.0, 50.0, 0.5, "begun")],  # before the first step
    ],
)
def test_silence_and_slowness_are_no_offence(ranks):
    assert judged(ranks) is None


def test_waits_are_counted_alike_on_all_ranks_and_nested_ones_once():
    section.enter("step 1")
    before = section.current()
    assert (before.name, before.waits) == ("step 1", False)
    with section.waiting():
        inside = section.current()
        assert (inside.moves - before.moves, inside.waits, inside.name) == (1, True, "step 1")
        with section.waiting():
            assert section.current() is inside
        assert section.current() is inside
    after = section.current()
    assert (after.moves - before.moves, after.waits, after.torn) == (2, False, False)
    assert before.since <= inside.since <= after.since


def test_a_wait_that_failed_is_remembered_until_the_next():
    with pytest.raises(RuntimeError, match="peer"), section.waiting():
        raise RuntimeError("connection closed by peer")
    assert section.current().torn
    assert not section.current().waits
    with section.waiting():
        assert not section.current().torn
    with pytest.raises(RuntimeError), section.waiting():
        raise RuntimeError("connection closed by peer")
    section.enter("step 2")
    assert not section.current().torn
