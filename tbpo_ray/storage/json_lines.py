"""JSON that every reader accepts: a number that is not finite is written as null."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from tbpo_ray.errors import InputError, first_line


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


def read_object(file: Path, remedy: str, keys: Collection[str] = ()) -> dict[str, Any]:
    """Read a JSON object that this project wrote.

    Args:
        remedy: what to do about a damaged file, for the message.
        keys: the keys that it must have.

    Raises:
        FileNotFoundError: the file does not exist.
        InputError: it is empty or damaged; naming the file.
    """
    content = file.read_bytes()
    try:
        value = json.loads(content.decode("utf-8"))
        problem = "" if isinstance(value, dict) else f"holds a {type(value).__name__} and not a mapping"
    except (ValueError, RecursionError) as error:
        problem = f"is not JSON ({first_line(error, 80)})" if content.strip() else "is empty"
    if not problem:
        absent = [key for key in keys if key not in value]
        if not absent:
            return dict(value)
        problem = f"lacks the key {absent[0]}"
    raise InputError(f"{file}: {problem}; {remedy}")


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
