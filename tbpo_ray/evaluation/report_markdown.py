"""The tables of a comparison as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any


def to_markdown(page: dict[str, Any]) -> str:
    """Format the tables of a page that `report.build_page` made."""
    return "\n\n".join(part for part in _parts(page) if part) + "\n"


def _parts(page: dict[str, Any]) -> Iterator[str]:
    yield f"# {page['title']}"
    yield page["subtitle"]
    yield from page["warnings"]
    yield page["gate"]
    yield _policies(page)
    yield page["notes"]
    if page["costs"]:
        yield "## Cost of training"
        yield _table(page["cost_headings"], page["costs"])
        yield page["cost_note"]
    if page["ranking"]:
        yield "## Ranking (Bradley-Terry, log-odds)"
        yield _ranking(page)
    if page["differences"]:
        yield "## Configuration differences"
        rows = [[row["key"], *row["values"]] for row in page["differences"]]
        yield _table(["key", *page["difference_labels"]], rows)
    yield "## Models and runs"
    origins = [[item["label"], item["model"], item["run"]] for item in page["origins"]]
    yield _table(["policy", "model", "MLflow run"], origins)
    yield f"`{page['hint']}`"


def _policies(page: dict[str, Any]) -> str:
    head = ["policy", *(column["heading"] for column in page["columns"])]
    return _table(head, [[row["label"], *map(_cell, row["cells"])] for row in page["rows"]])


def _cell(cell: dict[str, Any]) -> str:
    text = f"{cell['value']} {cell['interval']}".strip()
    return f"**{text}**" if cell["best"] else text


def _ranking(page: dict[str, Any]) -> str:
    rows = [
        [item["name"], f"{item['strength']:.2f}", f"{item['low']:.2f} to {item['high']:.2f}"]
        for item in page["ranking"]
    ]
    return _table(["policy", "strength", "95 % interval"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(_escape, line)) + " |" for line in lines)


def _escape(text: str) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")
