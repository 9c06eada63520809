"""Ranks make the same module calls though documents cut their rows differently: ZeRO-3 gathers weights at each call."""

import pytest

from tests.spawn import spawn

MODELS = {
    "gpt": {"kind": "gpt", "layers": 1, "width": 16, "heads": 2},
    "lstm": {"kind": "rnn", "layers": 2, "width": 16},
    "gru": {"kind": "rnn", "cell": "gru", "layers": 1, "width": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_uneven_documents_at_stage_3(name):
    job = "tests.models.rank_jobs:masked_curve"
    (plain,) = spawn(job, world=1, model=MODELS[name], engine={"kind": "plain"})
    ranks = spawn(job, world=2, model=MODELS[name], engine={"kind": "zero", "zero_stage": 3, "timeout": 60.0})
    assert plain[-1] != plain[0]
    for curve in ranks:
        assert curve == pytest.approx(plain, rel=1e-5)
