"""Parse chat messages from the values in a record: message lists, plain strings, JSON text and transcripts.

Every function here parses one *value* (the content of a column); which columns of a row hold the
values is decided in :mod:`tbpo_ray.data.record_shapes`, and where the prompt ends and the answers begin in
:mod:`tbpo_ray.data.pair_split`. A message keeps every field of its source, since a chat template may read it.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.models.chat import MEDIA_PARTS, Message, function_of, part_text

ROLES = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt", "ai"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
}
"""Role names that data sets use, and the role that each means."""
SYSTEM_ROLES = ("system", "developer")
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message with the model's reasoning before its answer."""

_CALL_ROLES = ("function_call", "tool_call")
"""Roles of ShareGPT turns whose text is a call as JSON."""
_TEXT_PARTS = (None, "text", "input_text", "output_text")
_MEDIA_KINDS = ("image", "images", "img", "imgs", "audio", "audios", "video", "videos")
_MEDIA_FIELDS = (
    *_MEDIA_KINDS,
    *(
        f"{kind}_{form}"
        for kind in _MEDIA_KINDS
        for form in ("url", "urls", "path", "paths", "file", "files", "bytes")
    ),
    "input_audio",
    "pixel_values",
)
_MEDIA_VALUE = {"bytes", "path", "array", "sampling_rate"}
"""Fields of an image or a sound in a table of Hugging Face `datasets`."""
_TRAINING_FLAGS = ("weight", "train", "training", "loss")
"""Fields of a message by which OpenAI, Axolotl and ms-swift leave turns out of the loss."""
_PYTHON_MESSAGES = re.compile(
    r"\s*(?:\[\s*)?\{\s*'(?:role'\s*:.*'content'|content'\s*:.*'role'|from'\s*:.*'value'|value'\s*:.*'from')\s*:",
    re.DOTALL,
)
_TURN = re.compile(r"\n\n(Human|Assistant):")
_TURN_ROLES = {"Human": "user", "Assistant": "assistant"}


def parse_prompt_value(value: Any) -> tuple[list[Message], bool]:
    """The messages of an explicit prompt, and whether it is a plain text, which may be one turn of several.

    Args:
        value: a message or a list of them, the JSON text of one, a transcript, or a plain text.

    Raises:
        RecordError: when the prompt is empty or of another type.
    """
    if isinstance(value, str):
        if not value.strip():
            raise RecordError("prompt_empty")
        parsed = parse_json_messages(value)
        if parsed is not None:
            return parsed, False
        turns = parse_transcript(value, single=value.startswith("\n\n"))
        if turns is None:
            return [{"role": "user", "content": value}], True
        return (turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns), False
    if isinstance(value, Mapping):
        return parse_messages([value]), False
    if not isinstance(value, list | tuple):
        raise RecordError("prompt_not_text", f"{type(value).__name__} {str(value)[:80]}")
    if not len(value):
        raise RecordError("prompt_empty", "an empty list of messages")
    return parse_messages(value), False


def parse_answer_value(value: Any, name: str, *, json_text: bool = True) -> list[Message] | str:
    """The turns of one side of a pair, or its text where it is plain text.

    Args:
        value: a text, a message, a list of messages, or the JSON text of these.
        name: `chosen` or `rejected`, for error messages.
        json_text: read a text as JSON if it holds messages; otherwise it stays a text.

    Raises:
        RecordError: when it is empty or of another type, or a message is malformed.
    """
    if isinstance(value, str):
        parsed = parse_json_messages(value) if json_text else None
        return value if parsed is None else parsed
    if isinstance(value, Mapping) and is_message(value):
        return parse_messages([value])
    if not isinstance(value, list | tuple):
        raise RecordError(f"{name}_not_text", f"{type(value).__name__} {str(value)[:80]}")
    if not len(value):
        raise RecordError(f"{name}_empty", "an empty list of messages")
    return parse_messages(value)


def is_message(value: Any) -> bool:
    """Whether a value has the fields of a message."""
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def parse_json_messages(text: str) -> list[Message] | None:
    """The messages in a JSON text, as CSV files hold them; None for other text."""
    if text.lstrip()[:1] not in ("[", "{"):
        return None
    if _PYTHON_MESSAGES.match(text):
        return _parse_python_messages(text)
    if not ('"role"' in text or '"from"' in text):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    items = [value] if isinstance(value, Mapping) else value
    if not items or not all(is_message(item) and ("content" in item or "value" in item) for item in items):
        return None
    return parse_messages(items)


def _parse_python_messages(text: str) -> list[Message]:
    """The messages in Python's notation of a list, which pandas writes into CSV files.

    Raises:
        RecordError: it is not complete, as without the commas that NumPy leaves out.
    """
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise RecordError(
            "message_malformed", f"{text[:60]!r} is Python's notation of messages; must be JSON text"
        ) from None
    return parse_messages([value] if isinstance(value, Mapping) else value)


