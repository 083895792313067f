"""JSON that every reader accepts: a number that is not finite is written as null."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """Serialize a value as JSON, with null in place of NaN and the infinities.

    Args:
        options: passed on to `json.dumps`.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        # Rare, so that the copy is made only then. The second call reports any other error.
        return json.dumps(_without_nonfinite(value), allow_nan=False, **options)


def loads_numbers(line: str) -> dict[str, Any]:
    """Parse a row of numbers that :func:`dumps` wrote; null becomes NaN again."""
    return with_nan(json.loads(line))


def with_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of numbers with NaN where it has null."""
    return {key: math.nan if value is None else value for key, value in row.items()}


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nonfinite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nonfinite(entry) for entry in value]
    return value
