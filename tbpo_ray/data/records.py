"""Preference records: the pairs in a row of any accepted shape, or the reason why there is none.

The shapes are listed in :mod:`tbpo_ray.data.record_shapes`; a row that ranks several answers gives the pairs
that `data.pairing` names. Columns that are not part of the pair are kept as metadata. Imports neither torch
nor ray.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

from tbpo_ray.config.schema import DataConfig
from tbpo_ray.data.contradictions import check_columns
from tbpo_ray.data.messages import (
    Message,
    check_media_columns,
    check_trained,
    check_unicode,
    content_text,
    is_message,
)
from tbpo_ray.data.pair_split import prompt_before, split_pair, with_system
from tbpo_ray.data.record_shapes import RawPair, RawShape, missing_columns, read_prompt, read_row
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.data.sources import RawRow, iter_raw
from tbpo_ray.data.table_rows import TableRow
from tbpo_ray.data.template_inputs import TEMPLATE_COLUMNS, template_inputs
from tbpo_ray.storage.json_lines import dumps

_log = logging.getLogger(__name__)

FORMAT_PREFIX = "format/"
"""What the names of the counts of rows by shape begin with (`format/pairs`)."""


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
    tie: bool = False
    """Whether neither answer is better; only with :attr:`ReadOptions.keep_ties`."""
    repeats_prompt: bool = False
    """Whether both answers repeated the prompt, which is taken off; white space behind it is left."""


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
    """How rows become pairs; see `data.format`, `data.pairing`, `data.pairing_gap` and `objective.ties`."""

    format: str = "auto"
    pairing: str = "best_worst"
    pairing_gap: float = 0.0
    seed: int = 0
    """Seed of `best_random`."""
    keep_ties: bool = False
    """Whether answers that tie make a pair too, which is marked; otherwise they are skipped."""
    swap_answers: bool = False
    """Exchange the two answers of every pair."""

    @classmethod
    def of(cls, data: DataConfig, seed: int = 0) -> ReadOptions:
        """The options of a configuration."""
        options = cls(data.format, data.pairing, data.pairing_gap, seed)
        return replace(options, swap_answers=data.swap_answers)


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
        return dumps(self.__dict__, default=str)


def parse_records(
    raw: Any,
    source: str = "",
    row: int = 0,
    options: ReadOptions = ReadOptions(),
    counts: Counter[str] | None = None,
) -> list[Record]:
    """The preferences in a raw row: usually one, several of ranked answers, none if ties are not kept.

    Args:
        counts: the name of the row's shape is counted here, behind :data:`FORMAT_PREFIX`, and
            `prompt_repeated`.

    Raises:
        RecordError: with one of :data:`tbpo_ray.data.rejection_reasons.REASONS`.
    """
    columns = _columns(raw)
    found = read_row(columns, options.format)
    if found is None:
        raise missing_columns(columns, options.format)
    shape, values = found
    if counts is not None:
        counts[FORMAT_PREFIX + shape] += 1
    check_media_columns(columns)
    check_columns(columns, values.used_columns)
    metadata = _metadata(columns, values)
    records = []
    for pair in _raw_pairs(values, options, row):
        for name, value in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            _check_answer_value(value, name, columns)
        split = split_pair(pair.prompt, pair.system, pair.chosen, pair.rejected)
        _check_prompt(split.prompt)
        for name, turns in (("chosen", split.chosen), ("rejected", split.rejected)):
            check_unicode(turns, name)
            check_trained(turns, name)
        turns = [*split.prompt, *split.chosen, *split.rejected]
        if counts is not None and split.repeats_prompt:
            counts["prompt_repeated"] += 1
        record = Record(
            split.prompt,
            split.chosen,
            split.rejected,
            **template_inputs(columns, turns),
            metadata=metadata,
            source=source,
            row=row,
            tie=pair.tie,
            repeats_prompt=split.repeats_prompt,
        )
        records.append(swap_answers(record) if options.swap_answers else record)
    return records


def swap_answers(record: Record) -> Record:
    """The record with its answers exchanged, and with them the columns that describe one answer."""
    others = {"chosen": "rejected", "rejected": "chosen"}
    metadata = {}
    for name, value in record.metadata.items():
        side, underscore, rest = name.partition("_")
        metadata[f"{others[side]}_{rest}" if underscore and side in others else name] = value
    return replace(record, chosen=record.rejected, rejected=record.chosen, metadata=metadata)


def parse_prompt(raw: Any, source: str = "", row: int = 0) -> Prompt:
    """The prompt of a raw row, which may hold a preference, one answer, or a prompt alone.

    Raises:
        RecordError: when there is no prompt in it.
    """
    columns = _columns(raw)
    check_media_columns(columns)
    found = read_row(columns)
    values = found[1] if found is not None else read_prompt(columns)
    check_columns(columns, values.used_columns)
    two = (values.chosen, values.rejected) if isinstance(values, RawPair) else values.answers[:2]
    answers = list(two)
    try:
        prompt = split_pair(values.prompt, values.system, *answers).prompt
    except RecordError:  # not a pair, but the prompt of one answer or of none
        prompt = with_system(prompt_before(values.prompt, answers[0]), values.system)
    if values.prompt is None or "prompt" not in columns:
        # A conversation to train on (`messages`) ends in its answer.
        while prompt and prompt[-1]["role"] == "assistant":
            prompt = prompt[:-1]
    _check_prompt(prompt)
    inputs = template_inputs(columns, prompt)
    return Prompt(prompt, _metadata(columns, values), source, row, **inputs)


def iter_records(
    source: str,
    limit: int | None = None,
    on_bad: Callable[[BadRecord], None] | None = None,
    options: ReadOptions = ReadOptions(),
    counts: Counter[str] | None = None,
) -> Iterator[Record]:
    """The pairs of a source in its order, read in this process.

    Args:
        source: a path, glob, fsspec address, `builtin:copyedit?...` or `hf:NAME[:SPLIT]`.
        limit: read at most this many rows.
        on_bad: called with each row that is not a pair; by default it is logged.
        counts: see :func:`parse_records`.

    Raises:
        InputError: when the source cannot be read.
    """
    for raw in iter_raw(source, limit):
        try:
            yield from parse_records(raw.load(), raw.source, raw.row, options, counts)
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


def _quarantine(raw: RawRow, error: RecordError, on_bad: Callable[[BadRecord], None] | None) -> None:
    bad = BadRecord(raw.source, raw.row, error.reason, error.detail, raw.as_read())
    if on_bad is not None:
        on_bad(bad)
    else:
        _log.warning("%s row %d skipped: %s", raw.source, raw.row, error)


def _columns(raw: Any) -> Mapping[str, Any]:
    if not isinstance(raw, Mapping):
        raise RecordError("not_object", type(raw).__name__)
    return _openai_columns(raw)


def _openai_columns(columns: Mapping[str, Any]) -> Mapping[str, Any]:
    """The columns of a row in OpenAI's preference format under the names that the readers of rows know.

    The messages and tools are in `input`, beside `preferred_output` and `non_preferred_output`.
    """
    names = {"preferred_output": "chosen", "non_preferred_output": "rejected"}
    request = columns.get("input")
    if not isinstance(request, Mapping) or "messages" not in request or not names.keys() <= columns.keys():
        return columns
    rest = {name: value for name, value in columns.items() if name != "input" and name not in names}
    return {**rest, **request, **{new: columns[name] for name, new in names.items()}}


def _raw_pairs(values: RawShape, options: ReadOptions, row: int) -> list[RawPair]:
    """The pairs of a row whose answers differ by `data.pairing_gap` or more, and ties where they are kept."""
    if isinstance(values, RawPair):
        # Scores beside a labeled pair only matter where a gap is set: the label itself says which is better.
        too_close = values.gap is not None and values.gap < options.pairing_gap
        if values.tie or (options.pairing_gap > 0 and too_close):
            return [replace(values, tie=True)] if options.keep_ties else []
        return [values]
    gap = options.pairing_gap if values.graded else 0.0
    order = sorted(range(len(values.answers)), key=lambda index: -values.scores[index])
    pairs: dict[bool, list[tuple[int, int]]] = {False: [], True: []}
    for better, worse in combinations(order, 2):
        tie = not _differ(values.scores[better] - values.scores[worse], gap)
        pairs[tie].append((better, worse))
    if options.pairing != "all":
        pairs = {tie: _choose_pair(some, order[0], options, row) for tie, some in pairs.items()}
        if pairs[False]:  # a row that has a preference gives one pair, which states it
            pairs[True] = []
    kept = (False, True) if options.keep_ties else (False,)
    answers, used = values.answers, values.used_columns
    return [
        RawPair(values.prompt, answers[a], answers[b], used, values.system, tie=tie)
        for tie in kept
        for a, b in pairs[tie]
    ]


def _choose_pair(
    pairs: list[tuple[int, int]], best: int, options: ReadOptions, row: int
) -> list[tuple[int, int]]:
    """At most one of `pairs` with the best answer: a random one, or the last, with the worst answer."""
    pairs = [pair for pair in pairs if pair[0] == best]
    if options.pairing == "best_random" and pairs:
        return [random.Random(f"{options.seed} {row}").choice(pairs)]
    return pairs[-1:]


def _differ(difference: float, gap: float) -> bool:
    return difference > 0 and difference >= gap


def _check_answer_value(value: Any, name: str, columns: Mapping[str, Any]) -> None:
    if value is None:
        raise RecordError(f"{name}_missing", "null" if name in columns else "columns: " + ", ".join(columns))
    if isinstance(value, str | list | tuple) or is_message(value):
        return
    raise RecordError(f"{name}_not_text", f"{type(value).__name__} {str(value)[:80]}")


def _check_prompt(messages: list[Message]) -> None:
    if not messages:
        raise RecordError("prompt_missing")
    check_unicode(messages, "prompt")
    if not any(content_text(message).strip() for message in messages):
        raise RecordError("prompt_empty")


def _metadata(columns: Mapping[str, Any], values: RawShape) -> dict[str, Any]:
    used = values.used_columns | TEMPLATE_COLUMNS
    # A checker function gets a table's columns as every other reader of the table does.
    given = columns.filled if isinstance(columns, TableRow) else columns
    return {str(name): value for name, value in given.items() if name not in used}
