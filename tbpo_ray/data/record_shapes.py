"""The row shapes that preference data sets use, one small function each.

A reader says which columns of a row hold the pair, or that the row is not of its shape. To accept a further
shape, write its reader and add it to :data:`SHAPES`. The values that it returns may take any form that
:mod:`tbpo_ray.data.messages` understands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tbpo_ray.data.messages import parse_messages
from tbpo_ray.data.rejection_reasons import RecordError


@dataclass(frozen=True)
class RawPair:
    """The unparsed values of a pair. A row without an answer has None there."""

    prompt: Any
    """None where both answers repeat the prompt."""
    chosen: Any
    rejected: Any
    used_columns: frozenset[str]
    """Columns that make up the pair; all others are metadata."""


def read_messages_column(columns: Mapping[str, Any]) -> RawPair | None:
    """A `messages` column with the prompt, beside answers that are plain strings.

    The messages may go on to the chosen answer, which is then removed.
    """
    messages, chosen = columns.get("messages"), columns.get("chosen")
    # Answers that are message lists repeat the prompt themselves, and `messages` is metadata (UltraFeedback).
    if columns.get("prompt") is not None or isinstance(chosen, list | tuple):
        return None
    if not isinstance(messages, list):
        return None
    if isinstance(chosen, str) and messages and _is_answer(messages[-1], chosen):
        messages = messages[:-1]
    used = frozenset({"messages", "prompt", "chosen", "rejected"})
    return RawPair(messages, chosen, columns.get("rejected"), used)


def read_pair_columns(columns: Mapping[str, Any]) -> RawPair:
    """The columns `prompt`, `chosen` and `rejected`; without `prompt` both answers repeat it."""
    prompt, chosen, rejected = (columns.get(name) for name in ("prompt", "chosen", "rejected"))
    return RawPair(prompt, chosen, rejected, frozenset({"prompt", "chosen", "rejected"}))


SHAPES: tuple[Callable[[Mapping[str, Any]], RawPair | None], ...] = (
    read_messages_column,
    read_pair_columns,  # last: it takes any row, and the columns that are missing are reported from it
)
"""Readers in the order in which they are tried; the first one that recognizes a row reads it."""


def read_row(columns: Mapping[str, Any]) -> RawPair:
    """The values of the pair in a row."""
    for read in SHAPES:
        pair = read(columns)
        if pair is not None:
            return pair
    raise AssertionError("the last shape accepts every row")


def _is_answer(message: Any, text: str) -> bool:
    try:
        return parse_messages([message]) == [{"role": "assistant", "content": text}]
    except RecordError:  # reported when the whole prompt is parsed
        return False
