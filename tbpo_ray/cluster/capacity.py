"""The capacity of a cluster: the nodes that are up, and those that its autoscaler may start."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tbpo_ray.errors import InputError, first_line

BOOTSTRAP = "~/ray_bootstrap_config.yaml"
"""Where `ray up` stores the cluster file on the head node."""
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "m": 1e-3}
_UNITS |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


UNLIMITED = 2**31


@dataclass(frozen=True)
class NodeKind:
    """Nodes of one kind."""

    name: str
    resources: Mapping[str, float]
    """Ray resources of one such node."""
    most: int = 1
    """The maximum number of such nodes."""
    labels: Mapping[str, str] = field(default_factory=dict)

    def holds(self, bundle: Mapping[str, float]) -> int:
        """How many bundles fit onto one node."""
        # Fractions of a resource add up inexactly: 0.3 / 0.1 must count as 3.
        fits = (
            int(self.resources.get(name, 0.0) / amount + 1e-9)
            for name, amount in bundle.items()
            if amount > 0
        )
        return min(fits, default=UNLIMITED)


@dataclass(frozen=True)
class Capacity:
    """Kinds of nodes, and the maximum number of nodes of all kinds together."""

    kinds: Sequence[NodeKind]
    most_nodes: int | None = None

    def fits(self, bundle: Mapping[str, float], labels: Mapping[str, str] | None = None) -> int:
        """How many bundles fit onto nodes that carry `labels`. No bundle is split over two nodes."""
        by_size = sorted(((k.holds(bundle), k.most) for k in self.with_labels(labels)), reverse=True)
        nodes_left, fitting = self.most_nodes if self.most_nodes is not None else UNLIMITED, 0
        for per_node, most in by_size:
            nodes = min(most, nodes_left)
            fitting += per_node * nodes
            nodes_left -= nodes
        return min(fitting, UNLIMITED)

    def with_labels(self, labels: Mapping[str, str] | None) -> list[NodeKind]:
        return [k for k in self.kinds if all(k.labels.get(name) == v for name, v in (labels or {}).items())]

    def has(self, resource: str, labels: Mapping[str, str] | None = None) -> bool:
        return any(k.most > 0 and k.resources.get(resource, 0) > 0 for k in self.with_labels(labels))

    def format(self, resources: Iterable[str]) -> str:
        """The nodes as text, with the given resources: `4 x gpu-train (8 GPU, 96 CPU)`."""
        names = list(resources)
        kinds = [
            f"{kind.most} x {kind.name} ({', '.join(f'{kind.resources.get(n, 0):g} {n}' for n in names)})"
            for kind in self.kinds
            if kind.most
        ]
        limit = "" if self.most_nodes is None else f", at most {self.most_nodes} of them together"
        return (", ".join(kinds) or "no node") + limit


def present() -> Capacity:
    """The nodes that are up."""
    import ray

    return Capacity(
        [
            NodeKind(str(node["NodeManagerHostname"]), node["Resources"], 1, node.get("Labels") or {})
            for node in ray.nodes()  # type: ignore[no-untyped-call]
            if node["Alive"]
        ]
    )


def available() -> Capacity:
    """The nodes that are up, with what is free on them now."""
    import ray
    from ray._private import state

    free = state.available_resources_per_node()  # type: ignore[no-untyped-call]
    return Capacity(
        [
            NodeKind(str(node["NodeManagerHostname"]), free[node["NodeID"]], 1, node.get("Labels") or {})
            for node in ray.nodes()  # type: ignore[no-untyped-call]
            if node["Alive"] and node["NodeID"] in free
        ]
    )


def possible(node_types: str | None = None) -> Capacity | None:
    """The nodes that the autoscaler may start; None if that is not known.

    Args:
        node_types: a file with the node types; by default the one that `ray up` stored on this node.

    Raises:
        InputError: `node_types` does not exist, or does not describe a cluster.
    """
    if node_types is None:
        file = Path(BOOTSTRAP).expanduser()
        return read_cluster_file(file) if file.is_file() else None
    return read_cluster_file(node_types)


def read_cluster_file(path: str | Path) -> Capacity:
    """The node types of a Ray cluster file, or of a KubeRay RayCluster or RayJob.

    Raises:
        InputError: the file does not exist, or does not describe a cluster.
    """
    key = f"cluster.node_types={path}"
    try:
        documents = [d for d in yaml.safe_load_all(Path(path).read_text(encoding="utf-8")) if d]
    # PyYAML raises ValueError for a date that does not exist.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{key}: cannot be read ({first_line(error)})") from error
    try:
        for document in documents:
            if not isinstance(document, dict):
                continue
            if "available_node_types" in document:
                return _ray_cluster(document)
            spec: dict[str, Any] = document.get("spec") or {}
            spec = spec.get("rayClusterSpec") or spec
            if "workerGroupSpecs" in spec:
                return _kuberay(spec)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        problem = f"malformed ({type(error).__name__}: {first_line(error)})"
        raise InputError(f"{key}: {problem}; must be a Ray cluster file or a KubeRay manifest") from error
    raise InputError(
        f"{key}: neither a Ray cluster file (available_node_types) nor a KubeRay manifest (workerGroupSpecs)"
    )


def _ray_cluster(tree: Mapping[str, Any]) -> Capacity:
    limit = tree.get("max_workers")
    kinds = []
    for name, kind in tree["available_node_types"].items():
        is_head = name == tree.get("head_node_type")
        most = 1 if is_head else kind.get("max_workers", limit or 0)
        resources = {key: float(value) for key, value in (kind.get("resources") or {}).items()}
        kinds.append(NodeKind(name, resources, int(most), dict(kind.get("labels") or {})))
    return Capacity(kinds, None if limit is None else limit + 1)  # max_workers does not count the head


def _kuberay(spec: Mapping[str, Any]) -> Capacity:
    """The groups of a KubeRay cluster. `rayStartParams` override the container's limits, as in KubeRay."""
    kinds = []
    for group in (spec.get("headGroupSpec") or {}, *spec["workerGroupSpecs"]):
        container = group["template"]["spec"]["containers"][0]
        limits = {**container.get("resources", {}).get("requests", {})}
        limits |= container.get("resources", {}).get("limits", {})
        start = group.get("rayStartParams") or {}
        resources = {
            "CPU": float(start.get("num-cpus", math.ceil(quantity(limits.get("cpu", 0))))),
            "GPU": float(start.get("num-gpus", quantity(limits.get("nvidia.com/gpu", 0)))),
            "memory": float(start.get("memory", quantity(limits.get("memory", 0)))),
        }
        most = group.get("maxReplicas", 0) if "groupName" in group else 1
        name = group.get("groupName", "head")
        kinds.append(NodeKind(name, resources, most, group.get("labels") or {}))
    return Capacity(kinds)


def quantity(value: str | int | float) -> float:
    """A Kubernetes quantity (`500m`, `64Gi`, `8`) as a number."""
    text = str(value).strip()
    digits = text.rstrip("".join(set("".join(_UNITS))))
    return float(digits) * _UNITS[text[len(digits) :]]
