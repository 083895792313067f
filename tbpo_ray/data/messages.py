"""Parse chat messages from the values in a record: message lists, plain strings and transcripts.

Every function here parses one *value* (the content of a column); which columns of a row hold the
values is decided in :mod:`tbpo_ray.data.record_shapes`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from tbpo_ray.data.rejection_reasons import RecordError

Message = dict[str, Any]
"""One turn: `role`, `content` (text, a list of parts or None) and every further field of the source."""

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}
"""Role names that data sets use, and the role that each means."""

_TURN = re.compile(r"\n\n(Human|Assistant):")
_TURN_ROLES = {"Human": "user", "Assistant": "assistant"}


def parse_prompt_value(value: Any) -> list[Message]:
    """The messages of an explicit prompt: a message list, a transcript that ends in `Assistant:`, or text.

    Raises:
        RecordError: when the prompt is empty or of another type.
    """
    if isinstance(value, str):
        if not value.strip():
            raise RecordError("prompt_empty")
        turns = parse_transcript(value)
        if turns and turns[-1] == {"role": "assistant", "content": ""}:
            return turns[:-1]
        return [{"role": "user", "content": value}]
    if not isinstance(value, list | tuple):
        raise RecordError("prompt_not_text", f"{type(value).__name__} {str(value)[:80]}")
    if not len(value):
        raise RecordError("prompt_empty", "an empty list of messages")
    return parse_messages(value)


def split_answer(value: Any, prompt: list[Message] | None, name: str) -> tuple[list[Message], str]:
    """Split one side of a pair into the prompt and the answer.

    Args:
        value: a string or a list of messages, with the prompt in front of the answer or without it.
        prompt: the row's explicit prompt, if it has one.
        name: `chosen` or `rejected`, for error messages.

    Returns:
        The prompt as this side states it (empty when there is none at all), and the answer's text.

    Raises:
        RecordError: when a message is malformed or the last one is not the assistant's.
    """
    if isinstance(value, str):
        turns = parse_transcript(value)
        # With an explicit prompt a text is only a transcript if it repeats that prompt: an answer may itself
        # begin with "Human:".
        if turns is None or (prompt is not None and turns[: len(prompt)] != prompt):
            return prompt or [], value
    else:
        turns = parse_messages(value)
        if prompt and len(turns) == 1:
            turns = [*prompt, *turns]
    last = turns[-1]
    if last["role"] != "assistant":
        raise RecordError("no_final_answer", f"{name} ends in a message with the role {last['role']}")
    return turns[:-1], last["content"]


def parse_transcript(text: str) -> list[Message] | None:
    r"""The messages of an HH-RLHF transcript (`\n\nHuman: ...\n\nAssistant: ...`), None for other text."""
    text = text if text.startswith("\n\n") else "\n\n" + text.lstrip("\n")
    if not text.startswith("\n\nHuman:"):
        return None
    parts = _TURN.split(text)
    turns = [
        {"role": _TURN_ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return turns if len(turns) > 1 else None


def parse_messages(value: Sequence[Any]) -> list[Message]:
    """A list of messages with normalized roles and plain text.

    Raises:
        RecordError: when a message is not `{role, content}` or `{from, value}` with a known role and text.
    """
    return [_parse_message(item) for item in value]


def _parse_message(item: Any) -> Message:
    if not isinstance(item, Mapping):
        raise RecordError("message_malformed", f"{type(item).__name__} {str(item)[:80]}")
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if not isinstance(role, str) or role not in ROLES:
        raise RecordError("message_malformed", f"role {role!r}; known roles are {', '.join(ROLES)}")
    if isinstance(content, list | tuple):
        content = _join_parts(content)
    if not isinstance(content, str):
        raise RecordError("message_malformed", f"content {str(content)[:80]!r} of the {role} is not text")
    return {"role": ROLES[role], "content": content}


def _join_parts(parts: Sequence[Any]) -> Any:
    """The text of content of the form `[{"type": "text", "text": ...}, ...]`; other content unchanged."""
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    strings = [text for text in texts if isinstance(text, str)]
    return "".join(strings) if len(strings) == len(parts) else parts
