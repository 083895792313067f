"""The verdict: the metrics of several policies, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.columns import COLUMNS, Column
from tbpo_ray.evaluation.costs import HEADINGS, NOTE, cost_rows
from tbpo_ray.evaluation.measures import Estimate
from tbpo_ray.storage.files import write_atomic
from tbpo_ray.storage.json_lines import dumps, with_nan

VERDICT = "verdict.json"


@dataclass(frozen=True)
class PolicyVerdict:
    """The metrics of one policy."""

    name: str
    model: str
    prompts: int
    """Prompts with at least one answer."""
    failed: int
    """Samples that the engine rejected."""
    metrics: dict[str, Estimate]
    slices: dict[str, dict[str, dict[str, Estimate]]] = field(default_factory=dict)
    """Column -> value -> metric; `prompts` among the metrics is the size of the slice."""
    samples: str = ""
    """Folder of the samples, relative to the verdict."""


@dataclass(frozen=True)
class Verdict:
    """The metrics of all policies, and how they were measured."""

    policies: list[PolicyVerdict]
    baseline: str
    reference: str
    judge: dict[str, Any]
    prompts: dict[str, Any]
    """`source`, `digest`, `rows` and `skipped`."""
    ranking: list[dict[str, Any]] = field(default_factory=list)
    """Bradley-Terry strengths, strongest first, where more than two policies were compared."""
    run_id: str | None = None
    """Id of the MLflow run."""
    costs: list[dict[str, Any]] = field(default_factory=list)
    """Training runs of the pipeline: `name`, `objective`, `run`, `data`, and pairs, tokens and seconds."""

    def __getitem__(self, name: str) -> PolicyVerdict:
        return next(policy for policy in self.policies if policy.name == name)

    def save(self, folder: Path) -> Path:
        """Write `verdict.json` and return its path."""
        tree = self.__dict__ | {
            "policies": [
                policy.__dict__ | {"metrics": _plain(policy.metrics), "slices": _plain(policy.slices)}
                for policy in self.policies
            ]
        }
        file = folder / VERDICT
        write_atomic(file, dumps(tree, indent=2, ensure_ascii=False))
        return file

    @classmethod
    def load(cls, file: str | Path) -> Verdict:
        """Read a verdict.

        Raises:
            InputError: the file does not exist, or is not a verdict.
        """
        path = Path(file)
        if not path.is_file():
            raise InputError(f"{path}: no such verdict; evaluate the run first")
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            policies = [
                PolicyVerdict(
                    **(item | {"metrics": _estimates(item["metrics"]), "slices": _slices(item["slices"])})
                )
                for item in tree["policies"]
            ]
            ranking = [with_nan(item) for item in tree.get("ranking", [])]
            return cls(**(tree | {"policies": policies, "ranking": ranking}))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a verdict ({type(error).__name__}: {error})") from error

    def table(self) -> str:
        """Format a text table with one line per policy and intervals in brackets."""
        head, *body = _align_columns(self._rows())
        rule = "-" * max(map(len, (head, *body)))
        note = (
            f"{self.prompts['rows']} prompts from {self.prompts['source']}; judge: {self.judge_name}; "
            f"win rates against {self.baseline}; 95 % intervals; KL: k1 estimate in nats per answer"
        )
        return "\n".join([head, rule, *body, rule, note, *self.judge_notes(), *self._costs()])

    def markdown(self) -> str:
        """The same table in Markdown."""
        head, *body = self._rows()
        lines = [head, ["---"] * len(head), *body]
        return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)

    def _rows(self) -> list[list[str]]:
        """The cells of the table, with its headings."""
        columns = [
            column
            for column in COLUMNS
            if column.in_verdict and any(column.metric in policy.metrics for policy in self.policies)
        ]
        rows = [["policy", *(column.heading for column in columns)]]
        return rows + [
            [policy.name, *(self._cell(policy, column) for column in columns)] for policy in self.policies
        ]

    @property
    def judge_name(self) -> str:
        """The kind of judge, and its rubric if it has one."""
        rubric = self.judge.get("rubric")
        return f"{self.judge['kind']} ({rubric})" if rubric else str(self.judge["kind"])

    def judge_notes(self) -> list[str]:
        """Sentences on how far a language model as judge can be trusted; empty for other judges."""
        bias, notes = self.judge.get("first_preferred"), []
        if bias:
            biased = bias["low"] > 0.5 or bias["high"] < 0.5
            meaning = "a bias, which judging in both orders turns into ties" if biased else "50 % is no bias"
            share = format_estimate(Estimate(bias["value"], bias["low"], bias["high"]), 100)
            notes.append(
                f"Position bias: the judge preferred the answer shown first in {share} of its verdicts on "
                f"{bias['pairs']} pairs; {meaning}."
            )
        elif self.judge.get("kind") == "llm":
            notes.append("Position bias: not measured, since no pair has a verdict in both orders.")
        missing = {
            name: self.judge[name]
            for name in ("unparsable", "timeouts", "malformed", "rejected", "errors", "failed")
            if self.judge.get(name)
        }
        if missing:
            counted = ", ".join(f"{name} {number}" for name, number in missing.items())
            notes.append(f"Replies of the judge that gave no verdict: {counted}.")
        return notes

    def _costs(self) -> list[str]:
        """The lines of the table of costs, after an empty line; none without costs."""
        if not self.costs:
            return []
        head, *body = _align_columns([list(HEADINGS), *cost_rows(self.costs)])
        rule = "-" * max(map(len, (head, *body)))
        return ["", head, rule, *body, rule, NOTE]

    def _cell(self, policy: PolicyVerdict, column: Column) -> str:
        estimate = policy.metrics.get(column.metric)
        if estimate is None:
            return "baseline" if policy.name == self.baseline and "win_rate" in column.metric else "-"
        return format_estimate(estimate, column.factor)


def _align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Pad the cells of each column to the same width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def format_estimate(estimate: Estimate, factor: int = 1) -> str:
    """Format an estimate: `78.5 % [74.2, 82.2]` with factor 100, otherwise `0.412 [0.401, 0.423]`."""
    digits, unit = (1, " %") if factor == 100 else (3, "")
    text = f"{estimate.value * factor:.{digits}f}{unit}"
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} [{estimate.low * factor:.{digits}f}, {estimate.high * factor:.{digits}f}]"


def _plain(tree: Any) -> Any:
    if isinstance(tree, Estimate):
        return tree.to_json()
    return {key: _plain(value) for key, value in tree.items()}


def _estimates(tree: Mapping[str, Any]) -> dict[str, Estimate]:
    return {name: Estimate(**values) for name, values in tree.items()}


def _slices(tree: Mapping[str, Any]) -> dict[str, dict[str, dict[str, Estimate]]]:
    return {
        c: {value: _estimates(metrics) for value, metrics in values.items()} for c, values in tree.items()
    }
