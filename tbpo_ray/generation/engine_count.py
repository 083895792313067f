"""How many vLLM engines a call starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tbpo_ray.cluster.capacity import UNLIMITED, Capacity, available, present
from tbpo_ray.cluster.fit import capacities
from tbpo_ray.config.schema import Config, GenerationConfig
from tbpo_ray.generation.vllm_engine import engine_resources


@dataclass(frozen=True)
class EngineCount:
    """The engines of a pool."""

    smallest: int
    """Engines that are requested at once."""
    largest: int
    """Engines that the pool may grow to."""
    per_node: int
    """Engines that share the cores of a node."""

    def __str__(self) -> str:
        if self.smallest == self.largest:
            return f"{self.smallest} engine(s)"
        return f"{self.smallest} to {self.largest} engines"


@dataclass(frozen=True)
class EngineNodes:
    """Where engines run."""

    use_gpu: bool = False
    """Whether each engine has `generation.tensor_parallel` GPUs; otherwise a CPU, or a part of one."""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that the nodes must have."""
    sizes: Sequence[Capacity] | None = None
    """What the cluster has, and what it can have; None: the nodes that are up when it is needed."""

    @classmethod
    def of(cls, config: Config) -> EngineNodes:
        """The nodes that a configuration gives to engines. Ray must be running."""
        return cls(config.cluster.gpus, config.cluster.labels.generate, capacities(config))

    def holds(self, generation: GenerationConfig) -> int:
        """How many engines there can ever be."""
        sizes = [present()] if self.sizes is None else self.sizes
        return max(self._fits(generation, size) for size in sizes)

    def has_free(self, generation: GenerationConfig) -> int:
        """How many engines can start now."""
        return self._fits(generation, available())

    def _fits(self, generation: GenerationConfig, size: Capacity) -> int:
        if self.use_gpu:
            bundle = engine_resources(generation, use_gpu=True, free_cpus=0.0, engines=1)
            return size.fits(bundle, self.labels)
        # An engine uses all cores of its node; a second one on it would only load the model twice.
        nodes = sum(k.most for k in size.with_labels(self.labels) if k.resources.get("CPU", 0.0) > 0)
        return min(nodes, size.most_nodes if size.most_nodes is not None else UNLIMITED)


def engine_count(generation: GenerationConfig, batches: int, nodes: EngineNodes) -> EngineCount:
    """The number of engines of `generation.engines`.

    With `auto`, the pool starts with what is free now, and can grow to all that the nodes hold.

    Args:
        batches: batches of prompts, beyond which an engine would have nothing to do.
    """
    if generation.engines != "auto":
        given = generation.engines
        smallest, largest = (given[0], given[1]) if isinstance(given, list) else (given, given)
        return EngineCount(smallest, largest, largest)
    largest = max(1, min(nodes.holds(generation), batches))
    return EngineCount(max(1, min(nodes.has_free(generation), largest)), largest, 1)
