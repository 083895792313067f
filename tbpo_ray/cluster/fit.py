"""Check whether the configured workers and engines can ever fit into the cluster."""

from __future__ import annotations

from collections.abc import Mapping

from tbpo_ray.cluster.capacity import Capacity, possible, present
from tbpo_ray.cluster.placement import format_resources
from tbpo_ray.cluster.session import is_private
from tbpo_ray.config.loading import stage_config
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError


def fit_to_cluster(config: Config) -> Config:
    """Resolve what the configuration leaves to the cluster: `use_gpu: auto` and the maximum of workers.

    Raises:
        InputError: the cluster can never hold the workers; the message includes the calculation.
    """
    sizes = capacities(config)
    pools = config.cluster.labels
    use_gpu = config.cluster.use_gpu
    if use_gpu == "auto":
        use_gpu = any(size.has("GPU", pools.train) for size in sizes)
    config = stage_config(config, {}, cluster__use_gpu=use_gpu)
    workers = config.cluster.num_workers
    least, most = workers if isinstance(workers, list) else (workers, workers)
    bundle = config.cluster.worker_resources
    fits = max(size.fits(bundle, pools.train) for size in sizes)
    if fits < least:
        raise InputError(
            f"cluster.num_workers={workers}: {least} x ({format_resources(bundle)}) never fit into "
            f"{_format_largest(sizes, bundle, pools.train)}; at most {fits} worker(s) do. Lower "
            "cluster.num_workers or cluster.resources_per_worker, or add nodes"
        )
    if isinstance(workers, list) and fits < most:
        return stage_config(config, {}, cluster__num_workers=[least, fits])
    return config


def fit_engines(config: Config, engines: int, bundle: Mapping[str, float]) -> None:
    """Refuse more vLLM engines than the cluster can ever hold.

    Raises:
        InputError: with the calculation.
    """
    sizes, labels = capacities(config), config.cluster.labels.generate
    fits = max(size.fits(bundle, labels) for size in sizes)
    if fits < engines:
        raise InputError(
            f"generation.engines={config.generation.engines}: {engines} x ({format_resources(bundle)}) never "
            f"fit into the cluster, {_format_largest(sizes, bundle, labels)}; at most {fits} engine(s) do. "
            "Lower generation.engines or generation.tensor_parallel, or add nodes"
        )


def _format_largest(sizes: list[Capacity], bundle: Mapping[str, float], labels: Mapping[str, str]) -> str:
    """The largest size that the cluster can have, as text."""
    largest = sizes[-1]
    text = largest.format(bundle)
    if labels:
        text += f" (with {format_resources(labels)}: {Capacity(largest.with_labels(labels)).format(bundle)})"
    return text if len(sizes) > 1 else f"{text}, the whole cluster"


def capacities(config: Config) -> list[Capacity]:
    """The nodes that are up and, if the cluster can grow to a known size, all nodes that it can have."""
    grown = None if is_private() else possible(config.cluster.node_types)
    return [present()] if grown is None else [present(), grown]
