"""The arguments, environment and resources of one vLLM engine, and checks before it starts."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tbpo_ray.config.schema import GenerationConfig
from tbpo_ray.errors import InputError
from tbpo_ray.storage.json_lines import read_object

_SPARE_CPUS = 0.2
"""CPUs that are reserved for the small Ray Data tasks around the engines."""
TASK_CPUS = 0.05
"""CPUs of each such task."""
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts as `max_lora_rank`."""


LENGTH_STEP = 64
"""`max_model_len` is rounded up to a multiple, so that similar prompts give the same engine."""
_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
"""Keys of a model's configuration in which vLLM looks for the longest sequence."""


def needed_length(model: str, longest_prompt: int, generation: GenerationConfig) -> int | None:
    """The `max_model_len` that prompts and answers need; None where the model's own limit is not above it.

    vLLM reserves the cache of a sequence of the longest length before it starts, whatever the prompts are:
    16 GiB for the 131,072 tokens of Llama 3.1 8B's own limit.

    Args:
        longest_prompt: tokens of the longest prompt.
    """
    needed = round_length(longest_prompt + generation.max_tokens)
    limit = model_limit(model)
    # Without a limit in the configuration vLLM assumes one of its own.
    return needed if limit is not None and needed < limit else None


def engine_length(model: str, longest_prompt: int, generation: GenerationConfig) -> int | None:
    """The `max_model_len` that an engine has in the end; None where vLLM assumes a limit of its own."""
    given = generation.engine.get("max_model_len") or generation.max_model_len
    return given or needed_length(model, longest_prompt, generation) or model_limit(model)


