"""Wait for the nodes that a step needs, say what is waited for, and check that they share the storage."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tbpo_ray.cluster.session import is_private
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError, RunFailedError
from tbpo_ray.progress import log_progress

_SAY_EVERY_S = 15.0
_VISIBLE_WITHIN_S = 20.0
"""A network file system may show a new file late."""


def wait_for_resources(
    config: Config,
    what: str,
    bundle: Mapping[str, float],
    count: int,
    *,
    labels: Mapping[str, str] | None = None,
    folders: Mapping[str, Path] | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Return when the cluster holds `count` bundles at the same time; the autoscaler is asked for them.

    The bundles are released again: the nodes stay up long enough for what asks for them next. In a private
    cluster on this machine nothing has to be waited for.

    Args:
        what: the step that needs them, for the sentences.
        labels: that the nodes must carry.
        folders: configuration key to a folder in which nodes and this process must see each other's files.
        files: configuration key to a path that the nodes must have.

    Raises:
        RunFailed: after `cluster.start_timeout_s` they are not there.
        InputError: a folder or path is not on storage that these nodes share with this one.
    """
    if is_private():
        return
    from ray.util.placement_group import placement_group, remove_placement_group

    wanted = f"{count} x ({format_resources(bundle)})" + (
        f" on nodes with {format_resources(labels)}" if labels else ""
    )
    group = placement_group(
        [dict(bundle)] * count,
        bundle_label_selector=[dict(labels)] * count if labels else None,
    )
    began = time.monotonic()
    try:
        while not group.wait(_SAY_EVERY_S if time.monotonic() - began > 1 else 2):
            waited = time.monotonic() - began
            if waited > config.cluster.start_timeout_s:
                raise RunFailedError(
                    f"cluster.start_timeout_s={config.cluster.start_timeout_s:g}: {wanted} for {what} did "
                    f"not come up; {cluster_state()}"
                )
            log_progress(f"{what} waits for {wanted}, {waited:.0f} s so far; {cluster_state()}")
        waited = time.monotonic() - began
        if waited > 5:
            log_progress(f"{what}: {wanted} after {waited:.0f} s")
        _check_storage(group, count, folders or {}, files or {})
    finally:
        remove_placement_group(group)


def format_resources(mapping: Mapping[str, Any]) -> str:
    """`1 CPU, 1 GPU` of resources, `pool=train` of labels."""
    return ", ".join(f"{k}={v}" if isinstance(v, str) else f"{v:g} {k}" for k, v in mapping.items())


def cluster_state() -> str:
    """What is up, what is coming and what could not be started, in one sentence."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    address = ray.get_runtime_context().gcs_address
    try:
        status = get_cluster_status(address)
    except Exception as error:  # only a sentence depends on it; the wait goes on
        return f"the state of the cluster is not known ({type(error).__name__})"
    up = [node.ray_node_type_name or "node" for node in (*status.active_nodes, *status.idle_nodes)]
    coming = [node.ray_node_type_name for node in status.pending_nodes]
    coming += [launch.ray_node_type_name for launch in status.pending_launches for _ in range(launch.count)]
    parts = [f"up: {_counted(up)}", f"coming: {_counted(coming)}"]
    if status.failed_launches:
        last = status.failed_launches[-1]
        parts.append(f"could not be started: {last.ray_node_type_name} ({(last.details or '')[:200]})")
    return ", ".join(parts)


def _counted(names: Sequence[str]) -> str:
    return ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names))) or "nothing"


def _check_storage(group: Any, count: int, folders: Mapping[str, Path], files: Mapping[str, str]) -> None:
    """Let the node of every bundle read a mark of this process and answer beside it."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    name = f".seen-by-{uuid.uuid4().hex}"
    try:
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(name)
        look = ray.remote(num_cpus=0, max_retries=2)(probe_shared_storage)
        answers = ray.get(
            [
                look.options(
                    scheduling_strategy=PlacementGroupSchedulingStrategy(
                        group, placement_group_bundle_index=index
                    )
                ).remote({k: str(v) for k, v in folders.items()}, dict(files), name, index)
                for index in range(count)
            ]
        )
        faults = []
        for index, (node, unseen) in enumerate(answers):
            for key, folder in folders.items():
                if key not in unseen and not _appears(folder / f"{name}-{index}"):
                    unseen.append(key)
            for key in unseen:
                where = folders.get(key) or files.get(key)
                faults.append(
                    f"{key}={where}: node {node} does not share it with the node of this job; give a path "
                    "on storage that every node mounts (NFS, EFS, Filestore, Lustre)"
                )
        if faults:
            raise InputError(*dict.fromkeys(faults))
    finally:
        for folder in folders.values():
            for mark in folder.glob(f"{name}*"):
                with suppress(OSError):
                    mark.unlink()


def probe_shared_storage(
    folders: dict[str, str], files: dict[str, str], name: str, index: int
) -> tuple[str, list[str]]:
    """On a node: which of the keys it does not share. Answers in each folder with a file of its own."""
    import ray

    unseen = [key for key, path in files.items() if not Path(path).exists()]
    for key, folder in folders.items():
        if not _appears(Path(folder) / name):
            unseen.append(key)
            continue
        try:
            (Path(folder) / f"{name}-{index}").write_text(name)
        except OSError:
            unseen.append(key)
    return ray.util.get_node_ip_address(), unseen


def _appears(file: Path) -> bool:
    until = time.monotonic() + _VISIBLE_WITHIN_S
    while not file.is_file():
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True
