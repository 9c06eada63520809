"""The DeepSpeed configuration of a run: generated from ours, plus what `engine.deepspeed` adds.

DeepSpeed lets unknown keys and contradictions pass in silence (`zero_optimisation` gives stage 0, an absent
`gradient_clipping` is 1.0). Here every key is known, and what both configs say must be the same in both.
"""

from __future__ import annotations

import copy
import difflib
import json
import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from lmtrain.engine import ds_keys
from lmtrain.engine.optimizer import OptimizerConfig
from lmtrain.engine.settings import EngineConfig, on_cpu
from lmtrain.errors import ConfigError

AUTO = "auto"


def deepspeed_json(
    config: EngineConfig, optimizer: OptimizerConfig, *, micro_batch: int, accumulation: int, world: int
) -> dict[str, Any]:
    """What DeepSpeed is given, as a JSON mapping. Nothing is started.

    Raises ConfigError for keys of `engine.deepspeed` that are unknown, contradict the run's config, or cannot be had.
    """
    ours = _generated(config, optimizer, micro_batch=micro_batch, accumulation=accumulation, world=world)
    given, place = _given(config.deepspeed)
    if not given:
        return _with_path(ours, config)
    _Check(place).all(given, config, optimizer, micro_batch=micro_batch, accumulation=accumulation, world=world)
    added = {key: value for key, value in given.items() if key in ds_keys.PASSED | ds_keys.CHECKED}
    for name in ("optimizer", "scheduler", "bfloat16"):  # the first two are ours alone, the third is bf16's old name
        added.pop(name, None)
    return _with_path(_merge(ours, _without_auto(added)), config)


def _with_path(out: dict[str, Any], config: EngineConfig) -> dict[str, Any]:
    """Say where NVMe is, and how many buffers its optimizer states need: DeepSpeed would run out of them in a step."""
    state = out["zero_optimization"].get("offload_optimizer", {})
    if state.get("device") == "nvme":  # a group's weights, gradient and two moments; one read ahead, one written behind
        state["nvme_path"] = config.nvme_path
        needed = 4 * (1 + bool(state.get("pipeline_read")) + bool(state.get("pipeline_write")))
        if state.setdefault("buffer_count", needed) < needed:
            raise ConfigError(
                f"engine.deepspeed: zero_optimization.offload_optimizer.buffer_count = {state['buffer_count']}, "
                f"but {needed} are needed; raise it, or leave it out"
            )
    return out


def untested(config: EngineConfig) -> list[str]:
    """Keys of `engine.deepspeed` that DeepSpeed gets and that lmtrain's tests never gave it, as dotted paths."""
    given, _ = _given(config.deepspeed)
    return sorted(set(_leaves(_without_auto({k: v for k, v in given.items() if k in _PASSED_ON}))) - ds_keys.TESTED)


_PASSED_ON = ds_keys.PASSED | {"bf16", "data_types", "fp16", "zero_optimization"}
_OURS = {"bf16.enabled", "data_types.grad_accum_dtype", "fp16.enabled", "zero_optimization.stage"}


def _leaves(tree: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        elif path + key not in _OURS:
            yield path + key


def _generated(
    config: EngineConfig, optimizer: OptimizerConfig, *, micro_batch: int, accumulation: int, world: int
) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.zero_stage in (1, 2) and config.precision == "fp32" and config.offload == "none" and on_cpu(config):
        zero["contiguous_gradients"] = False  # host memory does not fragment; saves two copies of every gradient
    if config.zero_stage == 3:
        zero["memory_efficient_linear"] = False  # it rounds differently from torch's
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": config.offload, "pin_memory": not on_cpu(config)}
    out: dict[str, Any] = {
        "train_batch_size": micro_batch * accumulation * world,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.clip,  # always: DeepSpeed's default is 1.0
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    if config.precision != "fp32":
        out[config.precision] = {"enabled": True}
        out["data_types"] = {"grad_accum_dtype": "fp32"}
    return out


def _given(source: str | dict[str, Any] | None) -> tuple[dict[str, Any], str]:
    """The mapping of `engine.deepspeed`, and what to call it in messages."""
    if not isinstance(source, str):
        return copy.deepcopy(source or {}), "engine.deepspeed"
    path = Path(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"engine.deepspeed = {source}: cannot be read ({error}); give a ds_config.json") from None

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise ConfigError(f"{path.name}: the key {key!r} is given twice; keep one")
            seen[key] = value
        return seen

    try:
        value = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path.name} line {error.lineno}: not valid JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path.name} holds a {type(value).__name__}, wanted a JSON object")
    return value, path.name


