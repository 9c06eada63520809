"""The DeepSpeed JSON: what is generated, what may be added, and what is refused in which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lmtrain.config import build
from lmtrain.engine import EngineConfig, OptimizerConfig, deepspeed_json, ds_keys, untested
from lmtrain.errors import ConfigError
from tests.spawn import spawn


def make(given: Any = None, *, optimizer: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    config = EngineConfig(**settings, deepspeed=given)
    return deepspeed_json(config, OptimizerConfig(**(optimizer or {})), micro_batch=4, accumulation=2, world=2)


def test_generated() -> None:
    out = make(optimizer={"clip": 0.5}, device="cpu")
    assert out["train_batch_size"] == 16
    assert out["train_micro_batch_size_per_gpu"] == 4
    assert out["gradient_accumulation_steps"] == 2
    assert out["gradient_clipping"] == 0.5
    assert out["zero_optimization"] == {"stage": 1, "contiguous_gradients": False}
    assert "bf16" not in out
    json.dumps(out)


def test_clipping_off_is_written() -> None:
    assert make(optimizer={"clip": 0.0})["gradient_clipping"] == 0.0


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_accumulates_in_fp32(stage: int, precision: str) -> None:
    out = make(zero_stage=stage, precision=precision)
    assert out[precision] == {"enabled": True}
    assert out["data_types"] == {"grad_accum_dtype": "fp32"}


def test_stage_3_multiplies_as_torch_does() -> None:
    assert make(zero_stage=3)["zero_optimization"]["memory_efficient_linear"] is False


def test_offload() -> None:
    assert make(zero_stage=2, offload="cpu")["zero_optimization"]["offload_optimizer"]["device"] == "cpu"


def test_nvme() -> None:
    there = {"zero_stage": 3, "offload": "nvme", "nvme_path": "/disk"}
    state = make(**there)["zero_optimization"]["offload_optimizer"]
    assert {key: state[key] for key in ("device", "nvme_path", "buffer_count")} == {
        "device": "nvme", "nvme_path": "/disk", "buffer_count": 4,
    }  # fmt: skip
    ahead = make({"zero_optimization": {"offload_optimizer": {"pipeline_read": True}}}, **there)
    assert ahead["zero_optimization"]["offload_optimizer"]["buffer_count"] == 8
    with pytest.raises(ConfigError, match="buffer_count = 7, but 8 are needed"):
        make({"zero_optimization": {"offload_optimizer": {"pipeline_write": True, "buffer_count": 7}}}, **there)


AGREEING: dict[str, Any] = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 2,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": False, "loss_scale_window": 500},
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
    "scheduler": {"type": "auto"},
    "wandb": {"enabled": False},
    "wall_clock_breakdown": True,
    "data_types": {"grad_accum_dtype": "fp32"},
}


@pytest.mark.parametrize("inline", [True, False])
def test_agreeing_keys_are_merged_and_auto_is_filled(tmp_path: Path, inline: bool) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(AGREEING))
    out = make(AGREEING if inline else str(path), zero_stage=2, device="cpu")
    assert out["train_batch_size"] == 16
    assert out["train_micro_batch_size_per_gpu"] == 4
    assert out["zero_optimization"] == {"stage": 2, "overlap_comm": True, "contiguous_gradients": False}
    assert out["fp16"]["loss_scale_window"] == 500
    assert out["bf16"] == {}
    assert out["wall_clock_breakdown"] is True
    assert "optimizer" not in out
    assert "scheduler" not in out
    assert "wandb" not in out
    assert "auto" not in json.dumps(out)


def test_keys_that_no_test_of_ours_gives_deepspeed_are_told(tmp_path: Path) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(AGREEING))
    found = untested(EngineConfig(zero_stage=2, device="cpu", deepspeed=str(path)))
    assert found == ["fp16.loss_scale_window", "wall_clock_breakdown", "zero_optimization.overlap_comm"]
    assert untested(EngineConfig()) == []
    tested = {"zero_optimization": {"offload_param": {"device": "cpu"}, "stage3_param_persistence_threshold": 0}}
    assert untested(EngineConfig(zero_stage=3, deepspeed=tested)) == []


BAD: list[tuple[str, Any, dict[str, Any], list[str]]] = [
    (
        "stage",
        {"zero_optimization": {"stage": 2}},
        {"zero_stage": 1},
        ["zero_optimization.stage = 2 in ds_config.json", "engine.zero_stage = 1 in the config"],
    ),
    ("stage by default", {"zero_optimization": {"stage": 2}}, {}, ["engine.zero_stage = 1 by default"]),
    (
        "batch",
        {"train_batch_size": 100},
        {},
        ["train_batch_size = 100", "micro-batch 4 x accumulation 2 x ranks 2 = 16"],
    ),
    (
        "micro-batch",
        {"train_micro_batch_size_per_gpu": 8},
        {},
        ["train_micro_batch_size_per_gpu = 8 in ds_config.json", "data.micro_batch = 4"],
    ),
    (
        "accumulation",
        {"gradient_accumulation_steps": 3},
        {},
        ["gradient_accumulation_steps = 3", "data.global_batch 16"],
    ),
    (
        "clip",
        {"gradient_clipping": 0.5},
        {},
        ["gradient_clipping = 0.5 in ds_config.json", "optimizer.clip = 1.0 by default"],
    ),
    (
        "zero misspelt",
        {"zero_optimisation": {"stage": 3}},
        {},
        ["unknown key 'zero_optimisation'", "'zero_optimization'"],
    ),
    ("misspelt", {"gradient_cliping": 1.0}, {}, ["'gradient_cliping'", "did you mean 'gradient_clipping'?"]),
    ("unheard of", {"quux": 1}, {}, ["unknown key 'quux'", "remove it"]),
    (
        "nested misspelt",
        {"zero_optimization": {"stage": 1, "overlap_com": True}},
        {},
        ["'zero_optimization.overlap_com'", "did you mean 'overlap_comm'?"],
    ),
    ("zero is a bool", {"zero_optimization": True}, {}, ["zero_optimization = true: wanted a mapping"]),
    ("wandb", {"wandb": {"enabled": True, "project": "x"}}, {}, ["wandb", "the wandb section"]),
    ("tensorboard", {"tensorboard": {"enabled": True}}, {}, ["tensorboard", "metrics.jsonl"]),
    ("csv", {"csv_monitor": {"enabled": True}}, {}, ["csv_monitor", "metrics.jsonl"]),
    ("comet", {"comet": {"enabled": True}}, {}, ["comet"]),
    ("scheduler", {"scheduler": {"type": "WarmupLR", "params": {}}}, {}, ["scheduler", "schedule section"]),
    ("optimizer kind", {"optimizer": {"type": "Lamb"}}, {}, ["optimizer.type = Lamb", "adamw or muon"]),
    ("other optimizer", {"optimizer": {"type": "Muon"}}, {}, ["optimizer.type = Muon", "optimizer.kind = adamw"]),
    (
        "lr",
        {"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}},
        {},
        ["optimizer.params.lr = 0.0003 in ds_config.json", "optimizer.lr = 0.001"],
    ),
    ("betas", {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.999]}}}, {}, ["betas", "[0.9, 0.95]"]),
    ("L2 decay", {"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, {}, ["adam_w_mode", "decoupled"]),
    (
        "optimizer parameter",
        {"optimizer": {"type": "AdamW", "params": {"beta": 1}}},
        {},
        ["'optimizer.params.beta'", "betas"],
    ),
    (
        "bf16",
        {"bf16": {"enabled": True}},
        {"precision": "fp32"},
        ["bf16.enabled = true in ds_config.json", "engine.precision = fp32 in the config"],
    ),
    (
        "bf16 off",
        {"bf16": {"enabled": False}},
        {"precision": "bf16"},
        ["bf16.enabled = false", "engine.precision = bf16"],
    ),
    ("low accumulation", {"data_types": {"grad_accum_dtype": "bf16"}}, {"precision": "bf16"}, ["accumulated in fp32"]),
    ("autocast", {"torch_autocast": {"enabled": True}}, {}, ["torch_autocast", "engine.precision"]),
    (
        "offload",
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}},
        {},
        ["zero_optimization.offload_optimizer.device = cpu", "engine.offload = none"],
    ),
    (
        "nvme",
        {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
        {"zero_stage": 3},
        ["offload_param.device = nvme", "do not survive a step", "cpu keeps them in host memory"],
    ),
    (
        "nvme path",
        {"zero_optimization": {"offload_optimizer": {"nvme_path": "/elsewhere"}}},
        {"zero_stage": 3, "offload": "nvme", "nvme_path": "/here"},
        ["offload_optimizer.nvme_path = /elsewhere", "engine.nvme_path = /here"],
    ),
    ("offload_param", {"zero_optimization": {"offload_param": {"device": "cpu"}}}, {}, ["needs engine.zero_stage = 3"]),
    (
        "old offload",
        {"zero_optimization": {"stage": 1, "cpu_offload": True}},
        {},
        ["cpu_offload", "engine.offload = cpu"],
    ),
    (
        "activation checkpointing",
        {"activation_checkpointing": {"partition_activations": True}},
        {},
        ["engine.activation_checkpointing"],
    ),
    ("elasticity", {"elasticity": {"enabled": True}}, {}, ["does not have it any more"]),
    ("sum", {"gradient_allreduce_op": "sum"}, {}, ["mean over ranks"]),
    ("pipeline", {"pipeline": {"stages": 2}}, {}, ["pipeline", "ZeRO"]),
    ("profiler", {"flops_profiler": {"enabled": True}}, {}, ["output_file"]),
]


@pytest.mark.parametrize(("given", "settings", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_refusals(tmp_path: Path, given: Any, settings: dict[str, Any], words: list[str]) -> None:
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(given))
    with pytest.raises(ConfigError) as caught:
        make(str(path), **settings)
    message = str(caught.value)
    assert "\n" not in message
    assert "ds_config.json" in message
    for word in words:
        assert word in message
    with pytest.raises(ConfigError, match=r"engine\.deepspeed"):
        make(given, **settings)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read"):
        make(str(tmp_path / "none.json"))
    path = tmp_path / "ds_config.json"
    path.write_text('{"train_batch_size": 16,\n "gradient_clipping": }')
    with pytest.raises(ConfigError, match=r"ds_config.json line 2: not valid JSON"):
        make(str(path))
    path.write_text("[1]")
    with pytest.raises(ConfigError, match=r"holds a list, wanted a JSON object"):
        make(str(path))
    path.write_text('{"gradient_clipping": 1.0, "gradient_clipping": 2.0}')
    with pytest.raises(ConfigError, match=r"'gradient_clipping' is given twice"):
        make(str(path))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"zero_stage": 0, "precision": "bf16"}, "use engine.zero_stage = 1"),
        ({"zero_stage": 0, "offload": "cpu"}, "needs engine.zero_stage 1, 2 or 3"),
        ({"zero_stage": 2, "offload": "nvme", "nvme_path": "/x"}, "nvme needs engine.zero_stage = 3, it is 2"),
        ({"zero_stage": 3, "offload": "nvme"}, "nvme needs engine.nvme_path"),
        ({"kind": "plain", "precision": "fp16"}, "kind zero"),
        ({"kind": "plain", "offload": "cpu"}, "needs engine.kind = zero"),
        ({"kind": "plain", "deepspeed": {"bf16": {}}}, "does not use DeepSpeed"),
        ({"zero_stage": 4}, "zero_stage = 4"),
        ({"timeout": 0}, "timeout = 0"),
        ({"stage": 1}, "did you mean 'zero_stage'?"),
        ({"activation_checkpointing": "norms"}, "activation_checkpointing"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(EngineConfig, settings, where="engine")
    assert words in str(caught.value)


def read_by_deepspeed(place: Any, folder: Path) -> dict[str, Any]:
    """Every top-level key that DeepSpeed looks for, and the fields of its sections (run in a process of its own)."""
    import os

    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.runtime import config as c
    from deepspeed.runtime import precision_config as p
    from deepspeed.runtime.zero import config as z
    from deepspeed.runtime.zero import offload_config as o

    seen: set[str] = set()

    class Keys:
        def __contains__(self, key: str) -> bool:
            seen.add(key)
            return False

    class Spy(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            seen.add(key)
            return super().get(key, default)

        def __getitem__(self, key: str) -> Any:
            seen.add(key)
            return super().__getitem__(key)

        def __contains__(self, key: object) -> bool:
            seen.add(str(key))
            return super().__contains__(key)

        def keys(self) -> Any:
            return Keys()

    c.DeepSpeedConfig(Spy(train_batch_size=4))

    def fields(model: Any) -> list[str]:
        return sorted(field.alias or name for name, field in model.model_fields.items())

    return {
        "version": deepspeed.__version__,
        "top": sorted(seen),
        "removed": sorted(c._REMOVED_TOP_LEVEL_CONFIG_KEYS),
        "zero": fields(z.DeepSpeedZeroConfig),
        "zero_removed": sorted(c._REMOVED_ZERO_CONFIG_KEYS),
        "bf16": fields(p.DeepSpeedBF16Config),
        "fp16": fields(p.DeepSpeedFP16Config),
        "offload_param": fields(o.DeepSpeedZeroOffloadParamConfig),
        "offload_optimizer": fields(o.DeepSpeedZeroOffloadOptimizerConfig),
    }


@pytest.mark.slow
def test_the_tables_are_those_of_the_pinned_version() -> None:
    """Every key that DeepSpeed reads is in one of our tables, and no table has a key that it does not read."""
    found = spawn("tests.engine.test_ds_config:read_by_deepspeed", world=1)[0]
    assert found["version"] == "0.19.8"
    read_elsewhere = {"data_parallel_size", "sequence_parallel_size"}  # in deepspeed.initialize
    tables = [ds_keys.CHECKED, ds_keys.PASSED, ds_keys.MONITORS, ds_keys.REFUSED, ds_keys.REMOVED]
    ours = set().union(*tables)
    assert sum(map(len, tables)) == len(ours), "a key is in two tables"
    assert ours - read_elsewhere == set(found["top"]) | set(found["removed"])
    assert set(found["removed"]) == ds_keys.REMOVED
    assert ds_keys.ZERO | set(ds_keys.ZERO_REFUSED) == set(found["zero"]) | set(found["zero_removed"])
    assert set(found["bf16"]) == ds_keys.BF16 | {k for k in ds_keys.MASTERS if k.startswith("bf16")}
    assert set(found["fp16"]) == ds_keys.FP16 | {k for k in ds_keys.MASTERS if k.startswith("fp16")}
    offload = ds_keys.OFFLOAD | ds_keys.OFFLOAD_OPTIMIZER | set(ds_keys.OFFLOAD_REFUSED)
    assert offload == set(found["offload_param"]) | set(found["offload_optimizer"])
