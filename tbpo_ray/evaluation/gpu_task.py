"""Run a function in a Ray task that holds a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar, cast

from tbpo_ray.cluster.processes import NodeProcess, await_end, own_processes

P = ParamSpec("P")
R = TypeVar("R")


def run_on_gpu(labels: Mapping[str, str], function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Return `function(*args, **kwargs)`, computed in a new process on a node that has a free GPU.

    When this returns, the process has ended, and the memory of its GPU is free.

    Args:
        labels: labels that the node must have.

    Raises:
        RunFailedError: the process cannot be killed.
    """
    import ray

    # max_calls=1: the process ends with the task, which is what returns its GPU memory.
    task = ray.remote(num_gpus=1, max_calls=1)(_call).options(
        name=getattr(function, "__name__", "gpu task"), label_selector=dict(labels)
    )
    result, processes = ray.get(task.remote(function, args, kwargs))
    await_end(processes)
    return cast("R", result)


def _call(
    function: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]
) -> tuple[object, list[NodeProcess]]:
    return function(*args, **kwargs), own_processes()
