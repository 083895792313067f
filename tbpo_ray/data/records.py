"""Preference records: what a row of any accepted shape says, or the reason why it is no pair.

Accepted shapes (extra columns travel along as metadata):

- `prompt`, `chosen`, `rejected` as plain strings or lists of chat messages;
- no prompt: `chosen` and `rejected` are message lists that begin alike and end in one assistant message;
- no prompt: `chosen` and `rejected` are HH-RLHF transcripts (`\\n\\nHuman: ...\\n\\nAssistant: ...`);
- UltraFeedback: a `prompt` string beside message lists that repeat it, a `messages` column or not.

Imports neither torch nor ray.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tbpo_ray.data.rejection_reasons import REASONS, RecordError
from tbpo_ray.data.sources import RawRow, iter_raw

__all__ = [
    "REASONS",
    "BadRecord",
    "Message",
    "Prompt",
    "Record",
    "RecordError",
    "iter_prompts",
    "iter_raw",
    "iter_records",
    "parse_prompt",
    "parse_record",
]

Message = dict[str, str]
_log = logging.getLogger(__name__)

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
}
_TURN = re.compile(r"\n\n(Human|Assistant):")
_PAIR_COLUMNS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class Record:
    """One preference: two answers to one prompt.

    `prompt` is a list of `{"role", "content"}` messages (a plain string is one user message), `row` the
    0-based position in `source`, `metadata` the columns that are not part of the pair.
    """

    prompt: list[Message]
    chosen: str
    rejected: str
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    row: int = 0


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer, with the metadata that a checker may need."""

    prompt: list[Message]
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    row: int = 0


@dataclass(frozen=True)
class BadRecord:
    """A row that was put aside; `record` is the row as it was read (text if it could not be parsed)."""

    source: str
    row: int
    reason: str
    detail: str
    record: Any

    def to_json(self) -> str:
        """One line of the quarantine file."""
        return json.dumps(self.__dict__, default=str)


def parse_record(raw: Any, source: str = "", row: int = 0) -> Record:
    """The preference in a raw row.

    Raises:
        RecordError: with one of :data:`REASONS`, when the row is no pair.
    """
    columns = _columns(raw)
    chosen, rejected = _answer_value(columns, "chosen"), _answer_value(columns, "rejected")
    own = _prompt_value(columns, chosen)
    chosen_prompt, chosen_text = _split_answer(chosen, own, "chosen")
    rejected_prompt, rejected_text = _split_answer(rejected, own, "rejected")
    if chosen_prompt != rejected_prompt:
        raise RecordError("prompts_differ", _first_difference(chosen_prompt, rejected_prompt))
    if not chosen_prompt:
        raise RecordError("prompt_missing")
    _check_prompt(chosen_prompt)
    for name, text in (("chosen", chosen_text), ("rejected", rejected_text)):
        _check_unicode(text, name)
        if not text.strip():
            raise RecordError(f"{name}_empty")
    if chosen_text.strip() == rejected_text.strip():
        raise RecordError("answers_identical", chosen_text[:80])
    return Record(chosen_prompt, chosen_text, rejected_text, _metadata(columns, own), source, row)


def parse_prompt(raw: Any, source: str = "", row: int = 0) -> Prompt:
    """The prompt of a raw row, which may hold a pair, one answer, or a prompt alone.

    Raises:
        RecordError: when there is no prompt in it.
    """
    columns = _columns(raw)
    chosen = columns.get("chosen")
    own = _prompt_value(columns, chosen)
    messages = own
    if isinstance(chosen, str | list | tuple) and len(chosen):
        messages = _split_answer(chosen, own, "chosen")[0]
    if not messages:
        raise RecordError("prompt_missing")
    _check_prompt(messages)
    return Prompt(messages, _metadata(columns, own), source, row)


def iter_records(
    source: str, limit: int | None = None, on_bad: Callable[[BadRecord], None] | None = None
) -> Iterator[Record]:
    """Pairs of a source, in its order, in this process.

    Args:
        source: a path, glob, fsspec address, `builtin:copyedit?...` or `hf:NAME[:SPLIT]`.
        limit: read at most this many rows.
        on_bad: called with each row that is no pair; by default it is logged.

    Raises:
        InputError: when the source cannot be read.
    """
    for raw in iter_raw(source, limit):
        try:
            yield parse_record(raw.load(), raw.source, raw.row)
        except RecordError as error:
            _put_aside(raw, error, on_bad)


def iter_prompts(
    source: str, limit: int | None = None, on_bad: Callable[[BadRecord], None] | None = None
) -> Iterator[Prompt]:
    """The first `limit` prompts of a source of pairs or of prompts alone; else as :func:`iter_records`."""
    given = 0
    for raw in iter_raw(source):
        if limit is not None and given >= limit:
            return
        try:
            yield parse_prompt(raw.load(), raw.source, raw.row)
            given += 1
        except RecordError as error:
            _put_aside(raw, error, on_bad)


