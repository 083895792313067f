"""The section `cluster`."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from tbpo_ray.config.base import Count, NonNegative, Number, Positive, Section

CountOrRange = Count | Annotated[list[Count], Field(min_length=2, max_length=2)]
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


class PoolLabels(Section):
    """Node labels that each part of the work requires, for a cluster with several pools of nodes."""

    prepare: dict[str, str] = Field(default_factory=dict)
    """Labels for reading, tokenizing, reference scores on CPUs, and export."""
    train: dict[str, str] = Field(default_factory=dict)
    """Labels for the training workers, and for reference scores on GPUs."""
    generate: dict[str, str] = Field(default_factory=dict)
    """Labels for the vLLM engines."""

    @field_validator("prepare", "train", "generate")
    @classmethod
    def _check_labels(cls, value: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        for name, label in value.items():
            if not _LABEL.fullmatch(label):
                raise ValueError(
                    f"cluster.labels.{info.field_name}.{name}={label}: use letters, digits, '.', '_' or '-'"
                )
        return value


class ClusterConfig(Section):
    """The workers of a run, their resources, and how many failures the run survives."""

    num_workers: CountOrRange = 1
    """Training workers: a number, or `[min, max]` to grow and shrink with the cluster."""
    use_gpu: bool | Literal["auto"] = "auto"
    """Give each training worker and each vLLM engine a GPU; `auto`: if the cluster has GPUs or can start a
    node with GPUs."""
    resources_per_worker: dict[str, NonNegative] = Field(default_factory=dict)
    """Ray resources of a training worker; default: `{CPU: 1}`, or `{CPU: 4, GPU: 1}` with GPUs."""
    device_memory_gib: Positive | None = None
    """Memory of the device of a training worker in GiB: its GPU, or its share of the node without GPUs. A run
    that does not fit is refused before it starts; default: that of a GPU on the driver's node, if there is
    one, and no check otherwise."""
    threads_per_worker: Count | None = None
    """Torch threads of a CPU worker; default: the node's cores divided by the workers on the node."""
    max_failures: Annotated[int, Field(ge=-1), Number] = 2
    """Worker failures that a run survives; -1: any number."""
    max_preemption_failures: Annotated[int, Field(ge=-1), Number] = -1
    """Failures by node preemption that a run survives; -1: any number."""
    start_timeout_s: Positive = 600
    """Seconds to wait for nodes to start."""
    labels: PoolLabels = PoolLabels()
    """Pools of nodes for the parts of the work; default: any node that has the resources."""
    node_types: str | None = None
    """A Ray cluster file or KubeRay manifest that describes what the cluster can grow to; default: the file
    that `ray up` left on the head node. Without either, only running nodes count."""

    @field_validator("num_workers")
    @classmethod
    def _check_range(cls, value: int | list[int]) -> int | list[int]:
        if isinstance(value, list) and value[0] > value[1]:
            raise ValueError("[min, max] must have min <= max")
        return value

    @property
    def gpus(self) -> bool:
        """Whether workers get GPUs; `auto` counts as no until it is resolved on a cluster."""
        return self.use_gpu is True

    @property
    def max_workers(self) -> int:
        """The number of training workers, or the upper end of the range."""
        return self.num_workers[1] if isinstance(self.num_workers, list) else self.num_workers

    @property
    def worker_resources(self) -> dict[str, float]:
        """Ray resources of a training worker."""
        default = {"CPU": 4.0, "GPU": 1.0} if self.gpus else {"CPU": 1.0}
        return dict(self.resources_per_worker) or default
