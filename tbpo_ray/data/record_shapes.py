"""The row shapes that preference data sets use, one small reader each.

A reader says which values of a row are the prompt and its answers, or that the row is not of its shape. To
accept a further shape, write its reader, add it to :data:`SHAPES` and its name to
:data:`tbpo_ray.config.schema.RecordFormat`. The values that a reader returns may take any form that
:mod:`tbpo_ray.data.messages` understands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tbpo_ray.data.column_values import (
    Columns,
    alpaca_prompt,
    check_contains,
    find_prompt_columns,
    find_whole_prompt,
    first_turns,
    interleave,
    is_answer,
    is_filled,
    label_scores,
    parse_conversation,
    post_prompt,
    role_and_words,
    score_gap,
    states_prompt,
    system_value,
    text_of,
    texts_of,
    to_choice,
    to_flag,
    to_number,
    winner_scores,
)
from tbpo_ray.data.messages import parse_messages, parse_prompt_value
from tbpo_ray.data.rejection_reasons import RecordError

SYSTEM_COLUMNS = ("system", "system_prompt", "system_message", "system_instruction", "sys_prompt")
TIE_COLUMN = "tie"
ACCEPTED = (
    "prompt (or messages, conversations, question, instruction, input) with chosen and rejected; "
    "response_0/response_1, response_1/response_2 or human_ref_A/human_ref_B with a label; "
    "response_a/response_b or output_1/output_2 with preference or winner; "
    "conversation_a/conversation_b with winner; summaries with choice; answers with ranks; "
    "completions or responses with scores"
)
"""For messages: the columns that hold a preference."""
_ANSWER_COLUMNS = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("response_j", "response_k"),
)
_CONVERSATION_COLUMNS = ("messages", "conversations", "conversation", "trajectory")
_LABELED_COLUMNS = (
    *((f"{name}_{a}", f"{name}_{b}") for name in ("response", "answer") for a, b in ("AB", "ab")),
    *((f"{name}_1", f"{name}_2") for name in ("output", "response", "answer")),
    ("output_a", "output_b"),
    ("completion_a", "completion_b"),
)
_LABELS = ("preference", "winner", "label", "preferred", "human_preference")
_SINGLE_ANSWERS = ("completion", "response", "answer", "output", "generation")
_SINGLE_RATINGS = ("label", "labels", "is_safe", "helpfulness", "score", "rating", "reward", "overall_score")
"""Columns that rate the one answer of a row, as KTO's `label` does."""
_SCORE_LISTS = {
    "scores": 1,
    "ratings": 1,
    "rating": 1,
    "rewards": 1,
    "all_rm_scores": 1,
    "ranks": -1,
    "rank": -1,
}
"""Columns with a number for each answer, and its sign: ranks are better where they are lower."""
_SCORE_FIELDS = ("overall_score", "fine-grained_score", "score", "rating", "reward", "pm_score")


@dataclass(frozen=True)
class RawPair:
    """The unparsed values of a pair. A row without an answer has None there."""

    prompt: Any
    """None where both answers repeat the prompt."""
    chosen: Any
    rejected: Any
    used_columns: frozenset[str]
    """Columns that make up the pair; all others are metadata."""
    system: Any = None
    """The text of a system turn that has a column of its own."""
    gap: float | None = None
    """By how much the chosen answer's score is higher, if known."""
    tie: bool = False
    """Whether the source itself says that neither answer is better."""


@dataclass(frozen=True)
class RawRanking:
    """The unparsed answers to one prompt with a score each, of which pairs are made."""

    prompt: Any
    answers: Sequence[Any]
    scores: Sequence[float]
    """Higher is better; equal scores are a tie."""
    used_columns: frozenset[str]
    system: Any = None
    graded: bool = True
    """Whether the differences of the scores mean more than their signs."""


RawShape = RawPair | RawRanking
Reader = Callable[[Columns], RawShape | None]


def read_messages_column(columns: Columns) -> RawPair | None:
    """A list of messages with the prompt, beside two answers.

    The messages may go on to the chosen answer, which is then removed. A `prompt` beside them has to be one
    of their user turns.
    """
    names = _answer_names(columns) or _ANSWER_COLUMNS[0]
    chosen, rejected, text = (columns.get(n) for n in (*names, "prompt"))
    if chosen is None or rejected is None:
        return None
    found = _find_conversation(columns)
    if found is None:
        return None
    name, messages = found
    if states_prompt(chosen):
        # The messages of UltraFeedback are the chosen conversation again: they add nothing.
        whole, start = parse_messages(chosen), parse_messages(messages)
        if [role_and_words(m) for m in whole[: len(start)]] == [role_and_words(m) for m in start]:
            return None
    if len(messages) > 1 and is_answer(messages[-1], chosen):
        messages = messages[:-1]
    if is_filled(text):
        check_contains(parse_prompt_value(text)[0], parse_messages(messages), name)
    return RawPair(messages, chosen, rejected, frozenset({name, "prompt", *names}))


