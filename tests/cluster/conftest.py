"""A private cluster whose nodes are started by Ray's autoscaler, all of them on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tbpo_ray.cluster.session import free_port

ROOT = Path(__file__).resolve().parents[2]
HEAD = "f" * 51 + "00000"
"""The id that Ray's fake node provider gives to the head node."""


class ScalingCluster:
    """`ray start --head` with no CPU, token authentication and an autoscaler that starts up to two nodes."""

    def __init__(self, folder: Path):
        self.folder, self.token_file = folder, folder / "token"
        self.gcs, self.dashboard, self.agent, self.client = (free_port() for _ in range(4))
        self.address = f"http://127.0.0.1:{self.dashboard}"
        self.gcs_address = f"{_own_address()}:{self.gcs}"
        home = folder / "home"
        home.mkdir()
        subprocess.run(
            [_bin("ray"), "get-auth-token", "--generate"],
            env=os.environ | {"HOME": str(home), "RAY_AUTH_MODE": "token"},
            check=True,
            capture_output=True,
        )
        (home / ".ray" / "auth_token").rename(self.token_file)
        self.token = self.token_file.read_text().strip()
        self.config = home / "ray_bootstrap_config.yaml"  # where `ray up` leaves it on the head
        self.config.write_text(yaml.safe_dump(self._cluster_file()))
        keep = {k: v for k, v in os.environ.items() if k in ("LANG", "LC_ALL", "TZ")}
        self.environment = keep | {
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "TORCH_EXTENSIONS_DIR": os.environ.get("TORCH_EXTENSIONS_DIR", str(folder / "torch")),
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.token_file),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
        }

    def _cluster_file(self) -> dict[str, Any]:
        empty: dict[str, Any] = {"auth": {}, "file_mounts": {}, "cluster_synced_files": []}
        for when in ("initialization", "setup", "head_setup", "worker_setup"):
            empty[f"{when}_commands"] = []
        for when in ("head_start_ray", "worker_start_ray"):
            empty[f"{when}_commands"] = []
        worker = {"resources": {"CPU": 1, "object_store_memory": 200_000_000}, "labels": {"pool": "cpu"}}
        return empty | {
            "cluster_name": "test",
            "max_workers": 2,
            "upscaling_speed": 10.0,
            "idle_timeout_minutes": 0.5,
            "provider": {
                "type": "external",
                "module": "separate_nodes.SeparateNodes",
                "folder": str(self.folder),
                "gcs_address": self.gcs_address,
                "head_node_id": HEAD,
                "launch_multiple": True,
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            "available_node_types": {
                "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
                "cpu": worker | {"node_config": {}, "min_workers": 0, "max_workers": 2},
            },
            "head_node_type": "ray.head.default",
        }

    def start(self) -> None:
        ours = {
            "RAY_FAKE_CLUSTER": "1",
            "PYTHONPATH": str(Path(__file__).parent),
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD,
            "RAY_NODE_TYPE_NAME": "ray.head.default",
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD,
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        command = [
            _bin("ray"), "start", "--head", "--num-cpus=0", f"--port={self.gcs}",
            f"--dashboard-port={self.dashboard}", "--dashboard-host=127.0.0.1",
            f"--dashboard-agent-listen-port={self.agent}", f"--ray-client-server-port={self.client}",
            "--object-store-memory=200000000", f"--temp-dir={self.folder}",
            f"--autoscaling-config={self.config}", "--disable-usage-stats",
        ]  # fmt: skip
        done = subprocess.run(
            command, env=self.environment | ours, capture_output=True, text=True, timeout=120, cwd=self.folder
        )
        assert done.returncode == 0, done.stdout + done.stderr
        until = time.monotonic() + 90
        while self.submit("true", wait=True).returncode != 0:  # the job agent comes up last
            assert time.monotonic() < until, "the cluster takes no jobs"
            time.sleep(2)

    def stop(self) -> None:
        """End every process of this cluster, known by its temporary folder, and no other."""
        for kind in (signal.SIGTERM, signal.SIGKILL):
            for process in self.processes():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(kind)
            psutil.wait_procs(self.processes(), timeout=5)
        shutil.rmtree(self.folder, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("RAY_TMPDIR") == str(self.folder):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def submit(
        self, *command: str, wait: bool = True, environment: dict[str, str] | None = None, job: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """`ray job submit --working-dir . -- command`, as a user calls it."""
        words = [_bin("ray"), "job", "submit", "--address", self.address]
        words += ["--submission-id", job] if job else []
        words += [] if wait else ["--no-wait"]
        if command != ("true",):
            words += ["--working-dir", "."]
        return subprocess.run(
            [*words, "--", *command],
            env=self.environment | (environment or {}),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def get(self, path: str, token: str | None = None) -> Any:
        """JSON from the dashboard's API."""
        request = urllib.request.Request(f"{self.address}{path}")
        request.add_header("Authorization", f"Bearer {self.token if token is None else token}")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.loads(answer.read())

    def workers(self) -> list[str]:
        """Ids of the worker nodes that are alive."""
        rows = self.get("/api/v0/nodes?detail=1&limit=1000")["data"]["result"]["result"]
        return [row["node_id"] for row in rows if row["state"] == "ALIVE" and not row["is_head_node"]]

    def wait_until_given_back(self) -> None:
        until = time.monotonic() + 150
        while self.workers():
            assert time.monotonic() < until, "the nodes are not given back"
            time.sleep(1)

    def pull_the_plug(self, node: str) -> None:
        """Kill a worker node as a power cut would: all of its processes at once."""
        for process in self.processes():
            try:
                if process.environ().get("RAY_OVERRIDE_NODE_ID_FOR_TESTING") == node:
                    process.kill()
            except psutil.Error:
                continue


def _bin(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def _own_address() -> str:
    import ray._private.services

    return str(ray._private.services.get_node_ip_address())


@pytest.fixture(scope="module")
def scaling() -> Iterator[ScalingCluster]:
    # A short path: Ray puts UNIX sockets into it.
    cluster = ScalingCluster(Path(tempfile.mkdtemp(prefix="sc-", dir="/tmp")))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
