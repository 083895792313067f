"""What Ray Train's controller tells the run's folder, for the driver to pass on."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from tbpo_ray.training.causes import root_cause
from tbpo_ray.training.metrics import MetricsFile
from tbpo_ray.training.ownership import NotOursError, Permit


class FailureLog(UserCallback):
    """Notes failed workers: a sentence in `events.log`, everything in `failure.log`."""

    def __init__(self, permit: Permit):
        self.permit = permit

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        ranks = ", ".join(str(rank) for rank in sorted(worker_exceptions))
        first = worker_exceptions[min(worker_exceptions)]
        run_dir = Path(self.permit.run_dir)
        try:
            MetricsFile(run_dir, self.permit).say(f"worker {ranks} failed: {root_cause(first)}")
        except NotOursError:  # their driver has ended, and others tell what becomes of the run
            return
        with (run_dir / "failure.log").open("a", encoding="utf-8") as out:
            for rank, error in sorted(worker_exceptions.items()):
                out.write(f"--- worker {rank}\n{''.join(traceback.format_exception(error))}\n")
