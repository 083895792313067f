"""Chat templates: conversations as text, with every field that a template may read, the same on every day.

A template is a program that comes with a tokenizer. It is run by transformers' sandbox on exactly what the
record holds; the few adjustments below exist because public templates differ in what they accept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

Message = dict[str, Any]
"""One turn: `role`, `content` and every further field of the record's message."""

FIXED_DATE = datetime(2024, 7, 26)
"""Given to templates that print today's date: tokens must not change overnight."""

MEDIA_PARTS = ("image", "image_url", "audio", "input_audio", "audio_url", "video", "video_url", "file")
"""Types of content parts that are not text."""

_PROBE = "Quizzical"
"""An answer that no template alters, to see what a template puts behind it."""
_READS_PARTS = re.compile(
    r"content\s+is\s+(not\s+)?(string|iterable|sequence|mapping)|\[\s*['\"]type['\"]\s*\]|\.type\b"
)
_READS_TEXT_ARGUMENTS = re.compile(r"arguments\s+is\s+(not\s+)?(string|mapping)")


class TemplateRefusedError(ValueError):
    """A template raised an error on a conversation; the message is the template's own."""


@dataclass(frozen=True)
class ChatTemplate:
    """A Jinja chat template and the special tokens that it refers to.

    Attributes:
        source: the template's text.
        special_tokens: names to texts, such as `bos_token`: `<s>`.
    """

    source: str
    special_tokens: Mapping[str, str]

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = False,
    ) -> str:
        """The conversation as text.

        Args:
            messages: turns in order.
            tools: JSON schemas of the functions that the assistant may call.
            arguments: further values for the template (`enable_thinking` ...); they win over the defaults.
            add_generation_prompt: end in what the template puts in front of an answer.

        Raises:
            TemplateRefusedError: with the template's own reason.
        """
        turns = [self._adjusted(message) for message in messages]
        options = {"tools": tools, "arguments": arguments, "add_generation_prompt": add_generation_prompt}
        if not any("content" in turn and turn["content"] is None for turn in turns):
            return self._run(turns, **options)
        # Most templates test a null content for truth; some would print `None`, others fail on it.
        emptied = [turn | {"content": ""} if turn.get("content", "") is None else turn for turn in turns]
        without = self._run(emptied, **options)
        try:
            as_given = self._run(turns, **options)
        except TemplateRefusedError:
            return without
        return without if as_given.count("None") > without.count("None") else as_given

    def frame(
        self, prompt: Sequence[Message], *, tools: Any = None, arguments: Mapping[str, Any] | None = None
    ) -> tuple[str, str, str] | None:
        """Text of the prompt alone, text between it and an answer's content, and text behind the content.

        Found by rendering an answer that no template alters; None where the template refuses it or hides it.
        """
        probe = {"role": "assistant", "content": _PROBE}
        try:
            alone = self.render(prompt, tools=tools, arguments=arguments)
            text = self.render([*prompt, probe], tools=tools, arguments=arguments)
        except TemplateRefusedError:
            return None
        before, found, behind = text.rpartition(_PROBE)
        if not found or not before.startswith(alone):
            return None
        return alone, before[len(alone) :], behind

    def turn_end(self, special: re.Pattern[str]) -> str | None:
        """The special token behind an assistant's turn (`<|im_end|>`, `<end_of_turn>` ...), or None.

        Args:
            special: matches the texts of the tokenizer's special tokens.
        """
        conversation = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": _PROBE}]
        try:
            _, found, behind = self.render(conversation).rpartition(_PROBE)
        except TemplateRefusedError:
            return None
        match = special.search(behind) if found else None
        return match.group() if match and not behind[: match.start()].strip() else None

    def _run(
        self,
        turns: list[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        arguments: Mapping[str, Any] | None,
        add_generation_prompt: bool,
    ) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        values: dict[str, Any] = {
            **self.special_tokens,
            "date_string": FIXED_DATE.strftime("%d %b %Y"),
            "strftime_now": FIXED_DATE.strftime,
            **(arguments or {}),
        }
        try:
            rendered = render_jinja_template(
                conversations=[turns],
                tools=[dict(tool) for tool in tools] if tools else None,
                chat_template=self.source,
                add_generation_prompt=add_generation_prompt,
                **values,
            )
        except Exception as error:  # a template is a program of its own: whatever it raises is its refusal
            raise TemplateRefusedError(f"{type(error).__name__}: {error}"[:200]) from error
        return rendered[0][0]

    def _adjusted(self, message: Message) -> Message:
        turn = dict(message)
        if turn.get("role") == "developer" and "developer" not in self.source:
            turn["role"] = "system"
        if isinstance(turn.get("content"), list) and not _READS_PARTS.search(self.source):
            turn["content"] = part_text(turn["content"])
        if turn.get("tool_calls") and not _READS_TEXT_ARGUMENTS.search(self.source):
            turn["tool_calls"] = [_with_parsed_arguments(call) for call in turn["tool_calls"]]
        return turn


def part_text(parts: Sequence[Any]) -> str:
    """The texts of content parts, joined."""
    return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in parts)


def _with_parsed_arguments(call: Any) -> Any:
    """A tool call whose `arguments`, JSON text in OpenAI's format, are parsed: templates dump them again."""
    if not isinstance(call, Mapping):
        return call
    inner = call.get("function", call)
    given = inner.get("arguments") if isinstance(inner, Mapping) else None
    if not isinstance(given, str):
        return call
    try:
        parsed = json.loads(given)
    except ValueError:
        return call
    if not isinstance(parsed, Mapping):
        return call
    changed = {**inner, "arguments": parsed}
    return {**call, "function": changed} if "function" in call else changed
