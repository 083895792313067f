"""Tokenize preference pairs, with the boundary between prompt and answer found in token space.

The chat template renders the prompt (with its generation prompt) and the conversations with each answer; an
answer is what the template writes behind the prompt, up to and including the token that ends an assistant's
turn (EOS where the template has none). No token ever spans the boundary, so that training, evaluation and
generation see exactly the same prompt tokens. These rules apply, and each use of one is counted:

- a prompt starts with exactly one BOS if the tokenizer or its template uses BOS;
- an answer ends in exactly one end token, unless it was truncated; text of an answer that spells a special
  token is plain text, except for markers such as `<think>` in the content of an assistant's turn, which are
  the tokens that the template itself writes or looks for;
- a prompt longer than `data.max_prompt_length` is truncated at the front (BOS is kept), never at the end;
- an answer is truncated at `data.max_length`, and always keeps at least one token;
- the turns of users and tools inside an answer are context: their tokens are masked.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tbpo_ray.config.schema import DataConfig
from tbpo_ray.data.answers import (
    AnswerRenderer,
    NotPrefixStableError,
    RenderedAnswers,
    Segment,
    TemplateRefusedError,
)
from tbpo_ray.data.encoding import Continuation, Encoder, any_of, guard, spells
from tbpo_ray.data.plain_answers import plain_refusal, plain_segments, plain_text
from tbpo_ray.data.records import Record
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.data.template_alterations import alters_prompt
from tbpo_ray.data.tokenizer_spec import TokenizerSpec
from tbpo_ray.models.chat import ChatTemplate, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["PairTokenizer", "TokenizedPair", "TokenizerSpec", "prompt_tokens"]


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids: the prompt with its BOS, each answer with its end token (without it if truncated)."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_mask: list[bool] | None = None
    """False at the tokens that are context only: turns of users and tools inside the answer. None if all
    tokens are trained."""
    rejected_mask: list[bool] | None = None


class PairTokenizer:
    """Turns records into tokenized pairs.

    Args:
        spec: the tokenizer.
        max_length: maximum number of tokens of a prompt and one answer together.
        prompt_limit: maximum number of tokens of a prompt, smaller than `max_length`.
    """

    def __init__(self, spec: TokenizerSpec, max_length: int, prompt_limit: int):
        assert 1 <= prompt_limit < max_length
        self.spec, self.max_length, self.prompt_limit = spec, max_length, prompt_limit
        self.counts: Counter[str] = Counter()
        """How often each rule was applied."""
        self._encoder = Encoder(spec.backend, list(spec.special_tokens.values()))
        self._renderer: AnswerRenderer | None = None
        self.end = spec.eos
        """The token that ends an answer."""
        self._end_text = ""
        if (template := spec.chat_template) is not None:
            self._use_template(template)

    def _use_template(self, template: ChatTemplate) -> None:
        spec = self.spec
        added = {token.content: index for index, token in self._encoder.added.items()}
        special = [token.content for token in self._encoder.added.values() if token.special]
        ends = template.turn_ends(added, special)
        if ends:
            self.end = added[ends[-1]]
            self._end_text = ends[-1]
            # An answer that spells its own end must not end there, whatever kind of token that is.
            self._encoder = Encoder(spec.backend, [*spec.special_tokens.values(), *ends])
        texts = self._encoder.special_texts
        self._markers = template.markers(texts, ends)
        self._foreign = any_of(texts - self._markers)
        self._renderer = AnswerRenderer(template, ends, self._encoder.special)

    def prompts(
        self,
        conversations: Sequence[list[Message]],
        *,
        tools: Sequence[Sequence[Mapping[str, Any]] | None] | None = None,
        template_kwargs: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[list[int] | RecordError]:
        """The prompt tokens of each conversation, or the reason why there are none.

        Args:
            tools: the tools of each conversation.
            template_kwargs: each conversation's own arguments for the chat template.
        """
        count = len(conversations)
        texts = [
            self._render_prompt(*item)
            for item in zip(
                conversations, tools or [None] * count, template_kwargs or [{}] * count, strict=True
            )
        ]
        ids = iter(self._encode_prompts([text for text in texts if isinstance(text, str)]))
        out: list[list[int] | RecordError] = []
        for text, messages in zip(texts, conversations, strict=True):
            out.append(text if isinstance(text, RecordError) else self._normalize_prompt(next(ids)))
            if isinstance(text, str):
                self.counts["prompt_altered_by_template"] += alters_prompt(messages, text)
            self.counts["special_text_in_prompt"] += spells(messages, self._encoder.special)
        return out

    def pairs(self, records: Sequence[Record]) -> list[TokenizedPair | RecordError]:
        """The tokens of each record, or the reason why it is rejected."""
        rendered = [self._render(record) for record in records]
        good = [item for item in rendered if not isinstance(item, RecordError)]
        raw_prompts = self._encode_prompts([item.prompt for item in good])
        answers = iter(self._encode_answers(good, raw_prompts))
        prompts = iter(raw_prompts)
        out: list[TokenizedPair | RecordError] = []
        for record, item in zip(records, rendered, strict=True):
            self.counts["special_text_in_prompt"] += spells(record.prompt, self._encoder.special)
            if isinstance(item, RecordError):
                out.append(item)
                continue
            self.counts.update(item.notes)
            prompt, both = self._normalize_prompt(next(prompts)), (next(answers), next(answers))
            out.append(prompt if isinstance(prompt, RecordError) else self._pair(prompt, item, both))
        return out

    def _render_prompt(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        template_kwargs: Mapping[str, Any],
    ) -> str | RecordError:
        if self._renderer is None:
            return plain_refusal([messages], tools) or plain_text(messages)
        try:
            return self._renderer.template.render(
                messages,
                tools=tools,
                template_kwargs=self._template_kwargs(template_kwargs),
                add_generation_prompt=True,
            )
        except TemplateRefusedError as error:
            return RecordError("template_refused", str(error))

    def _render(self, record: Record) -> RenderedAnswers | RecordError:
        answers = [record.chosen, record.rejected]
        if self._renderer is None:
            refusal = plain_refusal([record.prompt, *answers], record.tools)
            if refusal is not None:
                return refusal
            return RenderedAnswers(plain_text(record.prompt), [plain_segments(turns) for turns in answers])
        if record.repeats_prompt:  # the template writes its own text between prompt and answer
            answers = [[{**turn, "content": turn["content"].lstrip()} for turn in turns] for turns in answers]
        mark = ""
        if any(spells(turns, self._encoder.special) for turns in answers):
            turns = [*answers[0], *answers[1]]
            guarded, mark = guard(turns, self._encoder.special, self._foreign, record.prompt)
            given, answers = answers, [guarded[: len(record.chosen)], guarded[len(record.chosen) :]]
            self.counts["special_text_in_answer"] += sum(a != b for a, b in zip(given, answers, strict=True))
        try:
            rendered = self._renderer.render(
                record.prompt,
                answers,
                tools=record.tools,
                template_kwargs=self._template_kwargs(record.template_kwargs),
            )
            return replace(rendered, guard=mark)
        except RecordError as error:
            return error
        except TemplateRefusedError as error:
            return RecordError("template_refused", str(error))
        except NotPrefixStableError as error:
            return RecordError("template_not_prefix_stable", str(error))

    def _template_kwargs(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a conversation; a null of the record's own keeps the configured argument."""
        configured = self.spec.template_kwargs
        return {**configured, **{k: v for k, v in own.items() if v is not None or k not in configured}}

    def _encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        return self._encoder.encode(texts, plain=self._renderer is None)

    def _encode_answers(
        self, rendered: Sequence[RenderedAnswers], prompts: Sequence[list[int]]
    ) -> list[_Answer]:
        """The tokens of both answers of each pair, in one list."""
        items: list[Continuation] = []
        sides: list[list[Segment]] = []
        for pair, prompt in zip(rendered, prompts, strict=True):
            for segments in pair.answers:
                text = segments[0].text
                if len(segments) == 1:
                    text = self._without_end(text)
                items.append(Continuation(pair.prompt, prompt, text, pair.guard))
                sides.append(segments)
        encoded = self._encode_behind(items)
        # The last segment's end token is added below.
        answers = [
            _Answer(ids, [True] * len(ids)) if len(segments) == 1 else self._join(item, ids, segments)
            for item, ids, segments in zip(items, encoded, sides, strict=True)
        ]
        decoded = self._encoder.backend.decode_batch([a.ids for a in answers], skip_special_tokens=False)
        for answer, back, first, segments in zip(answers, decoded, items, sides, strict=True):
            texts = [first.text, *(segment.text for segment in segments[1:])]
            text = self._without_end("".join(texts)) if segments[1:] else first.text
            if not self._same_text(text, back, first, answer.ids):
                answer.text_differs = back[:80]
            if self._lacks_end(segments[-1].text):
                answer.ids.append(self.end)
                answer.mask.append(True)
        return answers

    def _without_end(self, text: str) -> str:
        """A text without the end token behind it, and without the white space that the token swallows."""
        without = text.removesuffix(self._end_text)
        swallows = without != text and self._encoder.added[self.end].lstrip
        return without.rstrip() if swallows else without

    def _lacks_end(self, last: str) -> bool:
        """Whether the end token has to be put behind the tokens of an answer's last segment."""
        if self._end_text or self._renderer is None:
            return last.endswith(self._end_text)
        # A template without an end of its own may have written EOS or another special token.
        return all(match.end() < len(last) for match in self._encoder.special.finditer(last))

    def _encode_behind(self, items: Sequence[Continuation]) -> list[list[int]]:
        if self._renderer is None:
            return self._encoder.encode([item.text for item in items], plain=True)
        return self._encoder.encode_behind(items)

    def _join(self, first: Continuation, ids: list[int], segments: Sequence[Segment]) -> _Answer:
        """An answer of several segments, of which the first one is already encoded; without its end token."""
        before, all_ids, mask = first.before + first.text, list(ids), [True] * len(ids)
        for k, segment in enumerate(segments[1:], start=2):
            text = self._without_end(segment.text) if k == len(segments) else segment.text
            behind = Continuation(before, [*first.before_ids, *all_ids], text, first.guard)
            (more,) = self._encode_behind([behind])
            all_ids += more
            mask += [segment.trained] * len(more)
            before += segment.text
        return _Answer(all_ids, mask)

    def _pair(
        self, prompt: list[int], rendered: RenderedAnswers, answers: Sequence[_Answer]
    ) -> TokenizedPair | RecordError:
        masks: list[list[bool] | None] = []
        for name, answer in zip(("chosen", "rejected"), answers, strict=True):
            if not any(t != self.end for t in answer.ids):
                return RecordError("answer_without_tokens", name)
            if answer.text_differs is not None:
                return RecordError("answer_not_representable", f"{name} decodes to {answer.text_differs!r}")
        room = self.max_length - len(prompt)
        for name, answer in zip(("chosen", "rejected"), answers, strict=True):
            self.counts[f"{name}_truncated"] += len(answer.ids) > room
            answer.ids, answer.mask = answer.ids[:room], answer.mask[:room]
            masks.append(None if all(answer.mask) else answer.mask)
            self.counts["masked_answers"] += masks[-1] is not None
        chosen, rejected = answers[0].ids, answers[1].ids
        if chosen == rejected:
            return RecordError("pair_same_tokens", f"{len(chosen)} tokens each")
        return TokenizedPair(prompt, chosen, rejected, *masks)

    def _same_text(self, text: str, back: str, first: Continuation, ids: Sequence[int]) -> bool:
        """Whether an answer's tokens say what its text says, up to what tokenizers do to white space.

        That is Unicode composition, one space that some tokenizers prepend or take away at the beginning, and
        the white space around added tokens, which some of them swallow and others get.
        """
        if back == text or back == " " + text:
            return True
        text = text.replace(first.guard, "") if first.guard else text
        text, back = (unicodedata.normalize("NFC", value) for value in (text, back))
        added = {self._encoder.added[token].content for token in ids if token in self._encoder.added}
        for content in added:  # some decoders read the mark of a space inside of a token as a space
            text, back = (value.replace(content, content.replace("▁", " ")) for value in (text, back))
        added = {content.replace("▁", " ") for content in added}
        if added:
            around = re.compile(rf"\s*({'|'.join(map(re.escape, added))})\s*")
            text, back = (around.sub(r"\1", value) for value in (text, back))
        token = self._encoder.added.get(first.before_ids[-1]) if first.before_ids else None
        if token is not None and token.rstrip:
            text, back = text.lstrip(), back.lstrip()
        return back in (text, " " + text) or " " + back == text

    def _normalize_prompt(self, ids: list[int]) -> list[int] | RecordError:
        """Make sure of exactly one BOS and at most `prompt_limit` tokens."""
        bos, start = self.spec.bos, 0
        while bos is not None and start < len(ids) and ids[start] == bos:
            start += 1
        self.counts["bos_repeated"] += start > 1
        self.counts["bos_added"] += not start and self.spec.adds_bos
        head = [bos] if bos is not None and (start or self.spec.adds_bos) else []
        body = ids[start:]
        if not body:
            return RecordError("prompt_without_tokens")
        if len(head) + len(body) > self.prompt_limit:
            self.counts["prompt_truncated"] += 1
            head = head if self.prompt_limit > 1 else []
            body = body[len(body) - (self.prompt_limit - len(head)) :]
        return [*head, *body]


@dataclass
class _Answer:
    """The tokens of an answer with its end token, before truncation."""

    ids: list[int]
    mask: list[bool]
    text_differs: str | None = None
    """What the tokens decode to, where that is not the text."""


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: list[Message], data: DataConfig) -> list[int]:
    """The tokens of one prompt, exactly as in training.

    Raises:
        RecordError: when the template refuses the conversation or renders no tokens.
    """
    template = json.dumps([tokenizer.chat_template, data.template_kwargs], sort_keys=True)
    pairs = _cached_tokenizer(tokenizer, template, data.max_length, data.prompt_limit)
    ids = pairs.prompts([messages])[0]
    if isinstance(ids, RecordError):
        raise ids
    return ids


@lru_cache(maxsize=8)
def _cached_tokenizer(tokenizer: Any, template: str, max_length: int, prompt_limit: int) -> PairTokenizer:
    spec = TokenizerSpec.of(tokenizer, json.loads(template)[1])
    return PairTokenizer(spec, max_length, prompt_limit)
