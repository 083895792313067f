"""Writes the benchmark's tables into a page, between `<!-- PART -->` and `<!-- end -->`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tbpo_ray.errors import InputError
from tbpo_ray.storage.files import write_atomic

END = "<!-- end -->"


def check_markers(page: Path, parts: Sequence[str]) -> None:
    """Refuse a page without a place for one of the tables, before hours are spent on measuring.

    Raises:
        InputError: the page does not exist, or has no markers for a part.
    """
    if not page.is_file():
        raise InputError(f"--into {page}: no such file")
    text = page.read_text(encoding="utf-8")
    for part in parts:
        _find_place(text, part, page)


def replace_table(page: Path, part: str, table: str) -> None:
    """Replace the text between a part's markers."""
    text = page.read_text(encoding="utf-8")
    start, stop = _find_place(text, part, page)
    write_atomic(page, f"{text[:start]}\n{table.strip()}\n{text[stop:]}")


def _find_place(text: str, part: str, page: Path) -> tuple[int, int]:
    """Start and end of the text between a part's markers."""
    marker = f"<!-- {part} -->"
    start = text.find(marker)
    stop = text.find(END, start)
    between = text[start + len(marker) : stop]
    # Another marker in between means that this part's own end marker is missing.
    if start < 0 or stop < 0 or "<!--" in between:
        raise InputError(
            f"--into {page}: no place for {part}; write {marker} and {END} on lines of their own"
        )
    return start + len(marker), stop
