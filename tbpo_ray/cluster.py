"""Join the Ray cluster at hand, or start a private one on this machine."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from typing import Any

from tbpo_ray.config import Config
from tbpo_ray.configuration import stage_config
from tbpo_ray.errors import InputError

QUIET = ("ray", "ray.train", "ray.data", "ray.tune", "ray.serve", "ray._private")


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
            ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING, **options)
        else:
            folder = tempfile.mkdtemp(prefix="tbpo-ray-")
            os.environ["RAY_TMPDIR"] = folder
            ray.init(
                address="local",
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


def fit_to_cluster(config: Config) -> Config:
    """Settle what the configuration leaves to the cluster: GPUs or not, and how many workers at most.

    Raises:
        InputError: for a plan that the cluster can never satisfy, with the arithmetic.
    """
    most = most_resources()
    use_gpu = config.cluster.use_gpu if config.cluster.use_gpu != "auto" else most.get("GPU", 0) > 0
    config = stage_config(config, {}, cluster__use_gpu=use_gpu)
    asked = config.cluster.num_workers
    least, largest = asked if isinstance(asked, list) else (asked, asked)
    fits = min(
        (int(most.get(name, 0.0) / each + 1e-9)
         for name, each in config.cluster.worker_resources.items() if each > 0),
        default=largest,
    )  # fmt: skip
    if fits < least:
        each = ", ".join(f"{value:g} {name}" for name, value in config.cluster.worker_resources.items())
        have = ", ".join(f"{most.get(name, 0.0):g} {name}" for name in config.cluster.worker_resources)
        raise InputError(
            f"cluster.num_workers={asked}: {least} x ({each}) never fit into the cluster's "
            f"{have}; at most {fits} worker(s) do. Lower cluster.num_workers or "
            "cluster.resources_per_worker, or add nodes"
        )
    if isinstance(asked, list) and fits < largest:
        return stage_config(config, {}, cluster__num_workers=[least, fits])
    return config


def most_resources() -> dict[str, float]:
    """The cluster's resources with every node type of its autoscaler at its maximum."""
    import ray
    from ray._private.state import state

    now = dict(ray.cluster_resources())
    possible = state.get_max_resources_from_cluster_config() or {}
    return {
        name: max(float(now.get(name, 0)), float(possible.get(name, 0))) for name in now.keys() | possible
    }
