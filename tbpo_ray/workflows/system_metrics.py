"""Log the use of the cluster's nodes to an MLflow run while it lasts."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tbpo_ray.cluster.node_metrics import NodeMetrics
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import first_line
from tbpo_ray.storage.paths import output_dir
from tbpo_ray.tracking.environment import system_metrics_seconds
from tbpo_ray.tracking.tracker import Tracker

log = logging.getLogger(__name__)


@contextmanager
def system_metrics(config: Config, run_id: str) -> Iterator[None]:
    """Log `system/...` metrics of all nodes to the run every `tracking.system_metrics_seconds`.

    Ray must be running. A fault in the measurement never ends the job: it is logged once.
    """
    seconds = system_metrics_seconds(config.tracking)
    if seconds <= 0:
        yield
        return
    stop = threading.Event()
    thread = threading.Thread(
        target=_record, args=(config, run_id, seconds, stop), name="system-metrics", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=30)


def _record(config: Config, run_id: str, seconds: float, stop: threading.Event) -> None:
    nodes = NodeMetrics()
    try:
        # A tracker of its own, because the buffer of a tracker belongs to one thread.
        tracker = Tracker.attach(config.tracking, output_dir(config), run_id)
        began = tracker.started_at
        while True:
            # The seconds since the run began, so that a resumed run continues its curves.
            tracker.log_metrics(nodes.sample(), step=max(0, int(time.time() - began)))
            if stop.wait(seconds):
                break
        tracker.flush()
    except Exception as error:
        # Training must not depend on the measurement of its machines, nor on what Ray's agents answer.
        log.warning("system metrics are no longer logged (%s: %s)", type(error).__name__, first_line(error))
    finally:
        nodes.close()
