"""What one vLLM engine is told: arguments, environment, resources; and checks made before it starts."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from tbpo_ray.config.schema import GenerationConfig
from tbpo_ray.errors import InputError

_SPARE_CPUS = 0.2
"""Left for the small Ray Data tasks around the engines."""
TASK_CPUS = 0.05
"""What such a task asks for."""


def engine_arguments(generation: GenerationConfig, *, use_gpu: bool, adapter: str | None) -> dict[str, Any]:
    """vLLM engine arguments: what the CPU needs, then the configuration, then `generation.engine`."""
    arguments: dict[str, Any] = {
        "tensor_parallel_size": generation.tensor_parallel,
        "disable_log_stats": True,
    }
    if not use_gpu:
        # A seeded request whose prompt is read in two steps ends vLLM's engine on the CPU: it takes back the
        # draw of the first step, which a CPU generator cannot do. So no prompt is cut into chunks.
        arguments |= {"enforce_eager": True, "dtype": "float32", "enable_chunked_prefill": False}
    if generation.tensor_parallel > 1:
        # One engine stays on one node. Ray's executor would hold a placement group that nobody removes.
        arguments["distributed_executor_backend"] = "mp"
    if generation.max_model_len is not None:
        arguments["max_model_len"] = generation.max_model_len
    if adapter is not None:
        arguments |= {"enable_lora": True, "max_lora_rank": _vllm_rank(_adapter_config(adapter)["r"])}
    return arguments | generation.engine | {"trust_remote_code": False}


def environment(*, use_gpu: bool, engines: int) -> dict[str, str]:
    """Environment of an engine actor; nothing is copied from the caller's environment."""
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
            # The worker runs inside the engine's process (a third import of vLLM less) and shares the cores.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // engines)),
        }
    return variables


def engine_resources(
    generation: GenerationConfig, *, use_gpu: bool, free_cpus: float, engines: int
) -> dict[str, float]:
    """Ray resources of one engine. Without GPUs: a CPU, or a fraction when less than that is free."""
    if use_gpu:
        return {"CPU": 1.0, "GPU": float(generation.tensor_parallel)}
    share = (free_cpus - _SPARE_CPUS) / engines
    return {
        "CPU": 1.0
        if share >= 1 or free_cpus <= _SPARE_CPUS
        else max(0.05, math.floor(share * 100 + 1e-6) / 100)
    }


def pool_size(generation: GenerationConfig) -> tuple[int, int]:
    """(min, max) engines."""
    engines = generation.engines
    return (engines[0], engines[1]) if isinstance(engines, list) else (engines, engines)


def end_tokens(model: str) -> set[int]:
    """Token ids that end an answer, from the model folder's generation and model configuration."""
    for name in ("generation_config.json", "config.json"):
        file = Path(model) / name
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id") if file.is_file() else None
        if ids is not None:
            return set(ids) if isinstance(ids, list) else {int(ids)}
    return set()


def check_model(model: str, adapter: str | None = None) -> None:
    """Say what is wrong with a model or an adapter folder before an engine starts on it.

    Raises:
        InputError: no folder, no configuration, or an adapter whose shapes are another model's.
    """
    folder = Path(model)
    if not folder.is_dir():
        raise InputError(f"{model}: no such model folder")
    if not (folder / "config.json").is_file():
        raise InputError(f"{model}: not a model folder, it has no config.json")
    if adapter is not None:
        _check_adapter(folder, Path(adapter))


def _adapter_config(adapter: str | Path) -> dict[str, Any]:
    file = Path(adapter) / "adapter_config.json"
    if not file.is_file():
        raise InputError(f"{adapter}: not a LoRA adapter, it has no adapter_config.json")
    return json.loads(file.read_text(encoding="utf-8"))


def _check_adapter(model: Path, adapter: Path) -> None:
    """Compare the adapter's matrices with the weights they are added to, by shape."""
    from safetensors import safe_open

    config = _adapter_config(adapter)
    weights = adapter / "adapter_model.safetensors"
    if config.get("peft_type", "LORA") != "LORA" or not weights.is_file():
        raise InputError(f"{adapter}: not a LoRA adapter in safetensors (adapter_model.safetensors)")
    shapes: dict[str, list[int]] = {}
    for file in model.glob("*.safetensors"):
        with safe_open(str(file), framework="numpy") as tensors:
            shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118
    with safe_open(str(weights), framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            module, matrix, _ = name.removeprefix("base_model.model.").rpartition(".lora_")
            base = shapes.get(f"{module}.weight")
            if not matrix:
                continue
            got = tensors.get_slice(name).get_shape()
            side = 1 if name.endswith("lora_A.weight") else 0
            if base is None or got[side] != base[side]:
                have = f"is {base}" if base else "does not exist"
                raise InputError(
                    f"{adapter}: an adapter of another model: {name} is {got}, {module} of {model} {have}"
                )


def _vllm_rank(rank: int) -> int:
    """The least `max_lora_rank` vLLM allows that holds `rank`."""
    for allowed in (8, 16, 32, 64, 128, 256, 320, 512):
        if rank <= allowed:
            return allowed
    raise InputError(f"LoRA rank {rank}: vLLM serves at most 512; merge the adapter instead")
