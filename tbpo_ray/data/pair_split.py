"""Split a pair into the prompt that both answers share and the turns of each answer.

An explicit prompt wins: it is followed by what the answers have in common behind it. The answers may repeat
it whole, without its system turn or only its last turns, or begin with the assistant. Anything else
contradicts it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tbpo_ray.data.messages import (
    SYSTEM_ROLES,
    Message,
    content_text,
    is_blank,
    parse_answer_value,
    parse_json_messages,
    parse_prompt_value,
    parse_transcript,
)
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.data.repeated_prompt import remove_prompt

Turns = list[Message]
_SEPARATORS = ("\n", "\n\n", " ", "")
"""What may be between a system text and the prompt where answers repeat both."""


@dataclass(frozen=True)
class SplitPair:
    """A prompt and the turns of two answers to it, the first and the last of each the assistant's."""

    prompt: Turns
    chosen: Turns
    rejected: Turns
    repeats_prompt: bool = False
    """Whether both answers are plain texts that repeated the prompt. It is taken off; the white space between
    it and an answer is the beginning of the answer."""


def split_pair(prompt: Any, system: Any, chosen: Any, rejected: Any) -> SplitPair:
    """Split the values of a pair.

    Args:
        prompt: the explicit prompt, or None.
        system: the text of a system turn from a column of its own, or None.
        chosen: a text, a message or messages, with the prompt in front of the answer or without it.
        rejected: likewise.

    Raises:
        RecordError: when they are not two answers to one prompt.
    """
    explicit, is_text = (None, False) if prompt is None else parse_prompt_value(prompt)
    if is_text and (turn := _transcript_turn(prompt, (chosen, rejected))):
        explicit, is_text = turn, False
    # One answer of plain text shows that the set holds text: JSON in the other is then what the model wrote.
    as_json = all(map(_states_messages, (chosen, rejected)))
    sides: list[Turns] = [
        _answer_turns(value, explicit, name, json_text=as_json)
        for name, value in (("chosen", chosen), ("rejected", rejected))
    ]
    for name, turns in zip(("chosen", "rejected"), sides, strict=True):
        if turns[-1]["role"] != "assistant":
            role = turns[-1]["role"]
            raise RecordError("no_final_answer", f"{name} ends in a message with the role {role}")
        if is_blank(turns[-1]):
            raise RecordError(f"{name}_empty")
    start: Turns = []
    repeats = False
    if explicit is not None:
        without = _without_text(explicit, system, sides, (chosen, rejected))
        repeats, sides = without is not None, without or sides
        start = _conversation_of(explicit[0], sides) if is_text else _without_answer(explicit, sides[0])
        start, sides = _remove_prompt(start, sides)
    shared = _boundary(start, *sides)
    start = with_system([*start, *sides[0][:shared]], system)
    if not start:
        raise RecordError("prompt_missing")
    answers = [turns[shared:] for turns in sides]
    if isinstance(chosen, str) and any(map(_has_adjacent_answers, answers)):
        # A transcript with a speaker's name in the wrong place, as there are some in HH-RLHF.
        raise RecordError("prompts_differ", _first_difference(*answers))
    if [_stripped(turn) for turn in answers[0]] == [_stripped(turn) for turn in answers[1]]:
        raise RecordError("answers_identical", content_text(answers[0][-1])[:80])
    return SplitPair(start, answers[0], answers[1], repeats_prompt=repeats)


def prompt_before(prompt: Any, answer: Any) -> Turns:
    """The prompt of a row with one answer or none; empty where there is none.

    Raises:
        RecordError: when a value is malformed.
    """
    explicit, is_text = (None, False) if prompt is None else parse_prompt_value(prompt)
    if not answer:
        return explicit or []
    turns = _answer_turns(answer, explicit, "chosen")
    start: Turns = []
    if explicit is not None:
        start = _conversation_of(explicit[0], [turns]) if is_text else _without_answer(explicit, turns)
        start, (turns,) = _remove_prompt(start, [turns])
    last = len(turns)
    while last and turns[last - 1]["role"] == "assistant":
        last -= 1
    return [*start, *turns[:last]]


