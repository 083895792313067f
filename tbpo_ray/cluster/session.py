"""Connect to the surrounding Ray cluster, or start a private one on this machine."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import socket
import sys
import tempfile
from typing import Any

from tbpo_ray.signals import keep_handlers

QUIET = ("ray", "ray.train", "ray.data", "ray.tune", "ray.serve", "ray._private")
_PRIVATE = "TBPO_PRIVATE_CLUSTER"
"""Set in a process that started a private cluster, and thereby in that cluster's workers."""


def start_ray(**options: Any) -> None:
    """Connect to Ray once per process, with logging at WARNING and above.

    Inside a job, or with `RAY_ADDRESS` set, this connects to that cluster. Otherwise it starts a private one
    with its own temporary folder, so that it does not disturb another cluster on this machine, and shuts it
    down when the process exits.

    Args:
        options: further arguments of `ray.init`.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    # The default of a minute is too short for workers that wait for nodes to start.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    from ray.data import DataContext

    # Before the connection, which announces that tokens are in use.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    if not ray.is_initialized():
        with keep_handlers():
            _connect(options)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def _connect(options: dict[str, Any]) -> None:
    import ray

    if os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"):
        if os.environ.pop(_PRIVATE, None):  # inherited from the process that started this one
            os.environ.pop("RAY_API_SERVER_ADDRESS", None)
        ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING, **options)
    else:
        os.environ[_PRIVATE] = "1"
        folder = tempfile.mkdtemp(prefix="tbpo-ray-")
        os.environ["RAY_TMPDIR"] = folder
        port = free_port()
        # Ray frees the resources of a killed trainer after asking the dashboard whether its job is alive.
        # Without this address it searches the machine for a cluster, and gives up if it finds two.
        os.environ["RAY_API_SERVER_ADDRESS"] = f"http://127.0.0.1:{port}"
        ray.init(
            address="local",
            dashboard_port=port,
            log_to_driver=False,
            logging_level=logging.WARNING,
            _temp_dir=folder,
            dashboard_host="127.0.0.1",
            **options,
        )
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        atexit.register(ray.shutdown)


def stop_ray() -> None:
    """Disconnect from Ray, and shut a private cluster down; nothing if this process has no connection."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()


def free_port() -> int:
    """A port on which nothing on this machine listens at present."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def is_private() -> bool:
    """Whether this runs in a private cluster of :func:`start_ray`, which has one node and never grows."""
    return _PRIVATE in os.environ