class _Check:
    """Compares a given DeepSpeed configuration with ours. `place` is its name in messages."""

    def __init__(self, place: str) -> None:
        self.place = place

    def all(
        self,
        given: Mapping[str, Any],
        config: EngineConfig,
        optimizer: OptimizerConfig,
        *,
        micro_batch: int,
        accumulation: int,
        world: int,
    ) -> None:
        """Raise ConfigError at the first key that cannot stand."""
        self._top(given)
        self._batch(given, micro_batch=micro_batch, accumulation=accumulation, world=world)
        clip = ("optimizer.clip", optimizer.clip, "clip" in optimizer.model_fields_set)
        self._same(given, "gradient_clipping", *clip)
        self._precision(given, config)
        self._zero(given, config)
        self._optimizer(given, optimizer)
        self._fixed(given, "gradient_allreduce_op", ("mean",), "the loss is scaled for the mean over ranks")
        self._fixed(given, "managed_gradient_accumulation", (True,), "lmtrain says which micro-batch is the last")
        untested = ("zero_allow_untested_optimizer", (True,), "the optimizers are lmtrain's own")
        self._fixed(given, *untested)
        self._fixed(given, "zero_force_ds_cpu_optimizer", (False,), "the optimizers are lmtrain's own")
        profiler = given.get("flops_profiler")
        if isinstance(profiler, Mapping) and profiler.get("enabled") is True and not profiler.get("output_file"):
            self._fail("flops_profiler prints on stdout, which belongs to results; give flops_profiler.output_file")

    def _fail(self, text: str) -> None:
        raise ConfigError(f"{self.place}: {text}")

    def _top(self, given: Mapping[str, Any]) -> None:
        known = ds_keys.PASSED | ds_keys.CHECKED
        for key, value in given.items():
            if key in ds_keys.MONITORS:
                if isinstance(value, Mapping) and value.get("enabled") in (False, None):
                    continue
                self._fail(f"{key}: {ds_keys.MONITORS[key]}")
            if key in ds_keys.REFUSED:
                self._fail(f"{key}: {ds_keys.REFUSED[key]}")
            if key in ds_keys.REMOVED:
                self._fail(f"{key}: DeepSpeed 0.19.8 does not have it any more; remove it")
            if key not in known:
                self._unknown(key, known | set(ds_keys.MONITORS), "")

    def _unknown(self, key: str, known: Collection[str], path: str) -> None:
        near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}?" if near else "DeepSpeed 0.19.8 does not know it; remove it"
        self._fail(f"unknown key {path + key!r}; {hint}")

    def _same(self, given: Mapping[str, Any], path: str, name: str, ours: Any, explicit: bool, note: str = "") -> None:
        """The value at `path`, if given, must be our `name`'s."""
        value = _at(given, path)
        if value is None or value == AUTO or _equal(value, ours):
            return
        where = "in the config" if explicit else "by default"
        raise ConfigError(
            f"{path} = {_text(value)} in {self.place}, {name} = {_text(ours)} {where}{note}; "
            f'make them equal, or write "auto" in {self.place}'
        )

    def _fixed(self, given: Mapping[str, Any], path: str, allowed: tuple[Any, ...], why: str) -> None:
        value = _at(given, path)
        if value is not None and value != AUTO and value not in allowed:
            self._fail(f"{path} = {_text(value)}, but {why}; remove it")

    def _batch(self, given: Mapping[str, Any], *, micro_batch: int, accumulation: int, world: int) -> None:
        product = micro_batch * accumulation * world
        value = given.get("train_batch_size")
        if value is not None and value != AUTO and not _equal(value, product):
            raise ConfigError(
                f"train_batch_size = {_text(value)} in {self.place}, but micro-batch {micro_batch} x accumulation "
                f"{accumulation} x ranks {world} = {product}; set data.global_batch, or write "
                f'"auto" in {self.place}'
            )
        self._same(given, "train_micro_batch_size_per_gpu", "data.micro_batch", micro_batch, True)
        note = f" (data.global_batch {product} / (micro-batch {micro_batch} x ranks {world}))"
        self._same(given, "gradient_accumulation_steps", "accumulation", accumulation, True, note)

    def _section(self, given: Mapping[str, Any], path: str, known: Collection[str], refused: Mapping[str, str]) -> None:
        section = _at(given, path)
        if section is None or section == AUTO:
            return
        if not isinstance(section, Mapping):
            self._fail(f"{path} = {_text(section)}: wanted a mapping of its keys")
        for key in section:
            if key in refused:
                self._fail(f"{path}.{key}: {refused[key]}")
            if key not in known:
                self._unknown(key, known, f"{path}.")

    def _precision(self, given: Mapping[str, Any], config: EngineConfig) -> None:
        explicit = "precision" in config.model_fields_set
        for name, known in (("bf16", ds_keys.BF16), ("bfloat16", ds_keys.BF16), ("fp16", ds_keys.FP16)):
            self._section(given, name, known, ds_keys.MASTERS)
            enabled = _at(given, f"{name}.enabled")
            kind = "bf16" if name == "bfloat16" else name
            if enabled in (None, AUTO) or bool(enabled) == (config.precision == kind):
                continue
            where = "in the config" if explicit else "by default"
            raise ConfigError(
                f"{name}.enabled = {_text(enabled)} in {self.place}, engine.precision = {config.precision} {where}; "
                f'make them agree, or write "auto" in {self.place}'
            )
        self._section(given, "data_types", ds_keys.DATA_TYPES, {})
        self._fixed(given, "data_types.grad_accum_dtype", ("fp32",), "gradients are accumulated in fp32")
        self._fixed(given, "data_types.param_dtype", (config.precision,), f"engine.precision = {config.precision}")

    def _zero(self, given: Mapping[str, Any], config: EngineConfig) -> None:
        self._section(given, "zero_optimization", ds_keys.ZERO, ds_keys.ZERO_REFUSED)
        explicit = "zero_stage" in config.model_fields_set
        self._same(given, "zero_optimization.stage", "engine.zero_stage", config.zero_stage, explicit)
        path = "zero_optimization.offload_optimizer"
        self._section(given, path, ds_keys.OFFLOAD_OPTIMIZER, ds_keys.OFFLOAD_REFUSED)
        self._section(given, "zero_optimization.offload_param", ds_keys.OFFLOAD, ds_keys.OFFLOAD_REFUSED)
        self._same(given, f"{path}.device", "engine.offload", config.offload, "offload" in config.model_fields_set)
        for name in (path, "zero_optimization.offload_param"):
            explicit = "nvme_path" in config.model_fields_set
            self._same(given, f"{name}.nvme_path", "engine.nvme_path", config.nvme_path, explicit)
        param = "zero_optimization.offload_param.device"
        device = _at(given, param)
        why = "weights on NVMe do not survive a step in DeepSpeed 0.19.8 (docs/zero.md); cpu keeps them in host memory"
        self._fixed(given, param, ("none", "cpu"), why)
        if device == "cpu" and config.zero_stage != 3:
            self._fail(f"{param} = cpu needs engine.zero_stage = 3, it is {config.zero_stage}")

    def _optimizer(self, given: Mapping[str, Any], optimizer: OptimizerConfig) -> None:
        scheduler = given.get("scheduler")
        if scheduler not in (None, AUTO) and not (isinstance(scheduler, Mapping) and scheduler.get("type") == AUTO):
            self._fail("scheduler: the learning rate is a function of the step; remove it and use the schedule section")
        self._section(given, "optimizer", ("type", "params", "legacy_fusion"), {})
        kind = _at(given, "optimizer.type")
        if kind is not None and kind != AUTO:
            names = {"adamw": "adamw", "adam": "adamw", "muon": "muon"}
            if str(kind).lower() not in names:
                self._fail(f"optimizer.type = {_text(kind)} is not offered; optimizer.kind is adamw or muon")
            explicit = "kind" in optimizer.model_fields_set
            wanted = names[str(kind).lower()]
            if wanted != optimizer.kind:
                self._same(given, "optimizer.type", "optimizer.kind", optimizer.kind, explicit)
        known = ds_keys.MUON_PARAMS if optimizer.kind == "muon" else ds_keys.ADAMW_PARAMS
        self._section(given, "optimizer.params", known, {})
        self._fixed(given, "optimizer.params.adam_w_mode", (True,), "weight decay is decoupled (AdamW)")
        self._fixed(given, "optimizer.params.bias_correction", (True,), "AdamW corrects its moments")
        pairs = [("lr", "lr"), ("muon_lr", "lr"), ("adam_lr", "adamw_lr"), ("betas", "betas"), ("eps", "eps")]
        pairs += [("weight_decay", "weight_decay"), ("momentum", "momentum"), ("ns_steps", "newton_schulz")]
        for theirs, name in pairs:
            explicit = name in optimizer.model_fields_set
            self._same(given, f"optimizer.params.{theirs}", f"optimizer.{name}", getattr(optimizer, name), explicit)


def _at(given: Mapping[str, Any], path: str) -> Any:
    at: Any = given
    for key in path.split("."):
        if not isinstance(at, Mapping):
            return None
        at = at.get(key)
    return at


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    numbers = isinstance(a, int | float) and isinstance(b, int | float)
    if numbers and not isinstance(a, bool) and not isinstance(b, bool):
        return math.isclose(a, b, rel_tol=1e-12)
    return bool(a == b) and type(a) is type(b)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _without_auto(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_auto(v) for k, v in value.items() if v != AUTO}
    return value


def _merge(ours: dict[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """Theirs into ours; keys that both have were found equal, and mappings are merged."""
    for key, value in theirs.items():
        if isinstance(value, Mapping) and isinstance(ours.get(key), dict):
            _merge(ours[key], value)
        else:
            ours[key] = value
    return ours
