"""Types of keys in mappings that the schema leaves open: the judge, and what DeepSpeed and vLLM receive."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any, get_origin

from tbpo_ray.config import field_types
from tbpo_ray.config.engine_options import ENGINE_KINDS
from tbpo_ray.config.validation import unknown_key_message

ENGINE_SET_ELSEWHERE = {
    "model": "evaluation.policies",
    "tensor_parallel_size": "generation.tensor_parallel",
}
"""vLLM engine arguments that the job sets, and the keys of the configuration they come from."""
_OTHER_MODEL = "samples would not be those of the policy that is evaluated"
ENGINE_REFUSED = {
    **dict.fromkeys(
        (
            "tokenizer", "tokenizer_mode", "tokenizer_revision", "skip_tokenizer_init",
            "enable_prompt_embeds",
        ),
        "samples would be made of other tokens than those of training",
    ),
    **dict.fromkeys(
        (
            "model_weights", "hf_config_path", "config_format", "hf_overrides", "model_class_overrides",
            "runner", "convert", "io_processor_plugin", "diffusion_config",
        ),
        _OTHER_MODEL,
    ),
    **dict.fromkeys(
        (
            "generation_config", "override_generation_config", "logits_processors", "return_sampling_mask",
            "watermark", "watermark_config",
        ),
        "samples would follow other rules than the settings of generation and the policy's own stop tokens",
    ),
}  # fmt: skip
"""vLLM engine arguments by which samples would no longer be those of the run's own model, tokenizer and
sampling parameters, and the reason."""
_LOADED_AS_THEY_ARE = ("auto", "safetensors", "fastsafetensors", "runai_streamer", "instanttensor")
"""Values of `load_format` that read the model's own weights; `dummy` makes random ones."""
JUDGE_KEYS: dict[str, tuple[str, ...]] = {
    "checker": ("function",),
    "reward_model": ("model", "revision", "batch_size"),
    "llm": (
        "url", "model", "pool", "api_key_env", "prompt_file", "rubric", "both_orders", "max_tokens",
        "temperature", "concurrency", "retries", "timeout_s", "price_input", "price_output",
    ),
    "implicit": (),
}  # fmt: skip
"""The keys of `evaluation.judge` beside `kind`, by kind."""
JUDGE_KINDS = tuple(JUDGE_KEYS)
JUDGE_TYPES: dict[str, Any] = {
    **dict.fromkeys(
        ("kind", "function", "model", "revision", "url", "pool", "api_key_env", "prompt_file", "rubric"),
        str | None,
    ),
    "both_orders": bool,
    "batch_size": int, "max_tokens": int, "concurrency": int, "retries": int,
    "temperature": float, "timeout_s": float, "price_input": float, "price_output": float,
}  # fmt: skip
BENCHMARK_TYPES: dict[str, Any] = {
    "suite": str | None,
    "tasks": list[str],
    "shots": dict[str, int],
    "include_path": str | None,
    "limit": int | None,
}

OPEN_TYPES: dict[str, Any] = {
    **{f"evaluation.judge.{name}": kind for name, kind in JUDGE_TYPES.items()},
    **{f"evaluation.benchmarks.{name}": kind for name, kind in BENCHMARK_TYPES.items()},
    **{f"generation.engine.{name}": kind | None for name, kind in ENGINE_KINDS.items()},
}
"""Types of the dotted keys in mappings that the schema leaves open."""

_TYPE_NAMES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    dict: "a mapping",
    list: "a list",
    type(None): "null",
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
    faults += [
        f"{where}.{name}={arguments[name]!r}: not supported, since {reason}; remove it"
        for name, reason in ENGINE_REFUSED.items()
        if name in arguments
    ]
    if arguments.get("load_format", "auto") not in (*_LOADED_AS_THEY_ARE, None):
        faults.append(
            f"{where}.load_format={arguments['load_format']!r}: not supported, since {_OTHER_MODEL}; must be "
            f"one of {', '.join(_LOADED_AS_THEY_ARE)}"
        )
    faults += [
        f"{where}.{name}: must be the name of an argument" for name in arguments if not name.isidentifier()
    ]
    settled = (*ENGINE_SET_ELSEWHERE, *ENGINE_REFUSED, "load_format")
    known = {name: value for name, value in arguments.items() if name not in settled}
    faults += type_faults(known, ENGINE_KINDS, where, optional=tuple(ENGINE_KINDS))
    if arguments.get("trust_remote_code") is True:
        faults.append(
            f"{where}.trust_remote_code=True: not supported; convert the model to safetensors of a known "
            "class"
        )
    if faults:
        raise ValueError("\n".join(faults))


def check_judge(settings: Mapping[str, Any]) -> None:
    """Refuse a judge of an unknown kind, settings that its kind does not have, and values of a wrong type.

    Raises:
        ValueError: one line per fault; each names the dotted key.
    """
    kind = settings.get("kind", "checker")
    if kind not in JUDGE_KINDS:
        raise ValueError(f"evaluation.judge.kind={kind!r}: unknown; must be one of {', '.join(JUDGE_KINDS)}")
    where = "evaluation.judge"
    faults = [
        f"{where}.{name}={value!r}: must be a single value"
        for name, value in settings.items()
        if isinstance(value, list | dict)
    ]
    accepted = ("kind", *JUDGE_KEYS[kind])
    faults += [
        unknown_key_message(f"{where}.{name}", [f"{where}.{key}" for key in accepted])
        + (f" (kind: {kind})" if name in JUDGE_TYPES else "")
        for name in settings
        if name not in accepted
    ]
    known = {name: value for name, value in settings.items() if name in JUDGE_TYPES}
    if faults := faults or list(type_faults(known, JUDGE_TYPES, where)):
        raise ValueError("\n".join(faults))


def check_benchmarks(settings: Mapping[str, Any]) -> None:
    """Refuse unknown keys of `evaluation.benchmarks`, and values of a wrong type.

    Raises:
        ValueError: one line per fault; each names the dotted key.
    """
    where = "evaluation.benchmarks"
    faults = list(type_faults(settings, BENCHMARK_TYPES, where, closed=True))
    shots = settings.get("shots")
    if isinstance(shots, Mapping):
        faults += type_faults(shots, dict.fromkeys(shots, int), f"{where}.shots")
    if faults:
        raise ValueError("\n".join(faults))


def type_faults(
    values: Mapping[str, Any],
    kinds: Mapping[str, Any],
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
            yield f"{where}.{name}={value!r}: must be {_type_name(kind)}"


def _type_name(kind: Any) -> str:
    """A type in words, such as `a string or a list`."""
    return " or ".join(_TYPE_NAMES[get_origin(member) or member] for member in field_types.members(kind))


def _has_type(value: Any, kind: Any) -> bool:
    return any(_is_of(value, member) for member in field_types.members(kind))


def _is_of(value: Any, kind: Any) -> bool:
    origin = get_origin(kind) or kind
    if isinstance(value, bool):
        return origin is bool
    if origin is dict:
        return isinstance(value, Mapping)
    if origin is list:
        item = field_types.item_type(kind)
        return isinstance(value, list) and all(_has_type(entry, item) for entry in value)
    if origin is int:  # 5e8 too, as DeepSpeed's documentation writes bucket sizes
        return isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if origin is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, origin)
