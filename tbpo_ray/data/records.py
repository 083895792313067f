"""Preference records: the pair in a row of any accepted shape, or the reason why there is none.

Accepted shapes (further columns are kept as metadata):

- `prompt`, `chosen`, `rejected` as plain strings or lists of chat messages;
- no prompt: `chosen` and `rejected` are message lists that begin alike and end in one assistant message;
- no prompt: `chosen` and `rejected` are HH-RLHF transcripts (`\\n\\nHuman: ...\\n\\nAssistant: ...`);
- UltraFeedback: a `prompt` string beside message lists that repeat it, with or without a `messages` column;
- a `messages` column with the prompt, beside answers that are plain strings.

Imports neither torch nor ray.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tbpo_ray.data.messages import Message, parse_prompt_value, split_answer
from tbpo_ray.data.record_shapes import RawPair, read_row
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.data.sources import RawRow, iter_raw

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One preference: two answers to one prompt."""

    prompt: list[Message]
    """What both answers share; a plain string in the source becomes one user message."""
    chosen: list[Message]
    """The turns of the answer; the first and the last are the assistant's."""
    rejected: list[Message]
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the functions that the assistant may call."""
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Arguments for the chat template from the record itself; they win over `data.template_kwargs`."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """The columns that are not part of the pair."""
    source: str = ""
    row: int = 0
    """0-based position in `source`."""

    @property
    def chosen_text(self) -> str:
        """The text of the chosen answer, for people, judges and hashes."""
        return answer_text(self.chosen)

    @property
    def rejected_text(self) -> str:
        return answer_text(self.rejected)


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer, with the metadata that a checker may need."""

    prompt: list[Message]
    metadata: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    row: int = 0
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ReadOptions:
    """How rows become pairs; see `data.format`, `data.pairing` and `data.pairing_gap`."""

    format: str = "auto"
    pairing: str = "best_worst"
    pairing_gap: float = 0.0
    seed: int = 0
    """Seed of `best_random`."""


@dataclass(frozen=True)
class BadRecord:
    """A quarantined row; `record` is the row as it was read (text if it could not be parsed)."""

    source: str
    row: int
    reason: str
    detail: str
    record: Any

    def to_json(self) -> str:
        """One line of the quarantine file."""
        return json.dumps(self.__dict__, default=str)


def parse_records(
    raw: Any, source: str = "", row: int = 0, options: ReadOptions = ReadOptions()
) -> list[Record]:
    """The preferences in a raw row: usually one, several of ranked answers, none if the answers tie.

    Raises:
        RecordError: with one of :data:`tbpo_ray.data.rejection_reasons.REASONS`.
    """
    columns = _columns(raw)
    pair = read_row(columns)
    for name, value in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        _check_answer_value(value, name, columns)
    prompt = None if pair.prompt is None else parse_prompt_value(pair.prompt)
    chosen_prompt, chosen = split_answer(pair.chosen, prompt, "chosen")
    rejected_prompt, rejected = split_answer(pair.rejected, prompt, "rejected")
    if chosen_prompt != rejected_prompt:
        raise RecordError("prompts_differ", _first_difference(chosen_prompt, rejected_prompt))
    _check_prompt(chosen_prompt)
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        _check_unicode(text, name)
        if not text.strip():
            raise RecordError(f"{name}_empty")
    if chosen.strip() == rejected.strip():
        raise RecordError("answers_identical", chosen[:80])
    turns = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    metadata = _metadata(columns, pair)
    return [Record(chosen_prompt, *turns, metadata=metadata, source=source, row=row)]


def parse_prompt(raw: Any, source: str = "", row: int = 0) -> Prompt:
    """The prompt of a raw row, which may hold a pair, one answer, or a prompt alone.

    Raises:
        RecordError: when there is no prompt in it.
    """
    columns = _columns(raw)
    pair = read_row(columns)
    prompt = None if pair.prompt is None else parse_prompt_value(pair.prompt)
    if isinstance(pair.chosen, str | list | tuple) and len(pair.chosen):
        prompt = split_answer(pair.chosen, prompt, "chosen")[0]
    prompt = prompt or []
    _check_prompt(prompt)
    return Prompt(prompt, _metadata(columns, pair), source, row)


def iter_records(
    source: str,
    limit: int | None = None,
    on_bad: Callable[[BadRecord], None] | None = None,
    options: ReadOptions = ReadOptions(),
) -> Iterator[Record]:
    """The pairs of a source in its order, read in this process.

    Args:
        source: a path, glob, fsspec address, `builtin:copyedit?...` or `hf:NAME[:SPLIT]`.
        limit: read at most this many rows.
        on_bad: called with each row that is not a pair; by default it is logged.

    Raises:
        InputError: when the source cannot be read.
    """
    for raw in iter_raw(source, limit):
        try:
            yield from parse_records(raw.load(), raw.source, raw.row, options)
        except RecordError as error:
            _quarantine(raw, error, on_bad)


def iter_prompts(
    source: str, limit: int | None = None, on_bad: Callable[[BadRecord], None] | None = None
) -> Iterator[Prompt]:
    """The first `limit` prompts of a source of pairs or of prompts alone; see :func:`iter_records`."""
    yielded = 0
    for raw in iter_raw(source):
        if limit is not None and yielded >= limit:
            return
        try:
            yield parse_prompt(raw.load(), raw.source, raw.row)
            yielded += 1
        except RecordError as error:
            _quarantine(raw, error, on_bad)


def answer_text(turns: Sequence[Message]) -> str:
    """The text of an answer: the contents of its assistant turns, separated by blank lines."""
    contents = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    return "\n\n".join(content for content in contents if content)


def _quarantine(raw: RawRow, error: RecordError, on_bad: Callable[[BadRecord], None] | None) -> None:
    bad = BadRecord(raw.source, raw.row, error.reason, error.detail, raw.as_read())
    if on_bad is not None:
        on_bad(bad)
    else:
        _log.warning("%s row %d skipped: %s", raw.source, raw.row, error)


def _columns(raw: Any) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise RecordError("not_object", type(raw).__name__)
    return raw


def _check_answer_value(value: Any, name: str, columns: Mapping[str, Any]) -> None:
    if value is None:
        raise RecordError(f"{name}_missing", "null" if name in columns else "columns: " + ", ".join(columns))
    if isinstance(value, str):
        return
    if not isinstance(value, list | tuple):
        raise RecordError(f"{name}_not_text", f"{type(value).__name__} {str(value)[:80]}")
    if not len(value):
        raise RecordError(f"{name}_empty", "an empty list of messages")


def _check_prompt(messages: list[Message]) -> None:
    if not messages:
        raise RecordError("prompt_missing")
    for message in messages:
        _check_unicode(message["content"], "prompt")
    if not any(message["content"].strip() for message in messages):
        raise RecordError("prompt_empty")


def _check_unicode(text: str, name: str) -> None:
    # JSON can escape half of a surrogate pair; such a string is valid in Python but tokenizers refuse it.
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError("text_not_unicode", f"{name}, character {error.start}") from None


def _metadata(columns: Mapping[str, Any], pair: RawPair) -> dict[str, Any]:
    return {str(name): value for name, value in columns.items() if name not in pair.used_columns}


def _first_difference(left: list[Message], right: list[Message]) -> str:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return f"message {index}: {a['content'][:60]!r} / {b['content'][:60]!r}"
    return f"{len(left)} and {len(right)} messages before the answer"
