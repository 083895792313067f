"""Columns of a row that state the same thing twice, and differently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tbpo_ray.data.column_values import is_filled, parse_conversation, role_and_words, system_value
from tbpo_ray.data.messages import content_text, parse_messages
from tbpo_ray.data.record_shapes import SYSTEM_COLUMNS
from tbpo_ray.data.rejection_reasons import RecordError

_CONVERSATIONS = ("messages", "conversations", "conversation")


def check_columns(columns: Mapping[str, Any], used: frozenset[str]) -> None:
    """Refuse a row in which another column contradicts the one that its prompt is read from.

    Args:
        used: the columns that make up the pair.

    Raises:
        RecordError: when two conversations differ before their last answer, or two system columns do.
    """
    if used.intersection(_CONVERSATIONS):
        _check_equal({name: _prompt_words(columns.get(name)) for name in _CONVERSATIONS})
    if used.intersection(SYSTEM_COLUMNS):
        _check_equal({name: _system_words(columns.get(name), name) for name in SYSTEM_COLUMNS})


def _check_equal(values: Mapping[str, Any]) -> None:
    stated = {name: value for name, value in values.items() if value}
    first = next(iter(stated), None)
    other = next((name for name, value in stated.items() if value != stated[str(first)]), None)
    if other is not None:
        raise RecordError("prompts_differ", f"columns {first} and {other}")


def _prompt_words(value: Any) -> list[tuple[str, str]]:
    """The turns of a conversation in front of its last answer; empty for another value."""
    found = parse_conversation(value)
    turns = [role_and_words(turn) for turn in parse_messages(found)] if found is not None else []
    while turns and turns[-1][0] == "assistant":
        turns.pop()
    return turns


def _system_words(value: Any, name: str) -> str:
    if not is_filled(value):
        return ""
    stated = system_value(value, name)
    texts = [stated] if isinstance(stated, str) else map(content_text, parse_messages(stated))
    return " ".join(" ".join(texts).split())
