"""How the benchmarks present their results: cells, Markdown tables, and the machine below them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def ratio_cell(value: Mapping[str, float], digits: int = 2) -> str:
    """A ratio and its range over the rounds."""
    return f"{value['ratio']:.{digits}f} [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"


def goal_cell(value: float, goal: float | None, *, at_most: bool = False) -> str:
    """The goal, and whether it is reached."""
    if goal is None:
        return "-"
    reached = value <= goal if at_most else value >= goal
    return f"{'at most' if at_most else 'at least'} {goal:g}: {'reached' if reached else 'missed'}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def machine_line(about: Mapping[str, Any], other_versions: Mapping[str, str] | None = None) -> str:
    """One sentence about the machine and the versions, to be put below a table."""
    versions = about["versions"] | dict(other_versions or {})
    listed = ", ".join(f"{name} {number}" for name, number in versions.items())
    return f"{about['processor']}, {about['cores']} cores, load {about['load']:.1f} at the start; {listed}."


def section(intro: str, head: Sequence[str], rows: Sequence[Sequence[str]], about: Mapping[str, Any]) -> str:
    """An introduction, the table, and the machine that it was measured on."""
    return f"{intro}\n\n{table(head, rows)}\n{machine_line(about)}\n"
