"""One model, evaluated by real processes: the same for every batch size, world size and ZeRO stage, and right."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lmtrain.protocol import Cond, Place
from tests.inference.jobs import CONTEXT, corpus, model_of, scores
from tests.spawn import spawn

BATCHES = [1, 3, 8]
SUBSET = "{'model': 'gpt', 'mode': 'window', 'max_symbols': 200}"
"""Too few blocks for an interval."""
QUICK = [(2, 3), (4, 1)]


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    """The plain engine in this process."""
    return scores(Place(), Path(), engine={"kind": "plain"}, batches=BATCHES)


def by_run(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Results by what was run, batch sizes together."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        label = str({key: value for key, value in one.items() if key not in {"batch", "result"}})
        runs.setdefault(label, []).append(one["result"])
    return runs


def agree(found: list[dict[str, Any]], want: list[dict[str, Any]]) -> None:
    """Nats within 1e-6 of the first batch size alone, every count equal, the interval too."""
    expected = by_run(want)
    for label, results in by_run(found).items():
        first = expected[label][0]
        assert len(results) == len(BATCHES)
        for result in results:
            assert result["nats"] == pytest.approx(first["nats"], rel=1e-6), label
            assert result["perplexity"] == pytest.approx(first["perplexity"], rel=1e-5), label
            for key in ("symbols", "documents", "bytes", "words", "lines", "complete", "share", "interval_note"):
                assert result[key] == first[key], (label, key)
            assert (result["interval"] is None) == (first["interval"] is None) == (label == SUBSET), label
            if first["interval"] is not None:
                bounds = first["interval"]["bits_per_byte"]
                assert result["interval"]["bits_per_byte"] == pytest.approx(bounds, rel=1e-6), label


def test_alone_it_is_torchs_own_cross_entropy(alone: list[dict[str, Any]]) -> None:
    """Row after row of the text, by the logits of the models and `F.cross_entropy`."""
    split = corpus().split("data")
    text = torch.from_numpy(split.read(0, split.symbols))
    ends = split.document_ends().tolist()
    model = model_of("gpt").eval()
    nats, start = 0.0, 256
    for at in range(0, len(text), CONTEXT):
        row = text[at : at + CONTEXT]
        with torch.no_grad():
            logits_BTV = model.predict(row[None], cond=Cond(torch.tensor([start])))
        nats += F.cross_entropy(logits_BTV[0].double(), row, reduction="sum").item()
        start = int(row[-1])
    assert by_run(alone)["{'model': 'gpt', 'mode': 'window'}"][0]["nats"] == pytest.approx(nats, rel=1e-6)

    model = model_of("rnn").eval()
    nats = 0.0
    for begin, end in itertools.pairwise([0, *ends]):
        with torch.no_grad():
            logits_BTV = model.predict(text[None, begin:end], cond=Cond(torch.tensor([256])))
        nats += F.cross_entropy(logits_BTV[0].double(), text[begin:end], reduction="sum").item()
    assert by_run(alone)["{'model': 'rnn', 'mode': 'carried'}"][0]["nats"] == pytest.approx(nats, rel=1e-6)
    agree(alone, alone)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "stage"), QUICK)
def test_ranks_and_stages(world: int, stage: int, alone: list[dict[str, Any]]) -> None:
    _compare(world, stage, alone)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("world", "stage"), sorted(set(itertools.product((1, 2, 4), range(4))) - set(QUICK)))
def test_all_ranks_and_stages(world: int, stage: int, alone: list[dict[str, Any]]) -> None:
    _compare(world, stage, alone)


def _compare(world: int, stage: int, alone: list[dict[str, Any]]) -> None:
    ranks = spawn(
        "tests.inference.jobs:scores",
        world=world,
        engine={"kind": "zero", "zero_stage": stage},
        batches=BATCHES,
    )
    assert all(rank == ranks[0] for rank in ranks)
    agree(ranks[0], alone)
