"""Answers cut into chunks by their text."""

from __future__ import annotations

from typing import Any

import pytest

from tbpo_ray.config.objective_options import ChunksConfig
from tbpo_ray.data.chunks import chunk_ids, token_texts


def chunks(pieces: list[str], **settings: Any) -> list[str]:
    """The texts of the chunks."""
    ids = chunk_ids(pieces, ChunksConfig(**settings)).tolist()
    assert ids == sorted(ids) and set(ids) == set(range(len(set(ids))))
    return ["".join(p for p, i in zip(pieces, ids, strict=True) if i == chunk) for chunk in sorted(set(ids))]


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["One", ".", " Two", "!", " Three", ""], ["One.", " Two!", " Three"]),
        (["He", " said", ' "No', '."', " Then"], ['He said "No."', " Then"]),
        (["a", "\n\n", "\n", "b", "\n", ""], ["a\n\n\n", "b\n"]),
        (["a", ";", " b", ":", " c", ":d"], ["a;", " b:", " c:d"]),
        (["3", ".", "14", "?", "x"], ["3.14?x"]),
        (["Hm", ". ", "Yes"], ["Hm. ", "Yes"]),
        (["Hm. Ye", "s"], ["Hm. Yes"]),  # a token belongs where it ends
        (["", ""], [""]),
        ([], []),
    ],
)
def test_cuts_follow_the_text(pieces: list[str], expected: list[str]) -> None:
    assert chunks(pieces, min_tokens=1) == expected


def test_long_chunks_are_split_before_short_ones_are_merged() -> None:
    pieces = [*"abcdefghi", ".", " ", *"jk"]
    assert chunks(pieces, min_tokens=1, max_tokens=4) == ["abcd", "efgh", "i. ", "jk"]
    assert chunks(pieces, min_tokens=4, max_tokens=4) == ["abcd", "efgh", "i. jk"]
    assert chunks(["a", ".", " b"], min_tokens=4) == ["a. b"]
    # The last one goes backward, and a merged chunk may be longer than the limit.
    assert chunks([*"abcd", ".", " ", "e"], min_tokens=4, max_tokens=5) == ["abcd. e"]
    assert chunks([*"ab", "\n", *"cdef", "\n", "g"], min_tokens=4, max_tokens=8) == ["ab\ncdef\ng"]


def test_fixed_and_whole_answers() -> None:
    pieces = ["a", ".", " b", ".", " c"]
    assert chunks(pieces, kind="fixed", min_tokens=1, max_tokens=2) == ["a.", " b.", " c"]
    assert chunks(pieces, kind="answer") == ["a. b. c"]


class Spaceless:
    """A tokenizer that drops the space of the first token that it decodes, as SentencePiece does."""

    all_special_ids = (2,)
    words = (" a", " the", "</s>", "x")

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [0]

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] for i in ids).removeprefix(" ")


def test_tokens_keep_their_space_and_special_ones_have_no_text() -> None:
    texts = token_texts(Spaceless())
    assert texts([1, 3, 1, 2]) == [" the", "x", " the", ""]


def test_the_tokens_of_a_real_tokenizer_spell_the_text(small_model: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(small_model)
    text = "copy the red fox. Then stop"
    ids = tokenizer.encode(text, add_special_tokens=False)
    # This tokenizer's first token has a space, too, which decoding drops at the start of a text.
    assert "".join(token_texts(tokenizer)(ids)).lstrip() == tokenizer.decode(ids)
