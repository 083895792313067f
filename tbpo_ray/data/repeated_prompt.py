"""Answers in plain text that repeat the prompt, as older versions of TRL expected them.

A row `{prompt: Q, chosen: Q + A, rejected: Q + B}` states its prompt three times. Trained as it is, the
policy would learn to repeat its prompts. A row says so itself where both answers begin with the prompt; but
an answer may also begin with the same words of its own accord (`Hello` and `Hello! How can I help?`).
"""

from __future__ import annotations

from collections.abc import Sequence

from tbpo_ray.data.rejection_reasons import RecordError

_SHORT_ASCII, _SHORT = 12, 6
"""A prompt of one word that has fewer characters may be the answers' own first word."""
_FEW_WORDS = 8
"""A prompt with fewer words may be the beginning of an answer's own sentence."""
_GOES_ON = ",.;:!?'\u2019)-\u2013\u2014\u3001\u3002\uff0c\uff01\uff1f"
"""Punctuation that continues a sentence or ends it."""


def remove_prompt(prompt: str, chosen: str, rejected: str) -> tuple[str, str] | None:
    """What follows the prompt in both answers, with the white space between them; None if it is not repeated.

    Raises:
        RecordError: both answers begin with the prompt, but the words may be their own; or an answer is empty
            behind the prompt.
    """
    first, second = _rest(prompt, chosen), _rest(prompt, rejected)
    if first is None or second is None:
        return None
    text = prompt.strip()
    if _is_short(text) or _goes_on(text, (first, second)):
        raise RecordError("prompt_repeated_unclear", repr(text[:80]))
    for name, rest in (("chosen", first), ("rejected", second)):
        if not rest.strip():
            raise RecordError(f"{name}_empty", "it is the prompt again, with nothing behind it")
    return first, second


def _rest(prompt: str, answer: str) -> str | None:
    """What follows the prompt in an answer, which may have other white space between the words."""
    at = len(prompt) if answer.startswith(prompt) else _end_of_words(prompt.split(), answer)
    if at is None:
        return None
    rest, last = answer[at:], prompt[-1]
    goes_on = last.isalnum() and last.isascii() and rest[:1].isalnum()
    return None if goes_on else rest  # the prompt's last word is another one in the answer


def _end_of_words(words: Sequence[str], text: str) -> int | None:
    """Where in a text that begins with these words the last one ends."""
    at = 0
    for number, word in enumerate(words):
        start = at
        while at < len(text) and text[at].isspace():
            at += 1
        if (number and at == start) or not text.startswith(word, at):
            return None
        at += len(word)
    return at


def _is_short(prompt: str) -> bool:
    return len(prompt.split()) < 2 and len(prompt) < (_SHORT_ASCII if prompt.isascii() else _SHORT)


def _goes_on(prompt: str, rests: tuple[str, str]) -> bool:
    """Whether an answer goes on in the sentence of the prompt, as an answer of its own may."""
    if len(prompt.split()) >= _FEW_WORDS or not prompt[-1].isalnum():
        return False
    return any(rest[:1] and rest[:1] in _GOES_ON for rest in rests)
