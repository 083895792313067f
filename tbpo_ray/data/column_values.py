"""Values of columns that several row shapes share: prompts, answers, labels and scores."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tbpo_ray.data.messages import (
    ROLES,
    SYSTEM_ROLES,
    content_text,
    is_message,
    parse_answer_value,
    parse_json_messages,
    parse_json_text,
    parse_messages,
)
from tbpo_ray.data.rejection_reasons import RecordError

Columns = Mapping[str, Any]

PROMPT_COLUMNS = (
    "prompt", "messages", "conversations", "conversation", "trajectory", "question", "query",
    "instruction", "input", "context", "history",
)  # fmt: skip
"""Columns that may hold the prompt beside `chosen` and `rejected`; the first one that is filled counts."""
_SCORE_COLUMNS = tuple(
    (name.format("chosen"), name.format("rejected"))
    for name in (
        "score_{}",
        "{}_score",
        "{}-rating",
        "{}_rating",
        "rating_{}",
        "{}_avg_rating",
        "reward_{}",
        "{}_reward",
    )
)
_TEXT_FIELDS = ("response", "answer", "text", "content", "completion", "output", "generation")
_POST_LABELS = {"subreddit": "SUBREDDIT: r/", "title": "TITLE: ", "post": "POST: ", "article": "ARTICLE: "}


def find_prompt(columns: Columns) -> tuple[str | None, Any]:
    """The column with the prompt and its value; None where no such column is filled.

    An empty `prompt` is found too, so that it is reported as such.

    Raises:
        RecordError: without a `prompt`, when several other columns hold different parts of one.
    """
    if columns.get("prompt") is not None:
        return "prompt", columns["prompt"]
    found = find_prompt_columns(columns)
    if not found:
        return None, None
    first, known = found[0], f" {_all_words(columns[found[0]])} "
    parts = {"input", "history"} if first == "instruction" else set()
    others = [n for n in found[1:] if n not in parts and f" {_all_words(columns[n])} " not in known]
    if others:
        raise RecordError("prompt_ambiguous", f"columns {', '.join([first, *others])}")
    return first, columns[first]


def find_prompt_columns(columns: Columns) -> list[str]:
    """The filled columns that may hold a prompt."""
    return [name for name in PROMPT_COLUMNS if _is_prompt_value(columns.get(name))]


def find_whole_prompt(columns: Columns) -> tuple[frozenset[str], Any]:
    """The prompt of a row and the columns it is made of: an instruction includes its input and history.

    Raises:
        RecordError: see :func:`find_prompt`; also when a part of the prompt is not of its type.
    """
    name, prompt = find_prompt(columns)
    if name == "instruction" and isinstance(prompt, str):
        return frozenset({"instruction", "input", "history"}), alpaca_prompt(columns)
    return frozenset({name or "prompt"}), prompt


def alpaca_prompt(columns: Columns) -> list[dict[str, Any]]:
    parts = [columns["instruction"], columns.get("input")]
    for part in parts:
        if not (part is None or isinstance(part, str)):
            raise RecordError("prompt_not_text", f"input {type(part).__name__} {str(part)[:80]}")
    text = "\n".join(part for part in parts if part and part.strip())
    messages: list[dict[str, Any]] = []
    history = parse_json_text(columns.get("history"), "message_malformed") or []
    if not isinstance(history, list | tuple):
        raise RecordError("message_malformed", f"history {str(history)[:80]!r} is not a list of turns")
    for turn in history:
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise RecordError("message_malformed", f"history {str(turn)[:80]!r} is not [user, assistant]")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return [*messages, {"role": "user", "content": text}]


def post_prompt(info: Mapping[str, Any]) -> str:
    """The prompt in which OpenAI's comparisons ask for a summary."""
    lines = [f"{label}{info[name]}" for name, label in _POST_LABELS.items() if is_filled(info.get(name))]
    if not any(is_filled(info.get(name)) for name in ("post", "article")):
        raise RecordError("prompt_missing", "info has neither post nor article")
    return "\n\n".join([*lines, "TL;DR:"])


def text_of(item: Any, name: str) -> Any:
    if not isinstance(item, Mapping) or is_message(item):
        return item
    for key in _TEXT_FIELDS:
        if item.get(key) is not None:
            return item[key]
    raise RecordError("chosen_not_text", f"{name}: none of {', '.join(_TEXT_FIELDS)} in {str(item)[:80]}")


def texts_of(value: Any) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = parse_json_text(value, "message_malformed")
    return list(value) if isinstance(value, list | tuple) else [value]


def interleave(prompts: Sequence[Any], answers: Sequence[Any]) -> list[dict[str, Any]]:
    if len(prompts) != len(answers):
        raise RecordError("prompts_differ", f"{len(prompts)} prompts and {len(answers)} responses")
    turns = []
    for prompt, answer in zip(prompts, answers, strict=True):
        turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return turns


def winner_scores(value: Any) -> list[float]:
    name = str(value).lower()
    if name.startswith("tie") or name in ("both_bad", "bothbad"):
        return [0.0, 0.0]
    if name in ("model_a", "a") or name in ("model_b", "b"):
        return [float(name.endswith("a")), float(name.endswith("b"))]
    raise RecordError("label_malformed", f"winner {value!r}; must be model_a, model_b or tie")


