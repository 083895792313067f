"""Where an answer begins and ends in a rendered conversation, and which of its text is trained.

The prompt is the conversation rendered with its generation prompt, exactly what the policy continues when it
samples. Where a template's generation prompt holds more than it writes in front of a finished answer (an
opened `<think>`), the prompt is what the finished conversation holds. The answer is what the template writes
behind it, up to the token that ends an assistant turn. An answer may hold several turns; the results of tools
and the user's words between them are context, not trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.data.template_alterations import (
    alters_prompt,
    alters_turn,
    argument_words,
    opens,
    says_something,
    spoken_texts,
)
from tbpo_ray.models.chat import ChatTemplate, Message, function_of
from tbpo_ray.models.turn_tokens import TemplateRefusedError

_OPENED_MARKER = re.compile(r"[<\[|/]+$")
"""The beginning of a marker such as `<think>` at the end of a text."""

_WORD = re.compile(r"\w+")
_MARKER = re.compile(r"<[^<>\s]+>\Z")
_MARKUP = re.compile(
    r"^\s|\s\Z|^\Z|[<>\[\]{}|\\`/\u2190-\u25ff\u27c0-\u2bff\u3008-\u301b\uff5c\U000e0000-\U0010ffff]"
)


@dataclass(frozen=True)
class Segment:
    """A stretch of an answer's text."""

    text: str
    trained: bool


@dataclass(frozen=True)
class RenderedAnswers:
    """The text of a prompt and of the answers to it."""

    prompt: str
    answers: list[list[Segment]]
    notes: list[str] = field(default_factory=list)
    """Names of the exceptional rules that were applied, to be counted:

    - `generation_prompt_differs`: a finished answer does not begin with the generation prompt;
    - `answer_rendered_plain`: the template refuses or hides an answer, which is then its text and an end;
    - `answer_altered_by_template`: the template does not write the answer as it is, such as without thoughts
      or without tool calls;
    - `prompt_altered_by_template`: the template does not write a turn of the prompt, such as a system turn;
    - `tools_ignored_by_template`: the template does not write the tools;
    - `turn_without_end`: the template ends a turn only where it is the last one, so that an earlier turn of
      an answer has no end token.
    """
    guard: str = ""
    """What marks the special tokens that the answers spell; see :func:`tbpo_ray.data.encoding.guard`."""


class NotPrefixStableError(ValueError):
    """A template writes the same turns differently once others follow, so that no token span is theirs."""


