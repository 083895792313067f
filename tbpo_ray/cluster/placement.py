"""Wait for the nodes that a stage needs, report on the wait, and check that they share the storage."""

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

_REPORT_INTERVAL_SECONDS = 15.0
_VISIBILITY_SECONDS = 20.0
"""How long a network file system may take to show a new file."""


def wait_for_resources(
    config: Config,
    purpose: str,
    bundle: Mapping[str, float],
    count: int,
    *,
    labels: Mapping[str, str] | None = None,
    folders: Mapping[str, Path] | None = None,
    files: Mapping[str, str] | None = None,
) -> None:
    """Return when the cluster can hold `count` bundles at the same time; the autoscaler is asked for them.

    The bundles are released again. The nodes stay up long enough for the work that requests them next. In a
    private cluster on this machine there is nothing to wait for.

    Args:
        purpose: the stage that needs the resources, for progress lines and errors.
        labels: labels that the nodes must carry.
        folders: configuration key to a folder in which nodes and this process must see each other's files.
        files: configuration key to a path that must exist on the nodes.

    Raises:
        RunFailedError: the resources are not available after `cluster.start_timeout_s`.
        InputError: a folder or path is not on storage that the nodes share with this process.
    """
    if is_private():
        return
    from ray.util.placement_group import placement_group, remove_placement_group

    request = f"{count} x ({format_resources(bundle)})"
    if labels:
        request += f" on nodes with {format_resources(labels)}"
    group = placement_group(
        [dict(bundle)] * count, bundle_label_selector=[dict(labels)] * count if labels else None
    )
    try:
        _await_group(group, config.cluster.start_timeout_s, purpose, request)
        _check_storage(group, count, folders or {}, files or {})
    finally:
        remove_placement_group(group)


def _await_group(group: Any, timeout_s: float, purpose: str, request: str) -> None:
    began = time.monotonic()
    interval = 2.0  # first, since most often the nodes are up; then less often
    while not group.wait(interval):
        waited = time.monotonic() - began
        if waited > timeout_s:
            raise RunFailedError(
                f"cluster.start_timeout_s={timeout_s:g}: {request} for {purpose} did not become available; "
                f"{cluster_state()}"
            )
        log_progress(f"{purpose} waits for {request}, {waited:.0f} s so far; {cluster_state()}")
        interval = _REPORT_INTERVAL_SECONDS
    waited = time.monotonic() - began
    if waited > 5:
        log_progress(f"{purpose}: {request} after {waited:.0f} s")


def format_resources(mapping: Mapping[str, Any]) -> str:
    """Resources or labels as text: `1 CPU, 1 GPU` or `pool=train`."""
    return ", ".join(f"{k}={v}" if isinstance(v, str) else f"{v:g} {k}" for k, v in mapping.items())


def cluster_state() -> str:
    """The nodes that are up, those that are starting, and the last one that failed to start, as text."""
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    address = ray.get_runtime_context().gcs_address
    try:
        status = get_cluster_status(address)
    except Exception as error:  # only a progress line depends on it; the wait continues
        return f"the state of the cluster is not known ({type(error).__name__})"
    up = [node.ray_node_type_name or "node" for node in (*status.active_nodes, *status.idle_nodes)]
    starting = [node.ray_node_type_name for node in status.pending_nodes]
    starting += [launch.ray_node_type_name for launch in status.pending_launches for _ in range(launch.count)]
    parts = [f"up: {_count_names(up)}", f"starting: {_count_names(starting)}"]
    if status.failed_launches:
        last = status.failed_launches[-1]
        parts.append(f"failed to start: {last.ray_node_type_name} ({(last.details or '')[:200]})")
    return ", ".join(parts)


def _count_names(names: Sequence[str]) -> str:
    return ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names))) or "nothing"


def _check_storage(group: Any, count: int, folders: Mapping[str, Path], files: Mapping[str, str]) -> None:
    """Check that this process and the node of every bundle see each other's files.

    This process writes a probe file into each folder; each node looks for it and writes one of its own.
    """
    probe = f".seen-by-{uuid.uuid4().hex}"
    try:
        for folder in folders.values():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / probe).write_text(probe)
        faults = []
        paths: dict[str, Path | str] = {**files, **folders}
        for index, (node, not_shared) in enumerate(_probe_nodes(group, count, folders, files, probe)):
            seen = [key for key in folders if key not in not_shared]
            unanswered = [key for key in seen if not _appears(folders[key] / f"{probe}-{index}")]
            faults += [_not_shared(key, paths[key], node) for key in [*not_shared, *unanswered]]
        if faults:
            raise InputError(*dict.fromkeys(faults))
    finally:
        for file in [file for folder in folders.values() for file in folder.glob(f"{probe}*")]:
            with suppress(OSError):
                file.unlink()


def _probe_nodes(
    group: Any, count: int, folders: Mapping[str, Path], files: Mapping[str, str], probe: str
) -> list[tuple[str, list[str]]]:
    """Run `probe_shared_storage` in each bundle."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=2)(probe_shared_storage)
    paths = {key: str(folder) for key, folder in folders.items()}
    strategies = (
        PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index) for index in range(count)
    )
    results: list[tuple[str, list[str]]] = ray.get(
        [
            task.options(scheduling_strategy=strategy).remote(paths, dict(files), probe, index)
            for index, strategy in enumerate(strategies)
        ]
    )
    return results


def _not_shared(key: str, path: Path | str, node: str) -> str:
    return (
        f"{key}={path}: not shared between node {node} and the node of this job; use a path on storage that "
        "every node mounts (NFS, EFS, Filestore, Lustre)"
    )


def probe_shared_storage(
    folders: dict[str, str], files: dict[str, str], probe: str, index: int
) -> tuple[str, list[str]]:
    """Run on a node: look for the probe file in each folder, and answer with a file next to it.

    Returns:
        The node's address, and the configuration keys whose paths it does not share.
    """
    import ray

    not_shared = [key for key, path in files.items() if not Path(path).exists()]
    for key, folder in folders.items():
        if not _appears(Path(folder) / probe):
            not_shared.append(key)
            continue
        try:
            (Path(folder) / f"{probe}-{index}").write_text(probe)
        except OSError:
            not_shared.append(key)
    return str(ray.util.get_node_ip_address()), not_shared  # type: ignore[no-untyped-call]


def _appears(file: Path) -> bool:
    deadline = time.monotonic() + _VISIBILITY_SECONDS
    while not file.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.5)
    return True
