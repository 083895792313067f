"""Checks of `training.deepspeed`, so that DeepSpeed's own errors do not appear in the workers.

The tables follow DeepSpeed's configuration classes. Other top-level keys are passed through.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tbpo_ray.config.open_values import type_faults

KEY = "training.deepspeed"
DEFAULT_STAGE = 1
"""The stage where `stage: null` leaves it to the memory plan, and that plan knows no limit."""
OFFLOAD_STAGES = {"offload_optimizer": (1, 2, 3), "offload_param": (3,)}
"""Keys of DeepSpeed's `zero_optimization` that offload, and the ZeRO stages in which they have an effect."""
OFFLOAD_DEVICES = ("none", "cpu", "nvme")

_OFFLOAD_KEYS: dict[str, type] = {
    "device": str, "nvme_path": str, "buffer_count": int, "buffer_size": int, "max_in_cpu": int,
    "pin_memory": bool, "pipeline_read": bool, "pipeline_write": bool, "fast_init": bool, "ratio": float,
    "super_offload": bool, "cpuadam_cores_perc": float,
}  # fmt: skip
_STAGE3_KEYS: dict[str, type] = {
    "prefetch_bucket_size": int, "param_persistence_threshold": int, "model_persistence_threshold": int,
    "max_live_parameters": int, "max_reuse_distance": int, "gather_16bit_weights_on_model_save": bool,
    "module_granularity_threshold": int, "use_all_reduce_for_fetch_params": bool,
    "allgather_sequential": bool, "gather_fp16_weights_on_model_save": bool,
}  # fmt: skip
_ZERO_KEYS: dict[str, type] = {
    "stage": int, "contiguous_gradients": bool, "reduce_scatter": bool, "reduce_bucket_size": int,
    "use_multi_rank_bucket_allreduce": bool, "allgather_partitions": bool, "allgather_bucket_size": int,
    "overlap_comm": bool, "compute_grad_norm": bool, "load_from_fp32_weights": bool,
    "elastic_checkpoint": bool, "offload_param": dict, "offload_optimizer": dict, "zenflow": dict,
    "sub_group_size": int, "cpu_offload_param": bool, "cpu_offload_use_pin_memory": bool,
    "cpu_offload": bool, "ignore_unused_parameters": bool, "legacy_stage1": bool,
    "round_robin_gradients": bool, "parameter_alignment": bool, "zero_hpz_partition_size": int,
    "zero_quantized_weights": bool, "zero_quantized_nontrainable_weights": bool,
    "zero_quantized_gradients": bool, "memory_efficient_linear": bool, "pipeline_loading_checkpoint": bool,
    "override_module_apply": bool, "log_trace_cache_warnings": bool, "enable_sanity_checks": bool,
    "save_muon_momentum_buffer_in_memory": bool, "leaf_module": dict,
    **_STAGE3_KEYS, **{f"stage3_{name}": kind for name, kind in _STAGE3_KEYS.items()},
}  # fmt: skip
_OPTIONAL = (
    "offload_param", "offload_optimizer", "zenflow", "nvme_path", "overlap_comm", "cpu_offload",
    "cpu_offload_param", "cpu_offload_use_pin_memory",
)  # fmt: skip
_TOP_KEYS: dict[str, type] = {
    "stage": int, "zero_optimization": dict, "bf16": dict, "fp16": dict, "amp": dict, "data_types": dict,
    "activation_checkpointing": dict, "flops_profiler": dict, "comms_logger": dict, "torch_autocast": dict,
    "checkpoint": dict, "aio": dict, "gradient_clipping": float, "steps_per_print": int,
    "wall_clock_breakdown": bool, "prescale_gradients": bool, "gradient_predivide_factor": float,
    "communication_data_type": str, "zero_allow_untested_optimizer": bool,
    "zero_force_ds_cpu_optimizer": bool, "memory_breakdown": bool, "dump_state": bool,
}  # fmt: skip
_SET_ELSEWHERE = {
    "optimizer": "training.optimizer",
    "scheduler": "training.scheduler",
    "train_batch_size": "training.pairs_per_step",
    "train_micro_batch_size_per_gpu": "training.micro_batch_pairs",
    "gradient_accumulation_steps": "training.pairs_per_step and training.micro_batch_pairs",
}

