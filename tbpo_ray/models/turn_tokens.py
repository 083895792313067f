"""The tokens that a chat template writes around an assistant's turn, found by rendering probes.

- `ends`: those directly behind a turn; the last of them ends it (Cohere writes `<|END_RESPONSE|>` in front of
  `<|END_OF_TURN_TOKEN|>`).
- markers: special tokens around an assistant's thoughts (`<think>`, `</think>`). They are the assistant's own
  words: in the content of its turn they are these tokens, while other special tokens spelled there are text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tbpo_ray.models.chat import ChatTemplate, Message

PROBE = "Quizzical"
"""A text that no template alters."""

PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_it",
        "description": "Probe.",
        "parameters": {"type": "object", "properties": {}, "required": []},
    },
}

THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that hold an assistant's thoughts."""

_THOUGHT = "Thoughtful"
_SYSTEM: Message = {"role": "system", "content": "Hello"}
_USER: Message = {"role": "user", "content": "Hello"}
_STARTS: tuple[tuple[list[Message], list[dict[str, Any]] | None], ...] = (
    ([_USER], None),
    ([_SYSTEM, _USER], None),
    ([_USER], [PROBE_TOOL]),
    ([_SYSTEM, _USER], [PROBE_TOOL]),
)
"""Conversations and their tools: some templates refuse one without a system turn or without tools."""
_ARGUMENTS: tuple[dict[str, Any], ...] = (
    {},
    *({name: value} for name in ("enable_thinking", "thinking") for value in (True, False)),
)


class TemplateRefusedError(ValueError):
    """A template raised an error on a conversation; the message is the template's own."""


def turn_ends(template: ChatTemplate, tokens: Iterable[str], special: Iterable[str] = ()) -> tuple[str, ...]:
    """The tokens that follow one another directly behind an assistant's turn, empty if there are none.

    What ends the conversation rather than each turn (an EOS behind the last `<|end|>`) is not among them,
    unless nothing else ends a turn.

    Args:
        tokens: texts of the tokenizer's added tokens.
        special: those that count even where the template writes other text between the turn and them.
    """
    answer: Message = {"role": "assistant", "content": PROBE}
    for start, tools in _STARTS:
        last = _behind(template, [*start, answer], tools)
        if last is None:
            continue
        begin = template.special_tokens.get("bos_token")
        known = [t for t in tokens if t != begin or t == template.special_tokens.get("eos_token")]
        later = [t for t in special if t in known]
        ends = _run(last, known, later)
        within = _run(_behind(template, [*start, answer, _USER], tools) or "", known, later)
        same = [a for a, _ in takewhile(lambda both: both[0] == both[1], zip(ends, within, strict=False))]
        return tuple(same or ends)
    return ()


def _behind(
    template: ChatTemplate, turns: Sequence[Message], tools: list[dict[str, Any]] | None
) -> str | None:
    """What the template writes behind the probe; None if it refuses or hides it."""
    try:
        _, found, behind = template.render(turns, tools=tools).rpartition(PROBE)
    except TemplateRefusedError:
        return None
    return behind if found else None


def _run(text: str, tokens: Sequence[str], special: Sequence[str]) -> list[str]:
    """The adjacent tokens at the beginning of a text, or else those from its first special one."""
    first = re.match(rf"\s*({_any_of(tokens)})", text) or re.search(f"({_any_of(special)})", text)
    if first is None:
        return []
    run = [first[1]]
    following = re.compile(_any_of(tokens))
    at = first.end()
    while (match := following.match(text, at)) is not None:
        run.append(match.group())
        at = match.end()
    return run


def _any_of(tokens: Iterable[str]) -> str:
    # The longest first, since one token may be the beginning of another.
    known = sorted((token for token in tokens if token.strip()), key=len, reverse=True)
    return "|".join(map(re.escape, known)) or r"(?!)"