def with_system(prompt: Turns, system: Any) -> Turns:
    """The prompt with the system turn of a column in front, unless it has the same one already.

    Raises:
        RecordError: when the prompt has another system turn.
    """
    if system is None or (isinstance(system, str) and not system.strip()):
        return prompt
    messages = [{"role": "system", "content": system}] if isinstance(system, str) else None
    messages = messages or parse_prompt_value(system)[0]
    if not prompt or prompt[0]["role"] not in SYSTEM_ROLES:
        return [*messages, *prompt]
    given = prompt[: len(messages)]
    if [_words(content_text(turn)) for turn in given] != [_words(content_text(turn)) for turn in messages]:
        raise RecordError("prompts_differ", f"two system turns: {_quoted(messages[0])} / {_quoted(given[0])}")
    return prompt


def _states_messages(answer: Any) -> bool:
    """Whether an answer is messages, in a list or as JSON text, rather than a plain text."""
    try:
        return not isinstance(answer, str) or parse_json_messages(answer) is not None
    except RecordError:  # a malformed message, which is reported when the answer is parsed
        return True


def _answer_turns(value: Any, explicit: Turns | None, name: str, *, json_text: bool = True) -> Turns:
    """The turns of one side, with the prompt in front where it repeats it."""
    parsed = parse_answer_value(value, name, json_text=json_text)
    if not isinstance(parsed, str):
        return parsed
    turns = parse_transcript(parsed)
    # With an explicit prompt a text is only a transcript if it begins as HH-RLHF's do or repeats that prompt:
    # an answer may itself begin with "Human:".
    if turns is not None and (explicit is None or parsed.startswith("\n\n") or _starts_with(turns, explicit)):
        return turns
    if not parsed.strip():
        raise RecordError(f"{name}_empty")
    return [{"role": "assistant", "content": parsed}]


def _transcript_turn(prompt: Any, values: Sequence[Any]) -> Turns | None:
    """The turn of a prompt such as `Human: ...` where both answers are transcripts that go on from it."""
    if not all(isinstance(value, str) for value in (prompt, *values)):
        return None
    turn = parse_transcript(prompt, single=True)
    sides = [parse_transcript(value) for value in values]
    repeats = turn is not None and all(side is not None and _starts_with(side, turn) for side in sides)
    return turn if repeats else None


def _without_text(
    explicit: Turns, system: Any, sides: Sequence[Turns], values: Sequence[Any]
) -> list[Turns] | None:
    """Answers of plain text without the prompt that both repeat; None where they do not.

    Args:
        system: the value of a system column, which may be in front of the repeated prompt.
        sides: the parsed values.
    """
    prompt = explicit[-1].get("content")
    if explicit[-1]["role"] != "user" or not isinstance(prompt, str) or not prompt.strip():
        return None
    plain = [[{"role": "assistant", "content": value}] for value in values]
    if list(sides) != plain or not all(isinstance(value, str) for value in values):
        return None
    first = explicit[0].get("content") if explicit[0]["role"] in SYSTEM_ROLES else system
    starts = [f"{first}{space}{prompt}" for space in _SEPARATORS] if isinstance(first, str) and first else []
    for start in (*starts, prompt):
        if (rests := remove_prompt(start, *values)) is not None:
            return [[{"role": "assistant", "content": rest}] for rest in rests]
    return None


def _conversation_of(message: Message, sides: Sequence[Turns]) -> Turns:
    """The turns up to the one that a plain text prompt states; sets often name one turn of several."""
    starts = []
    for turns in sides:
        if turns[0]["role"] == "assistant":
            continue
        index = next((k for k, turn in enumerate(turns) if _key(turn) == _key(message)), None)
        if index is None:
            raise RecordError("prompts_differ", f"prompt {_quoted(message)} / {_quoted(turns[0])}")
        starts.append(turns[:index])
    if starts and any(start != starts[0] for start in starts):
        raise RecordError("prompts_differ", _first_difference(*starts[:2]))
    return [*(starts[0] if starts else []), message]


