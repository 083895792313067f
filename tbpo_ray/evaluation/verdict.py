"""The verdict: what the numbers say about several policies, as JSON and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tbpo_ray.errors import InputError
from tbpo_ray.evaluation.measures import Estimate

VERDICT = "verdict.json"

COLUMNS = (
    ("exact_match", "exact match", 100),
    ("score", "score", 1),
    ("win_rate", "win rate", 100),
    ("lc_win_rate", "win rate, length-controlled", 100),
    ("implicit_accuracy", "own reward accuracy", 100),
    ("credit_auc", "credit AUC, log-ratio", 1),
    ("credit_auc_advantage", "credit AUC, advantage", 1),
    ("distinct_1", "distinct-1", 1),
    ("kl_k1", "KL from reference", 1),
)
"""Metric, heading and factor of the table's columns; columns that no policy has are left out."""


@dataclass(frozen=True)
class PolicyVerdict:
    """One policy's numbers."""

    name: str
    model: str
    prompts: int
    """Prompts with at least one answer."""
    failed: int
    """Samples the engine refused."""
    metrics: dict[str, Estimate]
    slices: dict[str, dict[str, dict[str, Estimate]]] = field(default_factory=dict)
    """Column -> value -> metric; `prompts` among the metrics counts the slice."""
    samples: str = ""
    """Folder of the samples, relative to the verdict."""


@dataclass(frozen=True)
class Verdict:
    """All policies, what they were compared on and how."""

    policies: list[PolicyVerdict]
    baseline: str
    reference: str
    judge: dict[str, Any]
    prompts: dict[str, Any]
    """`source digest rows left_out`."""
    ranking: list[dict[str, Any]] = field(default_factory=list)
    """Bradley-Terry strengths, strongest first, where more than two policies were compared."""
    run_id: str | None = None
    """MLflow run."""

    def __getitem__(self, name: str) -> PolicyVerdict:
        return next(policy for policy in self.policies if policy.name == name)

    def save(self, folder: Path) -> Path:
        tree = self.__dict__ | {
            "policies": [
                policy.__dict__ | {"metrics": _plain(policy.metrics), "slices": _plain(policy.slices)}
                for policy in self.policies
            ]
        }
        file = folder / VERDICT
        file.write_text(json.dumps(tree, indent=2, ensure_ascii=False), encoding="utf-8")
        return file

    @classmethod
    def load(cls, file: str | Path) -> Verdict:
        """Raises InputError where the file is missing or no verdict."""
        path = Path(file)
        if not path.is_file():
            raise InputError(f"{path}: no verdict there; evaluate the run first")
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            policies = [
                PolicyVerdict(
                    **(item | {"metrics": _estimates(item["metrics"]), "slices": _slices(item["slices"])})
                )
                for item in tree["policies"]
            ]
            return cls(**(tree | {"policies": policies}))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: not a verdict ({type(error).__name__}: {error})") from error

    def table(self) -> str:
        """A text table: one line per policy, intervals in brackets."""
        columns = [c for c in COLUMNS if any(c[0] in policy.metrics for policy in self.policies)]
        rows = [["policy", *(heading for _, heading, _ in columns)]]
        for policy in self.policies:
            rows.append([policy.name, *(self._cell(policy, key, factor) for key, _, factor in columns)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        rule = "-" * max(len(line) for line in lines)
        note = (
            f"{self.prompts['rows']} prompts of {self.prompts['source']}, judged by {self.judge['kind']}; "
            f"win rate against {self.baseline}; 95 % intervals; KL: k1 estimate in nats per answer"
        )
        return "\n".join([lines[0], rule, *lines[1:], rule, note])

    def _cell(self, policy: PolicyVerdict, key: str, factor: int) -> str:
        estimate = policy.metrics.get(key)
        if estimate is None:
            return "baseline" if policy.name == self.baseline and "win_rate" in key else "-"
        return show(estimate, factor)


def show(estimate: Estimate, factor: int = 1) -> str:
    """`78.5 % [74.2, 82.2]` for shares, `0.412 [0.40, 0.43]` otherwise."""
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
