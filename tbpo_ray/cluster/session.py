"""Join the Ray cluster at hand, or start a private one on this machine."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import socket
import tempfile
from typing import Any

QUIET = ("ray", "ray.train", "ray.data", "ray.tune", "ray.serve", "ray._private")
_PRIVATE = "TBPO_PRIVATE_CLUSTER"
"""Set in a process that started a cluster of its own, and so in that cluster's workers."""


def start_ray(**options: Any) -> None:
    """Connect to Ray once per process, with its log lines at warnings and above.

    Inside a job, or with `RAY_ADDRESS` set, this joins that cluster. Otherwise it starts a private one
    with a temporary folder of its own, so that another cluster on this machine is not disturbed, and
    ends it with the process.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    # Workers that wait for nodes to come up must not be given up on after a minute.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "600")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    from ray.data import DataContext

    if not ray.is_initialized():
        if os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_JOB_ID"):
            if os.environ.pop(_PRIVATE, None):  # of the process that started this one
                os.environ.pop("RAY_API_SERVER_ADDRESS", None)
            ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING, **options)
        else:
            os.environ[_PRIVATE] = "1"
            folder = tempfile.mkdtemp(prefix="tbpo-ray-")
            os.environ["RAY_TMPDIR"] = folder
            port = free_port()
            # What frees the resources of a trainer that was killed asks the dashboard whether it still lives.
            # Without an address it looks over the machine for a cluster, and gives up where it finds two.
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
    context = DataContext.get_current()
    context.enable_progress_bars = False
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


def free_port() -> int:
    """A port that nothing on this machine listens at now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def is_private() -> bool:
    """Whether this runs in a cluster of :func:`start_ray`'s own, which has one node and never grows."""
    return _PRIVATE in os.environ
