"""The logs of worker processes that died, kept after Ray's own folder is gone."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from tbpo_ray.cluster.error_summary import last_error
from tbpo_ray.storage.files import write_atomic

_MAX_BYTES = 1 << 20
"""How much of the end of a log is kept."""
_READ_SECONDS = 30.0
_ENDED_ON_PURPOSE = ("RAY_KILL", "OUT_OF_SCOPE", "REF_DELETED", "OWNER_DIED", "INTENDED")
"""Reasons in Ray's table of actors that are consequences of a failure, not failures."""


def keep_dead_workers_logs(target: Path, *, since: float) -> str:
    """Copy what actors that have died since `since` (seconds since the epoch) printed to the file `target`.

    Ray deletes its logs with a private cluster, and on another node they are hard to find.

    Returns:
        The last error in the logs and the path of the copy, for the end of an error message; empty if no
        actor died, or its log cannot be read.
    """
    logs = {}
    with suppress(Exception):  # it explains another error, and must not replace it
        for actor in _dead_actors(since):
            text = read_worker_log(actor["Address"]["NodeID"], int(actor["Pid"]))
            if text:
                name = str(actor["ActorClassName"]).rsplit(".", 1)[-1]
                logs[f"{name}, process {actor['Pid']}"] = text
    if not logs:
        return ""
    try:
        write_atomic(target, "".join(f"--- {name}\n{text}\n" for name, text in logs.items()))
    except OSError:
        place = ""
    else:
        place = f"its log is in {target}"
    errors = [error for error in map(last_error, logs.values()) if error]
    quoted = f"its last error: {errors[-1]}" if errors else ""
    return "; ".join(part for part in (quoted, place) if part)


def _dead_actors(since: float) -> list[Mapping[str, Any]]:
    """Actors that died on their own, in the order of their deaths."""
    from ray._private import state

    dead = [actor for actor in state.actors().values() if actor["State"] == "DEAD" and actor["Pid"]]
    failed = [actor for actor in dead if not any(w in str(actor["DeathCause"]) for w in _ENDED_ON_PURPOSE)]
    recent = [actor for actor in failed if actor["EndTime"] / 1000 >= since]
    return sorted(recent, key=lambda actor: actor["EndTime"])


def read_worker_log(node: str, pid: int) -> str:
    """The end of what a worker process printed on the node with this id; empty if the node is lost."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if node == ray.get_runtime_context().get_node_id():
        return read_log(pid)
    strategy = NodeAffinitySchedulingStrategy(node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(read_log).options(scheduling_strategy=strategy)
    try:
        return str(ray.get(task.remote(pid), timeout=_READ_SECONDS))
    except ray.exceptions.RayError:  # the node is gone, and the log with it
        return ""


def read_log(pid: int) -> str:
    """The end of what a worker process of this node printed, its errors last."""
    from ray._private import worker

    node: Any = worker._global_node
    folder = Path(node.get_logs_dir_path())
    texts = []
    for suffix in ("out", "err"):
        for file in folder.glob(f"worker-*-{pid}.{suffix}"):
            with file.open("rb") as handle:
                handle.seek(max(0, file.stat().st_size - _MAX_BYTES))
                texts.append(handle.read().decode("utf-8", "replace"))
    return "\n".join(text for text in texts if text.strip())
