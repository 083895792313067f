"""Callbacks in Ray Train's controller, which write to the run's folder for the driver to read."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from tbpo_ray.cluster.error_summary import error_summary
from tbpo_ray.storage.ownership import LeaseLostError, WriteLease
from tbpo_ray.training.metrics_file import MetricsFile


class FailureLog(UserCallback):
    """Records failed workers: one sentence in `events.log`, all tracebacks in `failure.log`."""

    def __init__(self, lease: WriteLease):
        self.lease = lease

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        ranks = ", ".join(str(rank) for rank in sorted(worker_exceptions))
        first = worker_exceptions[min(worker_exceptions)]
        run_dir = Path(self.lease.run_dir)
        try:
            MetricsFile(run_dir, self.lease).log_event(f"worker {ranks} failed: {error_summary(first)}")
        except LeaseLostError:
            return  # these workers no longer belong to the run, so their failure does not either
        with (run_dir / "failure.log").open("a", encoding="utf-8") as out:
            for rank, error in sorted(worker_exceptions.items()):
                out.write(f"--- worker {rank}\n{''.join(traceback.format_exception(error))}\n")
