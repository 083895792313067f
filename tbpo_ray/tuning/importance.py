"""Parameter importance: how much of the difference between trials a parameter explains beyond chance."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tbpo_ray.tuning.parameter import DISCRETE, Parameter
from tbpo_ray.tuning.space import Space
from tbpo_ray.tuning.study_state import Trial

BINS, MIN_TRIALS, SHUFFLES = 3, 5, 500


@dataclass(frozen=True)
class Importance:
    """Importance of one parameter, measured over the trials in which it was active."""

    key: str
    share: float
    """Share of the variance between the parameter's groups beyond that of shuffled values, in [0, 1]."""
    p_value: float
    """Share of shuffles that explain at least as much (a permutation test)."""
    trials: int


def last_common_step(trials: Sequence[Trial], metric: str) -> int | None:
    """The last step at which all trials reported the metric, so that none benefits from having run longer."""
    steps = [{int(r["step"]) for r in t.reports if metric in r} | _final_step(t, metric) for t in trials]
    common = set.intersection(*steps) if steps else set()
    return max(common, default=None)


def _final_step(trial: Trial, metric: str) -> set[int]:
    return {trial.step} if metric in trial.values else set()


def comparable_values(trials: Sequence[Trial], metric: str) -> tuple[int | None, dict[int, float]]:
    """A common step and each trial's metric at it, by trial number.

    If there is no common step, these are the final values of the finished trials.
    """
    usable = [t for t in trials if t.state in ("finished", "stopped")]
    step = last_common_step(usable, metric)
    if step is None:
        values = {t.number: _final_value(t, metric) for t in usable if t.state == "finished"}
    else:
        values = {t.number: _value_at(t, step, metric) for t in usable}
    return step, {number: value for number, value in values.items() if math.isfinite(value)}


def _final_value(trial: Trial, metric: str) -> float:
    return trial.values.get(metric, math.nan)


def _value_at(trial: Trial, step: int, metric: str) -> float:
    value = trial.value_at(step, metric)
    return value if value is not None else _final_value(trial, metric)


def importances(space: Space, trials: Sequence[Trial], values: dict[int, float]) -> list[Importance]:
    """Importance of each parameter that was active in at least `MIN_TRIALS` trials, highest first."""
    # One generator for all parameters; a fixed seed gives the same report for the same study.
    rng = random.Random(0)
    measured = (_importance(p, trials, values, rng) for p in space.parameters.values())
    return sorted((item for item in measured if item is not None), key=lambda item: -item.share)


def _importance(
    p: Parameter, trials: Sequence[Trial], values: dict[int, float], rng: random.Random
) -> Importance | None:
    known = [(t.params[p.key], values[t.number]) for t in trials if t.number in values and p.key in t.params]
    if len(known) < MIN_TRIALS:
        return None
    groups = _groups(p, [value for value, _ in known])
    # Groups of one trial each, or a single group, explain everything or nothing whatever the values are.
    if not 2 <= len(set(groups)) < len(groups):
        return None
    scores = [score for _, score in known]
    observed = _variance_between(groups, scores)
    shuffled = []
    for _ in range(SHUFFLES):
        rng.shuffle(scores)
        shuffled.append(_variance_between(groups, scores))
    expected = sum(shuffled) / SHUFFLES
    share = max(0.0, (observed - expected) / (1 - expected)) if expected < 1 else 0.0
    p_value = (1 + sum(s >= observed - 1e-12 for s in shuffled)) / (1 + SHUFFLES)
    return Importance(p.key, share, p_value, len(known))


def _groups(p: Parameter, values: Sequence[object]) -> list[int]:
    """A group for each value: the listed value, or one of `BINS` equally filled parts of the range."""
    if p.kind in DISCRETE:
        return [p.values.index(value) for value in values]
    ranked = sorted(range(len(values)), key=lambda i: p.position(values[i]))
    groups = [0] * len(values)
    for rank, i in enumerate(ranked):
        groups[i] = rank * BINS // len(values)
    return groups


def _variance_between(groups: Sequence[int], scores: Sequence[float]) -> float:
    """Share of the scores' variance that is between the groups' means."""
    mean = sum(scores) / len(scores)
    total = sum((s - mean) ** 2 for s in scores)
    if total <= 0:
        return 0.0
    within = 0.0
    for group in set(groups):
        members = [s for g, s in zip(groups, scores, strict=True) if g == group]
        center = sum(members) / len(members)
        within += sum((s - center) ** 2 for s in members)
    return 1 - within / total
