"""The MLflow run of a trial that has ended."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tbpo_ray.evaluation.win_rates import t_interval
from tbpo_ray.tracking.tracker import Tracker
from tbpo_ray.tuning.study_state import Trial

STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


def log_ended_trial(
    tracker: Tracker, trial: Trial, rows: Iterable[Mapping[str, Any]], metrics: Sequence[str]
) -> None:
    """Log what only the study knows about a trial, and set the final status of its run.

    Args:
        rows: logged rows that the run does not have yet; those after the trial's last step are skipped.
        metrics: the study's metrics; their means and intervals over the seeds are logged.
    """
    for row in rows:
        if row["step"] <= trial.step:
            tracker.log_metrics({k: v for k, v in row.items() if k != "step"}, int(row["step"]))
    tracker.log_params({f"sampled.{key}": value for key, value in trial.params.items()})
    takeovers = {f"tune.took_over_at_{t['step']}": f"t{t['donor']:03d}" for t in trial.lineage}
    tracker.set_tags({"tune.state": trial.state, "tune.reason": trial.reason} | takeovers)
    if trial.state == "finished":
        for metric in metrics:
            tracker.log_metrics(_seed_statistics(trial, metric))
    tracker.log_metrics({"trial_seconds": trial.seconds, "worker_seconds": trial.seconds * trial.workers})
    tracker.finish(STATUS[trial.state])


def _seed_statistics(trial: Trial, metric: str) -> dict[str, float]:
    mean, low, high = t_interval([row.get(metric, math.nan) for row in trial.repeats])
    named = {f"mean/{metric}": mean, f"mean/{metric}/low": low, f"mean/{metric}/high": high}
    return {name: value for name, value in named.items() if math.isfinite(value)}
