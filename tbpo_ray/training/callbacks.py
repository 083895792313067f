"""What Ray Train's controller tells the run's folder, for the driver to pass on."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from tbpo_ray.cluster.error_summary import error_summary
from tbpo_ray.storage.ownership import NotOursError, WriteLease
from tbpo_ray.training.metrics_file import MetricsFile


class FailureLog(UserCallback):
    """Notes failed workers: a sentence in `events.log`, everything in `failure.log`."""

    def __init__(self, lease: WriteLease):
        self.lease = lease

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        ranks = ", ".join(str(rank) for rank in sorted(worker_exceptions))
        first = worker_exceptions[min(worker_exceptions)]
        run_dir = Path(self.lease.run_dir)
        try:
            MetricsFile(run_dir, self.lease).log_event(f"worker {ranks} failed: {error_summary(first)}")
        except NotOursError:  # their driver has ended, and others tell what becomes of the run
            return
        with (run_dir / "failure.log").open("a", encoding="utf-8") as out:
            for rank, error in sorted(worker_exceptions.items()):
                out.write(f"--- worker {rank}\n{''.join(traceback.format_exception(error))}\n")
