"""Run a function in a Ray task that holds a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")


def run_on_gpu(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Return `function(*args, **kwargs)`, computed in a new process on a node that has a free GPU."""
    import ray

    # max_calls=1: the process ends with the task, which is what returns its GPU memory.
    task = ray.remote(num_gpus=1, max_calls=1)(_call).options(name=getattr(function, "__name__", "gpu task"))
    return cast("R", ray.get(task.remote(function, args, kwargs)))


def _call(function: Callable[..., object], args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
    return function(*args, **kwargs)
