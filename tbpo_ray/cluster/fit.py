"""Whether the configured workers and engines can ever fit into the cluster."""

from __future__ import annotations

from collections.abc import Mapping

from tbpo_ray.cluster.capacity import Capacity, possible, present
from tbpo_ray.cluster.placement import format_resources
from tbpo_ray.cluster.session import is_private
from tbpo_ray.config.loading import stage_config
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError


def fit_to_cluster(config: Config) -> Config:
    """Settle what the configuration leaves to the cluster: GPUs or not, and how many workers at most.

    Raises:
        InputError: for a plan that the cluster can never satisfy, with the arithmetic.
    """
    sizes = capacities(config)
    pools = config.cluster.labels
    use_gpu = config.cluster.use_gpu
    if use_gpu == "auto":
        use_gpu = any(size.has("GPU", pools.train) for size in sizes)
    config = stage_config(config, {}, cluster__use_gpu=use_gpu)
    asked = config.cluster.num_workers
    least, largest = asked if isinstance(asked, list) else (asked, asked)
    bundle = config.cluster.worker_resources
    fits = max(size.fits(bundle, pools.train) for size in sizes)
    if fits < least:
        raise InputError(
            f"cluster.num_workers={asked}: {least} x ({format_resources(bundle)}) never fit into "
            f"{_sizes(sizes, bundle, pools.train)}; at most {fits} worker(s) do. Lower "
            "cluster.num_workers or cluster.resources_per_worker, or add nodes"
        )
    if isinstance(asked, list) and fits < largest:
        return stage_config(config, {}, cluster__num_workers=[least, fits])
    return config


def fit_engines(config: Config, engines: int, bundle: Mapping[str, float]) -> None:
    """Refuse vLLM engines that the cluster can never hold.

    Raises:
        InputError: with the arithmetic.
    """
    sizes, labels = capacities(config), config.cluster.labels.generate
    fits = max(size.fits(bundle, labels) for size in sizes)
    if fits < engines:
        raise InputError(
            f"generation.engines={config.generation.engines}: {engines} x ({format_resources(bundle)}) never "
            f"fit into the cluster, {_sizes(sizes, bundle, labels)}; at most {fits} engine(s) do. Lower "
            "generation.engines or generation.tensor_parallel, or add nodes"
        )


def _sizes(sizes: list[Capacity], bundle: Mapping[str, float], labels: Mapping[str, str]) -> str:
    """The cluster in words; the largest it can be."""
    most = sizes[-1]
    words = most.sentence(bundle)
    if labels:
        words += f" (with {format_resources(labels)}: {Capacity(most.with_labels(labels)).sentence(bundle)})"
    return words if len(sizes) > 1 else f"{words}, which is all that is up"


def capacities(config: Config) -> list[Capacity]:
    """The nodes that are up and, where the cluster grows and something says how far, all it can have."""
    grown = None if is_private() else possible(config.cluster.node_types)
    return [present()] if grown is None else [present(), grown]