def _put_aside(raw: RawRow, error: RecordError, on_bad: Callable[[BadRecord], None] | None) -> None:
    bad = BadRecord(raw.source, raw.row, error.reason, error.detail, raw.as_read())
    if on_bad is not None:
        on_bad(bad)
    else:
        _log.warning("%s row %d left out: %s", raw.source, raw.row, error)


def _columns(raw: Any) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise RecordError("not_object", type(raw).__name__)
    return raw


def _answer_value(columns: Mapping[str, Any], name: str) -> Any:
    value = columns.get(name)
    if value is None:
        raise RecordError(f"{name}_missing", "null" if name in columns else "columns: " + ", ".join(columns))
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        raise RecordError(f"{name}_not_text", f"{type(value).__name__} {str(value)[:80]}")
    if not len(value):
        raise RecordError(f"{name}_empty", "an empty list of messages")
    return value


def _prompt_value(columns: Mapping[str, Any], chosen: Any) -> list[Message] | None:
    """The explicit prompt, or None when the answers have to repeat it."""
    value = columns.get("prompt")
    if value is None and not isinstance(chosen, list | tuple) and isinstance(columns.get("messages"), list):
        value = columns["messages"]
        if (
            isinstance(chosen, str)
            and value
            and _messages(value[-1:])[0]
            == {
                "role": "assistant",
                "content": chosen,
            }
        ):
            value = value[:-1]
    if value is None:
        return None
    if isinstance(value, str):
        if not value.strip():
            raise RecordError("prompt_empty")
        turns = _transcript(value)
        if turns and turns[-1] == {"role": "assistant", "content": ""}:
            return turns[:-1]
        return [{"role": "user", "content": value}]
    if not isinstance(value, list | tuple):
        raise RecordError("prompt_not_text", f"{type(value).__name__} {str(value)[:80]}")
    if not len(value):
        raise RecordError("prompt_empty", "an empty list of messages")
    return _messages(value)


def _split_answer(value: Any, own: list[Message] | None, name: str) -> tuple[list[Message], str]:
    """Prompt and answer of one side; `own` is the row's explicit prompt."""
    if isinstance(value, str):
        turns = _transcript(value)
        repeats = turns is not None and (own is None or turns[: len(own)] == own)
        if not repeats:
            return own or [], value
        assert turns is not None
    else:
        turns = _messages(value)
        if own and len(turns) == 1:
            turns = [*own, *turns]
    last = turns[-1]
    if last["role"] != "assistant":
        raise RecordError("no_final_answer", f"{name} ends in a message of the {last['role']}")
    return turns[:-1], last["content"]


def _transcript(text: str) -> list[Message] | None:
    """Messages of an HH-RLHF transcript, None for any other text."""
    start = text if text.startswith("\n\n") else "\n\n" + text.lstrip("\n")
    if not start.startswith("\n\nHuman:"):
        return None
    parts = _TURN.split(start)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[who], "content": said.strip()}
        for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return turns if len(turns) > 1 else None


def _messages(value: Any) -> list[Message]:
    return [_message(item) for item in value]


def _message(item: Any) -> Message:
    if not isinstance(item, Mapping):
        raise RecordError("message_malformed", f"{type(item).__name__} {str(item)[:80]}")
    role, content = item.get("role", item.get("from")), item.get("content", item.get("value"))
    if not isinstance(role, str) or role not in _ROLES:
        raise RecordError("message_malformed", f"role {role!r}; known are {', '.join(_ROLES)}")
    if isinstance(content, list | tuple):
        pieces = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        content = "".join(pieces) if all(isinstance(piece, str) for piece in pieces) else content  # type: ignore[arg-type]
    if not isinstance(content, str):
        raise RecordError("message_malformed", f"content {str(content)[:80]!r} of the {role} is not text")
    return {"role": _ROLES[role], "content": content}


def _check_prompt(messages: list[Message]) -> None:
    for message in messages:
        _check_unicode(message["content"], "prompt")
    if not any(message["content"].strip() for message in messages):
        raise RecordError("prompt_empty")


def _check_unicode(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError("text_not_unicode", f"{name}, character {error.start}") from None


def _metadata(columns: Mapping[str, Any], own: list[Message] | None) -> dict[str, Any]:
    used = {*_PAIR_COLUMNS, *(() if columns.get("prompt") is not None or own is None else ("messages",))}
    return {str(name): value for name, value in columns.items() if name not in used}


def _first_difference(left: list[Message], right: list[Message]) -> str:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return f"message {index}: {a['content'][:60]!r} / {b['content'][:60]!r}"
    return f"{len(left)} and {len(right)} messages before the answer"
