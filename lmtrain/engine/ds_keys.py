"""The keys of DeepSpeed 0.19.8's configuration: passed on, checked against ours, or refused with what to use instead.

A test compares these tables with what that version reads, so that they do not age in silence.
"""

from __future__ import annotations

CHECKED = frozenset(
    {
        "bf16",
        "bfloat16",
        "data_types",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_allreduce_op",
        "gradient_clipping",
        "managed_gradient_accumulation",
        "optimizer",
        "scheduler",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
"""Top-level keys that say something that our config says too, or that our loss relies on."""

PASSED = frozenset(
    {
        "aio",
        "comms_logger",
        "communication_data_type",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "gradient_predivide_factor",
        "log_level",
        "memory_breakdown",
        "prescale_gradients",
        "steps_per_print",
        "timers",
        "vocabulary_size",
        "wall_clock_breakdown",
    }
)
"""Top-level keys that DeepSpeed gets as they are."""

_BY_ZERO = "lmtrain divides a model among ranks by ZeRO alone; remove it and use engine.zero_stage"
_BY_LOADER = "batches come from lmtrain's loader; remove it and use the data section"
_BY_MONITOR = "DeepSpeed's own monitor would log beside the run; remove it: "

MONITORS = {
    "wandb": _BY_MONITOR + "the wandb section of the run's config logs to W&B",
    "tensorboard": _BY_MONITOR + "metrics.jsonl in the run folder and the wandb section take its place",
    "csv_monitor": _BY_MONITOR + "metrics.jsonl in the run folder takes its place",
    "comet": _BY_MONITOR + "metrics.jsonl in the run folder and the wandb section take its place",
}
"""Refused when enabled."""

REFUSED = {
    "activation_checkpointing": "remove it and use engine.activation_checkpointing",
    "autotuning": "lmtrain runs one configuration; remove it",
    "checkpoint": "checkpoints are lmtrain's own; remove it and use the checkpoint section",
    "compile": "remove it and use engine.compile",
    "data_efficiency": _BY_LOADER,
    "data_parallel_size": _BY_ZERO,
    "dataloader_drop_last": _BY_LOADER,
    "datastates_ckpt": "checkpoints are lmtrain's own; remove it and use the checkpoint section",
    "expert_parallel": _BY_ZERO,
    "hybrid_engine": "it is for generation inside training; remove it and use `lmtrain sample`",
    "pipeline": _BY_ZERO,
    "seq_parallel_communication_data_type": _BY_ZERO,
    "sequence_parallel_size": _BY_ZERO,
    "tensor_parallel": _BY_ZERO,
    "torch_autocast": "it does not resume to the same bits at stage 3; remove it and use engine.precision",
    "use_data_before_expert_parallelism": _BY_ZERO,
    "weight_quantization": "it is for inference; remove it",
}
"""Top-level keys that cannot be had, and why."""

REMOVED = frozenset(
    {
        "amp",
        "compression_training",
        "curriculum_learning",
        "eigenvalue",
        "elasticity",
        "graph_harvesting",
        "nebula",
        "progressive_layer_drop",
        "quantize_training",
        "sparse_attention",
        "sparse_gradients",
    }
)
"""Top-level keys of older versions."""

ZERO = frozenset(
    {
        "allgather_bucket_size",
        "allgather_partitions",
        "contiguous_gradients",
        "enable_sanity_checks",
        "ignore_unused_parameters",
        "leaf_module",
        "load_from_fp32_weights",
        "log_trace_cache_warnings",
        "memory_efficient_linear",
        "offload_optimizer",
        "offload_param",
        "overlap_comm",
        "override_module_apply",
        "parameter_alignment",
        "pipeline_loading_checkpoint",
        "reduce_bucket_size",
        "reduce_scatter",
        "round_robin_gradients",
        "stage",
        "stage3_allgather_sequential",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_gather_fp16_weights_on_model_save",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_module_granularity_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "stage3_use_all_reduce_for_fetch_params",
        "sub_group_size",
        "use_multi_rank_bucket_allreduce",
    }
)
"""Keys of zero_optimization that are passed on (`stage` and `offload_optimizer` after a check)."""

_OTHER_SHARDS = "checkpoints by parameter name do not know that division of the weights; remove it"

ZERO_REFUSED = {
    "compute_grad_norm": "lmtrain needs the norm to see steps that are not finite; remove it",
    "cpu_offload": "remove it and use engine.offload = cpu",
    "cpu_offload_param": "remove it and use offload_param",
    "cpu_offload_use_pin_memory": "remove it and use offload_optimizer.pin_memory",
    "elastic_checkpoint": "checkpoints are lmtrain's own and fit any number of ranks; remove it",
    "legacy_stage1": "DeepSpeed 0.19.8 does not have it any more; remove it",
    "mics_hierarchical_params_gather": "DeepSpeed 0.19.8 removed it; remove it",
    "mics_shard_size": "DeepSpeed 0.19.8 removed it; remove it",
    "save_muon_momentum_buffer_in_memory": "lmtrain's Muon keeps its momentum beside the weights; remove it",
    "zenflow": "it updates late, so that stages would not agree any more; remove it",
    "zero_hpz_partition_size": _OTHER_SHARDS,
    "zero_quantized_gradients": "quantised gradients are not those of the loss; remove it",
    "zero_quantized_nontrainable_weights": _OTHER_SHARDS,
    "zero_quantized_weights": "quantised weights are not those that are saved; remove it",
    "zeropp_loco_param": "DeepSpeed 0.19.8 removed it; remove it",
}
"""Keys of zero_optimization that cannot be had, and why."""

FP16 = frozenset(
    {
        "auto_cast",
        "consecutive_hysteresis",
        "enabled",
        "hysteresis",
        "initial_scale_power",
        "loss_scale",
        "loss_scale_window",
        "min_loss_scale",
    }
)
BF16 = frozenset({"check_grad_overflow", "enabled", "immediate_grad_update"})
MASTERS = {
    "bf16_master_weights_and_grads": "master weights and moments are fp32 in lmtrain; remove it",
    "bf16_optimizer_states": "master weights and moments are fp32 in lmtrain; remove it",
    "fp16_master_weights_and_grads": "master weights and moments are fp32 in lmtrain; remove it",
}
OFFLOAD = frozenset({"buffer_count", "buffer_size", "device", "max_in_cpu", "nvme_path", "pin_memory"})
"""Keys of offload_param; those of offload_optimizer are OFFLOAD_OPTIMIZER."""
OFFLOAD_OPTIMIZER = frozenset(
    {"buffer_count", "device", "fast_init", "nvme_path", "pin_memory", "pipeline_read", "pipeline_write"}
)
OFFLOAD_REFUSED = {
    "cpuadam_cores_perc": "it belongs to super_offload; remove it",
    "ratio": "lmtrain offloads all or nothing; remove it",
    "super_offload": "lmtrain offloads with ZeRO-Offload; remove it",
}
DATA_TYPES = frozenset({"buffer_dtype", "grad_accum_dtype", "keep_in_fp32_modules", "param_dtype"})

ADAMW_PARAMS = frozenset(
    {"lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode", "fused", "bias_correction"}
)
MUON_PARAMS = ADAMW_PARAMS | {"momentum", "muon_lr", "adam_lr", "ns_steps"}

TESTED = frozenset(
    {
        "fp16.hysteresis",
        "fp16.initial_scale_power",
        "zero_optimization.contiguous_gradients",
        "zero_optimization.memory_efficient_linear",
        "zero_optimization.offload_optimizer.device",
        "zero_optimization.offload_optimizer.pin_memory",
        "zero_optimization.offload_param.device",
        "zero_optimization.offload_param.pin_memory",
        "zero_optimization.stage3_param_persistence_threshold",
    }
)
"""What else than our own words lmtrain's tests run DeepSpeed with, on a CPU. All other keys are passed on untested."""