def parse_transcript(text: str, *, single: bool = False) -> list[Message] | None:
    r"""The messages of an HH-RLHF transcript (`\n\nHuman: ...\n\nAssistant: ...`), None for other text.

    Args:
        single: accept a transcript of one turn.
    """
    text = text if text.startswith("\n\n") else "\n\n" + text.lstrip("\n")
    if not text.startswith("\n\nHuman:"):
        return None
    parts = _TURN.split(text)
    turns: list[Message] = [
        {"role": _TURN_ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return turns if len(turns) > 1 or single else None


def parse_messages(value: Sequence[Any]) -> list[Message]:
    """A list of messages with normalized roles and all their fields.

    Raises:
        RecordError: when a message is not `{role, content}` or `{from, value}` with a known role and text, or
            holds an image, audio or video.
    """
    return [_parse_message(item) for item in value]


def content_text(message: Message) -> str:
    """The text of a message for people and comparisons: its content without its other fields."""
    content = message.get("content")
    if content is None:
        return ""
    if isinstance(content, list):
        return part_text(content)
    return content if isinstance(content, str) else json.dumps(content, default=str)


def answer_text(turns: Sequence[Message]) -> str:
    """The text of an answer: the contents of its assistant turns, separated by blank lines."""
    texts = [content_text(turn) for turn in turns if turn["role"] == "assistant"]
    return "\n\n".join(text for text in texts if text)


def is_blank(message: Message) -> bool:
    """Whether a message says nothing: no text, no tool call and no reasoning."""
    if message.get("tool_calls") or any(message.get(name) for name in REASONING_FIELDS):
        return False
    return not content_text(message).strip()


def parse_tools(value: Any, *, bare: bool = False) -> list[dict[str, Any]] | None:
    """The tools of a record, from a list of JSON schemas; None where there are none.

    The list and each of its schemas may be JSON text.

    Args:
        bare: the schemas are those of functions, without `{"type": "function", "function": ...}` around them.

    Raises:
        RecordError: when it is something else.
    """
    parsed = parse_json_text(value, "tools_malformed")
    if not parsed:
        return None
    items = [parsed] if isinstance(parsed, Mapping) else parsed
    if isinstance(items, list | tuple):
        items = [parse_json_text(item, "tools_malformed") for item in items]
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise RecordError("tools_malformed", str(value)[:80])
    tools = [dict(item) for item in items]
    if bare:
        return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return tools


def parse_json_text(value: Any, reason: str) -> Any:
    """A value that a column may also hold as JSON text; a blank text is None.

    Raises:
        RecordError: with `reason`, when a text is not JSON.
    """
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise RecordError(reason, value[:80]) from None


def check_media_columns(columns: Mapping[str, Any]) -> None:
    """Refuse a row whose image, audio or video column is not empty.

    Raises:
        RecordError: naming the column.
    """
    for name in _MEDIA_FIELDS:
        if not _is_empty(columns.get(name)):
            raise RecordError("media_not_supported", f"column {name}")
    for name, value in columns.items():
        if _is_media(value):
            raise RecordError("media_not_supported", f"column {name}, an image or a sound")


def _is_media(value: Any) -> bool:
    """Whether a value of a table is an image or a sound, or a list of these, whatever its column is named."""
    if isinstance(value, list | tuple):
        return any(map(_is_media, value))
    if not isinstance(value, Mapping) or not value.keys() <= _MEDIA_VALUE:
        return False
    return value.get("bytes") is not None or value.get("array") is not None


def check_trained(turns: Sequence[Message], name: str) -> None:
    """Refuse an answer with a turn that its record leaves out of the loss, since all its turns are trained.

    Raises:
        RecordError: naming the field.
    """
    for turn in turns:
        for flag in _TRAINING_FLAGS:
            value = turn.get(flag, 1)
            if turn["role"] == "assistant" and str(value).lower() not in ("1", "1.0", "true"):
                raise RecordError("turn_not_trained", f"{flag}={value!r} in {name}")


def check_unicode(value: Any, name: str) -> None:
    """Check every string in a value, at any depth.

    Raises:
        RecordError: naming the value and the character.
    """
    if isinstance(value, str):
        # JSON can escape half of a surrogate pair; such a string is valid in Python but tokenizers refuse it.
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RecordError("text_not_unicode", f"{name}, character {error.start}") from None
    elif isinstance(value, Mapping):
        for key, item in value.items():
            check_unicode(key, name)
            check_unicode(item, name)
    elif isinstance(value, list | tuple):
        for item in value:
            check_unicode(item, name)


def _parse_message(item: Any) -> Message:
    if not isinstance(item, Mapping):
        raise RecordError("message_malformed", f"{type(item).__name__} {str(item)[:80]}")
    # Tables and OpenAI's replies fill absent fields with null, which templates would take for present ones.
    fields = {str(name): value for name, value in item.items() if value is not None}
    role = fields.pop("role") if "role" in fields else fields.pop("from", None)
    content = fields.pop("content") if "content" in fields else fields.pop("value", None)
    kind = role.lower() if isinstance(role, str) else ""
    if kind not in ROLES:
        raise RecordError("message_malformed", f"role {role!r}; known roles are {', '.join(ROLES)}")
    _check_second_statement(fields, kind, content)
    for name in _MEDIA_FIELDS:
        if not _is_empty(fields.get(name)):
            raise RecordError("media_not_supported", f"field {name} of the {role}")
    if kind in _CALL_ROLES:
        fields["tool_calls"], content = _calls(parse_json_text(content, "message_malformed")), None
    _normalize_calls(fields)
    message = {"role": ROLES[kind], "content": content, **fields}
    message["content"] = _parse_content(content, message)
    return message


def _check_second_statement(fields: Mapping[str, Any], kind: str, content: Any) -> None:
    """Refuse a message in which `from` or `value` contradicts `role` or `content`."""
    value, speaker = fields.get("value"), fields.get("from")
    if isinstance(value, str) and value != content:
        raise RecordError("message_malformed", "content and value differ")
    role = ROLES.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is not None and role != ROLES[kind]:
        raise RecordError("message_malformed", f"role {kind!r} and from {speaker!r} differ")


def _normalize_calls(fields: dict[str, Any]) -> None:
    """Bring the calls of a message to `tool_calls`, the only field that templates read."""
    calls = parse_json_text(fields.pop("tool_calls", None), "message_malformed")
    legacy = fields.pop("function_call", None)
    older = _calls(parse_json_text(legacy, "message_malformed")) if legacy else []
    items = [calls] if calls and isinstance(calls, Mapping) else calls or older
    if not isinstance(items, list | tuple):
        raise RecordError("message_malformed", f"tool_calls {str(calls)[:80]}")
    parsed = [_parse_call(item) for item in items]
    if older and [_function_words(call) for call in older] != [_function_words(call) for call in parsed]:
        raise RecordError("message_malformed", "function_call and tool_calls differ")
    if parsed:
        fields["tool_calls"] = parsed


def _function_words(call: Mapping[str, Any]) -> tuple[Any, Any]:
    """The name and the arguments of a call, which may be JSON text."""
    function = function_of(call)
    arguments = function.get("arguments")
    try:
        return function.get("name"), json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return function.get("name"), arguments


def _parse_call(item: Any) -> dict[str, Any]:
    """One item of `tool_calls`; a bare `{name, arguments}` is put under `function`, as templates expect."""
    call = parse_json_text(item, "message_malformed")
    if not isinstance(call, Mapping):
        raise RecordError("message_malformed", f"tool_calls {str(item)[:80]}")
    if call.get("function") is not None or "name" not in call:
        return dict(call)
    function = {name: call[name] for name in ("name", "arguments") if name in call}
    rest = {name: value for name, value in call.items() if name not in ("name", "arguments", "function")}
    return {"type": "function", **rest, "function": function}


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls of `{name, arguments}`, one or a list."""
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, list) or not all(isinstance(call, Mapping) and "name" in call for call in items):
        raise RecordError("message_malformed", f"{str(value)[:80]!r} is not a function call")
    return [{"type": "function", "function": dict(call)} for call in items]


def _parse_content(content: Any, message: Message) -> Any:
    role = message["role"]
    if isinstance(content, str):
        return content
    if content is None:
        if message.get("tool_calls") or any(message.get(name) for name in REASONING_FIELDS):
            return None
        raise RecordError("message_malformed", f"the {role} has no content")
    if role == "tool" and isinstance(content, list | tuple) and not _are_parts(content):
        return json.dumps(content, ensure_ascii=False, default=str)  # a result that happens to be a list
    if isinstance(content, list | tuple):
        return [_parse_part(part, role) for part in content]
    if role == "tool":  # a result as JSON, which templates print themselves
        return content
    raise RecordError("message_malformed", f"content {str(content)[:80]!r} of the {role} is not text")


def _are_parts(content: Sequence[Any]) -> bool:
    """Whether the content of a tool's message is parts of text, or of media, which are refused later."""
    kinds = [part.get("type") if isinstance(part, Mapping) else None for part in content]
    if any(isinstance(kind, str) and kind in (*MEDIA_PARTS, *_MEDIA_FIELDS) for kind in kinds):
        return True
    return bool(content) and all(
        isinstance(kind, str) and kind in _TEXT_PARTS and isinstance(part.get("text"), str)
        for kind, part in zip(kinds, content, strict=True)
    )


def _parse_part(part: Any, role: str) -> Any:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        raise RecordError("message_malformed", f"content part {str(part)[:80]!r} of the {role} is not text")
    fields = {str(name): value for name, value in part.items() if value is not None}
    kind = fields.get("type")
    media = next((name for name in (*MEDIA_PARTS, *_MEDIA_FIELDS) if name == kind or name in fields), None)
    if media is not None:
        raise RecordError("media_not_supported", f"content part {media} of the {role}")
    if kind not in _TEXT_PARTS or not isinstance(fields.get("text"), str):
        raise RecordError("message_malformed", f"content part of the type {kind!r} of the {role} is not text")
    return fields


def _is_empty(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_empty(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(_is_empty(item) for item in value)
    return value is None or value == "" or (isinstance(value, bytes) and not value)


__all__ = ["ROLES", "Message", "answer_text", "content_text", "parse_messages", "parse_prompt_value"]
