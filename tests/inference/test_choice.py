"""Spread over folds against the standard library; the choice by one standard error, worked out by hand."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmtrain.inference.choice import Spread, one_standard_error

NUMBERS = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20)


@given(NUMBERS)
def test_spread_is_that_of_the_standard_library(values: list[float]) -> None:
    spread = Spread(tuple(values))
    assert spread.mean == pytest.approx(statistics.fmean(values), abs=1e-9)
    assert spread.sd == pytest.approx(statistics.stdev(values), abs=1e-9)
    assert spread.se == pytest.approx(statistics.stdev(values) / math.sqrt(len(values)), abs=1e-9)


def test_one_value_has_no_spread() -> None:
    spread = Spread((3.0,))
    assert spread.mean == 3.0
    assert math.isnan(spread.sd)
    assert math.isnan(spread.se)
    assert spread.to_json() == {"values": [3.0], "mean": 3.0, "sd": None, "se": None}


def test_the_simplest_within_one_standard_error_of_the_best() -> None:
    # Means 2.0, 1.5, 1.6, 1.9 from complex to simple; the best is 1.5 with an error of 0.2: 1.6 is within, 1.9 is not.
    choice = one_standard_error([2.0, 1.5, 1.6, 1.9], [0.9, 0.2, 0.0, 9.0], [0, 1, 2, 3])
    assert (choice.best, choice.chosen) == (1, 2)
    assert choice.limit == pytest.approx(1.7)
    assert one_standard_error([2.0, 1.5, 1.6, 1.9], [0.9, 0.5, 0.0, 9.0], [0, 1, 2, 3]).chosen == 3
    assert one_standard_error([2.0, 1.5, 1.6, 1.9], [0.9, 0.5, 0.0, 9.0], [3, 2, 1, 0]).chosen == 0
    assert one_standard_error([2.0, 1.5, 1.6, 1.9], [0.9, 0.05, 9.0, 9.0], [0, 1, 2, 3]).chosen == 1


def test_equally_simple_candidates_go_by_their_mean_and_then_by_their_place() -> None:
    assert one_standard_error([1.2, 1.0, 1.1], [0.3, 0.3, 0.3], [1, 0, 1]).chosen == 2
    assert one_standard_error([1.0, 1.0], [0.1, 0.1], [1, 1]).chosen == 0


def test_what_diverged_is_out_and_an_unknown_error_is_none() -> None:
    choice = one_standard_error([math.inf, 1.0, math.nan, 1.05], [0.1, math.nan, 0.1, 0.1], [0, 1, 9, 2])
    assert (choice.best, choice.limit, choice.chosen) == (1, 1.0, 1)
    with pytest.raises(ValueError, match="no candidate has a finite mean"):
        one_standard_error([math.inf, math.nan], [0.1, 0.1], [0, 1])
