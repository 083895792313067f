"""Use of CPU, memory, GPU, disk and network of every node, as Ray's own agents report it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

_MEGABYTE = 1e6
_TIMEOUT_SECONDS, _MAX_CONNECTIONS = 3.0, 16
_GAUGES = {
    "ray_node_cpu_utilization",
    "ray_node_mem_used",
    "ray_node_mem_total",
    "ray_node_disk_usage",
    "ray_node_disk_utilization_percentage",
    "ray_node_gpus_utilization",
    "ray_node_gram_used",
    "ray_node_gram_available",
    "ray_node_network_sent",
    "ray_node_network_received",
}
"""Ray's documented names of the metrics that are read."""


class NodeMetrics:
    """Reads the metrics of all nodes of the cluster that this process is connected to.

    Nodes are called `node-0`, `node-1` ... in the order in which they are first seen, the head node first.
    """

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._network: dict[str, tuple[float, float, float]] = {}
        self._client = httpx.Client(timeout=_TIMEOUT_SECONDS, trust_env=False)

    def sample(self) -> dict[str, float]:
        """Metrics by MLflow's names: `system/<metric>`, and `system/<node>/<metric>` if there are several.

        A node that does not answer within some seconds is skipped.
        """
        nodes = _alive_nodes()
        for node in nodes:
            self._names.setdefault(node["NodeID"], f"node-{len(self._names)}")
        found: dict[str, float] = {}
        with ThreadPoolExecutor(_MAX_CONNECTIONS) as pool:
            for node, metrics in zip(nodes, pool.map(self._read, nodes), strict=True):
                prefix = f"system/{self._names[node['NodeID']]}/" if len(self._names) > 1 else "system/"
                found |= {prefix + name: value for name, value in metrics.items()}
        return found

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _read(self, node: Mapping[str, Any]) -> dict[str, float]:
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        try:
            response = self._client.get(url)
            response.raise_for_status()
        except httpx.HTTPError:
            return {}
        return self._named(node["NodeID"], read_gauges(response.text))

    def _named(self, node_id: str, gauges: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
        """Ray's gauges of one node under MLflow's names and in its units."""
        one = {name: next(iter(values.values())) for name, values in gauges.items()}
        found = {}
        if "ray_node_cpu_utilization" in one:
            found["cpu_utilization_percentage"] = one["ray_node_cpu_utilization"]
        if "ray_node_mem_used" in one:
            found["system_memory_usage_megabytes"] = one["ray_node_mem_used"] / _MEGABYTE
            if one.get("ray_node_mem_total"):
                share = one["ray_node_mem_used"] / one["ray_node_mem_total"]
                found["system_memory_usage_percentage"] = 100 * share
        if "ray_node_disk_usage" in one:
            found["disk_usage_megabytes"] = one["ray_node_disk_usage"] / _MEGABYTE
        if "ray_node_disk_utilization_percentage" in one:
            found["disk_usage_percentage"] = one["ray_node_disk_utilization_percentage"]
        return found | _gpu_metrics(gauges) | self._network_metrics(node_id, one)

    def _network_metrics(self, node_id: str, one: Mapping[str, float]) -> dict[str, float]:
        """Megabytes per second since the last sample."""
        if not {"ray_node_network_sent", "ray_node_network_received"} <= one.keys():
            return {}
        now = (time.monotonic(), one["ray_node_network_sent"], one["ray_node_network_received"])
        before = self._network.get(node_id)
        self._network[node_id] = now
        if before is None or now[0] <= before[0]:
            return {}
        seconds = (now[0] - before[0]) * _MEGABYTE
        return {
            "network_transmit_megabytes_per_second": max(0.0, now[1] - before[1]) / seconds,
            "network_receive_megabytes_per_second": max(0.0, now[2] - before[2]) / seconds,
        }


def read_gauges(text: str) -> dict[str, dict[str, float]]:
    """The gauges of a node in the text of its Prometheus endpoint: name, then index of the GPU, to value."""
    from prometheus_client.parser import text_string_to_metric_families

    found: dict[str, dict[str, float]] = {}
    families: Iterable[Any] = text_string_to_metric_families(text)
    for family in families:
        if family.name in _GAUGES:
            for sample in family.samples:
                found.setdefault(family.name, {})[sample.labels.get("GpuIndex", "")] = float(sample.value)
    return found


def _gpu_metrics(gauges: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    found = {}
    for index, value in gauges.get("ray_node_gpus_utilization", {}).items():
        found[f"gpu_{index}_utilization_percentage"] = value
    used, free = gauges.get("ray_node_gram_used", {}), gauges.get("ray_node_gram_available", {})
    for index, value in used.items():  # Ray reports GPU memory in megabytes
        found[f"gpu_{index}_memory_usage_megabytes"] = value
        if value + free.get(index, 0.0) > 0 and index in free:
            found[f"gpu_{index}_memory_usage_percentage"] = 100 * value / (value + free[index])
    return found


def _alive_nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster, the head node first."""
    import ray

    all_nodes: Any = ray.nodes
    nodes = [node for node in all_nodes() if node.get("Alive")]
    return sorted(nodes, key=lambda node: "node:__internal_head__" not in node.get("Resources", {}))
