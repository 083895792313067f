"""What a study knows: one file, replaced whole at each change, from which a killed study goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tbpo_ray.config.schema import TuneConfig
from tbpo_ray.storage.files import write_atomic

ENDED = ("finished", "stopped", "failed")
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Two-sided 95 % points of Student's t for 1 to 9 degrees of freedom."""


@dataclass
class Trial:
    """One trial of a study."""

    number: int
    params: dict[str, Any]
    """Sampled values by dotted key; under pbt those in force now."""
    state: str = "waiting"
    """`waiting`, `running`, `finished`, `stopped` or `failed`."""
    reports: list[dict[str, float]] = field(default_factory=list)
    """What was reported in the middle: `step` and the metrics, of the first seed."""
    values: dict[str, float] = field(default_factory=dict)
    """The last row of metrics; means over the seeds in a finished trial."""
    repeats: list[dict[str, float]] = field(default_factory=list)
    """The last row of each seed."""
    step: int = 0
    seconds: float = 0.0
    """Wall seconds, start-up included, of all sessions."""
    workers: int = 1
    reason: str = ""
    """Why it failed."""
    generation: int = 0
    """How often it has taken over another trial's weights."""
    lineage: list[dict[str, Any]] = field(default_factory=list)
    """One entry per take-over: `step`, `donor`, `checkpoint`, `params`."""

    @property
    def name(self) -> str:
        return f"t{self.number:03d}"

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def at_step(self, step: int, metric: str) -> float | None:
        """The metric as reported at `step`, or None."""
        found = [r[metric] for r in self.reports if r["step"] == step and metric in r]
        return found[-1] if found else None


class StudyState:
    """The trials of a study, kept in `study.json`."""

    def __init__(self, file: Path, facts: Mapping[str, Any], trials: Sequence[Trial] = ()):
        self.file, self.facts, self.trials = file, dict(facts), list(trials)

    @classmethod
    def open(cls, file: Path) -> StudyState:
        if not file.is_file():
            return cls(file, {})
        tree = json.loads(file.read_text(encoding="utf-8"))
        return cls(file, tree["facts"], [Trial(**trial) for trial in tree["trials"]])

    def save(self) -> None:
        tree = {"facts": self.facts, "trials": [asdict(trial) for trial in self.trials]}
        write_atomic(self.file, json.dumps(tree, indent=1))

    def unfinished(self) -> list[Trial]:
        return [trial for trial in self.trials if not trial.ended]

    def in_state(self, *states: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.state in states]


def objectives(trial: Trial, tune: TuneConfig) -> list[float] | None:
    """The trial's values of the study's metrics; None where one is missing or not finite."""
    values = [trial.values.get(metric, math.nan) for metric in tune.metrics]
    return values if all(math.isfinite(value) for value in values) else None


def pareto(trials: Sequence[Trial], tune: TuneConfig) -> list[Trial]:
    """The finished trials that no other finished trial beats in every metric; one metric: the best alone."""
    signs = [1 if mode == "max" else -1 for mode in tune.modes]
    known = []
    for trial in trials:
        values = objectives(trial, tune)
        if trial.state == "finished" and values is not None:
            known.append((trial, [s * v for s, v in zip(signs, values, strict=True)]))
    front = [(trial, own) for trial, own in known if not any(_beats(other, own) for _, other in known)]
    ranked = [trial for trial, own in sorted(front, key=lambda item: item[1], reverse=True)]
    return ranked if len(signs) > 1 else ranked[:1]


def _beats(one: Sequence[float], other: Sequence[float]) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval (Student's t) of values from different seeds; nan bounds for a single one."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    t = T95[len(values) - 2] if len(values) - 2 < len(T95) else 1.96
    half = t * math.sqrt(variance / len(values))
    return mean, mean - half, mean + half
