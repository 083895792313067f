"""Ray's reports of its nodes under MLflow's names."""

from __future__ import annotations

import http.server
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tbpo_ray.cluster import node_metrics
from tbpo_ray.cluster.node_metrics import NodeMetrics, read_gauges

TEXT = """# TYPE ray_node_cpu_utilization gauge
ray_node_cpu_utilization{Version="2.60.0",ip="10.0.0.1"} 37.5
# TYPE ray_node_mem_used gauge
ray_node_mem_used{ip="10.0.0.1"} 4.0e9
# TYPE ray_node_mem_total gauge
ray_node_mem_total{ip="10.0.0.1"} 1.6e10
# TYPE ray_node_disk_usage gauge
ray_node_disk_usage{ip="10.0.0.1"} 2.5e10
# TYPE ray_node_disk_utilization_percentage gauge
ray_node_disk_utilization_percentage{ip="10.0.0.1"} 25.0
# TYPE ray_node_gpus_utilization gauge
ray_node_gpus_utilization{GpuIndex="0",ip="10.0.0.1"} 90.0
ray_node_gpus_utilization{GpuIndex="1",ip="10.0.0.1"} 10.0
# TYPE ray_node_gram_used gauge
ray_node_gram_used{GpuIndex="0",ip="10.0.0.1"} 6000.0
# TYPE ray_node_gram_available gauge
ray_node_gram_available{GpuIndex="0",ip="10.0.0.1"} 2000.0
# TYPE ray_node_network_sent gauge
ray_node_network_sent{ip="10.0.0.1"} SENT
# TYPE ray_node_network_received gauge
ray_node_network_received{ip="10.0.0.1"} 1.0e6
# TYPE ray_other gauge
ray_other{ip="10.0.0.1"} 1.0
"""


@pytest.fixture
def node(monkeypatch) -> Iterator[dict[str, Any]]:
    """A node whose agent has sent 3 MB more at every request."""
    sent = [0.0]

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None: ...

        def do_GET(self) -> None:
            sent[0] += 3e6
            body = TEXT.replace("SENT", str(sent[0])).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield {"NodeID": "a", "NodeManagerAddress": "127.0.0.1", "MetricsExportPort": running.server_address[1]}
    running.shutdown()


def test_metrics_of_one_node(monkeypatch, node):
    monkeypatch.setattr(node_metrics, "_alive_nodes", lambda: [node])
    nodes = NodeMetrics()
    first = nodes.sample()
    assert first == {
        "system/cpu_utilization_percentage": 37.5,
        "system/system_memory_usage_megabytes": 4000.0,
        "system/system_memory_usage_percentage": 25.0,
        "system/disk_usage_megabytes": 25000.0,
        "system/disk_usage_percentage": 25.0,
        "system/gpu_0_utilization_percentage": 90.0,
        "system/gpu_1_utilization_percentage": 10.0,
        "system/gpu_0_memory_usage_megabytes": 6000.0,
        "system/gpu_0_memory_usage_percentage": 75.0,
    }
    began = time.monotonic()
    time.sleep(0.1)
    second = nodes.sample()
    nodes.close()
    rate = second["system/network_transmit_megabytes_per_second"]
    assert 3 / (time.monotonic() - began + 0.2) < rate < 3 / 0.1
    assert second["system/network_receive_megabytes_per_second"] == 0


def test_nodes_keep_their_names_and_one_that_is_silent_is_skipped(monkeypatch, node):
    silent = {"NodeID": "b", "NodeManagerAddress": "127.0.0.1", "MetricsExportPort": 1}
    monkeypatch.setattr(node_metrics, "_alive_nodes", lambda: [silent, node])
    nodes = NodeMetrics()
    assert {name.split("/")[1] for name in nodes.sample()} == {"node-1"}
    monkeypatch.setattr(node_metrics, "_alive_nodes", lambda: [node])
    assert {name.split("/")[1] for name in nodes.sample()} == {"node-1"}
    nodes.close()


def test_other_metrics_are_not_read():
    assert "ray_other" not in read_gauges(TEXT.replace("SENT", "1"))
