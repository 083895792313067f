"""Collate token ids of pairs into padded tensors, in one of three layouts.

separate  each answer has its own row:            [prompt][chosen]  /  [prompt][rejected]
shared    both answers follow one prompt:         [prompt][chosen][rejected]
packed    shared rows follow each other in one:   [prompt][chosen][rejected][prompt][chosen][rejected]...

In every layout the model's hidden states are gathered at the positions that predict answer tokens, so
everything after the model sees the same `[S, B, T]` tensors. Tokens of an answer that are context only, such
as the results of tools, are in the rows but not among the T.

Shapes: B pairs, S sides (chosen, rejected; one for SFT), T trained answer tokens, R rows of length L, K
length of a row with a single answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tbpo_ray.data.deal import align


@dataclass
class PairBatch:
    """Padded tensors of one micro-batch."""

    input_ids: Tensor
    """[R, L] int64"""
    position_ids: Tensor
    """[R, L] int64; the positions of the rejected answer restart after the prompt, those of a pair at 0"""
    segment: Tensor
    """[R, L] int8: 0 prompt, 1 chosen, 2 rejected, -1 padding"""
    predict: Tensor
    """[S, B, T] int64: index into the flattened [R * L] hidden states that predicts this label"""
    labels: Tensor
    """[S, B, T] int64"""
    mask: Tensor
    """[S, B, T] bool: True where the answer has a trained token"""
    ref_logps: Tensor | None
    """[S, B, T] float32, from the cache"""
    weights: Tensor | None
    """[S, B, T] float32: token weights, where the data has them"""
    shared: bool
    """Whether a row holds more than one answer, so that attention is limited to parts of it."""
    selected: Tensor | None = None
    """[N] int64: the flattened [S * B * T] positions where the mask is true, ascending. They are found while
    the mask is on the host: an accelerator would have to be waited for."""
    real_tokens: int = 0
    """Positions of the rows that are not padding"""
    gather_index: Tensor | None = None
    """[S * B, K] int64, where `shared`: for each answer, the flattened [R * L] positions of its separate
    row [prompt][answer]; padded with 0"""
    scatter_index: Tensor | None = None
    """[R, L] int64, where `shared`: for each position, its index in the flattened [S * B * K] gathered
    rows; padded with 0"""
    pair: Tensor | None = None
    """[R, L] int32, packed layout only: the pair that a position belongs to, -1 at padding"""
    tie: Tensor | None = None
    """[B] bool: True where neither answer is better; None if the data has no ties"""
    pair_margins: Tensor | None = None
    """[B] float32: by how much each pair's score difference has to exceed 0; None if it is not read"""
    pair_weights: Tensor | None = None
    """[B] float32: factor on each pair's loss; None if it is not read"""
    chunks: Tensor | None = None
    """[S, B, T] int64: the chunk of its answer that each token belongs to; None if it is not read"""

    @property
    def pairs(self) -> int:
        return self.labels.shape[1]

    def to(self, device: torch.device | str) -> PairBatch:
        """The batch on a device. The host does not wait for the copies, if the batch is pinned."""
        return self._map(lambda value: value.to(device, non_blocking=True))

    def pin(self) -> PairBatch:
        """The batch in pinned memory, from which a GPU copies on its own."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> PairBatch:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = change(value)
        return PairBatch(**values)

    def attention_mask(self, window: int | None = None) -> Tensor:
        """[R, 1, L, L] bool, True where the query (third axis) may see the key (fourth axis).

        A token sees the prompt of its own pair and its own answer up to itself. `window` keeps only keys
        whose position is less than `window` before the query's (sliding-window layers).
        """
        length = self.segment.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.segment.device).tril()
        key, query = self.segment[:, None, :], self.segment[:, :, None]
        allowed = causal & (key >= 0) & ((key == 0) | (key == query))
        if self.pair is not None:
            allowed &= self.pair[:, None, :] == self.pair[:, :, None]
        if window is not None:
            allowed &= self.position_ids[:, :, None] - self.position_ids[:, None, :] < window
        # Padding sees itself: a softmax over no key at all would be NaN, which spreads in the backward pass.
        return (allowed | torch.eye(length, dtype=torch.bool, device=allowed.device))[:, None]


def collate(  # noqa: PLR0913  (the columns of the data, and the layout)
    prompts: Sequence[np.ndarray],
    answers: Sequence[Sequence[np.ndarray]],
    *,
    pad_id: int,
    shared: bool,
    packed: bool = False,
    truncate_to_shorter: bool,
    ref_logps: Sequence[Sequence[np.ndarray]] | None = None,
    weights: Sequence[Sequence[np.ndarray]] | None = None,
    trained: Sequence[Sequence[np.ndarray]] | None = None,
) -> PairBatch:
    """Pad pairs to a batch.

    Args:
        prompts: B arrays of token ids, BOS included, never empty.
        answers: for each side B arrays of token ids; one side for SFT, otherwise chosen and rejected.
        shared: whether both answers follow one prompt in one row.
        packed: whether in addition all pairs follow each other in a single row.
        truncate_to_shorter: truncate both answers of a pair to the number of trained tokens of the shorter
            one, for objectives that compare the answers token by token and do not read beyond it.
        ref_logps: for each side B arrays with a value for each trained token before truncation.
        weights: token weights, in the same form.
        trained: for each side B arrays as long as the answers, False at tokens that are context only; an
            empty array if all tokens are trained.
    """
    sides, pairs = len(answers), len(prompts)
    indices, sizes = _select(answers, trained, truncate_to_shorter=truncate_to_shorter)
    # Nothing is predicted behind the last trained token, so rows end there.
    spans = np.array([[i[-1] + 1 if len(i) else 0 for i in side] for side in indices], dtype=np.int64)
    shared |= packed
    rows = _Rows(prompts, sizes, spans.reshape(sides, pairs), pad_id=pad_id, shared=shared, packed=packed)
    for b, prompt in enumerate(prompts):
        for s in range(sides):
            rows.place(s, b, prompt, answers[s][b][: rows.spans[s, b]], indices[s][b])
    mask = np.arange(rows.labels.shape[-1]) < sizes[:, :, None]
    return PairBatch(
        input_ids=torch.from_numpy(rows.input_ids),
        position_ids=torch.from_numpy(rows.position_ids),
        segment=torch.from_numpy(rows.segment),
        predict=torch.from_numpy(rows.predict),
        labels=torch.from_numpy(rows.labels),
        mask=torch.from_numpy(mask),
        ref_logps=_pad_values(ref_logps, sizes, mask.shape[-1]),
        weights=_pad_values(weights, sizes, mask.shape[-1]),
        shared=shared,
        selected=torch.from_numpy(np.flatnonzero(mask)),
        real_tokens=int((rows.segment >= 0).sum()),
        gather_index=torch.from_numpy(rows.gather_index) if shared else None,
        scatter_index=torch.from_numpy(rows.scatter_index) if shared else None,
        pair=torch.from_numpy(rows.pair) if packed else None,
    )


class _Rows:
    """The arrays of a :class:`PairBatch` while they are filled, answer by answer."""

    def __init__(
        self,
        prompts: Sequence[np.ndarray],
        sizes: np.ndarray,
        spans: np.ndarray,
        *,
        pad_id: int,
        shared: bool,
        packed: bool,
    ):
        """Reserve rows for answers of which `spans` [S, B] tokens are placed and `sizes` [S, B] trained."""
        sides, self.pairs = sizes.shape
        self.shared, self.spans = shared, spans
        prompt_sizes = np.array([len(p) for p in prompts], dtype=np.int64)
        # The last token of an answer predicts nothing, so it is a label but not an input.
        inputs = np.maximum(spans - 1, 0)
        row_sizes = prompt_sizes + (inputs.sum(axis=0) if shared else inputs)
        blocks = self.pairs if shared else sides * self.pairs
        ends = np.cumsum(row_sizes.reshape(-1))
        # Where each block, a prompt and what follows it, begins: in the only row, or in a row of its own.
        self.row = np.zeros(blocks, dtype=np.int64) if packed else np.arange(blocks)
        self.starts = ends - row_sizes.reshape(-1) if packed else np.zeros(blocks, dtype=np.int64)
        self.length = _align(int(ends[-1] if packed else row_sizes.max(initial=1)))
        self.single = _align(int((prompt_sizes + inputs).max(initial=1)))
        rows, longest = 1 if packed else blocks, _align(int(sizes.max(initial=1)))
        self.input_ids = np.full((rows, self.length), pad_id, dtype=np.int64)
        self.position_ids = np.zeros((rows, self.length), dtype=np.int64)
        self.segment = np.full((rows, self.length), -1, dtype=np.int8)
        self.labels = np.zeros((sides, self.pairs, longest), dtype=np.int64)
        self.predict = np.zeros((sides, self.pairs, longest), dtype=np.int64)
        self.gather_index = np.zeros((sides * self.pairs, self.single), dtype=np.int64)
        self.scatter_index = np.zeros((rows, self.length), dtype=np.int64)
        self.pair = np.full((rows, self.length), -1, dtype=np.int32)
        self.filled = self.starts.copy()
        """[blocks] the next free column of each block"""

    def place(
        self, side: int, pair: int, prompt: np.ndarray, answer: np.ndarray, trained: np.ndarray
    ) -> None:
        """Append an answer to its row, after the prompt that the row needs once.

        Args:
            trained: the indices of the answer's trained tokens, the last of which is its last token.
        """
        single_row = side * self.pairs + pair
        block, p, n = pair if self.shared else single_row, len(prompt), len(answer)
        if self.filled[block] == self.starts[block]:
            self._fill(block, single_row, prompt, position=0, segment=0)
        first = int(self.row[block]) * self.length + int(self.starts[block])
        self.gather_index[single_row, :p] = first + np.arange(p)
        if n == 0:
            return
        columns = self._fill(block, single_row, answer[:-1], position=p, segment=side + 1)
        self.gather_index[single_row, p : p + n - 1] = columns
        # The first answer token is predicted by the last position of the prompt.
        predicting = np.concatenate([[first + p - 1], columns])
        self.labels[side, pair, : len(trained)] = answer[trained]
        self.predict[side, pair, : len(trained)] = predicting[trained]

    def _fill(
        self, block: int, single_row: int, ids: np.ndarray, *, position: int, segment: int
    ) -> np.ndarray:
        """Append tokens to a block; returns their flattened positions."""
        row, start = int(self.row[block]), int(self.filled[block])
        where, positions = slice(start, start + len(ids)), np.arange(position, position + len(ids))
        self.input_ids[row, where], self.position_ids[row, where] = ids, positions
        self.segment[row, where], self.pair[row, where] = segment, single_row % self.pairs
        self.scatter_index[row, where] = single_row * self.single + positions
        self.filled[block] = where.stop
        return row * self.length + np.arange(start, where.stop)


@dataclass(frozen=True)
class BatchLayout:
    """How the columns of prepared pairs become a batch."""

    sides: int
    pad_id: int
    shared_prompt: bool
    truncate_to_shorter: bool
    packed: bool = False


def collate_columns(columns: Mapping[str, Sequence[np.ndarray]], layout: BatchLayout) -> PairBatch:
    """Collate the columns of prepared data: `prompt_ids`, `chosen_ids`, `rejected_ids`, and where present
    `chosen_mask`, `rejected_mask`, `chosen_ref_logps`, `rejected_ref_logps`, `chosen_weights`,
    `rejected_weights`, `chosen_chunks`, `rejected_chunks`, `tie`, `pair_margin`, `pair_weight`."""
    names = ("chosen", "rejected")[: layout.sides]

    def each_side(suffix: str) -> list[Sequence[np.ndarray]] | None:
        values = [columns[f"{name}_{suffix}"] for name in names if f"{name}_{suffix}" in columns]
        return values if len(values) == len(names) else None

    answers = each_side("ids")
    assert answers is not None
    batch = collate(
        columns["prompt_ids"],
        answers,
        pad_id=layout.pad_id,
        shared=layout.shared_prompt and layout.sides == 2,
        packed=layout.packed,
        truncate_to_shorter=layout.truncate_to_shorter,
        ref_logps=each_side("ref_logps"),
        weights=each_side("weights"),
        trained=each_side("mask"),
    )
    if "tie" in columns:  # one value per pair, none for the placeholder of a rank without pairs
        batch.tie = torch.tensor([bool(value.any()) for value in columns["tie"]])
    chunks = each_side("chunks")
    if chunks is not None:
        padded = _pad_values(chunks, batch.mask.sum(-1).numpy(), batch.mask.shape[-1])
        batch.chunks = None if padded is None else padded.long()
    batch.pair_margins, batch.pair_weights = (
        _one_each(columns, "pair_margin"),
        _one_each(columns, "pair_weight"),
    )
    return batch


def _one_each(columns: Mapping[str, Sequence[np.ndarray]], name: str) -> Tensor | None:
    """A column with one number per pair; 0 for the placeholder of a rank without pairs. [B] float32"""
    if name not in columns:
        return None
    return torch.tensor([float(value[0]) if len(value) else 0.0 for value in columns[name]])


def _select(
    answers: Sequence[Sequence[np.ndarray]],
    trained: Sequence[Sequence[np.ndarray]] | None,
    *,
    truncate_to_shorter: bool,
) -> tuple[list[list[np.ndarray]], np.ndarray]:
    """The indices of the trained tokens of each answer, after truncation, and their numbers [S, B]."""
    found = [
        [
            _trained_indices(answer, None if trained is None else trained[s][b])
            for b, answer in enumerate(side)
        ]
        for s, side in enumerate(answers)
    ]
    sizes = np.array([[len(i) for i in side] for side in found], dtype=np.int64).reshape(len(answers), -1)
    if truncate_to_shorter and len(answers) == 2:
        sizes = np.broadcast_to(sizes.min(axis=0), sizes.shape)
    indices = [[i[:n] for i, n in zip(*side, strict=True)] for side in zip(found, sizes, strict=True)]
    return indices, sizes


def _trained_indices(answer: np.ndarray, trained: np.ndarray | None) -> np.ndarray:
    if trained is None or not len(trained):
        return np.arange(len(answer))
    if len(trained) != len(answer):
        raise ValueError(f"an answer has a mask of {len(trained)} values for {len(answer)} tokens")
    return np.flatnonzero(trained)


def _align(n: int) -> int:
    return int(align(max(n, 1)))


def _pad_values(
    values: Sequence[Sequence[np.ndarray]] | None, sizes: np.ndarray, longest: int
) -> Tensor | None:
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