def read_alpaca_columns(columns: Columns) -> RawPair | None:
    """Alpaca's columns: an `instruction`, its `input` and earlier turns in `history`, beside two answers."""
    names = _answer_names(columns)
    if names is None or columns.get("prompt") is not None or not {"instruction", *names} <= set(columns):
        return None
    chosen, rejected = (columns[name] for name in names)
    if not isinstance(columns["instruction"], str) or states_prompt(chosen):
        return None
    used = frozenset({"instruction", "input", "history", *names} & set(columns))
    return RawPair(alpaca_prompt(columns), chosen, rejected, used)


def read_pair_columns(columns: Columns) -> RawPair | None:
    """The columns `chosen` and `rejected`, beside a column with the prompt or repeating it themselves."""
    names = _answer_names(columns)
    if names is None:
        return None
    chosen, rejected = (columns.get(name) for name in names)
    repeated = states_prompt(chosen) and states_prompt(rejected)
    if repeated and columns.get("prompt") is None:
        prompt_columns, prompt = frozenset({"prompt"}), None
    else:
        prompt_columns, prompt = find_whole_prompt(columns)
    # Argilla marks the ties in its version of the Orca pairs.
    tie = columns.get("status") == "tie"
    used = prompt_columns | set(names)
    return RawPair(prompt, chosen, rejected, used, gap=score_gap(columns), tie=tie)


def read_shp(columns: Columns) -> RawRanking | None:
    """Stanford Human Preferences: `human_ref_A`, `human_ref_B`, and `labels` 1 where A is preferred."""
    names = ("history", "human_ref_A", "human_ref_B", "labels")
    if not set(names) <= set(columns):
        return None
    prefers_a = to_choice(columns["labels"], "labels", (0, 1))
    return _choose(columns["history"], columns, names[1:3], 1 - prefers_a, names)


def read_safe_rlhf(columns: Columns) -> RawRanking | None:
    """PKU-SafeRLHF: `response_0`, `response_1`, and `better_response_id` with the more helpful one."""
    names = ("prompt", "response_0", "response_1", "better_response_id")
    if not set(names) <= set(columns):
        return None
    better = to_choice(columns["better_response_id"], "better_response_id", (0, 1))
    return _choose(columns["prompt"], columns, names[1:3], better, names)


def read_helpsteer(columns: Columns) -> RawRanking | None:
    """HelpSteer's preferences: two responses and a signed strength, positive where the second is better."""
    label = _first_filled(columns, ("preference_strength", "overall_preference"))
    names = _filled_pair(columns, (("response_1", "response_2"), ("response1", "response2")))
    if label is None or names is None:
        return None
    prompt = _first_filled(columns, ("context", "prompt")) or "prompt"
    strength = to_number(columns[label], label)
    answers = [columns.get(name) for name in names]
    used = frozenset({prompt, label, *names})
    return RawRanking(columns.get(prompt), answers, [0.0, strength], used)


def read_two_answers(columns: Columns) -> RawRanking | None:
    """Two answers with a score each, as in WebGPT's comparisons."""
    if not {"answer_0", "answer_1", "score_0", "score_1"} <= set(columns):
        return None
    prompt_columns, prompt = find_whole_prompt(columns)
    if isinstance(prompt, Mapping) and "full_text" in prompt:
        prompt = prompt["full_text"]
    scores = [to_number(columns[name], name) for name in ("score_0", "score_1")]
    used = prompt_columns | {"answer_0", "answer_1", "score_0", "score_1"}
    return RawRanking(prompt, [columns["answer_0"], columns["answer_1"]], scores, used)


def read_summaries(columns: Columns) -> RawRanking | None:
    """OpenAI's summaries: a post in `info`, two `summaries`, and the index of the better one in `choice`."""
    info, summaries = columns.get("info"), columns.get("summaries")
    if not isinstance(info, Mapping) or not isinstance(summaries, list) or "choice" not in columns:
        return None
    choice = to_choice(columns["choice"], "choice", range(len(summaries)))
    scores = [float(index == choice) for index in range(len(summaries))]
    answers = [text_of(item, "summaries") for item in summaries]
    used = frozenset({"info", "summaries", "choice"})
    return RawRanking(post_prompt(info), answers, scores, used, graded=False)


