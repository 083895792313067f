"""The cost of the training runs behind a verdict, as rows of a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

HEADINGS = (
    "training", "objective", "steps", "pairs", "tokens", "seconds", "pairs scored", "scoring seconds", "data",
)  # fmt: skip
NOTE = (
    "Seconds: training steps, without starting workers, evaluations and checkpoints. Pairs scored: log-probs "
    "of frozen models that were computed before training, once for each model and instruction."
)
_COUNTS = ("steps", "pairs", "tokens")


def cost_rows(costs: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """One row of texts for each run, in the order of :data:`HEADINGS`; `-` for what was not stored."""
    return [
        [
            str(cost["name"]),
            str(cost["objective"]),
            *(_number(cost.get(key)) for key in _COUNTS),
            _number(cost.get("seconds")),
            _number(cost.get("scored_pairs")),
            _number(cost.get("scoring_seconds")),
            str(cost.get("data", "")) or "-",
        ]
        for cost in costs
    ]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"
