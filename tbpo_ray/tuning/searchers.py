"""Proposals as a pure function of the space and the trials so far, so a restart loses nothing."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from itertools import islice
from typing import Any

from tbpo_ray.config.schema import TuneConfig
from tbpo_ray.tuning.parameter import DISCRETE, Parameter
from tbpo_ray.tuning.space import Space
from tbpo_ray.tuning.study_state import Trial, metric_values

STARTUP_TRIALS = 4
"""Number of random trials before TPE fits its model."""


def propose(
    space: Space, number: int, history: Sequence[Trial], tune: TuneConfig, seed: int
) -> dict[str, Any] | None:
    """Values for trial `number` given all trials so far, or None once a grid is exhausted.

    The same arguments give the same values. With one metric, a stopped trial counts by what it had reached;
    with several it is ignored, because a trial that ran for less time has also moved less. A running trial
    keeps other proposals away from its values.
    """
    if tune.algorithm == "grid":
        return next(islice(space.grid_points(), number, None), None)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("optuna").setLevel(logging.WARNING)
    single_metric = len(tune.metrics) == 1
    # The sampler is made again for each proposal: a seed per trial keeps the proposals distinct.
    trial_seed = (seed * 1_000_003 + number) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler: Any
        if tune.algorithm == "random":
            sampler = optuna.samplers.RandomSampler(seed=trial_seed)
        else:
            sampler = optuna.samplers.TPESampler(
                seed=trial_seed, n_startup_trials=STARTUP_TRIALS, constant_liar=single_metric
            )
        directions: list[Any] = ["maximize" if mode == "max" else "minimize" for mode in tune.modes]
        study = optuna.create_study(directions=directions, sampler=sampler)
        for trial in history:
            study.add_trial(_to_optuna_trial(trial, space, tune))
        return space.propose(study.ask())


def trial_count(space: Space, tune: TuneConfig) -> int:
    """Number of trials of the study.

    Raises:
        InputError: a grid search over a range.
    """
    return min(tune.trials, len(list(space.grid_points()))) if tune.algorithm == "grid" else tune.trials


def _to_optuna_trial(trial: Trial, space: Space, tune: TuneConfig) -> Any:
    import optuna
    from optuna.trial import TrialState

    known = {k: v for k, v in trial.params.items() if k in space.parameters}
    facts: dict[str, Any] = {
        "params": {k: _to_optuna_value(space.parameters[k], v) for k, v in known.items()},
        "distributions": {k: _to_distribution(space.parameters[k]) for k in known},
    }
    values = metric_values(trial, tune)
    if trial.state == "finished" and values is not None:
        return optuna.trial.create_trial(state=TrialState.COMPLETE, values=values, **facts)
    reported = _reported_values(trial, tune.metrics[0])
    if trial.state == "stopped" and len(tune.metrics) == 1 and reported:
        # Optuna rejects NaN as the value of a pruned trial.
        usable = {step: value for step, value in reported.items() if not math.isnan(value)}
        return optuna.trial.create_trial(state=TrialState.PRUNED, intermediate_values=usable, **facts)
    if not trial.ended:
        return optuna.trial.create_trial(state=TrialState.RUNNING, intermediate_values=reported, **facts)
    return optuna.trial.create_trial(state=TrialState.FAIL, **facts)


def _reported_values(trial: Trial, metric: str) -> dict[int, float]:
    return {int(report["step"]): report[metric] for report in trial.reports if metric in report}


def _to_distribution(p: Parameter) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if p.kind in DISCRETE:
        return CategoricalDistribution(tuple(range(len(p.values))))
    low, high = p.values
    if p.kind == "randint":
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=p.kind == "loguniform")


def _to_optuna_value(p: Parameter, value: Any) -> Any:
    return p.values.index(value) if p.kind in DISCRETE else value
