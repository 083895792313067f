"""Token ids of texts that follow one another, without a token that spans the boundary between them.

The ids of a text behind another one equal those of the two texts encoded together, wherever these have a
token boundary in between. Two habits of tokenizers make a difference: some put a space in front of a text,
and some special tokens swallow the white space behind them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken

GUARD = "\U0010ffff"
"""A noncharacter that is put into a spelled special token while a template runs, so that the token which the
template writes and the text which the record holds can be told apart."""
_FIRST_PLACEHOLDER = 0xF0000


@dataclass(frozen=True)
class Continuation:
    """A text to encode behind another one."""

    before: str
    before_ids: Sequence[int]
    text: str


class Encoder:
    """Encodes texts with a tokenizer.

    Args:
        backend: the content of `tokenizer.json`.
        special: texts that count as special tokens, in addition to those of the tokenizer.
    """

    def __init__(self, backend: str, special: Sequence[str] = ()):
        from tokenizers import Tokenizer

        self._source = backend
        self.backend = Tokenizer.from_str(backend)
        self.added: dict[int, AddedToken] = self.backend.get_added_tokens_decoder()
        texts = {text for text in special if text}
        texts |= {token.content for token in self.added.values() if token.special}
        self._special_texts = texts
        # The longest first, since one token may be the beginning of another.
        self.special = re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")
        self._prepends, self._prepends_once = _prefix_habit(json.loads(backend))
        self._placeholders: dict[str, str] = {}

    def encode(self, texts: Sequence[str], *, plain: bool = False) -> list[list[int]]:
        """Token ids without BOS and EOS; with `plain`, special tokens spelled in a text stay text."""
        self.backend.encode_special_tokens = plain
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def encode_behind(self, items: Sequence[Continuation]) -> list[list[int]]:
        """Token ids of each text behind the one before it; a text with :data:`GUARD` is encoded by parts."""
        texts: list[str] = []
        for item in items:
            lead, in_context = self._context(item)
            texts.append(lead + item.text)
            if in_context:
                texts.append(item.before + item.text)
        encoded = self._encode_guarded(texts)
        return [self._behind(item, encoded) for item in items]

    def _context(self, item: Continuation) -> tuple[str, bool]:
        """An added token to encode in front of a text, and whether to encode all of the text before it."""
        token = self.added.get(item.before_ids[-1]) if item.before_ids else None
        if token is None:
            return "", self._prepends
        # The text depends on the token in front of it.
        return (str(token.content) if token.rstrip or self._prepends_once else ""), False

    def _behind(self, item: Continuation, encoded: Iterator[list[int]]) -> list[int]:
        lead, in_context = self._context(item)
        ids = next(encoded)[1:] if lead else next(encoded)
        if in_context:
            together, size = next(encoded), len(item.before_ids)
            ids = together[size:] if together[:size] == list(item.before_ids) else ids
        return ids

    def _encode_guarded(self, texts: Sequence[str]) -> Iterator[list[int]]:
        if not any(GUARD in text for text in texts):
            return iter(self.encode(texts))
        ordinary = iter(self.encode([text for text in texts if GUARD not in text]))
        return iter([self._encode_parts(text) if GUARD in text else next(ordinary) for text in texts])

    def _encode_parts(self, text: str) -> list[int]:
        """Token ids of a text in which some special tokens are spelled (guarded) and others are meant.

        Those that are meant become placeholders: added tokens that the tokenizer splits at, as it would
        split at the special tokens themselves, while it reads all other special tokens as text.
        """
        backend = self._plain_backend
        ids: dict[int, int] = {}

        def placeholder(match: re.Match[str]) -> str:
            token = match.group()
            meant = self.backend.token_to_id(token)
            if meant is None:
                return token
            if token not in self._placeholders:
                self._placeholders[token] = chr(_FIRST_PLACEHOLDER + len(self._placeholders))
                backend.add_tokens([self._like(token, self._placeholders[token])])
            character = self._placeholders[token]
            ids[backend.token_to_id(character)] = meant
            return character

        replaced = self.special.sub(placeholder, text).replace(GUARD, "")
        encoded = backend.encode(replaced, add_special_tokens=False).ids
        return [ids.get(token, token) for token in encoded]

    def _like(self, token: str, character: str) -> AddedToken:
        from tokenizers import AddedToken

        known = {added.content: added for added in self.added.values()}.get(token)
        strips = {"lstrip": known.lstrip, "rstrip": known.rstrip} if known is not None else {}
        return AddedToken(character, normalized=False, special=False, **strips)

    @cached_property
    def _plain_backend(self) -> Any:
        from tokenizers import Tokenizer

        tree = json.loads(self._source)
        for token in tree["added_tokens"]:
            token["special"] = token["special"] or token["content"] in self._special_texts
        backend = Tokenizer.from_str(json.dumps(tree))
        backend.encode_special_tokens = True
        return backend


def guard(messages: Sequence[dict[str, Any]], special: re.Pattern[str]) -> list[dict[str, Any]]:
    """The messages with :data:`GUARD` in every spelled special token of their strings, roles excepted."""
    return [
        {key: value if key == "role" else _guard(value, special) for key, value in message.items()}
        for message in messages
    ]


def _guard(value: Any, special: re.Pattern[str]) -> Any:
    if isinstance(value, str):
        return special.sub(lambda match: match.group()[0] + GUARD + match.group()[1:], value)
    if isinstance(value, dict):
        # The keys are the record's own too: those of a tool call's arguments are written out.
        return {_guard(key, special): _guard(item, special) for key, item in value.items()}
    return [_guard(item, special) for item in value] if isinstance(value, list) else value


def spells(messages: Sequence[dict[str, Any]], special: re.Pattern[str]) -> bool:
    """Whether a string in the messages spells a special token, roles excepted."""
    for message in messages:
        for key, value in message.items():
            if key != "role" and (special.search(value) if type(value) is str else _spells(value, special)):
                return True
    return False


def _spells(value: Any, special: re.Pattern[str]) -> bool:
    if isinstance(value, str):
        return special.search(value) is not None
    if isinstance(value, dict):
        return any(_spells(item, special) for pair in value.items() for item in pair)
    return isinstance(value, list) and any(_spells(item, special) for item in value)


def _prefix_habit(tree: dict[str, Any]) -> tuple[bool, bool]:
    """Whether a tokenizer puts a space in front of a text, and whether only of the first text."""
    prepends = once = False
    stack = [tree.get("normalizer"), tree.get("pre_tokenizer")]
    while stack:
        part = stack.pop()
        if not isinstance(part, dict):
            continue
        stack += [*(part.get("normalizers") or []), *(part.get("pretokenizers") or [])]
        kind, scheme = part.get("type"), part.get("prepend_scheme", "always")
        metaspace = kind == "Metaspace" and scheme != "never" and part.get("add_prefix_space", True)
        once |= metaspace and scheme == "first"
        prepends |= kind == "Prepend" or metaspace or (kind == "ByteLevel" and bool(part["add_prefix_space"]))
    return prepends, once
