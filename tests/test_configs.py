"""The configs for GPU clusters: what they say is possible, of the size they name, and what DeepSpeed would be given."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from lmtrain import models, schema
from lmtrain.config import read_yaml
from lmtrain.engine import deepspeed_json
from lmtrain.protocol import Spec

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
V = 50_304


def gpt2(layers: int, D: int, C: int) -> int:
    """GPT-2, tied: two norms, attention and a 4 D network a layer, all with biases; a norm at the end."""
    layer = (D * 3 * D + 3 * D) + (D * D + D) + (D * 4 * D + 4 * D) + (4 * D * D + D) + 2 * 2 * D
    return V * D + C * D + layers * layer + 2 * D


def swiglu(layers: int, D: int, head: int, hidden: int) -> int:
    """Rotary, tied, no biases: gains of the norms, of queries and of keys; three matrices of the gated network."""
    return V * D + layers * (4 * D * D + 3 * D * hidden + 2 * D + 2 * head) + D


def lstm(layers: int, D: int, H: int) -> int:
    """Tied through a map from H to D; torch's LSTM has two biases a gate."""
    return V * D + sum(4 * H * ((D if i == 0 else H) + H) + 8 * H for i in range(layers)) + H * D


LARGE: dict[str, dict[str, Any]] = {
    "gpt-124m-openwebtext": {"parameters": gpt2(12, 768, 1024), "named": 124e6, "stage": 1, "micro": 16, "rows": 512},
    "gpt-1b-openwebtext": {"parameters": swiglu(24, 2048, 128, 5464), "named": 1.3e9, "stage": 2, "micro": 8,
                           "rows": 512},
    "rnn-100m-openwebtext": {"parameters": lstm(2, 768, 2048), "named": 100e6, "stage": 1, "micro": 32, "rows": 1024},
}  # fmt: skip


def test_every_config_can_be_read() -> None:
    paths = [path for path in sorted(CONFIGS.glob("*.yaml")) if path.name != "sweep.yaml"]
    assert len(paths) >= 8
    for path in paths:
        config = schema.load(path)
        kind, _, corpus = path.stem.partition("-")
        assert config.model is not None
        assert config.model.kind == kind, "<kind>-<size>-<corpus>.yaml"
        assert corpus.count("-") == 1


@pytest.mark.parametrize("name", LARGE)
def test_a_large_config_has_the_size_of_its_name(name: str) -> None:
    config, expected = schema.load(CONFIGS / f"{name}.yaml"), LARGE[name]
    _, model_config = schema.need_train(config)
    with torch.device("meta"):
        model = models.build(model_config, Spec(alphabet=V, context=config.data.context, bos=V - 1))
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model.parameter_counts()["total"] == expected["parameters"]
    assert expected["parameters"] == pytest.approx(expected["named"], rel=0.05)
    assert config.prepare is not None
    assert config.prepare.tokenizer.vocab == V
    work = model.flops_per_symbol(config.data.context)
    assert work > 6 * model.parameter_counts()["without_embeddings"]


@pytest.mark.parametrize("name", LARGE)
@pytest.mark.parametrize("world", [8, 16, 32])
def test_what_deepspeed_gets_from_a_large_config(name: str, world: int) -> None:
    config, expected = schema.load(CONFIGS / f"{name}.yaml"), LARGE[name]
    micro, accumulation = config.data.layout(world)
    json = deepspeed_json(config.engine, config.optimizer, micro_batch=micro, accumulation=accumulation, world=world)
    assert micro == expected["micro"]
    assert json["train_batch_size"] == expected["rows"]
    assert json["train_micro_batch_size_per_gpu"] * json["gradient_accumulation_steps"] * world == expected["rows"]
    assert json["zero_optimization"]["stage"] == expected["stage"]
    assert "contiguous_gradients" not in json["zero_optimization"], "that is for host memory"
    assert json["bf16"] == {"enabled": True}
    assert json["data_types"]["grad_accum_dtype"] == "fp32"
    assert json["gradient_clipping"] == 1.0
    if name == "gpt-1b-openwebtext":
        assert json["zero_optimization"]["overlap_comm"] is True
        assert json["zero_optimization"]["reduce_bucket_size"] == 200_000_000


def test_the_large_configs_share_their_corpus() -> None:
    """Or their perplexities would not compare."""
    trees = [read_yaml(CONFIGS / f"{name}.yaml") for name in LARGE]
    assert all(tree["prepare"] == trees[0]["prepare"] for tree in trees)
    assert {tree["data"]["corpus"] for tree in trees} == {"corpora/openwebtext-bpe-50304"}


@pytest.mark.parametrize("name", LARGE)
def test_launch_lines_name_what_there_is(name: str) -> None:
    lines = re.findall(r"^#   ((?:lmtrain|deepspeed|sbatch) .*)$", (CONFIGS / f"{name}.yaml").read_text(), re.MULTILINE)
    assert {line.split()[0] for line in lines} == {"lmtrain", "deepspeed", "sbatch"}
    for line in lines:
        assert line.endswith(f" configs/{name}.yaml"), line
        for word in re.findall(r"(?:configs|launch)/\S+", line):
            assert (ROOT / word).is_file(), word


def test_what_the_comments_offer_for_smaller_cards_is_accepted() -> None:
    path = CONFIGS / "gpt-1b-openwebtext.yaml"
    offered = re.findall(
        r"[a-z]+\.[a-z_]+=\w+", " ".join(path.read_text().split("Cards of")[1].split("\nprepare")[0].split())
    )
    assert len(offered) == 3
    config = schema.load(path, offered)
    micro, accumulation = config.data.layout(16)
    json = deepspeed_json(config.engine, config.optimizer, micro_batch=micro, accumulation=accumulation, world=16)
    assert (json["zero_optimization"]["stage"], micro, accumulation) == (3, 2, 16)
    assert json["zero_optimization"]["overlap_comm"] is True
    assert config.engine.activation_checkpointing
    copy = (
        "prepare.source.kind=files prepare.source.name=null prepare.source.splits=null prepare.source.paths=[a.parquet]"
    )
    source = schema.load(CONFIGS / "gpt-124m-openwebtext.yaml", copy.split()).prepare
    assert source is not None
    assert source.source.kind == "files"
