"""What Ray Train's controller tells the run's folder, for the driver to pass on."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

from ray.train import UserCallback

from tbpo_ray.training.causes import root_cause
from tbpo_ray.training.metrics import MetricsFile


class FailureLog(UserCallback):
    """Notes failed workers: a sentence in `events.log`, everything in `failure.log`."""

    def __init__(self, run_dir: str):
        self.run_dir = run_dir

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        ranks = ", ".join(str(rank) for rank in sorted(worker_exceptions))
        first = worker_exceptions[min(worker_exceptions)]
        MetricsFile(Path(self.run_dir)).say(f"worker {ranks} failed: {root_cause(first)}")
        with (Path(self.run_dir) / "failure.log").open("a", encoding="utf-8") as out:
            for rank, error in sorted(worker_exceptions.items()):
                out.write(f"--- worker {rank}\n{''.join(traceback.format_exception(error))}\n")
