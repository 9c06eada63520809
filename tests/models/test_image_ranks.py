"""Image models on two ranks at every ZeRO stage: losses and streams are those of one process of plain torch."""

import pytest

from tests.spawn import spawn

MODELS = {
    "image_transformer": {
        "kind": "image_transformer", "layers": 2, "width": 8, "heads": 2, "query_block": 5, "memory_block": 4,
        "conditional": True,
    },
    "rectangles": {
        "kind": "image_transformer", "layers": 1, "width": 8, "heads": 2, "attention": "local_2d",
        "query_shape": [2, 1], "memory_reach": [0, 1], "head": "logistics", "components": 2,
    },
    "row_lstm": {"kind": "pixelrnn", "variant": "row_lstm", "layers": 1, "hidden": 3, "head_width": 8},
    "diagonal_bilstm": {"kind": "pixelrnn", "layers": 2, "hidden": 3, "head_width": 8, "conditional": True},
}  # fmt: skip


def agree(name: str, stage: int) -> None:
    job = "tests.models.image_jobs:curve_and_stream"
    (plain,) = spawn(job, world=1, model=MODELS[name], engine={"kind": "plain"})
    ranks = spawn(job, world=2, model=MODELS[name], engine={"kind": "zero", "zero_stage": stage, "timeout": 60.0})
    assert plain[2] != plain[0]
    for said in ranks:
        assert said == pytest.approx(plain, rel=1e-4)


@pytest.mark.slow
def test_stage_3_is_plain():
    agree("image_transformer", 3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_is_plain(name, stage):
    agree(name, stage)