def round_length(tokens: int) -> int:
    """`tokens` rounded up to a multiple of LENGTH_STEP."""
    return -(-tokens // LENGTH_STEP) * LENGTH_STEP


def model_limit(model: str) -> int | None:
    """The longest sequence according to a model's and its tokenizer's configuration; None if neither says."""
    config = read_object(Path(model) / "config.json", "save the model again")
    text = config.get("text_config") or {}
    found = [part.get(key) for part in (text, config) for key in _LENGTH_KEYS]
    tokenizer = Path(model) / "tokenizer_config.json"
    if tokenizer.is_file():
        found.append(read_object(tokenizer, "save the tokenizer again").get("model_max_length"))
    limits = [limit for limit in found if isinstance(limit, int | float)]
    return int(min(limits)) if limits else None


def check_length(model: str, generation: GenerationConfig) -> None:
    """Refuse a `max_model_len` above the model's own limit, which vLLM would refuse after the nodes started.

    Models with scaled rotary embeddings are left to vLLM, which knows how far they reach.

    Raises:
        InputError: names the key, the value and the limit.
    """
    config = read_object(Path(model) / "config.json", "save the model again")
    limit = model_limit(model)
    if limit is None or _has_scaled_positions(config) or generation.engine.get("hf_overrides"):
        return
    limit = max(limit, int(config.get("model_max_length") or 0))  # which vLLM accepts too
    given = {
        "max_model_len": generation.max_model_len,
        "engine.max_model_len": generation.engine.get("max_model_len"),
    }
    for key, value in given.items():
        if value is not None and value > limit:
            raise InputError(
                f"generation.{key}={value}: {model} has {limit} positions; must be at most {limit}, or null "
                "for what the prompts need"
            )


def _has_scaled_positions(config: Mapping[str, Any]) -> bool:
    """Whether rotary embeddings are scaled, in some layers at least, to reach beyond the positions named."""
    text = config.get("text_config") or config
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    layers = [rope, *(value for value in rope.values() if isinstance(value, Mapping))]
    return any((layer.get("rope_type") or layer.get("type") or "default") != "default" for layer in layers)


def engine_arguments(
    generation: GenerationConfig, *, use_gpu: bool, adapter: str | None, length: int | None = None
) -> dict[str, Any]:
    """Build the vLLM engine arguments; `generation.engine` overrides the rest.

    Args:
        length: default of `generation.max_model_len`, from `needed_length`.
    """
    arguments: dict[str, Any] = {
        "tensor_parallel_size": generation.tensor_parallel,
        "disable_log_stats": True,
    }
    if not use_gpu:
        # A seeded request whose prompt is prefilled in two chunks crashes vLLM's engine on the CPU: it
        # rewinds the random generator after the first chunk, which a CPU generator does not support.
        arguments |= {"enforce_eager": True, "dtype": "float32", "enable_chunked_prefill": False}
    if generation.gpus_per_engine > 1:
        # All processes of an engine are on one node. Ray's executor would leak a placement group.
        arguments["distributed_executor_backend"] = "mp"
    if (longest := generation.max_model_len or length) is not None:
        arguments["max_model_len"] = longest
    if adapter is not None:
        arguments |= {"enable_lora": True, "max_lora_rank": _vllm_rank(_adapter_config(adapter)["r"])}
    return arguments | generation.engine | {"trust_remote_code": False}


def environment(*, use_gpu: bool, engines: int) -> dict[str, str]:
    """Build the environment of an engine actor; nothing is copied from the caller's environment.

    Args:
        engines: engines on one node, which share its cores.
    """
    variables = {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": "ignore",
    }
    if not use_gpu:
        variables |= {
            "VLLM_CPU_KVCACHE_SPACE": "1",
            # The worker runs in the engine's process, which saves one import of vLLM, and shares the cores.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // engines)),
        }
    return variables


def engine_resources(
    generation: GenerationConfig, *, use_gpu: bool, free_cpus: float, engines: int
) -> dict[str, float]:
    """Ray resources of one engine. Without GPUs this is one CPU, or a fraction if less than one is free."""
    if use_gpu:
        return {"CPU": 1.0, "GPU": float(generation.gpus_per_engine)}
    share = (free_cpus - _SPARE_CPUS) / engines
    if share >= 1 or free_cpus <= _SPARE_CPUS:
        return {"CPU": 1.0}
    # Rounded down to hundredths: more than is free would never be scheduled.
    return {"CPU": max(0.05, math.floor(share * 100 + 1e-6) / 100)}


def check_model(model: str, adapter: str | None = None) -> None:
    """Check a model folder, and an adapter folder if there is one, before an engine loads them.

    Raises:
        InputError: the folder or its configuration is missing, or the adapter belongs to another model.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise InputError(f"{model}: no such model folder")
    if not (folder / "config.json").is_file():
        raise InputError(f"{model}: not a model folder (config.json is missing)")
    if adapter is not None:
        _check_adapter(folder, Path(adapter))


def _adapter_config(adapter: str | Path) -> dict[str, Any]:
    file = Path(adapter) / "adapter_config.json"
    if not file.is_file():
        raise InputError(f"{adapter}: not a LoRA adapter (adapter_config.json is missing)")
    return read_object(file, "save the adapter again", ("r",))


def _check_adapter(model: Path, adapter: Path) -> None:
    """Compare the shapes of the adapter's matrices with those of the weights that they are added to."""
    config = _adapter_config(adapter)
    weights = adapter / "adapter_model.safetensors"
    if config.get("peft_type", "LORA") != "LORA" or not weights.is_file():
        raise InputError(f"{adapter}: not a LoRA adapter in safetensors format (adapter_model.safetensors)")
    base_shapes: dict[str, list[int]] = {}
    for file in model.glob("*.safetensors"):
        base_shapes |= _tensor_shapes(file)
    for name, shape in _tensor_shapes(weights).items():
        module, matrix, _ = name.removeprefix("base_model.model.").rpartition(".lora_")
        if not matrix:
            continue
        base = base_shapes.get(f"{module}.weight")
        dimension = 1 if name.endswith("lora_A.weight") else 0  # A is [r, in], B is [out, r]
        if base is None or shape[dimension] != base[dimension]:
            actual = f"has shape {base}" if base else "does not exist"
            raise InputError(
                f"{adapter}: adapter of another model: {name} has shape {shape}, {module} of {model} {actual}"
            )


def _tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Shapes of the tensors in a safetensors file, without reading their values."""
    from safetensors import safe_open

    with safe_open(str(file), framework="numpy") as tensors:
        return {name: list(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118


def _vllm_rank(rank: int) -> int:
    """The smallest `max_lora_rank` that vLLM accepts and that is at least `rank`."""
    for accepted in _LORA_RANKS:
        if rank <= accepted:
            return accepted
    raise InputError(f"LoRA rank {rank}: vLLM serves at most {_LORA_RANKS[-1]}; merge the adapter instead")
