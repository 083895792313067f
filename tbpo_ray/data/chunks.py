"""Cut answers into chunks by their text, for the objective that compares them chunk by chunk.

The policy has no part in it. A cut is behind a run of newlines, behind `. ! ?` (with closing quotes or
brackets) and a space, and behind `;` or `:` and a space, so that a delimiter stays with what it ends. A token
belongs to the chunk in which it ends; one without text, such as the end token, to that of the token before.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tbpo_ray.config.objective_options import ChunksConfig

_CUT = re.compile(r"""\n+|[.!?]+["'”’»)\]}]*[ \t]+|[;:][ \t]+""")


def chunk_ids(pieces: Sequence[str], settings: ChunksConfig) -> np.ndarray:
    """The chunk of each token, counted from 0 without gaps.

    Args:
        pieces: the text of each token of an answer.

    Returns:
        [T] int32
    """
    n = len(pieces)
    if settings.kind == "semantic":
        runs = _merged(_split(_text_runs(pieces), settings.max_tokens), settings.min_tokens)
    elif settings.kind == "fixed":
        runs = _split([n], settings.max_tokens)
    else:
        runs = [n]
    return np.repeat(np.arange(len(runs), dtype=np.int32), runs)


def _text_runs(pieces: Sequence[str]) -> list[int]:
    """The number of tokens between the cuts of the text."""
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    cuts = np.array([match.end() for match in _CUT.finditer("".join(pieces))], dtype=np.int64)
    # A token that ends at a cut is in front of it.
    sizes = np.bincount(np.searchsorted(cuts, ends, side="left"))
    return [int(size) for size in sizes if size]


def _split(runs: Sequence[int], most: int) -> list[int]:
    """The runs with those that are longer than `most` split."""
    return [min(most, run - start) for run in runs for start in range(0, run, most)]


def _merged(runs: Sequence[int], fewest: int) -> list[int]:
    """The runs with those that are shorter than `fewest` merged with the next, the last with the previous."""
    merged: list[int] = []
    waiting = 0
    for run in runs:
        waiting += run
        if waiting >= fewest:
            merged.append(waiting)
            waiting = 0
    if waiting and merged:
        merged[-1] += waiting
    elif waiting:
        merged.append(waiting)
    return merged


def token_texts(tokenizer: Any) -> Callable[[Sequence[int]], list[str]]:
    """A function from token ids to the text of each, with the spaces that a token has inside a text.

    Special tokens have none. The texts of tokens seen before are remembered.
    """
    # Behind another token, because some tokenizers drop the space of the first one that they decode.
    anchor = tokenizer.encode("a", add_special_tokens=False)
    before = len(tokenizer.decode(anchor))
    special = set(tokenizer.all_special_ids)
    known: dict[int, str] = {}

    def texts(ids: Sequence[int]) -> list[str]:
        for token in set(ids) - known.keys():
            text = "" if token in special else tokenizer.decode([*anchor, token])[before:]
            known[token] = text
        return [known[token] for token in ids]

    return texts