def read_arena(columns: Columns) -> RawRanking | None:
    """Chatbot Arena: `conversation_a`, `conversation_b`, and `winner` as `model_a`, `model_b` or a tie.

    MT-Bench's human judgments are about the answer of one `turn`; what follows it was not judged.
    """
    names = ("conversation_a", "conversation_b", "winner")
    if not set(names) <= set(columns):
        return None
    scores = winner_scores(columns["winner"])
    answers = [first_turns(columns[name], columns.get("turn")) for name in names[:2]]
    return RawRanking(None, answers, scores, frozenset(names), graded=False)


def read_arena_columns(columns: Columns) -> RawRanking | None:
    """The Arena's columns of 0 and 1: `winner_model_a`, `winner_model_b` and `winner_tie`.

    Prompt and responses may each be the JSON text of a list, one text a turn.
    """
    names = ("prompt", "response_a", "response_b", "winner_model_a", "winner_model_b")
    if not set(names) <= set(columns):
        return None
    scores = [to_number(columns[name], name) for name in names[3:]]
    turns, *sides = (texts_of(columns[name]) for name in names[:3])
    answers = [interleave(turns, side) for side in sides]
    used = frozenset({*names, "winner_tie"})
    return RawRanking(None, answers, scores, used, graded=False)


def read_labeled(columns: Columns) -> RawRanking | None:
    """Two answers in columns that end in A and B or in 1 and 2, and a label that names the better one.

    So are AlpacaFarm's preferences (`output_1`, `output_2`, `preference`) and JudgeBench (`A>B`).
    """
    names = next((pair for pair in _LABELED_COLUMNS if set(pair) <= set(columns)), None)
    label = _first_filled(columns, _LABELS)
    if names is None or label is None:
        return None
    prompt_columns, prompt = find_whole_prompt(columns)
    scores = label_scores(columns[label], label, names)
    used = prompt_columns | {label, *names}
    return RawRanking(prompt, [columns[name] for name in names], scores, used, graded=False)


def read_ranked(columns: Columns) -> RawRanking | None:
    """Answers with a `rank` each, 1 for the best, as in Nectar."""
    name, items = _items(columns)
    if name is None or not all(isinstance(item, Mapping) and "rank" in item for item in items):
        return None
    return _ranking(columns, name, items, [-to_number(item["rank"], "rank") for item in items])


def read_scored(columns: Columns) -> RawRanking | None:
    """Answers with a score each, in the same items (UltraFeedback) or in a list beside them."""
    name, items = _items(columns)
    if name is None:
        return None
    for column, sign in _SCORE_LISTS.items():
        scores = columns.get(column)
        if isinstance(scores, list | tuple) and len(scores) == len(items):
            numbers = [sign * to_number(score, column) for score in scores]
            return _ranking(columns, name, items, numbers, column)
    field = next((f for f in _SCORE_FIELDS if all(isinstance(i, Mapping) and f in i for i in items)), None)
    if field is None:
        return None
    return _ranking(columns, name, items, [to_number(item[field], field) for item in items])


SHAPES: dict[str, Reader] = {
    "messages": read_messages_column,
    "alpaca": read_alpaca_columns,
    "pairs": read_pair_columns,
    "shp": read_shp,
    "safe_rlhf": read_safe_rlhf,
    "helpsteer": read_helpsteer,
    "two_answers": read_two_answers,
    "summaries": read_summaries,
    "arena": read_arena,
    "arena_columns": read_arena_columns,
    "labeled": read_labeled,
    "ranked": read_ranked,
    "scored": read_scored,
}
"""Readers by name, in the order in which they are tried; the first one that recognizes a row reads it."""


def read_row(columns: Columns, form: str = "auto") -> tuple[str, RawShape] | None:
    """The name of a row's shape, and the values of its prompt and answers; None if it has no known shape.

    Args:
        form: a name in :data:`SHAPES`, or `auto` to try them all.

    Raises:
        RecordError: when a value is not what its shape demands.
    """
    for name, read in SHAPES.items() if form == "auto" else [(form, SHAPES[form])]:
        raw = read(columns)
        if raw is not None:
            return name, _with_tie(columns, _with_system(columns, raw))
    return None


def missing_columns(columns: Columns, form: str) -> RecordError:
    """Why a row has no known shape: the columns that it has, and those that would be accepted."""
    seen = ", ".join(map(str, columns)) or "none"
    if form != "auto":
        return RecordError("chosen_missing", f"data.format={form} does not match its columns: {seen}")
    kind = without_preference(columns)
    return RecordError("chosen_missing", f"{kind}its columns are {seen}; accepted are {ACCEPTED}")