@dataclass(frozen=True)
class AnswerRenderer:
    """Splits conversations of one template.

    Attributes:
        template: renders them.
        ends: the tokens behind an assistant turn, of which the last ends it; empty where there are none.
        special: matches the texts of special tokens.
    """

    template: ChatTemplate
    ends: tuple[str, ...]
    special: re.Pattern[str]

    @property
    def end(self) -> str | None:
        """The token that ends an assistant turn."""
        return self.ends[-1] if self.ends else None

    def render(
        self,
        prompt: Sequence[Message],
        answers: Sequence[Sequence[Message]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> RenderedAnswers:
        """The text of the prompt, and the segments of each answer to it.

        Args:
            answers: their turns; the first and the last message of each is the assistant's.

        Raises:
            NotPrefixStableError: an answer has no place of its own in the rendered conversation.
            RecordError: the template hides all of an assistant's turn.
            TemplateRefusedError: the template's own refusal.
        """
        options: dict[str, Any] = {"tools": tools, "template_kwargs": template_kwargs}
        opening = self.template.render(prompt, add_generation_prompt=True, **options)
        notes: list[str] = []
        task = _Task(self, prompt, opening, options, notes)
        found: list[tuple[str, list[Segment]]] = []
        for turns in answers:
            like = None if notes else _like(answers[0], turns, found, opening)
            found.append(like or task.split(turns))
        # If only one answer follows the generation prompt, the prompt that both share is the shorter one.
        shortest = min((start for start, _ in found), key=len)
        if any(not start.startswith(shortest) for start, _ in found):
            raise NotPrefixStableError("the prompt is written differently in front of the two answers")
        segments = [
            [Segment(start[len(shortest) :] + first.text, True), *others] for start, (first, *others) in found
        ]
        if tools and self._ignores_tools(prompt, tools, opening, template_kwargs):
            notes.append("tools_ignored_by_template")
        if alters_prompt(prompt, opening):
            notes.append("prompt_altered_by_template")
        return RenderedAnswers(shortest, segments, notes)

    def _ignores_tools(
        self,
        prompt: Sequence[Message],
        tools: Sequence[Mapping[str, Any]],
        opening: str,
        template_kwargs: Mapping[str, Any] | None,
    ) -> bool:
        name = str(function_of(tools[0]).get("name") or "")
        if name and name in opening and name not in str(prompt):
            return False
        try:
            without = self.template.render(
                prompt, add_generation_prompt=True, template_kwargs=template_kwargs
            )
        except TemplateRefusedError:
            return False
        return without == opening

    def common_header(self, opened: str, header: str) -> str:
        """What a generation prompt and the text in front of a finished answer have in common.

        It ends at a boundary of both texts: two special tokens or words may begin with the same characters.
        """
        at = len(_common_prefix(opened, header))
        spans = [
            match.span()
            for text in (opened, header)
            for pattern in (self.special, _WORD)
            for match in pattern.finditer(text)
        ]
        moved = True
        while moved:
            before, at = at, len(_OPENED_MARKER.sub("", header[:at]))
            at = min((start for start, stop in spans if start < at < stop), default=at)
            moved = at < before
        return header[:at]

    def cut(self, text: str, *, last: bool) -> str:
        """`text` up to the end of the assistant's turn."""
        if self.end is not None:
            at = text.rfind(self.end)
            if at >= 0:
                return text[: at + len(self.end)]
        text = text.rstrip()
        matches = list(self.special.finditer(text))
        # Some turns have an end of their own, such as `<|eom_id|>` behind a call of a built-in tool.
        if not last or (matches and matches[-1].end() == len(text)):
            return text
        return text + (self.end or "")

    def cut_within(self, text: str, turn: Message, as_last: str) -> str:
        """`text` up to the end of its first turn, which the template writes differently as the last one.

        Some templates put an empty thought in front of the last turn only.

        Args:
            as_last: the turn's text as the last one.
        """
        inside = {match.group() for match in self.special.finditer(as_last)} - {self.end}
        match = next((match for match in self.special.finditer(text) if match.group() not in inside), None)
        if match is None or match.group() != self.end or alters_turn(turn, text[: match.start()]):
            raise NotPrefixStableError("a turn of the answer changes once others follow")
        return text[: match.end()]


@dataclass
class _Task:
    """The answers to one prompt.

    Attributes:
        opening: the prompt with its generation prompt.
        options: arguments of the template.
        notes: see :class:`RenderedAnswers`.
    """

    renderer: AnswerRenderer
    prompt: Sequence[Message]
    opening: str
    options: dict[str, Any]
    notes: list[str]

    @cached_property
    def _frame(self) -> tuple[str, str] | None:
        """The frame of an answer to the prompt, which both answers share."""
        return self.renderer.template.frame(self.prompt, ends=self.renderer.ends, **self.options)

    def split(self, turns: Sequence[Message]) -> tuple[str, list[Segment]]:
        """The text in front of an answer, and its segments, the last one up to its end token."""
        content = turns[0].get("content")
        plain = len(turns) == 1 and isinstance(content, str) and turns[0].keys() <= {"role", "content"}
        try:
            start, segments = self._turns(turns)
        except (TemplateRefusedError, NotPrefixStableError):
            if not plain:
                raise
            segments = []
        if plain:
            assert isinstance(content, str)
            ends = "".join(self.renderer.ends)
            text = segments[0].text if segments else ""
            if not text.removesuffix(ends).removesuffix(self.renderer.end or "").strip():
                self.notes.append("answer_rendered_plain")
                return self.opening, [Segment(content + ends, True)]
        if self._altered_turns(turns, segments, start):
            self.notes.append("answer_altered_by_template")
        if start != self.opening:
            self.notes.append("generation_prompt_differs")
        # What follows the prompt is always trained: the first segment is never empty.
        return start, [segment for segment in segments if segment.text]

    def _altered_turns(self, turns: Sequence[Message], segments: Sequence[Segment], start: str) -> bool:
        """Whether the template does not write all of the assistant's turns as they are.

        Args:
            start: the text in front of the answer.

        Raises:
            RecordError: it writes nothing but special tokens for a turn that says something.
        """
        spoken = [turn for turn in turns if turn["role"] == "assistant"]
        written = [segment.text for segment in segments if segment.trained]
        for turn, text in zip(spoken, written, strict=True):
            if says_something(turn) and not self.renderer.special.sub("", text).strip():
                raise RecordError("answer_without_tokens", "the chat template hides a turn of the assistant")
        # The first turn may begin with a marker that the generation prompt has opened already.
        opened = _MARKER.search(start.rstrip())
        if opened is not None and opens(opened.group(), spoken[0], written[0]):
            spoken = [{**spoken[0], "content": None}, *spoken[1:]]
        return any(
            alters_turn(turn, text) or any(word not in text for word in argument_words(turn))
            for turn, text in zip(spoken, written, strict=True)
        )

    def _turns(self, turns: Sequence[Message]) -> tuple[str, list[Segment]]:
        render = self.renderer.template.render
        whole = render([*self.prompt, *turns], **self.options)
        begin = reached = self._start(self.prompt, self.opening, whole, turns)
        segments: list[Segment] = []
        for k, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            start = begin
            if k > 0:
                known = [*self.prompt, *turns[:k]]
                opened = render(known, add_generation_prompt=True, **self.options)
                start = self._start(known, opened, whole, turns[k:])
                if start < reached:
                    raise NotPrefixStableError("a turn of the answer has no end of its own")
                segments.append(Segment(whole[reached:start], False))
            if k == len(turns) - 1:
                text = self.renderer.cut(whole[start:], last=True)
            else:
                text = self._inner_turn(whole, start, [*self.prompt, *turns[: k + 1]])
            if not text and (k == 0 or says_something(turn)):
                raise NotPrefixStableError("the template writes nothing for a turn of the answer")
            segments.append(Segment(text, True))
            reached = start + len(text)
        return whole[:begin], segments

    def _inner_turn(self, whole: str, start: int, known: Sequence[Message]) -> str:
        """The text of an assistant's turn that others follow.

        Args:
            start: where it begins in the text of the whole conversation.
            known: the conversation up to this turn.
        """
        renderer = self.renderer
        upto = renderer.template.render(known, **self.options)
        text = renderer.cut(upto[start:], last=False)
        if upto.startswith(whole[:start]):
            if whole.startswith(text, start):
                return text
            # Some templates write an end only behind the last turn.
            body = text.removesuffix("".join(renderer.ends)).rstrip()
            follows = whole[start + len(body) :].lstrip()
            same = body and whole.startswith(body, start) and not alters_turn(known[-1], body)
            if same and not follows.startswith(renderer.ends):
                self.notes.append("turn_without_end")
                return body
        return renderer.cut_within(whole[start:], known[-1], text)

    def _frames(
        self, known: Sequence[Message], opening: str, whole: str, following: Sequence[Message]
    ) -> Iterator[tuple[str, str]]:
        """`known` alone, and what may be the template's own text in front of the turn behind it."""
        frame = partial(self.renderer.template.frame, known, ends=self.renderer.ends, **self.options)
        found = self._frame if known is self.prompt else frame()
        if found is None:
            return
        yield found
        alone, _ = found
        # A turn that others follow, or that only calls tools, may have another header than the last answer.
        if following[1:] and (within := frame(rest=following[1:])) is not None:
            yield within
        if not any(spoken_texts(following[0])) and opening.startswith(alone) and whole.startswith(alone):
            yield alone, whole[len(alone) :]

    def _start(self, known: Sequence[Message], opening: str, whole: str, following: Sequence[Message]) -> int:
        """Where in `whole` the assistant's turn behind `known` begins.

        Args:
            opening: `known` with its generation prompt.
            following: the turn and those behind it.
        """
        if whole.startswith(opening):
            return len(opening)
        # The generation prompt may hold more than the template writes in front of a finished answer, such as
        # an opened `<think>`: the answer then begins behind what both have in common. Only the template's own
        # text is compared, since an answer may happen to begin like the generation prompt.
        for alone, header in self._frames(known, opening, whole, following):
            if opening.startswith(alone):
                header = self.renderer.common_header(opening[len(alone) :], header)
            if whole.startswith(alone + header):
                return len(alone) + len(header)
        raise NotPrefixStableError("the prompt is written differently in front of an answer")


def _like(
    first: Sequence[Message],
    turns: Sequence[Message],
    found: Sequence[tuple[str, list[Segment]]],
    opening: str,
) -> tuple[str, list[Segment]] | None:
    """An answer rendered like the first one, without running the template again, if that is safe.

    It is where the template writes the first answer as it is behind the generation prompt, and both are
    words without markup, which no template looks into.
    """
    if not found or not (_is_words(first) and _is_words(turns)):
        return None
    start, segments = found[0]
    written, content = segments[0].text, first[0]["content"]
    if start != opening or len(segments) != 1 or not written.startswith(content):
        return None
    return start, [Segment(turns[0]["content"] + written[len(content) :], True)]


def _is_words(turns: Sequence[Message]) -> bool:
    """Whether an answer is one turn of text without markup and without white space around it."""
    if len(turns) != 1 or len(turns[0]) != 2:
        return False
    content = turns[0]["content"]
    return type(content) is str and _MARKUP.search(content) is None


def _common_prefix(a: str, b: str) -> str:
    size = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:size]


__all__ = ["AnswerRenderer", "NotPrefixStableError", "RenderedAnswers", "Segment", "TemplateRefusedError"]
