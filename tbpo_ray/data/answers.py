"""Where an answer begins and ends in a rendered conversation, and which of its text is trained.

The prompt is the conversation rendered with its generation prompt, exactly what the policy continues when it
samples. Where a template's generation prompt holds more than it writes in front of a finished answer (an
opened `<think>`), the prompt is what the finished conversation holds. The answer is what the template writes
behind it, up to the token that ends an assistant turn. An answer may hold several turns; the results of tools
and the user's words between them are context, not trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tbpo_ray.models.chat import ChatTemplate, Message, TemplateRefusedError


@dataclass(frozen=True)
class Segment:
    """A stretch of an answer's text."""

    text: str
    trained: bool


class NotPrefixStableError(ValueError):
    """A template writes the same turns differently once others follow, so that no token span is theirs."""


@dataclass(frozen=True)
class AnswerRenderer:
    """Splits conversations of one template.

    Attributes:
        template: renders them.
        end: the special token behind an assistant turn; None where the template has none.
    """

    template: ChatTemplate
    end: str | None

    def pair(
        self,
        prompt: Sequence[Message],
        answers: Sequence[Sequence[Message]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[list[Segment]]]:
        """The text of the prompt, and the segments of each answer to it.

        Args:
            answers: their turns; the first and the last message of each is the assistant's.

        Raises:
            NotPrefixStableError, TemplateRefusedError: as :meth:`split`.
        """
        found = [self.split(prompt, turns, tools=tools, template_kwargs=template_kwargs) for turns in answers]
        shortest = min((start for start, _ in found), key=len)
        out = []
        for start, segments in found:
            if not start.startswith(shortest):
                raise NotPrefixStableError("the template writes one prompt differently before two answers")
            first = Segment(start[len(shortest) :] + segments[0].text, True)
            out.append([first, *segments[1:]])
        return shortest, out

    def split(
        self,
        prompt: Sequence[Message],
        turns: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> tuple[str, list[Segment]]:
        """The text in front of an answer, and the answer's, with its end token where the template has one.

        Raises:
            NotPrefixStableError: the template does not write the prompt in front of the answer as it writes
                the prompt alone.
            TemplateRefusedError: the template's own refusal.
        """
        options: dict[str, Any] = {"tools": tools, "template_kwargs": template_kwargs}
        whole = self.template.render([*prompt, *turns], **options)
        found: list[Segment] = []
        first = reached = None
        for k, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            known = [*prompt, *turns[:k]]
            start = self._start(known, whole, options)
            upto = whole if k == len(turns) - 1 else self.template.render([*known, turn], **options)
            text = self._cut(upto[start:], known, options)
            if not upto.startswith(whole[:start]) or not whole.startswith(text, start):
                raise NotPrefixStableError(f"turn {k + 1} of the answer is written differently in the whole")
            first = start if first is None else first
            if reached is not None:
                found.append(Segment(whole[reached:start], False))
            found.append(Segment(text, True))
            reached = start + len(text)
        return whole[:first], found

    def _start(self, known: Sequence[Message], whole: str, options: dict[str, Any]) -> int:
        """Where in `whole` the assistant's turn behind `known` begins."""
        start = self.template.render(known, add_generation_prompt=True, **options)
        if whole.startswith(start):
            return len(start)
        # The generation prompt may hold more than the template writes in front of a finished answer, such as
        # an opened `<think>`: the answer then begins behind what is written in front of its content.
        frame = self.template.frame(known, **options)
        if frame is not None and whole.startswith(frame[0] + frame[1]):
            return len(frame[0]) + len(frame[1])
        raise NotPrefixStableError("the template writes the prompt differently in front of an answer")

    def _cut(self, text: str, prompt: Sequence[Message], options: dict[str, Any]) -> str:
        """`text` up to the end of the assistant's turn."""
        if self.end is not None:
            at = text.rfind(self.end)
            return text[: at + len(self.end)] if at >= 0 else text.rstrip() + self.end
        frame = self.template.frame(prompt, **options)
        return text.removesuffix(frame[2]) if frame is not None else text.rstrip()


__all__ = ["AnswerRenderer", "NotPrefixStableError", "Segment", "TemplateRefusedError"]