def without_preference(columns: Columns) -> str:
    """What a row without a preference is, as the begin of a sentence; empty for one of an unknown kind."""
    names = set(columns)
    summary = columns.get("summary")
    if isinstance(summary, Mapping) and "axes" in summary:
        return "it is one summary with its ratings, not a comparison of two; "
    if {"message_id", "parent_id"} <= names:
        return "it is one message of a tree; make a pair of two replies to the same message; "
    answers = [name for name in _SINGLE_ANSWERS if is_filled(columns.get(name))]
    if len(answers) == 1:
        (answer,) = answers
        rated = next((name for name in _SINGLE_RATINGS if columns.get(name) is not None), None)
        if rated is not None:
            return f"it is unpaired: one answer in {answer}, rated by {rated}, and no second one; "
        if find_prompt_columns(columns):
            return f"it is one answer in {answer} without a second one, as for fine-tuning; "
    if not answers and _find_conversation(columns) is not None:
        return "it is one conversation without a second answer, as for fine-tuning; "
    return ""


def read_prompt(columns: Columns) -> RawPair:
    """The prompt of a row without a preference."""
    prompt_columns, prompt = find_whole_prompt(columns)
    used = prompt_columns | {"chosen", "rejected"}
    raw = _with_system(columns, RawPair(prompt, columns.get("chosen"), columns.get("rejected"), used))
    assert isinstance(raw, RawPair)
    return raw


def _find_conversation(columns: Columns) -> tuple[str, Sequence[Any]] | None:
    for name in _CONVERSATION_COLUMNS:
        messages = parse_conversation(columns.get(name))
        if messages is not None:
            return name, messages
    return None


def _answer_names(columns: Columns) -> tuple[str, str] | None:
    """The columns with the chosen and the rejected answer; None where no such column exists."""
    return _filled_pair(columns, _ANSWER_COLUMNS)


def _filled_pair(columns: Columns, pairs: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """The first pair of columns that are both filled, or else the first of which one exists."""
    # An answer that is missing is then reported for the pair of columns that the row does have.
    filled = [names for names in pairs if all(is_filled(columns.get(name)) for name in names)]
    partly = [names for names in pairs if any(is_filled(columns.get(name)) for name in names)]
    present = [names for names in pairs if any(name in columns for name in names)]
    return next(iter([*filled, *partly, *present]), None)


def _first_filled(columns: Columns, names: Sequence[str]) -> str | None:
    """The first column with a value, or else the first that exists; a number is a value, 0 too."""
    filled = (n for n in names if columns.get(n) not in (None, "", []))
    return next(filled, next((n for n in names if n in columns), None))


def _with_system(columns: Columns, raw: RawShape) -> RawShape:
    names = [n for n in SYSTEM_COLUMNS if n in columns and n not in raw.used_columns]
    name = next((n for n in names if is_filled(columns[n])), None)
    used = raw.used_columns | {n for n in names if n == name or not is_filled(columns[n])}
    return replace(raw, system=None if name is None else system_value(columns[name], name), used_columns=used)


def _with_tie(columns: Columns, raw: RawShape) -> RawShape:
    """Apply the column `tie`, which marks a row of any shape in which neither answer is better."""
    if columns.get(TIE_COLUMN) is None or TIE_COLUMN in raw.used_columns:
        return raw
    used = raw.used_columns | {TIE_COLUMN}
    if not to_flag(columns[TIE_COLUMN], TIE_COLUMN):
        return replace(raw, used_columns=used)
    if isinstance(raw, RawPair):
        return replace(raw, tie=True, used_columns=used)
    return replace(raw, scores=[0.0] * len(raw.scores), used_columns=used)


def _choose(
    prompt: Any, columns: Columns, answers: Iterable[str], better: int, used: Iterable[str]
) -> RawRanking:
    scores = [float(index == better) for index in (0, 1)]
    return RawRanking(prompt, [columns[name] for name in answers], scores, frozenset(used), graded=False)


def _items(columns: Columns) -> tuple[str | None, list[Any]]:
    for name in ("answers", "completions", "responses", "generations", "all_generated_responses"):
        items = columns.get(name)
        if isinstance(items, list | tuple) and len(items) > 1:
            return name, list(items)
    return None, []


def _ranking(
    columns: Columns, name: str, items: Sequence[Any], scores: Sequence[float], *further: str
) -> RawRanking:
    prompt_columns, prompt = find_whole_prompt(columns)
    used = prompt_columns | {name, *further}
    return RawRanking(prompt, [text_of(item, name) for item in items], scores, used)
