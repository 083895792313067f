"""Tokenize preference pairs, with the boundary between prompt and answer found in token space.

The prompt is rendered by the chat template (with its generation prompt) and tokenized separately from each
answer, which ends in EOS. No token ever spans the boundary, so that training, evaluation and generation see
exactly the same prompt tokens. These rules apply, and each use of one is counted:

- a prompt starts with exactly one BOS if the tokenizer or its template uses BOS;
- an answer ends in exactly one EOS, unless it was truncated; text that spells a special token is plain text;
- a prompt longer than `data.max_prompt_length` is truncated at the front (BOS is kept), never at the end;
- an answer is truncated at `data.max_length`, and always keeps at least one token.
"""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from tbpo_ray.config.schema import DataConfig
from tbpo_ray.data.chat_template import render_prompt
from tbpo_ray.data.messages import Message
from tbpo_ray.data.records import Record
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.errors import InputError
from tbpo_ray.models.load import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids: the prompt with its BOS, each answer with its EOS (without it if it was truncated)."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class TokenizerSpec:
    """Everything in a tokenizer that determines token ids, as plain text.

    It is small to send to workers, and its digest is part of the fingerprint of prepared pairs.
    """

    backend: str
    """The content of `tokenizer.json`."""
    template: str | None
    special_tokens: dict[str, str]
    """Names to texts (`bos_token`: `<s>`), which templates refer to."""
    bos: int | None
    eos: int
    adds_bos: bool
    """Whether the tokenizer itself puts BOS in front of a text."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TokenizerSpec:
        """The specification of a transformers tokenizer.

        Raises:
            InputError: when it has no fast backend or no EOS token.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if backend is None:
            raise InputError(f"model.name_or_path={name}: needs a fast tokenizer (tokenizer.json)")
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"model.name_or_path={name}: its tokenizer has no EOS token, so answers cannot end"
            )
        template: Any = tokenizer.chat_template
        if template is not None and not isinstance(template, str):
            template = tokenizer.get_chat_template()
        special = {
            key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)
        }
        from tokenizers import Tokenizer

        # A saved tokenizer may keep truncation and padding switched on; here both are decided elsewhere.
        copy = Tokenizer.from_str(backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and copy.encode("a").ids[:1] == [bos]
        return cls(copy.to_str(), template, special, bos, tokenizer.eos_token_id, adds_bos)

    @classmethod
    def load(cls, path: str, chat_template: str | None = None) -> TokenizerSpec:
        """The tokenizer in a model folder or on the hub; remote code is never run.

        Args:
            path: a folder or a hub name.
            chat_template: a Jinja file that replaces the tokenizer's own template, or `none` for plain text.

        Raises:
            InputError: when the tokenizer or the template does not exist.
        """
        return cls.of(load_tokenizer(path, chat_template=chat_template))

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TokenizerSpec:
        return cls(**json.loads(text))


class PairTokenizer:
    """Turns records into tokenized pairs.

    Args:
        spec: the tokenizer.
        max_length: maximum number of tokens of a prompt and one answer together.
        prompt_limit: maximum number of tokens of a prompt, smaller than `max_length`.
    """

    def __init__(self, spec: TokenizerSpec, max_length: int, prompt_limit: int):
        from tokenizers import Tokenizer

        assert 1 <= prompt_limit < max_length
        self.spec, self.max_length, self.prompt_limit = spec, max_length, prompt_limit
        self.counts: Counter[str] = Counter()
        """How often each rule was applied."""
        self._backend = Tokenizer.from_str(spec.backend)
        # Texts of special tokens: a prompt that spells one is counted, since a template does not escape it.
        texts = {token for token in spec.special_tokens.values() if token}
        added = self._backend.get_added_tokens_decoder().values()
        texts |= {token.content for token in added if token.special}
        self._special = re.compile("|".join(map(re.escape, sorted(texts))) or r"(?!)")

    def prompts(self, conversations: Sequence[list[Message]]) -> list[list[int] | RecordError]:
        """The prompt tokens of each conversation, or the reason why there are none."""
        spec = self.spec
        rendered = [render_prompt(messages, spec.template, spec.special_tokens) for messages in conversations]
        texts = [text for text in rendered if isinstance(text, str)]
        ids = iter(self._encode(texts, plain=spec.template is None))
        out: list[list[int] | RecordError] = []
        for text, messages in zip(rendered, conversations, strict=True):
            out.append(text if isinstance(text, RecordError) else self._normalize_prompt(next(ids)))
            self.counts["special_text_in_prompt"] += any(self._special.search(m["content"]) for m in messages)
        return out

    def pairs(self, records: Sequence[Record]) -> list[TokenizedPair | RecordError]:
        """The tokens of each record, or the reason why it is rejected."""
        prompts = self.prompts([record.prompt for record in records])
        texts = [text for record in records for text in (record.chosen_text, record.rejected_text)]
        answers = self._encode(texts, plain=True)
        decoded = self._backend.decode_batch(answers, skip_special_tokens=False)
        out: list[TokenizedPair | RecordError] = []
        for index, prompt in enumerate(prompts):
            if isinstance(prompt, RecordError):
                out.append(prompt)
                continue
            both = slice(2 * index, 2 * index + 2)
            out.append(self._pair(prompt, answers[both], texts[both], decoded[both]))
        return out

    def decode_answer(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens without its EOS."""
        ids = list(ids)
        return self._backend.decode(
            ids[:-1] if ids[-1:] == [self.spec.eos] else ids, skip_special_tokens=False
        )

    def _pair(
        self, prompt: list[int], answers: list[list[int]], texts: list[str], decoded: list[str]
    ) -> TokenizedPair | RecordError:
        for name, ids, text, back in zip(("chosen", "rejected"), answers, texts, decoded, strict=True):
            if not ids:
                return RecordError("answer_without_tokens", name)
            if not _same_text(text, back):
                return RecordError("answer_not_representable", f"{name} decodes to {back[:80]!r}")
        room = self.max_length - len(prompt)
        chosen = self._truncate_answer(answers[0], room, "chosen")
        rejected = self._truncate_answer(answers[1], room, "rejected")
        if chosen == rejected:
            return RecordError("pair_same_tokens", f"{len(chosen)} tokens each")
        return TokenizedPair(prompt, chosen, rejected)

    def _truncate_answer(self, ids: list[int], room: int, name: str) -> list[int]:
        """Append EOS if the answer fits into `room` tokens, otherwise truncate it."""
        if len(ids) < room:
            return [*ids, self.spec.eos]
        self.counts[f"{name}_truncated"] += 1
        return ids[:room]

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

    def _encode(self, texts: list[str], *, plain: bool) -> list[list[int]]:
        """Token ids without BOS and EOS; with `plain`, special tokens spelled in a text stay text."""
        self._backend.encode_special_tokens = plain
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: list[Message], data: DataConfig) -> list[int]:
    """The tokens of one prompt, exactly as in training.

    Raises:
        RecordError: when the template refuses the conversation or renders no tokens.
    """
    template = json.dumps(tokenizer.chat_template)
    pairs = _cached_tokenizer(tokenizer, template, data.max_length, data.prompt_limit)
    ids = pairs.prompts([messages])[0]
    if isinstance(ids, RecordError):
        raise ids
    return ids


@lru_cache(maxsize=8)
def _cached_tokenizer(tokenizer: Any, template: str, max_length: int, prompt_limit: int) -> PairTokenizer:
    return PairTokenizer(TokenizerSpec.of(tokenizer), max_length, prompt_limit)


def _same_text(text: str, back: str) -> bool:
    """Whether two texts are equal up to Unicode composition and one space that some tokenizers prepend."""
    if back == text or back == " " + text:
        return True
    return unicodedata.normalize("NFC", back) == unicodedata.normalize("NFC", text)
