"""Types of keys in mappings that the schema leaves open: the judge, and what DeepSpeed and vLLM receive."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

ENGINE_KINDS: dict[str, type] = {
    "tokenizer": str, "revision": str, "tokenizer_revision": str, "code_revision": str, "download_dir": str,
    "dtype": str, "quantization": str, "load_format": str, "kv_cache_dtype": str,
    "gpu_memory_utilization": float, "swap_space": float, "cpu_offload_gb": float,
    "max_model_len": int, "max_num_seqs": int, "max_num_batched_tokens": int, "block_size": int,
    "pipeline_parallel_size": int, "seed": int, "enforce_eager": bool, "enable_prefix_caching": bool,
    "enable_chunked_prefill": bool, "disable_log_stats": bool, "trust_remote_code": bool, "enable_lora": bool,
    "max_lora_rank": int, "disable_custom_all_reduce": bool, "hf_overrides": dict,
}  # fmt: skip
"""Common vLLM engine arguments; others are passed through as they are."""
ENGINE_SET_ELSEWHERE = {
    "model": "evaluation.policies",
    "tensor_parallel_size": "generation.tensor_parallel",
}
"""vLLM engine arguments that the job sets, and the keys of the configuration they come from."""
JUDGE_KINDS = ("checker", "reward_model", "llm", "implicit")
_JUDGE_TEXTS = ("kind", "function", "model", "url", "pool", "api_key_env", "prompt_file")

TEXT_KEYS: dict[str, Any] = {
    **{f"evaluation.judge.{name}": str | None for name in _JUDGE_TEXTS},
    "evaluation.benchmarks.tasks": list[str],
    "evaluation.benchmarks.include_path": str | None,
    **{f"generation.engine.{name}": str | None for name, kind in ENGINE_KINDS.items() if kind is str},
}
"""Dotted keys that take a string as typed, and their types."""

_TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    dict: "a mapping",
}


def check_engine(arguments: Mapping[str, Any]) -> None:
    """Refuse vLLM engine arguments that are malformed or that other keys set.

    Raises:
        ValueError: one line per fault; each names the dotted key.
    """
    where = "generation.engine"
    faults = [
        f"{where}.{name}={arguments[name]!r}: set by the job itself; remove it, and set {key}"
        for name, key in ENGINE_SET_ELSEWHERE.items()
        if name in arguments
    ]
    known = {name: value for name, value in arguments.items() if name not in ENGINE_SET_ELSEWHERE}
    faults += type_faults(known, ENGINE_KINDS, where, optional=tuple(ENGINE_KINDS))
    if arguments.get("trust_remote_code") is True:
        faults.append(
            f"{where}.trust_remote_code=True: not supported; convert the model to safetensors of a known "
            "class"
        )
    if faults:
        raise ValueError("\n".join(faults))


def check_judge(settings: Mapping[str, Any]) -> None:
    """Refuse a judge of an unknown kind, or a setting that is a list or a mapping.

    Raises:
        ValueError: one line per fault; each names the dotted key.
    """
    kind = settings.get("kind", "checker")
    if kind not in JUDGE_KINDS:
        raise ValueError(f"evaluation.judge.kind={kind!r}: unknown; must be one of {', '.join(JUDGE_KINDS)}")
    faults = [
        f"evaluation.judge.{name}={value!r}: must be a single value"
        for name, value in settings.items()
        if isinstance(value, list | dict)
    ]
    if faults:
        raise ValueError("\n".join(faults))


def type_faults(
    values: Mapping[str, Any],
    kinds: Mapping[str, type],
    where: str,
    *,
    closed: bool = False,
    optional: tuple[str, ...] = (),
) -> Iterator[str]:
    """The sentences for values of a wrong type and for unknown keys.

    Args:
        kinds: the types of the known keys.
        where: the dotted key of the mapping.
        closed: whether every unknown key is a fault, not only one that resembles a known key.
        optional: keys that may be null.
    """
    for name, value in values.items():
        kind = kinds.get(name)
        if kind is None:
            near = difflib.get_close_matches(str(name), kinds, n=1, cutoff=0.0 if closed else 0.85)
            if near:
                yield f"{where}.{name}: unknown key; the nearest known one is {where}.{near[0]}"
        elif not _has_type(value, kind) and not (value is None and name in optional):
            yield f"{where}.{name}={value!r}: must be {_TYPE_NAMES[kind]}"


def _has_type(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    if kind is dict:
        return isinstance(value, Mapping)
    if kind is int:  # 5e8 too, as DeepSpeed's documentation writes bucket sizes
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)
