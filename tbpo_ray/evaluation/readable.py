"""Conversations as text for judges and reports, which know no chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tbpo_ray.data.messages import REASONING_FIELDS, content_text
from tbpo_ray.models.chat import Message, function_of

_FURTHER_FIELDS = (*REASONING_FIELDS, "tool_plan", "refusal")
"""Fields of a message with text of their own beside the content."""


def conversation_text(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
    """A conversation as readable text.

    A single message without anything but its text is that text. Otherwise each turn begins with its role, and
    calls of tools, their results and the definitions of the tools have lines of their own:

        tool definition: {"name": "weather", ...}
        user: Will it rain in Oslo?
        assistant calls weather: {"city": "Oslo"}
        tool weather: heavy rain

    Args:
        tools: JSON schemas of the functions that the assistant may call.
    """
    lines = [f"tool definition: {_json(tool)}" for tool in tools or ()]
    turns = [list(_turn(message)) for message in messages]
    if not lines and len(messages) == 1 and messages[0]["role"] != "tool":
        text = content_text(messages[0])
        if turns == [[f"{messages[0]['role']}: {text}"]]:
            return text
    return "\n".join([*lines, *(line for turn in turns for line in turn)])


def _turn(message: Message) -> Iterator[str]:
    """The lines of one turn."""
    role = str(message["role"])
    name = message.get("name") or (message.get("tool_call_id") if role == "tool" else None)
    speaker = f"{role} {name}" if name else role
    for field in _FURTHER_FIELDS:
        if message.get(field):
            text = message[field]
            yield f"{speaker} ({field.replace('_', ' ')}): {text if isinstance(text, str) else _json(text)}"
    calls = list(_calls(message))
    text = content_text(message)
    if text or not calls:
        yield f"{speaker}: {text}"
    for call in calls:
        function = function_of(call)
        arguments = function.get("arguments", {})
        shown = arguments if isinstance(arguments, str) else _json(arguments)
        yield f"{speaker} calls {function.get('name') or 'a tool'}: {shown}"


def _calls(message: Message) -> Iterator[Any]:
    calls = message.get("tool_calls") or ()
    yield from calls if isinstance(calls, list | tuple) else (calls,)
    if message.get("function_call"):
        yield message["function_call"]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
