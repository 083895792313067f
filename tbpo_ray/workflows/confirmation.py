"""Confirmation of a search: its best configuration against the one without the search, with new seeds.

The best trial was selected by its metric, so its own value is biased upwards. Runs with seeds that the search
has not used give an unbiased comparison.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tbpo_ray.config.loading import digest
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import TbpoError
from tbpo_ray.evaluation.win_rates import t_interval
from tbpo_ray.tuning.trial import EVALUATION, final_metrics, trial_config
from tbpo_ray.workflows.evaluate import evaluate
from tbpo_ray.workflows.train import train

NEW_SEEDS = 1000
"""Distance of the first confirming seed from `run.seed`."""


@dataclass(frozen=True)
class Confirmation:
    """Values of the study's first metric for the seeds with which both configurations could be trained."""

    metric: str
    mode: str
    seeds: list[int]
    default: list[float]
    """Values of the configuration without the search, by seed."""
    best: list[float]
    faults: list[str]
    """One sentence for each run that failed."""
    runs: int

    @property
    def gain(self) -> tuple[float, float, float]:
        """Mean improvement over the seeds, and its 95 % interval."""
        sign = 1 if self.mode == "max" else -1
        return t_interval([sign * (b - d) for d, b in zip(self.default, self.best, strict=True)])

    @property
    def means(self) -> tuple[float, float]:
        """Mean value of the configuration without the search, and of the best one."""
        return sum(self.default) / len(self.seeds), sum(self.best) / len(self.seeds)

    def facts(self) -> dict[str, Any]:
        """What the study stores."""
        return {
            "metric": self.metric,
            "seeds": self.seeds,
            "default": self.default,
            "best": self.best,
            "gain": self.gain[0],
        }

    def note(self) -> str:
        """The result in one or two sentences."""
        failed = (
            f"{len(self.faults)} of {self.runs} confirming runs failed, the first: {self.faults[0]}"
            if self.faults
            else ""
        )
        if not self.seeds:
            return f"Not confirmed with new seeds: {failed}"
        (gain, low, high), (default, best) = self.gain, self.means
        bounds = f", 95 % interval {low:+.4f} to {high:+.4f}" if math.isfinite(low) else ""
        verdict = "beats" if gain > 0 else "does not beat"
        caveat = "" if gain <= 0 or (math.isfinite(low) and low > 0) else "; it may be noise"
        return (
            f"With {len(self.seeds)} new seed(s) the best configuration {verdict} the one without the "
            f"search in {self.metric}: {best:.4f} against {default:.4f}, a gain of "
            f"{gain:+.4f}{bounds}{caveat}.{' ' + failed if failed else ''}"
        )


def confirm_best(
    start: Config, params: Mapping[str, Any], folder: Path, parent_run_id: str | None, concurrent: int
) -> Confirmation:
    """Train both configurations with `tune.confirm` new seeds each.

    Args:
        start: the configuration without the search.
        params: the best trial's parameters.
        folder: where the runs are written.
        parent_run_id: the MLflow run that the new ones are children of.
        concurrent: how many runs train at the same time.
    """
    seeds = [start.run.seed + NEW_SEEDS + i for i in range(start.tune.confirm)]
    jobs: list[tuple[str, Mapping[str, Any], int]] = [("default", {}, seed) for seed in seeds]
    jobs += [("best", params, seed) for seed in seeds]

    def run(job: tuple[str, Mapping[str, Any], int]) -> tuple[float, str]:
        return _run(start, *job, folder=folder, parent_run_id=parent_run_id)

    with ThreadPoolExecutor(max_workers=concurrent) as pool:
        outcomes = list(pool.map(run, jobs))
    values = [value for value, _ in outcomes]
    # Only seeds with which both could be trained give a paired difference.
    paired = [
        (seed, default, best)
        for seed, default, best in zip(seeds, values[: len(seeds)], values[len(seeds) :], strict=True)
        if math.isfinite(default) and math.isfinite(best)
    ]
    return Confirmation(
        metric=start.tune.metrics[0],
        mode=start.tune.modes[0],
        seeds=[seed for seed, _, _ in paired],
        default=[default for _, default, _ in paired],
        best=[best for _, _, best in paired],
        faults=[fault for _, fault in outcomes if fault],
        runs=len(jobs),
    )


def _run(
    start: Config,
    label: str,
    params: Mapping[str, Any],
    seed: int,
    *,
    folder: Path,
    parent_run_id: str | None,
) -> tuple[float, str]:
    """The metric of one run, or NaN with the reason."""
    metric = start.tune.metrics[0]
    judged = metric.startswith(EVALUATION)
    # The name identifies the parameters, so that an extended study does not reuse another best trial's run.
    name = f"{label}-{digest(dict(params))[:8]}-s{seed}"
    try:
        config = trial_config(start, folder, name, params, seed)
        result = train(config, kind="confirm", parent_run_id=parent_run_id, export=judged)
        value = final_metrics(result, config, evaluate if judged else None).get(metric, math.nan)
    except TbpoError as error:
        return math.nan, f"{name}: {error}"
    return value, "" if math.isfinite(value) else f"{name}: {metric}={value}"
