"""Conversations as plain text, for tokenizers without a chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tbpo_ray.data.answers import Segment
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.data.template_alterations import own_content
from tbpo_ray.models.chat import Message
from tbpo_ray.models.turn_tokens import THOUGHT_FIELDS


def plain_text(messages: Sequence[Message]) -> str:
    """A conversation without a template: the contents of its messages with blank lines between them."""
    return "\n\n".join(own_content(message) for message in messages)


def plain_segments(turns: Sequence[Message]) -> list[Segment]:
    """The turns of an answer without a template; those of users are context."""
    segments = [Segment(own_content(turns[0]), True)]
    for turn in turns[1:]:
        trained = turn["role"] == "assistant"
        blank = Segment("\n\n", False)
        segments += [blank, Segment(own_content(turn), trained)]
    return segments


def plain_refusal(
    conversations: Sequence[Sequence[Message]], tools: Sequence[Mapping[str, Any]] | None
) -> RecordError | None:
    """Why a conversation cannot be written without a template."""
    messages = [message for conversation in conversations for message in conversation]
    if tools or any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        return RecordError(
            "template_missing", "the conversation has tools, and the tokenizer no chat template"
        )
    for message in messages:
        for name in THOUGHT_FIELDS:
            if message.get(name):
                return RecordError("template_missing", f"{name}: only a chat template writes it")
    return None
