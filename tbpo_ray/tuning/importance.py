"""What mattered: how much of the differences between trials goes with each parameter beyond chance."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from tbpo_ray.tuning.space import LISTED, Parameter, Space
from tbpo_ray.tuning.study_state import Trial

BINS, LEAST, SHUFFLES = 3, 5, 500


@dataclass(frozen=True)
class Importance:
    """Of one parameter, over the trials in which it was in force."""

    key: str
    share: float
    """Share of the variance between its groups beyond what shuffled values give, in [0, 1]."""
    chance: float
    """How often shuffled values give as much (a permutation test)."""
    trials: int


def common_step(trials: Sequence[Trial], metric: str) -> int | None:
    """The last step at which all these trials were measured, so that none is judged by having run longer."""
    steps = [{int(r["step"]) for r in t.reports if metric in r} | _end(t, metric) for t in trials]
    shared = set.intersection(*steps) if steps else set()
    return max(shared, default=None)


def compared(trials: Sequence[Trial], metric: str) -> tuple[int | None, dict[int, float]]:
    """A step and each trial's metric there; without a common one, the last values of finished trials."""
    usable = [t for t in trials if t.state in ("finished", "stopped")]
    step = common_step(usable, metric)
    if step is None:
        found = {t.number: t.values.get(metric, math.nan) for t in usable if t.state == "finished"}
    else:
        at = {t.number: t.at_step(step, metric) for t in usable}
        last = {t.number: t.values.get(metric, math.nan) for t in usable}
        found = {n: value if value is not None else last[n] for n, value in at.items()}
    return step, {n: value for n, value in found.items() if math.isfinite(value)}


def importances(space: Space, trials: Sequence[Trial], values: dict[int, float]) -> list[Importance]:
    """The parameters that can be judged, the most telling first; a parameter wants at least five trials."""
    rng = random.Random(0)
    out = []
    for p in space.parameters.values():
        known = [
            (t.params[p.key], values[t.number]) for t in trials if t.number in values and p.key in t.params
        ]
        if len(known) < LEAST:
            continue
        groups = _groups(p, [value for value, _ in known])
        scores = [score for _, score in known]
        if len(set(groups)) < 2 or len(set(groups)) >= len(groups):
            continue
        found = _between(groups, scores)
        shuffled = []
        for _ in range(SHUFFLES):
            rng.shuffle(scores)
            shuffled.append(_between(groups, scores))
        expected = sum(shuffled) / SHUFFLES
        share = max(0.0, (found - expected) / (1 - expected)) if expected < 1 else 0.0
        chance = (1 + sum(s >= found - 1e-12 for s in shuffled)) / (1 + SHUFFLES)
        out.append(Importance(p.key, share, chance, len(known)))
    return sorted(out, key=lambda item: -item.share)


def _groups(p: Parameter, values: Sequence[object]) -> list[int]:
    if p.kind in LISTED:
        return [p.values.index(value) for value in values]
    ranked = sorted(range(len(values)), key=lambda i: p.position(values[i]))
    groups = [0] * len(values)
    for rank, i in enumerate(ranked):
        groups[i] = rank * BINS // len(values)
    return groups


def _between(groups: Sequence[int], scores: Sequence[float]) -> float:
    """Share of the scores' variance that lies between the groups' means."""
    mean = sum(scores) / len(scores)
    total = sum((s - mean) ** 2 for s in scores)
    if total <= 0:
        return 0.0
    within = 0.0
    for group in set(groups):
        own = [s for g, s in zip(groups, scores, strict=True) if g == group]
        centre = sum(own) / len(own)
        within += sum((s - centre) ** 2 for s in own)
    return 1 - within / total


def _end(trial: Trial, metric: str) -> set[int]:
    return {trial.step} if metric in trial.values else set()
