"""The memory of the GPUs that training workers will get."""

from __future__ import annotations

from collections.abc import Callable

from tbpo_ray.config.loading import stage_config
from tbpo_ray.config.schema import Config

PROBE_SECONDS = 60.0
GIB = 2**30


def detect_device_memory(config: Config, probe: Callable[[Config], int | None] | None = None) -> Config:
    """Set `cluster.device_memory_gib` where something has to be chosen by it and it is not set.

    Args:
        config: `use_gpu` is resolved.
        probe: finds the bytes of a GPU; default: a Ray task on one.

    Returns:
        The configuration; unchanged where no GPU is up yet, so that its memory cannot be known.
    """
    training, cluster = config.training, config.cluster
    is_open = training.leaves_stage_open or "auto" in (
        training.activation_checkpointing,
        training.micro_batch_tokens,
    )
    if not is_open or not cluster.gpus or cluster.device_memory_gib is not None:
        return config
    found = (probe or _probe)(config)
    if found is None:
        return config
    # Workers may share a GPU.
    share = min(1.0, cluster.worker_resources.get("GPU", 1.0))
    return stage_config(config, {}, cluster__device_memory_gib=round(share * found / GIB, 2))


def _probe(config: Config) -> int | None:
    """Bytes of a GPU that is up and free; None if there is none now."""
    import ray

    if not ray.available_resources().get("GPU"):  # type: ignore[no-untyped-call]
        return None
    task = ray.remote(num_cpus=0, num_gpus=1, label_selector=config.cluster.labels.train)(
        _total_memory
    ).remote()
    try:
        found: int | None = ray.get(task, timeout=PROBE_SECONDS)
    except ray.exceptions.GetTimeoutError:
        ray.cancel(task, force=True)
        return None
    return found


def _total_memory() -> int | None:
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None
