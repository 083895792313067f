"""What a chat template leaves out of a conversation or changes in it, found by comparing it with the text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from tbpo_ray.models.chat import Message, function_of, part_text
from tbpo_ray.models.turn_tokens import THOUGHT_FIELDS

_PLAIN_WORDS = re.compile(r"[A-Za-z0-9_ .,-]+")


def says_something(turn: Message) -> bool:
    """Whether an assistant's turn has content, thoughts or tool calls."""
    return bool(turn.get("tool_calls")) or any(spoken_texts(turn))


def alters_turn(turn: Message, text: str) -> bool:
    """Whether the template does not write a turn as it is, such as without its thoughts or tool calls."""
    return any(value not in text for value in (*spoken_texts(turn), *_call_names(turn)))


def opens(marker: str, turn: Message, text: str) -> bool:
    """Whether a turn is what the template writes for it behind a marker, up to white space."""
    content = own_content(turn).strip()
    return content.startswith(marker) and "".join(content.split()) in "".join((marker + text).split())


def _calls(turn: Message) -> list[Mapping[str, Any]]:
    calls = turn.get("tool_calls")
    return [function_of(call) for call in calls] if isinstance(calls, list) else []


def _call_names(turn: Message) -> list[str]:
    return [str(call["name"]) for call in _calls(turn) if call.get("name")]


def argument_words(turn: Message) -> Iterator[str]:
    """The words in the arguments of a turn's calls.

    Values that a template may escape or write in a notation of its own are not among them.
    """
    for call in _calls(turn):
        arguments = call.get("arguments")
        if isinstance(arguments, str):
            with suppress(ValueError, RecursionError):
                arguments = json.loads(arguments)
        if isinstance(arguments, Mapping):
            words = (*arguments, *(value for value in arguments.values() if isinstance(value, str)))
            yield from (word.strip() for word in words if _PLAIN_WORDS.fullmatch(word))


def alters_prompt(prompt: Sequence[Message], text: str) -> bool:
    """Whether a chat template does not write all turns of a prompt.

    An assistant's thoughts do not count: most templates take them away from earlier turns.

    Args:
        text: what the template writes.
    """
    return any(_is_absent(value, text) for turn in prompt for value in _prompt_words(turn))


def _prompt_words(turn: Message) -> Iterator[str]:
    content = turn.get("content")
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        value = part_text([part]) if isinstance(part, Mapping) else part
        if isinstance(value, str):
            yield (value.rpartition("</think>")[2] if turn["role"] == "assistant" else value).strip()
    yield from _call_names(turn)
    yield from argument_words(turn)


def _is_absent(value: str, text: str) -> bool:
    # Some templates write the results of tools as JSON text.
    return value not in text and json.dumps(value, ensure_ascii=False)[1:-1] not in text


def spoken_texts(turn: Message) -> list[str]:
    """The content and the thoughts of a turn without white space around them."""
    values = (own_content(turn), *(turn.get(name) for name in THOUGHT_FIELDS))
    return [value.strip() for value in values if isinstance(value, str)]


def own_content(message: Message) -> str:
    """The text of a message's content."""
    content = message.get("content")
    return part_text(content) if isinstance(content, list) else content or ""
