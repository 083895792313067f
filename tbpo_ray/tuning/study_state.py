"""The state of a study: one file, replaced as a whole on every change, from which a killed study resumes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tbpo_ray.config.schema import TuneConfig
from tbpo_ray.storage.files import write_atomic
from tbpo_ray.storage.json_lines import dumps, read_object, with_nan

ENDED = ("finished", "stopped", "failed")


@dataclass
class Trial:
    """One trial of a study."""

    number: int
    params: dict[str, Any]
    """Sampled values by dotted key; under pbt, the current ones."""
    state: str = "waiting"
    """`waiting`, `running`, `finished`, `stopped` or `failed`."""
    reports: list[dict[str, float]] = field(default_factory=list)
    """Intermediate reports of the first seed: `step` and the metrics."""
    values: dict[str, float] = field(default_factory=dict)
    """The last row of metrics; means over the seeds once the trial is finished."""
    repeats: list[dict[str, float]] = field(default_factory=list)
    """The last row of metrics of each seed."""
    step: int = 0
    seconds: float = 0.0
    """Wall-clock seconds over all sessions, including startup."""
    workers: int = 1
    reason: str = ""
    """Why the trial failed."""
    generation: int = 0
    """How many times the trial has taken over another trial's weights."""
    lineage: list[dict[str, Any]] = field(default_factory=list)
    """One entry per takeover: `step`, `donor`, `checkpoint`, `params`."""

    @property
    def name(self) -> str:
        return f"t{self.number:03d}"

    @property
    def run_name(self) -> str:
        """Name of the training run that holds the trial's latest weights."""
        return f"{self.name}-x{self.generation}" if self.generation else self.name

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def value_at(self, step: int, metric: str) -> float | None:
        """The metric as last reported at `step`, or None."""
        reported = [r[metric] for r in self.reports if r["step"] == step and metric in r]
        return reported[-1] if reported else None


class StudyState:
    """The trials of a study and what is known about it as a whole, stored in `study.json`."""

    def __init__(self, file: Path, facts: Mapping[str, Any], trials: Sequence[Trial] = ()):
        self.file, self.facts, self.trials = file, dict(facts), list(trials)

    @classmethod
    def open(cls, file: Path) -> StudyState:
        if not file.is_file():
            return cls(file, {})
        remedy = "restore it, or use another run.name for a new study"
        tree = read_object(file, remedy, ("facts", "trials"))
        return cls(file, tree["facts"], [_read_trial(trial) for trial in tree["trials"]])

    def save(self) -> None:
        tree = {"facts": self.facts, "trials": [asdict(trial) for trial in self.trials]}
        write_atomic(self.file, dumps(tree, indent=1))

    def unfinished(self) -> list[Trial]:
        return [trial for trial in self.trials if not trial.ended]

    def in_state(self, *states: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.state in states]


def _read_trial(tree: dict[str, Any]) -> Trial:
    """A trial as it was stored; a metric that is null was not finite."""
    rows = {name: [with_nan(row) for row in tree[name]] for name in ("reports", "repeats") if name in tree}
    return Trial(**tree | rows | {"values": with_nan(tree.get("values", {}))})


def metric_values(trial: Trial, tune: TuneConfig) -> list[float] | None:
    """The trial's values of the study's metrics, or None if one of them is missing or not finite."""
    values = [trial.values.get(metric, math.nan) for metric in tune.metrics]
    return values if all(math.isfinite(value) for value in values) else None


def pareto_front(trials: Sequence[Trial], tune: TuneConfig) -> list[Trial]:
    """The finished trials that no other finished trial dominates, sorted by the first metric, best first.

    With a single metric, this is the best trial alone.
    """
    signs = [1 if mode == "max" else -1 for mode in tune.modes]
    scored: list[tuple[Trial, list[float]]] = []
    for trial in trials:
        values = metric_values(trial, tune)
        if trial.state == "finished" and values is not None:
            scored.append((trial, [sign * value for sign, value in zip(signs, values, strict=True)]))
    front = [item for item in scored if not any(_dominates(other, item[1]) for _, other in scored)]
    ranked = [trial for trial, _ in sorted(front, key=lambda item: item[1], reverse=True)]
    return ranked if len(signs) > 1 else ranked[:1]


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    return one != other and all(a >= b for a, b in zip(one, other, strict=True))