OPEN_TYPES: dict[str, Any] = {
    **{f"{KEY}.{name}": kind for name, kind in _TOP_KEYS.items()},
    **{f"{KEY}.zero_optimization.{name}": kind | None for name, kind in _ZERO_KEYS.items()},
    **{
        f"{KEY}.zero_optimization.{part}.{name}": kind | None
        for part in OFFLOAD_STAGES
        for name, kind in _OFFLOAD_KEYS.items()
    },
    **{f"{KEY}.{part}.enabled": bool for part in ("bf16", "fp16")},
}
"""Types of the dotted keys of `training.deepspeed`."""


def zero_stage(options: Mapping[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed configuration that has been checked; null counts as the default stage."""
    zero = options.get("zero_optimization", {})
    stage = options.get("stage", zero.get("stage", 0))
    return DEFAULT_STAGE if stage is None else int(stage)


def offloads(options: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed keeps the optimizer state or the weights off the device."""
    return any(_is_offloaded(options.get("zero_optimization", {}), part) for part in OFFLOAD_STAGES)


def offloads_to_nvme(options: Mapping[str, Any]) -> str | None:
    """The dotted key of a part that DeepSpeed keeps on a local disk, if there is one."""
    zero = options.get("zero_optimization", {})
    for part in OFFLOAD_STAGES:
        if (zero.get(part) or {}).get("device") == "nvme":
            return f"{KEY}.zero_optimization.{part}.device"
    return None


def check_deepspeed(options: Mapping[str, Any]) -> None:
    """Refuse a malformed DeepSpeed configuration.

    Raises:
        ValueError: one line per fault; each names the dotted key.
    """
    # A fault in the types makes the checks of the meaning impossible.
    faults = list(_type_faults(options)) or list(_stage_faults(options))
    if faults:
        raise ValueError("\n".join(faults))


def check_precision(options: Mapping[str, Any], precision: str) -> None:
    """Refuse options that would silently train in another dtype than `training.precision`.

    Raises:
        ValueError: one line per fault; each names the dotted key.
    """
    faults = []
    for name in ("fp16", "amp", "torch_autocast"):
        if options.get(name, {}).get("enabled"):
            faults.append(
                f"{KEY}.{name}.enabled=True: training.precision sets the dtype; remove it, and use "
                "training.precision=bf16 or fp32"
            )
    enabled = options.get("bf16", {}).get("enabled")
    if enabled is not None and enabled != (precision == "bf16"):
        faults.append(
            f"{KEY}.bf16.enabled={enabled}: contradicts training.precision={precision}; remove it, or set "
            f"training.precision={'bf16' if enabled else 'fp32'}"
        )
    if faults:
        raise ValueError("\n".join(faults))


def _misplaced_faults(options: Mapping[str, Any]) -> Iterator[str]:
    for name, value in options.items():
        if name in _SET_ELSEWHERE:
            yield f"{KEY}.{name}={value!r}: set by the job itself; remove it, and set {_SET_ELSEWHERE[name]}"
        elif name in _ZERO_KEYS and name != "stage":
            yield f"{KEY}.{name}={value!r}: must be {KEY}.zero_optimization.{name}"


def _type_faults(options: Mapping[str, Any]) -> Iterator[str]:
    yield from _misplaced_faults(options)
    # Integers may be written as 5e8 elsewhere, but not a stage.
    part = options.get("zero_optimization")
    if isinstance(part, Mapping) and isinstance(part.get("stage"), float):
        yield f"{KEY}.zero_optimization.stage={part['stage']!r}: must be 0, 1, 2 or 3"
    known = {name: value for name, value in options.items() if name not in _SET_ELSEWHERE}
    if known.get("stage") is None:
        known.pop("stage", None)
    if "stage" in known and not _is_integer(known["stage"]):
        yield f"{KEY}.stage={known.pop('stage')!r}: must be 0, 1, 2, 3, or null for the lowest that fits"
    yield from type_faults(known, _TOP_KEYS, KEY)
    for name in ("bf16", "fp16"):
        part = options.get(name)
        if isinstance(part, Mapping) and not isinstance(part.get("enabled", False), bool):
            yield f"{KEY}.{name}.enabled={part['enabled']!r}: must be true or false"
    zero = options.get("zero_optimization")
    if isinstance(zero, Mapping):
        where = f"{KEY}.zero_optimization"
        yield from type_faults(zero, _ZERO_KEYS, where, closed=True, optional=_OPTIONAL)
        for part in OFFLOAD_STAGES:
            if isinstance(zero.get(part), Mapping):
                yield from _offload_faults(zero[part], f"{KEY}.zero_optimization.{part}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _offload_faults(part: Mapping[str, Any], where: str) -> Iterator[str]:
    yield from type_faults(part, _OFFLOAD_KEYS, where, closed=True, optional=_OPTIONAL)
    if part.get("device") not in OFFLOAD_DEVICES:
        yield f"{where}.device={part.get('device')!r}: must be one of {', '.join(OFFLOAD_DEVICES)}"
    elif part["device"] == "nvme" and not part.get("nvme_path"):
        yield f"{where}.nvme_path: missing; device nvme needs a folder on a local disk"


def _stage_faults(options: Mapping[str, Any]) -> Iterator[str]:
    if "stage" in options and "zero_optimization" in options:
        yield f"{KEY}: give either `stage` or `zero_optimization`, not both"
        return
    stage = zero_stage(options)
    key = "stage" if "stage" in options else "zero_optimization.stage"
    if stage not in (0, 1, 2, 3):
        yield f"{KEY}.{key}={stage}: the ZeRO stage must be 0, 1, 2 or 3"
        return
    zero = options.get("zero_optimization", {})
    for part, stages in OFFLOAD_STAGES.items():
        if stage not in stages and _is_offloaded(zero, part):
            use = " or ".join(map(str, stages))
            yield (
                f"{KEY}.zero_optimization.{part}={zero[part]!r}: {part} does nothing with ZeRO stage "
                f"{stage}; remove it, or use {use}"
            )
    yield from _optimizer_faults(options, zero)
    if stage == 3:
        yield from _scaling_faults(options)


def _optimizer_faults(options: Mapping[str, Any], zero: Mapping[str, Any]) -> Iterator[str]:
    """Options that need an optimizer of DeepSpeed's own; the job brings torch's (`training.optimizer`)."""
    remedy = "needs DeepSpeed's own CPU Adam, and the job runs torch's training.optimizer"
    if options.get("zero_force_ds_cpu_optimizer"):
        yield f"{KEY}.zero_force_ds_cpu_optimizer=True: {remedy}; remove it"
    if zero.get("zenflow"):
        yield f"{KEY}.zero_optimization.zenflow={zero['zenflow']!r}: {remedy}; remove it"
    part = zero.get("offload_optimizer") or {}
    where = f"{KEY}.zero_optimization.offload_optimizer"
    if part.get("super_offload"):
        yield f"{where}.super_offload=True: {remedy}; remove it, and offload with device: cpu alone"
    if part.get("ratio", 1.0) != 1.0:
        yield f"{where}.ratio={part['ratio']!r}: {remedy}; must be 1.0, or remove it"


def _scaling_faults(options: Mapping[str, Any]) -> Iterator[str]:
    """Options of the gradients' scale that DeepSpeed refuses at stage 3."""
    if options.get("prescale_gradients"):
        yield f"{KEY}.prescale_gradients=True: not possible with ZeRO stage 3; remove it, or use stage 1 or 2"
    factor = options.get("gradient_predivide_factor", 1.0)
    if factor != 1.0:
        yield (
            f"{KEY}.gradient_predivide_factor={factor!r}: not possible with ZeRO stage 3; must be 1.0, or "
            "use stage 1 or 2"
        )


def _is_offloaded(zero: Mapping[str, Any], part: str) -> bool:
    return bool(zero.get(part)) and zero[part].get("device") in ("cpu", "nvme")