def label_scores(value: Any, name: str, sides: tuple[str, str]) -> list[float]:
    """The scores of two answers, of which a label names the better one or says that they are equal.

    Args:
        sides: the columns of the answers; they end in the letter or number that the label uses.

    Raises:
        RecordError: when the label is something else, such as 0 or 1, which may mean either.
    """
    first, second = (side[-1].lower() for side in sides)
    whole = isinstance(value, float) and value.is_integer()
    text = str(int(value) if whole else value).strip().strip("[]").lower().replace(" ", "")
    better = [
        {one, side.lower(), f"model_{one}", f"{one}>{other}", f"{one}>>{other}", f"{other}<{one}"}
        for one, other, side in ((first, second, sides[0]), (second, first, sides[1]))
    ]
    if text in better[0] or text in better[1]:
        return [float(text in better[0]), float(text in better[1])]
    # AlpacaEval writes a tie between its outputs 1 and 2 as 0 or 1.5.
    if text in ("tie", "equal", f"{first}={second}", *(("0", "1.5") if first == "1" else ())):
        return [0.0, 0.0]
    accepted = f"{first.upper()}, {second.upper()} or tie"
    raise RecordError("label_malformed", f"{name} {str(value)[:80]!r}; must be {accepted}")


def first_turns(conversation: Any, turn: Any) -> Any:
    """A conversation up to its assistant's `turn`-th answer; as it is where `turn` is not a number."""
    if not is_conversation(conversation) or not isinstance(turn, int) or isinstance(turn, bool) or turn < 1:
        return conversation
    roles = [ROLES.get(str(message.get("role") or message.get("from")).lower()) for message in conversation]
    answers = [index for index, role in enumerate(roles) if role == "assistant"]
    return conversation[: answers[turn - 1] + 1] if len(answers) >= turn else conversation


def to_choice(value: Any, name: str, allowed: Sequence[int]) -> int:
    number = to_number(value, name)
    if number not in allowed:
        raise RecordError(
            "label_malformed", f"{name} {value!r}; must be one of {', '.join(map(str, allowed))}"
        )
    return int(number)


def to_flag(value: Any, name: str) -> bool:
    """A bool, also as 0 or 1, or as the text that CSV files hold.

    Raises:
        RecordError: when it is something else.
    """
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False, "": False}
    text = str(value).strip().lower()
    if text not in known:
        raise RecordError("label_malformed", f"{name} {str(value)[:80]!r}; must be true or false")
    return known[text]


def to_number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RecordError("label_malformed", f"{name} {str(value)[:80]!r} is not a finite number")
    return number


def score_gap(columns: Columns) -> float | None:
    """By how much the score of the chosen answer is higher; None where there are no scores."""
    for names in _SCORE_COLUMNS:
        try:
            chosen, rejected = (to_number(columns.get(name), name) for name in names)
        except RecordError:
            continue
        return chosen - rejected
    return None


def is_conversation(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(is_message(item) for item in value)


def parse_conversation(value: Any) -> Sequence[Any] | None:
    """A list of messages, which a column may also hold as JSON text; None for another value.

    Raises:
        RecordError: when a message in the JSON text is malformed.
    """
    if isinstance(value, str):
        return parse_json_messages(value)
    return value if is_conversation(value) else None


def system_value(value: Any, name: str) -> Any:
    """The value of a system column: a text, or one or several system messages.

    Raises:
        RecordError: when it is something else.
    """
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], str):
        return value[0]
    if isinstance(value, str):
        return value
    messages = [value] if is_message(value) else value
    if is_conversation(messages) and all(m["role"] in SYSTEM_ROLES for m in parse_messages(messages)):
        return list(messages)
    raise RecordError("message_malformed", f"column {name} is not a system turn: {str(value)[:80]!r}")


def states_prompt(answer: Any) -> bool:
    """Whether one side of a pair is a conversation that begins with the prompt."""
    if not is_conversation(answer):
        return False
    role = answer[0].get("role") or answer[0].get("from")
    return ROLES.get(str(role).lower()) != "assistant"


def _is_prompt_value(value: Any) -> bool:
    return is_filled(value) and isinstance(value, str | Mapping | list | tuple)


def _all_words(value: Any) -> str:
    """Every text in a prompt, with single spaces."""
    if isinstance(value, str):
        return " ".join(value.split())
    if is_message(value):
        value = value.get("content", value.get("value"))
    items = value.values() if isinstance(value, Mapping) else value
    if isinstance(items, str):
        return _all_words(items)
    return " ".join(map(_all_words, items)) if isinstance(items, Iterable) else ""


def role_and_words(message: Mapping[str, Any]) -> tuple[str, str]:
    return message["role"], " ".join(content_text(dict(message)).split())


def is_filled(value: Any) -> bool:
    return value is not None and bool(value.strip() if isinstance(value, str) else value)


def is_answer(message: Any, answer: Any) -> bool:
    try:
        (turn,) = parse_messages([message])
        parsed = parse_answer_value(answer, "chosen")
    except (RecordError, ValueError):  # reported when the whole prompt is parsed
        return False
    text = parsed if isinstance(parsed, str) else content_text(parsed[-1])
    return turn["role"] == "assistant" and content_text(turn) in (text, answer)


def check_contains(prompt: Sequence[Columns], messages: Sequence[Columns], name: str) -> None:
    known = [role_and_words(message) for message in messages]
    for turn in map(role_and_words, prompt):
        if turn not in known:
            raise RecordError("prompts_differ", f"prompt {turn[1][:60]!r} is not in {name}")
