"""Sizes of pairs: all tokens, those that are trained, and how far into an answer a row reaches.

An answer may have tokens that are context only, such as the results of tools. They are in the rows up to
the last trained token, so that three numbers describe an answer: its tokens, its trained tokens, and its
span, the number of tokens up to the last trained one. An objective that compares the answers token by token
keeps as many trained tokens of both as the shorter one has, which shortens their spans.

Shapes: N pairs. An array of sizes has 3 columns (tokens of prompt, chosen, rejected) where every token of
every answer is trained, and otherwise 9: further the trained tokens, the spans, and the spans after
truncation, each of chosen and rejected. Imports NumPy only.
"""

from __future__ import annotations

from collections.abc import Sequence, Sized
from typing import Any

import numpy as np

TOKEN_COUNTS, ALL_COUNTS = 3, 9
_ANSWERS, _TRAINED, _SPANS, _CUT_SPANS = slice(1, 3), slice(3, 5), slice(5, 7), slice(7, 9)


def measure_pairs(
    prompts: Sequence[Sized],
    answers: Sequence[Sequence[Sized]],
    masks: Sequence[Sequence[Any]],
) -> np.ndarray:
    """The sizes of pairs: [N, 9] int32.

    Args:
        prompts: N prompts.
        answers: N chosen and N rejected answers.
        masks: of the same form; False at tokens that are context only, None or empty if all are trained.
    """
    sizes = np.zeros((len(prompts), ALL_COUNTS), dtype=np.int32)
    for row, (prompt, *pair) in enumerate(zip(prompts, *answers, *masks, strict=True)):
        tokens = [len(answer) for answer in pair[:2]]
        if pair[2] is None and pair[3] is None:
            sizes[row] = [len(prompt), *tokens, *tokens, *tokens, min(tokens), min(tokens)]
            continue
        trained = [
            np.arange(size) if mask is None or not len(mask) else np.flatnonzero(mask)
            for size, mask in zip(tokens, pair[2:], strict=True)
        ]
        counts = [len(index) for index in trained]
        cut = [index[: min(counts)] for index in trained]
        spans = [int(index[-1]) + 1 if len(index) else 0 for index in (*trained, *cut)]
        sizes[row] = [len(prompt), *tokens, *counts, *spans]
    return sizes


def trained_tokens(sizes: np.ndarray) -> np.ndarray:
    """Trained tokens of both answers, before truncation: [N, 2]."""
    sizes = np.asarray(sizes)
    return sizes[:, _TRAINED] if sizes.shape[1] == ALL_COUNTS else sizes[:, _ANSWERS]


def row_spans(sizes: np.ndarray, *, truncate_to_shorter: bool) -> np.ndarray:
    """Tokens of both answers up to the last one that a row needs: [N, 2].

    Args:
        truncate_to_shorter: both answers keep as many trained tokens as the shorter one has.
    """
    sizes = np.asarray(sizes)
    if sizes.shape[1] == ALL_COUNTS:
        return sizes[:, _CUT_SPANS if truncate_to_shorter else _SPANS]
    answers = sizes[:, _ANSWERS]
    if not truncate_to_shorter:
        return answers
    return np.broadcast_to(answers.min(axis=1, keepdims=True), answers.shape)


def compact(sizes: np.ndarray) -> np.ndarray:
    """The sizes without the columns that say nothing more, if all tokens of all answers are trained."""
    whole = np.array_equal(trained_tokens(sizes), sizes[:, _ANSWERS])
    return sizes[:, :TOKEN_COUNTS] if whole else sizes
