"""Processes on the nodes of a cluster: which of them are alive, waiting for their end, killing them.

Ray returns the GPUs of an actor when its worker ends, while a process that the worker started may still hold
their memory.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from tbpo_ray.errors import RunFailedError

_TASK_SECONDS = 30.0
"""How long a node may take to answer a question about its processes."""
_CLOCK_SECONDS = 2.0
"""How exactly a process's start is known; a later process with the same id starts later than that."""


@dataclass(frozen=True)
class NodeProcess:
    """A process on a node of the cluster."""

    node: str
    """Ray's id of the node."""
    pid: int
    started: float
    """When it started, in seconds since the epoch."""


def own_processes() -> list[NodeProcess]:
    """This process, which must be one of Ray's, and the processes below it."""
    import psutil
    import ray

    node = str(ray.get_runtime_context().get_node_id())
    this = psutil.Process()
    found = []
    for process in (this, *this.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # it has just ended
            found.append(NodeProcess(node, process.pid, process.create_time()))
    return found


def running(processes: Iterable[NodeProcess]) -> list[NodeProcess]:
    """Those of the processes that have not ended. A node that does not answer is lost, and all of its own."""
    return _on_nodes(_running_here, processes)


def kill(processes: Iterable[NodeProcess]) -> None:
    """Kill processes, stopped ones too, without waiting for their end."""
    _on_nodes(_kill_here, processes)


def await_end(processes: Iterable[NodeProcess], *, seconds: float = 60.0) -> None:
    """Return when all processes have ended; those that have not after `seconds` are killed.

    Raises:
        RunFailedError: a process cannot be killed.
    """
    left = running(processes)
    deadline = time.monotonic() + seconds
    killed = False
    while left:
        if time.monotonic() > deadline:
            if killed:
                names = ", ".join(f"{process.pid} on node {process.node}" for process in left)
                raise RunFailedError(f"processes that hold a model do not end, although killed: {names}")
            kill(left)
            killed, deadline = True, time.monotonic() + seconds
        time.sleep(0.1)
        left = running(left)


def _on_nodes(
    function: Callable[[list[NodeProcess]], list[NodeProcess]], processes: Iterable[NodeProcess]
) -> list[NodeProcess]:
    """Apply the function to the processes of each node, on that node."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes: dict[str, list[NodeProcess]] = defaultdict(list)
    for process in processes:
        nodes[process.node].append(process)
    here = ray.get_runtime_context().get_node_id()
    found = function(nodes.pop(here)) if here in nodes else []
    remote: Any = ray.remote(num_cpus=0, max_retries=0)(function)
    for node, members in nodes.items():
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        with suppress(ray.exceptions.RayError):  # the node is lost
            found += ray.get(
                remote.options(scheduling_strategy=strategy).remote(members), timeout=_TASK_SECONDS
            )
    return found


def _running_here(processes: list[NodeProcess]) -> list[NodeProcess]:
    import psutil

    found = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            now = psutil.Process(process.pid)
            same = abs(now.create_time() - process.started) < _CLOCK_SECONDS
            if same and now.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _kill_here(processes: list[NodeProcess]) -> list[NodeProcess]:
    import psutil

    for process in _running_here(processes):
        with suppress(psutil.NoSuchProcess):
            psutil.Process(process.pid).kill()
    return processes
