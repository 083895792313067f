"""Token ids of texts that follow one another, without a token that spans the boundary between them.

The ids of a text behind another one equal those of the two texts encoded together, wherever these have a
token boundary in between. Two habits of tokenizers make a difference: some put a space in front of a text,
and some special tokens swallow the white space behind them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import AddedToken

_GUARD = "\U0010ffff"
"""A noncharacter that is put into a spelled special token while a template runs, so that the token which the
template writes and the text which the record holds can be told apart."""
_PLACEHOLDER = "\U000f0000"
_FIRST_INDEX = 0xF0001


@dataclass(frozen=True)
class Continuation:
    """A text to encode behind another one."""

    before: str
    before_ids: Sequence[int]
    text: str
    guard: str = ""
    """What marks the special tokens that `text` spells; empty if it spells none."""


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
        self.special_texts = frozenset(texts)
        # The longest first, since one token may be the beginning of another.
        self.special = any_of(texts)
        """Matches them; white space, which may be a token too, is always text."""
        self._prepends, self._prepends_once = _prefix_habit(json.loads(backend))
        self._plain_backends: dict[str, tuple[Any, dict[str, str]]] = {}

    def encode(self, texts: Sequence[str], *, plain: bool = False) -> list[list[int]]:
        """Token ids without BOS and EOS; with `plain`, special tokens spelled in a text stay text."""
        self.backend.encode_special_tokens = plain
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def encode_behind(self, items: Sequence[Continuation]) -> list[list[int]]:
        """Token ids of each text behind the one before it; a guarded text is encoded by parts."""
        texts: list[tuple[str, str]] = []
        for item in items:
            lead, in_context = self._context(item)
            texts.append((lead + item.text, item.guard))
            if in_context:
                texts.append((item.before + item.text, item.guard))
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

    def _encode_guarded(self, texts: Sequence[tuple[str, str]]) -> Iterator[list[int]]:
        guarded = [bool(mark) and mark in text for text, mark in texts]
        ordinary = iter(
            self.encode([text for (text, _), by_parts in zip(texts, guarded, strict=True) if not by_parts])
        )
        return iter(
            [
                self._encode_parts(text, mark) if by_parts else next(ordinary)
                for (text, mark), by_parts in zip(texts, guarded, strict=True)
            ]
        )

    def _encode_parts(self, text: str, mark: str) -> list[int]:
        """Token ids of a text in which some special tokens are spelled (guarded) and others are meant.

        Those that are meant become placeholders: added tokens that the tokenizer splits at, as it would
        split at the special tokens themselves, while it reads all other special tokens as text.
        """
        start = unused(_PLACEHOLDER, [text])
        if start not in self._plain_backends:
            self._plain_backends[start] = (self._plain_backend(), {})
        backend, placeholders = self._plain_backends[start]
        ids: dict[int, int] = {}

        def placeholder(match: re.Match[str]) -> str:
            token = match.group()
            meant = self.backend.token_to_id(token)
            if meant is None or text.startswith(mark, match.end()):
                return token
            if token not in placeholders:
                placeholders[token] = start + chr(_FIRST_INDEX + len(placeholders))
                backend.add_tokens([self._like(token, placeholders[token])])
            ids[backend.token_to_id(placeholders[token])] = meant
            return placeholders[token]

        replaced = self.special.sub(placeholder, text).replace(mark, "")
        encoded = backend.encode(replaced, add_special_tokens=False).ids
        return [ids.get(token, token) for token in encoded]

    def _like(self, token: str, placeholder: str) -> AddedToken:
        from tokenizers import AddedToken

        known = {added.content: added for added in self.added.values()}.get(token)
        strips = {"lstrip": known.lstrip, "rstrip": known.rstrip} if known is not None else {}
        return AddedToken(placeholder, normalized=False, special=False, **strips)

    def _plain_backend(self) -> Any:
        from tokenizers import Tokenizer

        tree = json.loads(self._source)
        for token in tree["added_tokens"]:
            token["special"] = token["special"] or token["content"] in self.special_texts
        backend = Tokenizer.from_str(json.dumps(tree))
        backend.encode_special_tokens = True
        return backend


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern of texts that are not blank, which matches nothing if there are none."""
    # The longest first, since one token may be the beginning of another.
    known = sorted((text for text in texts if text.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, known)) or r"(?!)")


def unused(character: str, texts: Iterable[str]) -> str:
    """The shortest repetition of a character that no text has."""
    found = character
    joined = "\n".join(texts)
    while found in joined:
        found += character
    return found


def guard(
    messages: Sequence[dict[str, Any]],
    special: re.Pattern[str],
    foreign: re.Pattern[str],
    before: Sequence[dict[str, Any]] = (),
) -> tuple[list[dict[str, Any]], str]:
    """The messages with a mark in every spelled special token of their strings, roles excepted, and the mark.

    Args:
        special: matches special tokens.
        foreign: matches those that the content of an assistant's turn never means.
        before: further messages, whose text must not contain the mark either.
    """
    mark = unused(_GUARD, [text for turn in (*messages, *before) for text in _strings(turn)])
    guarded = []
    for message in messages:
        own = {"content"} if message.get("role") == "assistant" else set()
        guarded.append(
            {
                key: value if key == "role" else _guard(value, foreign if key in own else special, mark)
                for key, value in message.items()
            }
        )
    return guarded, mark


def _guard(value: Any, special: re.Pattern[str], mark: str) -> Any:
    if isinstance(value, str):
        return special.sub(lambda match: match.group()[0] + mark + match.group()[1:], value)
    if isinstance(value, dict):
        # The keys are the record's own too: those of a tool call's arguments are written out.
        return {_guard(key, special, mark): _guard(item, special, mark) for key, item in value.items()}
    return [_guard(item, special, mark) for item in value] if isinstance(value, list) else value


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def spells(messages: Sequence[dict[str, Any]], special: re.Pattern[str]) -> bool:
    """Whether a string in the messages spells a special token, roles excepted."""
    return any(
        key != "role"
        and any(special.search(text) for text in ([value] if type(value) is str else _strings(value)))
        for message in messages
        for key, value in message.items()
    )


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
