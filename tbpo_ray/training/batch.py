"""Token ids of some pairs -> padded tensors, in one of two layouts.

separate  each answer has a row of its own:       [prompt][chosen]  /  [prompt][rejected]
shared    both answers follow one prompt:         [prompt][chosen][rejected]

Either way the model's hidden states are gathered at the positions that predict answer tokens, so
everything behind the model sees the same `[S, B, T]` tensors.

B pairs, S sides (chosen, rejected; one for SFT), T answer tokens, R rows, L row length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGN = 8
"""Rows and answers are padded to a multiple of this, so that few shapes occur."""


@dataclass
class PairBatch:
    """Padded tensors of one micro-batch."""

    input_ids: Tensor
    """[R, L] int64"""
    position_ids: Tensor
    """[R, L] int64; the rejected answer restarts behind the prompt"""
    segment: Tensor
    """[R, L] int8: 0 prompt, 1 chosen, 2 rejected, -1 padding"""
    predict: Tensor
    """[S, B, T] int64: index into the flattened [R * L] hidden states that predicts this label"""
    labels: Tensor
    """[S, B, T] int64"""
    mask: Tensor
    """[S, B, T] bool: True where the answer has a token"""
    ref_logps: Tensor | None
    """[S, B, T] float32, from the cache"""
    weights: Tensor | None
    """[S, B, T] float32: token weights, where the data has them"""
    shared: bool
    pick: Tensor | None = None
    """[S * B, K] int64, shared layout: index into the flattened [R * L] positions of each answer's row as it
    would be alone, [prompt][answer]; padded with 0"""
    back: Tensor | None = None
    """[R, L] int64: where each position stands in the flattened [S * B * K] picked ones; padded with 0"""

    @property
    def pairs(self) -> int:
        return self.labels.shape[1]

    def to(self, device: torch.device | str) -> PairBatch:
        moved: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in moved.items():
            if isinstance(value, Tensor):
                moved[name] = value.to(device, non_blocking=True)
        return PairBatch(**moved)

    def attention_mask(self, window: int | None = None) -> Tensor:
        """[R, 1, L, L] bool, True where the query (third axis) may see the key (fourth axis).

        A token sees its own prompt and its own answer up to itself. `window` keeps keys whose
        position is less than `window` behind (sliding-window layers). Padding sees itself, so that
        no softmax is empty.
        """
        length = self.segment.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.segment.device).tril()
        key, query = self.segment[:, None, :], self.segment[:, :, None]
        allowed = causal & (key >= 0) & ((key == 0) | (key == query))
        if window is not None:
            allowed &= self.position_ids[:, :, None] - self.position_ids[:, None, :] < window
        return (allowed | torch.eye(length, dtype=torch.bool, device=allowed.device))[:, None]


def collate(
    prompts: Sequence[np.ndarray],
    answers: Sequence[Sequence[np.ndarray]],
    *,
    pad_id: int,
    shared: bool,
    cut: bool,
    ref_logps: Sequence[Sequence[np.ndarray]] | None = None,
    weights: Sequence[Sequence[np.ndarray]] | None = None,
) -> PairBatch:
    """Pad some pairs.

    Args:
        prompts: B arrays of token ids, BOS included, never empty.
        answers: for each side B arrays of token ids; one side for SFT, else chosen and rejected.
        shared: the layout.
        cut: compare to the shorter answer only (OBJECTIVES 'the tail is dead'): both are cut there.
        ref_logps: for each side B arrays as long as the answers (before the cut).
        weights: likewise.
    """
    sides, pairs = len(answers), len(prompts)
    sizes = np.array([[len(a) for a in side] for side in answers], dtype=np.int64).reshape(sides, pairs)
    if cut and sides == 2:
        sizes = np.broadcast_to(sizes.min(axis=0), sizes.shape)
    prompt_sizes = np.array([len(p) for p in prompts], dtype=np.int64)
    longest = _align(int(sizes.max(initial=1)))
    # The last token of an answer predicts nothing, so it is no input.
    inputs = np.maximum(sizes - 1, 0)
    row_sizes = prompt_sizes + inputs.sum(axis=0) if shared else (prompt_sizes + inputs).reshape(-1)
    length, rows = _align(int(row_sizes.max(initial=1))), pairs if shared else sides * pairs

    ids = np.full((rows, length), pad_id, dtype=np.int64)
    positions = np.zeros((rows, length), dtype=np.int64)
    segment = np.full((rows, length), -1, dtype=np.int8)
    labels = np.zeros((sides, pairs, longest), dtype=np.int64)
    predict = np.zeros((sides, pairs, longest), dtype=np.int64)
    mask = np.arange(longest) < sizes[:, :, None]
    alone = _align(int((prompt_sizes + inputs).max(initial=1)))
    pick = np.zeros((sides * pairs, alone), dtype=np.int64)
    back = np.zeros((rows, length), dtype=np.int64)
    for b, prompt in enumerate(prompts):
        p = len(prompt)
        end = p
        for s in range(sides):
            row = b if shared else s * pairs + b
            n = int(sizes[s, b])
            start = end if shared else p
            if not shared or s == 0:
                ids[row, :p], positions[row, :p], segment[row, :p] = prompt, np.arange(p), 0
                back[row, :p] = (s * pairs + b) * alone + np.arange(p)
            pick[s * pairs + b, :p] = row * length + np.arange(p)
            if n == 0:
                continue
            answer = answers[s][b][:n]
            end = start + n - 1
            ids[row, start:end] = answer[:-1]
            positions[row, start:end] = np.arange(p, p + n - 1)
            segment[row, start:end] = s + 1
            pick[s * pairs + b, p : p + n - 1] = row * length + np.arange(start, end)
            back[row, start:end] = (s * pairs + b) * alone + np.arange(p, p + n - 1)
            labels[s, b, :n] = answer
            predict[s, b, 0] = row * length + p - 1
            predict[s, b, 1:n] = row * length + np.arange(start, end)
    return PairBatch(
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        segment=torch.from_numpy(segment),
        predict=torch.from_numpy(predict),
        labels=torch.from_numpy(labels),
        mask=torch.from_numpy(mask),
        ref_logps=_ragged(ref_logps, sizes, longest),
        weights=_ragged(weights, sizes, longest),
        shared=shared,
        pick=torch.from_numpy(pick) if shared else None,
        back=torch.from_numpy(back) if shared else None,
    )


def collate_columns(
    columns: Mapping[str, Sequence[np.ndarray]], *, sides: int, pad_id: int, shared: bool, cut: bool
) -> PairBatch:
    """`collate` from the columns of prepared data: `prompt_ids`, `chosen_ids`, `rejected_ids`, and where
    present `chosen_ref_logps`, `rejected_ref_logps`, `chosen_weights`, `rejected_weights`."""
    names = ("chosen", "rejected")[:sides]

    def both(suffix: str) -> list[Sequence[np.ndarray]] | None:
        found = [columns.get(f"{name}_{suffix}") for name in names]
        return None if any(column is None for column in found) else found  # type: ignore[return-value]

    answers = both("ids")
    assert answers is not None
    return collate(
        columns["prompt_ids"],
        answers,
        pad_id=pad_id,
        shared=shared and sides == 2,
        cut=cut,
        ref_logps=both("ref_logps"),
        weights=both("weights"),
    )


def _align(n: int) -> int:
    return max(ALIGN, -(-n // ALIGN) * ALIGN)


def _ragged(values: Sequence[Sequence[np.ndarray]] | None, sizes: np.ndarray, longest: int) -> Tensor | None:
    if values is None:
        return None
    out = np.zeros((*sizes.shape, longest), dtype=np.float32)
    for s, side in enumerate(values):
        for b, row in enumerate(side):
            n = int(sizes[s, b])
            if len(row) < n:
                raise ValueError(f"a pair has {len(row)} token values for {n} tokens")
            out[s, b, :n] = row[:n]
    return torch.from_numpy(out)
