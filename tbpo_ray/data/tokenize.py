"""From messages to tokens, with every boundary found in token space.

The prompt is rendered by the chat template (with its generation prompt) and tokenized by itself; each answer
is tokenized by itself and ends in EOS. Nothing is ever merged across the boundary, so training, evaluation
and generation see the very same prompt tokens. The rules, each counted when it did something:

- BOS stands exactly once at the start, where the tokenizer or its template uses one;
- an answer ends in exactly one EOS, unless it was truncated; text that spells a special token is plain text;
- a prompt longer than `data.max_prompt_length` loses its front (BOS stays), never its end;
- an answer is cut at `data.max_length`, and always keeps at least one token.

Without a chat template a prompt is the contents of its messages joined by blank lines.
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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tbpo_ray.config.schema import DataConfig
from tbpo_ray.data.records import Message, Record
from tbpo_ray.data.rejection_reasons import RecordError
from tbpo_ray.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DATE = "26 Jul 2024"
"""Given to templates that would else print today's date, so that tokens do not change overnight."""


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids: the prompt with its BOS, each answer with its EOS (none where it was truncated)."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class TokenizerSpec:
    """All of a tokenizer that decides about tokens, as plain text: small to send, and it has a digest."""

    backend: str
    """What `tokenizer.json` holds."""
    template: str | None
    special_tokens: dict[str, str]
    """Names to texts (`bos_token`: `<s>`), which templates refer to."""
    bos: int | None
    eos: int
    adds_bos: bool
    """Whether the tokenizer puts BOS in front by itself."""

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> TokenizerSpec:
        """What matters of a transformers tokenizer.

        Raises:
            InputError: when it has no fast backend, or no EOS token.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if backend is None:
            raise InputError(f"model.name_or_path={name}: needs a fast tokenizer (tokenizer.json)")
        if tokenizer.eos_token_id is None:
            raise InputError(f"model.name_or_path={name}: the tokenizer has no EOS token, answers cannot end")
        template: Any = tokenizer.chat_template
        if template is not None and not isinstance(template, str):
            template = tokenizer.get_chat_template()
        special = {
            key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)
        }
        from tokenizers import Tokenizer

        copy = Tokenizer.from_str(backend.to_str())
        copy.no_truncation()
        copy.no_padding()
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and copy.encode("a").ids[:1] == [bos]
        return cls(copy.to_str(), template, special, bos, tokenizer.eos_token_id, adds_bos)

    @classmethod
    def load(cls, path: str, chat_template: str | None = None) -> TokenizerSpec:
        """The tokenizer in a model folder or on the hub; no remote code.

        Args:
            path: folder, or hub name.
            chat_template: a Jinja file to use instead of the tokenizer's own, or `none` for plain text.

        Raises:
            InputError: when there is no such tokenizer or template.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError) as error:
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise InputError(f"model.name_or_path={path}: no tokenizer could be loaded ({first})") from error
        if chat_template == "none":
            tokenizer.chat_template = None
        elif chat_template is not None:
            if not Path(chat_template).is_file():
                raise InputError(
                    f"model.chat_template={chat_template}: no such file; give a Jinja file or `none`"
                )
            tokenizer.chat_template = Path(chat_template).read_text(encoding="utf-8")
        return cls.of(tokenizer)

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
        max_length: most tokens of a prompt and one answer together.
        prompt_limit: most tokens of a prompt, smaller than `max_length`.
    """

    def __init__(self, spec: TokenizerSpec, max_length: int, prompt_limit: int):
        from tokenizers import Tokenizer

        assert 1 <= prompt_limit < max_length
        self.spec, self.max_length, self.prompt_limit = spec, max_length, prompt_limit
        self.counts: Counter[str] = Counter()
        """How often each rule did something."""
        self._backend = Tokenizer.from_str(spec.backend)
        texts = {token for token in spec.special_tokens.values() if token}
        added = self._backend.get_added_tokens_decoder().values()
        texts |= {token.content for token in added if token.special}
        self._special = re.compile("|".join(map(re.escape, sorted(texts))) or r"(?!)")

    def prompts(self, conversations: Sequence[list[Message]]) -> list[list[int] | RecordError]:
        """Prompt tokens of each conversation, or why there are none."""
        rendered = [self._render(messages) for messages in conversations]
        texts = [text for text in rendered if isinstance(text, str)]
        ids = iter(self._encode(texts, plain=self.spec.template is None))
        out: list[list[int] | RecordError] = []
        for text, messages in zip(rendered, conversations, strict=True):
            out.append(text if isinstance(text, RecordError) else self._trim_prompt(next(ids)))
            self.counts["special_text_in_prompt"] += any(self._special.search(m["content"]) for m in messages)
        return out

    def pairs(self, records: Sequence[Record]) -> list[TokenizedPair | RecordError]:
        """Tokens of each record, or why it is no pair."""
        prompts = self.prompts([record.prompt for record in records])
        texts = [text for record in records for text in (record.chosen, record.rejected)]
        answers = self._encode(texts, plain=True)
        decoded = self._backend.decode_batch(answers, skip_special_tokens=False)
        out: list[TokenizedPair | RecordError] = []
        for index, prompt in enumerate(prompts):
            two = slice(2 * index, 2 * index + 2)
            out.append(
                prompt
                if isinstance(prompt, RecordError)
                else self._pair(prompt, answers[two], texts[two], decoded[two])
            )
        return out

    def decode_answer(self, ids: Sequence[int]) -> str:
        """The text of an answer's tokens, its EOS left out."""
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
                return RecordError("answer_not_representable", f"{name} comes back as {back[:80]!r}")
        room = self.max_length - len(prompt)
        chosen, rejected = (
            self._finish(ids, room, name) for name, ids in zip(("chosen", "rejected"), answers, strict=True)
        )
        if chosen == rejected:
            return RecordError("pair_same_tokens", f"{len(chosen)} tokens each")
        return TokenizedPair(prompt, chosen, rejected)

    def _finish(self, ids: list[int], room: int, name: str) -> list[int]:
        if len(ids) < room:
            return [*ids, self.spec.eos]
        self.counts[f"{name}_truncated"] += 1
        return ids[:room]

    def _trim_prompt(self, ids: list[int]) -> list[int] | RecordError:
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

    def _render(self, messages: list[Message]) -> str | RecordError:
        if self.spec.template is None:
            return "\n\n".join(message["content"] for message in messages)
        from transformers.utils.chat_template_utils import render_jinja_template

        values: dict[str, Any] = {**self.spec.special_tokens, "date_string": _DATE}
        try:
            rendered = render_jinja_template(
                conversations=[messages],
                chat_template=self.spec.template,
                add_generation_prompt=True,
                **values,
            )
        except Exception as error:  # a template is a program of its own: whatever it raises is its refusal
            return RecordError("template_refused", f"{type(error).__name__}: {error}"[:200])
        return rendered[0][0]

    def _encode(self, texts: list[str], *, plain: bool) -> list[list[int]]:
        """Token ids without BOS and EOS; `plain`: special tokens spelled in the text stay text."""
        self._backend.encode_special_tokens = plain
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, messages: list[Message], data: DataConfig) -> list[int]:
    """The tokens of one prompt, exactly as training sees them.

    Raises:
        RecordError: when the template refuses the conversation, or nothing is left of it.
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
    """Equal up to Unicode composition and the one space that some tokenizers put in front."""
    if back == text or back == " " + text:
        return True
    return unicodedata.normalize("NFC", back) == unicodedata.normalize("NFC", text)