def _without_answer(explicit: Turns, chosen: Turns) -> Turns:
    """The prompt without the chosen answer, to which it may go on."""
    if len(explicit) > 1 and explicit[-1]["role"] == "assistant" and _key(explicit[-1]) == _key(chosen[-1]):
        return explicit[:-1]
    return explicit


def _remove_prompt(prompt: Turns, sides: Sequence[Turns]) -> tuple[Turns, list[Turns]]:
    """The prompt, with a system turn that only the answers state, and each side without the prompt."""
    leads, rests = [], []
    for turns in sides:
        skip = 0
        if prompt[0]["role"] not in SYSTEM_ROLES:
            while skip < len(turns) and turns[skip]["role"] in SYSTEM_ROLES:
                skip += 1
        if turns[0]["role"] != "assistant":  # a side that begins with the prompt
            leads.append(turns[:skip])
        rests.append(_rest(prompt, turns[skip:]))
    if leads and any(lead != leads[0] for lead in leads):
        raise RecordError("prompts_differ", _first_difference(*leads[:2]))
    return [*(leads[0] if leads else []), *prompt], rests


def _rest(prompt: Turns, turns: Turns) -> Turns:
    """What follows the prompt on one side."""
    body = prompt
    while body and body[0]["role"] in SYSTEM_ROLES:
        body = body[1:]
    tails = [prompt[k:] for k in range(1, len(prompt))]
    for start in (prompt, body, *tails):
        if start and _starts_with(turns, start):
            return turns[len(start) :]
    first = turns[0]["role"] if turns else "assistant"
    # A prompt that is only a system turn leaves the user's turn to the answers.
    if first == "assistant" or (not body and first not in SYSTEM_ROLES):
        return turns
    raise RecordError("prompts_differ", _first_difference(prompt, turns))


def _boundary(prompt: Turns, chosen: Turns, rejected: Turns) -> int:
    """How many leading turns of both sides belong to the prompt.

    Raises:
        RecordError: when the rest of both does not begin with the assistant.
    """
    same = 0
    longest = min(len(chosen), len(rejected)) - 1
    while same < longest and chosen[same] == rejected[same]:
        same += 1
    for start in range(same, -1, -1):
        before = chosen[start - 1] if start else (prompt[-1] if prompt else None)
        if chosen[start : start + 1] and chosen[start]["role"] == rejected[start]["role"] == "assistant":
            if before is None or before["role"] != "assistant":
                return start
            if not start:
                raise RecordError("prompt_ends_in_answer", _quoted(before))
    raise RecordError("prompts_differ", _first_difference(chosen, rejected))


def _has_adjacent_answers(turns: Turns) -> bool:
    return any(a["role"] == b["role"] == "assistant" for a, b in pairwise(turns))


def _starts_with(turns: Turns, start: Turns) -> bool:
    # One turn must remain: an answer that is all prompt is not an answer.
    if len(turns) <= len(start):
        return False
    return all(_key(a) == _key(b) for a, b in zip(turns, start, strict=False))


def _key(message: Message) -> tuple[str, str, str]:
    """Equal for messages that differ in white space only."""
    return (message["role"], _words(content_text(message)), _further(message))


def _stripped(message: Message) -> tuple[str, str, str]:
    return (message["role"], content_text(message).strip(), _further(message))


def _further(message: Message) -> str:
    rest = {name: value for name, value in message.items() if name not in ("role", "content")}
    return json.dumps(rest, sort_keys=True, default=str)


def _words(text: str) -> str:
    return " ".join(text.split())


def _quoted(message: Message) -> str:
    return f"{message['role']}: {content_text(message)[:60]!r}"


def _first_difference(left: Turns, right: Turns) -> str:
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return f"message {index}: {_quoted(a)} / {_quoted(b)}"
    return f"{len(left)} and {len(right)} messages before the answer"
