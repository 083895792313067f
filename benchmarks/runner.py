"""Runs parts of the benchmark and writes their figures and tables."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.page import check_markers, replace_table
from tbpo_ray.config.schema import Config
from tbpo_ray.errors import InputError
from tbpo_ray.storage.json_lines import dumps

PARTS = (
    "objectives",
    "data",
    "methods",
    "noise",
    "training",
    "overhead",
    "scaling",
    "reference",
    "growth",
    "generation",
    "search",
    "balance",
    "memory_plan",
    "checkpoint",
    "scale",
)
"""Modules of this package with the functions `run(config, quick=..., only=...)` and `markdown(result)`."""


def run_parts(
    config: Config,
    parts: Sequence[str],
    *,
    quick: bool = False,
    figures: Path | None = None,
    page: Path | None = None,
) -> None:
    """Run the parts one after another. Files are written after each, so an interruption loses only one part.

    Args:
        parts: names from `PARTS`, each with an optional `:CASE`.
        quick: use small sizes, to check that the benchmark runs.
        figures: the file that all figures are written to, as JSON.
        page: the Markdown file that the tables are written into.

    Raises:
        InputError: an unknown part, or a page without a place for a table.
    """
    unknown = [part for part in parts if part.partition(":")[0] not in PARTS]
    if unknown:
        raise InputError(f"--only {','.join(parts)}: {unknown[0]} is not a part; use {' '.join(PARTS)}")
    if page is not None:
        check_markers(page, parts)
    results: dict[str, Any] = {}
    for part in parts:
        name, _, case = part.partition(":")
        module = importlib.import_module(f"benchmarks.{name}")
        results[part] = module.run(config, quick=quick, **({"only": case} if case else {}))
        text = module.markdown(results[part])
        print(text, flush=True)
        if page is not None:
            replace_table(page, part, text)
        if figures is not None:
            figures.write_text(dumps(results, indent=1), encoding="utf-8")