def assistant_markers(template: ChatTemplate, special: Iterable[str], ends: Iterable[str]) -> frozenset[str]:
    """The special tokens that an assistant's own content may hold, since the template handles them there.

    A token is one of them if the template does not simply copy it from the content of a turn, writes it
    around the thoughts in a field of the message, or ends a generation prompt in it but does not write it in
    front of every answer. Tokens of users' turns and of the end of a turn are never among them.

    Args:
        special: texts of the tokenizer's special tokens.
        ends: see :func:`turn_ends`.
    """
    start = next((start for start, tools in _STARTS if tools is None and _render(template, start)), None)
    if start is None:
        return frozenset()
    named = f"{template.source}{template.tool_source or ''}"
    never = {*ends, *(template.special_tokens.get(f"{name}_token") for name in ("bos", "eos", "pad", "unk"))}
    asked = _render(template, start)
    usable = [t for t in special if t.strip() and t not in never and t not in asked]
    candidates = [t for t in usable if t in named]
    handled = {token for token in candidates if _is_handled(template, start, token)}
    openers = {t for t in candidates if any(_is_opener(template, start, t, closer) for closer in handled)}
    written = {*_around_thoughts(template, start, candidates), *_begun(template, start, candidates)}
    found = handled | openers | written
    return frozenset(found | {t for t in usable if any(_are_mirrored(t, marker) for marker in found)})


def _is_handled(template: ChatTemplate, start: list[Message], token: str) -> bool:
    """Whether the template does more with a token in the content of a turn than copying it."""
    content = f"{_THOUGHT}{token}{PROBE}"
    texts = list(_with_answer(template, start, {"content": content}))
    return any(PROBE in text and content not in text for text in texts)


def _is_opener(template: ChatTemplate, start: list[Message], token: str, closer: str) -> bool:
    pairs = zip(
        _with_answer(template, start, {"content": f"{_THOUGHT}{closer}{PROBE}"}),
        _with_answer(template, start, {"content": f"{token}{_THOUGHT}{closer}{PROBE}"}),
        strict=False,
    )
    return any(
        _THOUGHT in without and opened != without.replace(_THOUGHT, token + _THOUGHT)
        for without, opened in pairs
    )


def _around_thoughts(
    template: ChatTemplate, start: list[Message], candidates: Sequence[str]
) -> Iterator[str]:
    """The tokens next to thoughts that a field of the message holds."""
    plain = "".join(_with_answer(template, start, {"content": PROBE}))
    pattern = re.compile(rf"({_any_of(candidates)})\s*{_THOUGHT}\s*({_any_of(candidates)})")
    for name in THOUGHT_FIELDS:
        for text in _with_answer(template, start, {"content": PROBE, name: _THOUGHT}):
            for opener, closer in pattern.findall(text):
                # An opener that plain turns have as well is the header of the turn.
                if _are_mirrored(opener, closer) or opener not in plain:
                    yield from (opener, closer)


def _begun(template: ChatTemplate, start: list[Message], candidates: Sequence[str]) -> Iterator[str]:
    """The tokens in generation prompts that are not in front of every answer."""
    earlier = _render(template, [*start, {"role": "assistant", "content": PROBE}, _USER])
    if PROBE not in earlier:
        return
    for arguments in _ARGUMENTS:
        opened = _render(template, start, template_kwargs=arguments, add_generation_prompt=True)
        yield from (token for token in candidates if token in opened and token not in earlier)


def _are_mirrored(one: str, other: str) -> bool:
    """Whether two tokens are the opener and the closer of one marker, like `<think>` and `</think>`."""
    return one != other and ("/" in one) != ("/" in other) and one.replace("/", "") == other.replace("/", "")


def _with_answer(template: ChatTemplate, start: list[Message], fields: dict[str, Any]) -> Iterator[str]:
    """A conversation that ends in an answer, and one in which the user's next turn follows it."""
    answer = {"role": "assistant", **fields}
    yield _render(template, [*start, answer])
    yield _render(template, [*start, answer, _USER])


def _render(template: ChatTemplate, turns: Sequence[Message], **options: Any) -> str:
    """The text of a probe conversation; empty if the template refuses it."""
    try:
        return template.render(turns, **options)
    except TemplateRefusedError:
        return ""
