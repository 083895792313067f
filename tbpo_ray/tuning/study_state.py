"""The state of a study, from which a killed study resumes.

`study.json` has the whole state at one moment, and `study.jsonl` every change by number. The state is the
former with the changes that are newer than it, so that recording a report costs the same for every number of
trials.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from tbpo_ray.config.schema import TuneConfig
from tbpo_ray.errors import InputError
from tbpo_ray.storage.files import write_atomic
from tbpo_ray.storage.json_lines import dumps, read_object, with_nan
from tbpo_ray.tuning.ledger import REMEDY, Ledger

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

    def add_report(self, report: dict[str, float]) -> None:
        """Add an intermediate report, which replaces those at the same or a later step."""
        # Those are from before a resume or a takeover.
        self.reports = [r for r in self.reports if r["step"] < report["step"]]
        self.reports.append(report)


_FIELDS = tuple(f.name for f in fields(Trial) if f.name != "reports")


class StudyState:
    """The trials of a study and the facts about it as a whole, stored in `study.json` and `study.jsonl`."""

    def __init__(self, file: Path, facts: Mapping[str, Any], trials: Sequence[Trial] = ()):
        self.file, self.facts, self.trials = file, dict(facts), list(trials)
        self._ledger: Ledger | None = None
        self._recorded: dict[int, dict[str, str]] = {}
        """What the ledger has last been given of each trial: JSON by field."""

    @classmethod
    def open(cls, file: Path) -> StudyState:
        """Read a study's state; a study that does not exist yet has no trials.

        Raises:
            InputError: a file is damaged or missing.
        """
        ledger = Ledger(ledger_file(file))
        if not file.is_file():
            if ledger.file.is_file():
                raise InputError(f"{file}: missing, but {ledger.file.name} exists; {REMEDY}")
            return cls(file, {})
        tree = read_object(file, REMEDY, ("facts", "trials"))
        state = cls(file, tree["facts"], [_read_trial(trial) for trial in tree["trials"]])
        # A study of an earlier version has no ledger, and no number in its file.
        for entry in ledger.read(after=tree.get("entries", 0)):
            state._apply(entry)
        state._ledger = ledger
        return state

    def save(self) -> None:
        """Write the whole state."""
        tree = {
            "entries": self._open_ledger().count,
            "facts": self.facts,
            "trials": [asdict(trial) for trial in self.trials],
        }
        write_atomic(self.file, dumps(tree, indent=1))

    def record(
        self, trial: Trial, report: Mapping[str, float] | None = None, *, durable: bool = False, **facts: Any
    ) -> None:
        """Append what has changed of a trial since it was last recorded.

        Args:
            report: the report that was added to it, if any.
            durable: see :meth:`Ledger.append`. A report need not be: a trial that resumes reports it again.
            facts: what has become known about the study as a whole.
        """
        texts = {name: dumps(getattr(trial, name)) for name in _FIELDS}
        known = self._recorded.get(trial.number, {})
        changed = {name: getattr(trial, name) for name in _FIELDS if texts[name] != known.get(name)}
        entry: dict[str, Any] = {"trial": {**changed, "number": trial.number}}
        if report is not None:
            entry["report"] = report
        if facts:
            self.facts |= facts
            entry["facts"] = facts
        self._open_ledger().append(entry, durable=durable)
        self._recorded[trial.number] = texts

    def _open_ledger(self) -> Ledger:
        if self._ledger is None:
            self._ledger = Ledger(ledger_file(self.file))
        return self._ledger

    def _apply(self, entry: Mapping[str, Any]) -> None:
        """Repeat the change that an entry of the ledger describes."""
        self.facts |= entry.get("facts", {})
        tree = _with_nans(entry["trial"])
        number = tree["number"]
        if number > len(self.trials):
            raise InputError(f"{ledger_file(self.file)}: trial {number} without the one before it; {REMEDY}")
        if number == len(self.trials):
            self.trials.append(Trial(**tree))
        for name, value in tree.items():
            setattr(self.trials[number], name, value)
        if "report" in entry:
            self.trials[number].add_report(with_nan(entry["report"]))

    def unfinished(self) -> list[Trial]:
        return [trial for trial in self.trials if not trial.ended]

    def in_state(self, *states: str) -> list[Trial]:
        return [trial for trial in self.trials if trial.state in states]


def ledger_file(study_file: Path) -> Path:
    """The ledger of a study, next to its `study.json`."""
    return study_file.with_suffix(".jsonl")


def _read_trial(tree: dict[str, Any]) -> Trial:
    return Trial(**_with_nans(tree))


def _with_nans(tree: dict[str, Any]) -> dict[str, Any]:
    """The fields of a trial as they were stored; a metric that is null was not finite."""
    rows = {name: [with_nan(row) for row in tree[name]] for name in ("reports", "repeats") if name in tree}
    values = {"values": with_nan(tree["values"])} if "values" in tree else {}
    return tree | rows | values


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
