"""Put the benchmark's tables into a page, between `<!-- PART -->` and `<!-- end -->`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tbpo_ray.errors import InputError
from tbpo_ray.storage.files import write_atomic

END = "<!-- end -->"


def check_places(page: Path, parts: Sequence[str]) -> None:
    """Refuse a page without a place for one of the tables, before hours are spent.

    Raises:
        InputError: naming the marks that are missing.
    """
    if not page.is_file():
        raise InputError(f"--into {page}: no such file")
    text = page.read_text(encoding="utf-8")
    for part in parts:
        _place(text, part, page)


def put(page: Path, part: str, table: str) -> None:
    """Replace what stands between a part's marks."""
    text = page.read_text(encoding="utf-8")
    start, stop = _place(text, part, page)
    write_atomic(page, f"{text[:start]}\n{table.strip()}\n{text[stop:]}")


def _place(text: str, part: str, page: Path) -> tuple[int, int]:
    mark = f"<!-- {part} -->"
    start = text.find(mark)
    stop = text.find(END, start)
    between = text[start + len(mark) : stop]
    if start < 0 or stop < 0 or "<!--" in between:
        raise InputError(f"--into {page}: it has no place for {part}; write {mark} and {END} on own lines")
    return start + len(mark), stop
