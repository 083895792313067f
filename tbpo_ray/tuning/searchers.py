"""Proposals: a function of the space and of what is known so far, so that nothing is lost in a restart."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from itertools import islice
from typing import Any

from tbpo_ray.config.schema import TuneConfig
from tbpo_ray.tuning.space import LISTED, Parameter, Space
from tbpo_ray.tuning.study_state import Trial, objectives

RANDOM_FIRST = 4
"""Trials that TPE proposes at random before it models anything."""


def propose(
    space: Space, number: int, history: Sequence[Trial], tune: TuneConfig, seed: int
) -> dict[str, Any] | None:
    """Values for trial `number`, given all trials so far; None when a grid is exhausted.

    The same arguments give the same values. A stopped trial counts by what it had reached (one metric) or
    not at all (several: one that ran for less has also moved less); a running one keeps others away.
    """
    if tune.algorithm == "grid":
        return next(islice(space.points(), number, None), None)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("optuna").setLevel(logging.WARNING)
    single = len(tune.metrics) == 1
    own = (seed * 1_000_003 + number) % 2**32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler: Any
        if tune.algorithm == "random":
            sampler = optuna.samplers.RandomSampler(seed=own)
        else:
            sampler = optuna.samplers.TPESampler(
                seed=own, n_startup_trials=RANDOM_FIRST, constant_liar=single
            )
        directions: list[Any] = ["maximize" if mode == "max" else "minimize" for mode in tune.modes]
        study = optuna.create_study(directions=directions, sampler=sampler)
        for trial in history:
            study.add_trial(_told(trial, space, tune))
        return space.propose(study.ask())


def size(space: Space, tune: TuneConfig) -> int:
    """How many trials the study has.

    Raises:
        InputError: a grid over a range.
    """
    return min(tune.trials, len(list(space.points()))) if tune.algorithm == "grid" else tune.trials


def _told(trial: Trial, space: Space, tune: TuneConfig) -> Any:
    """A trial as Optuna keeps it."""
    import optuna
    from optuna.trial import TrialState

    known = {k: v for k, v in trial.params.items() if k in space.parameters}
    facts: dict[str, Any] = {
        "params": {k: _inner(space.parameters[k], v) for k, v in known.items()},
        "distributions": {k: _distribution(space.parameters[k]) for k in known},
    }
    values = objectives(trial, tune)
    if trial.state == "finished" and values is not None:
        return optuna.trial.create_trial(state=TrialState.COMPLETE, values=values, **facts)
    steps = {int(r["step"]): r[tune.metrics[0]] for r in trial.reports if tune.metrics[0] in r}
    if trial.state == "stopped" and len(tune.metrics) == 1 and steps:
        usable = {step: value for step, value in steps.items() if not math.isnan(value)}
        return optuna.trial.create_trial(state=TrialState.PRUNED, intermediate_values=usable, **facts)
    if not trial.ended:
        return optuna.trial.create_trial(state=TrialState.RUNNING, intermediate_values=steps, **facts)
    return optuna.trial.create_trial(state=TrialState.FAIL, **facts)


def _distribution(p: Parameter) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if p.kind in LISTED:
        return CategoricalDistribution(tuple(range(len(p.values))))
    low, high = p.values
    if p.kind == "randint":
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=p.kind == "loguniform")


def _inner(p: Parameter, value: Any) -> Any:
    return p.values.index(value) if p.kind in LISTED else value
