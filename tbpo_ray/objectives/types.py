"""The input and the output of an objective.

Shapes: B pairs, T answer tokens. Tokens are counted from the first token of the answer, so index t of
the chosen row and index t of the rejected row are the t-th tokens of the two answers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tbpo_ray.errors import InputError


@dataclass(kw_only=True)
class TokenScores:
    """Per-token scores of a batch of preference pairs.

    Values at positions outside the masks are never read and may be NaN.

    Args:
        chosen_logps: log pi of each token of the chosen answer, in nats. [B, T] float
        rejected_logps: the same for the rejected answer. [B, T] float. Every `rejected_*` may be None for
            an objective that does not read the rejected answer (`sft`).
        chosen_ref_logps: log pi_ref of the same tokens (None for objectives without a reference). [B, T]
        rejected_ref_logps: [B, T] float
        chosen_mask: True where the answer has a token; tokens start at index 0. [B, T] bool
        rejected_mask: [B, T] bool
        chosen_baseline: c_t, the state baseline (learned b, or a KL): depends on the prefix only. For `tdpo1`
            and `tdpo2` KL(pi_ref || pi), for `tis_dpo` with alpha above 0 KL(pi || pi_ref). [B, T]
        rejected_baseline: [B, T] float
        chosen_weights: token weights (`tis_dpo`), oracle token scores (`sepo`), self-assigned token
            rewards (`t_reg`), the guide's log-ratio (`tgdpo`) or token advantages (`arc_bpo`). [B, T] float
        rejected_weights: [B, T] float
        chosen_log_collision: log of the sum of pi(v | state)^2 over the vocabulary, with
            `objective.pair_weights=wpo`. [B, T] float
        rejected_log_collision: [B, T] float
        chosen_chunks: the chunk that each token belongs to (`arc_bpo`), from 0. [B, T] int
        rejected_chunks: [B, T] int
        tie: True for a pair whose answers are equally good; None if no pair is. `objective.ties` says what
            becomes of it. [B] bool
        pair_margins: by how much a pair's score difference has to exceed 0, with `objective.pair_margins`.
            [B] float
        pair_weights: factor on a pair's loss, with `objective.pair_weights`. [B] float
    """

    chosen_logps: Tensor
    rejected_logps: Tensor | None = None
    chosen_ref_logps: Tensor | None = None
    rejected_ref_logps: Tensor | None = None
    chosen_mask: Tensor
    rejected_mask: Tensor | None = None
    chosen_baseline: Tensor | None = None
    rejected_baseline: Tensor | None = None
    chosen_weights: Tensor | None = None
    rejected_weights: Tensor | None = None
    chosen_log_collision: Tensor | None = None
    rejected_log_collision: Tensor | None = None
    chosen_chunks: Tensor | None = None
    rejected_chunks: Tensor | None = None
    tie: Tensor | None = None
    pair_margins: Tensor | None = None
    pair_weights: Tensor | None = None


@dataclass
class ObjectiveOutput:
    """What an objective returns.

    Args:
        per_pair_loss: [B] float32 (float64 for float64 scores); 0 for a pair with nothing to compare, and for
            a tie that is dropped.
        loss: mean of per_pair_loss over pairs, dropped ties excluded; a scalar to call `backward()` on.
        metrics: scalars, detached; `tbpo_ray.objectives.metrics` documents each of them.
    """

    per_pair_loss: Tensor
    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass
class Side:
    """One answer of each pair: zero outside the mask, in at least float32. All [B, T] or None."""

    logps: Tensor
    mask: Tensor
    ref_logps: Tensor | None = None
    baseline: Tensor | None = None
    weights: Tensor | None = None
    log_collision: Tensor | None = None
    chunks: Tensor | None = None

    @property
    def log_ratio(self) -> Tensor:
        """r_t = log pi - log pi_ref. [B, T]"""
        assert self.ref_logps is not None
        return self.logps - self.ref_logps


FIELDS = ("logps", "ref_logps", "mask", "baseline", "weights", "log_collision", "chunks")


def clean_side(scores: TokenScores, side: str, needed: tuple[str, ...]) -> Side:
    """Return the `chosen` or `rejected` half of the scores, masked and in at least float32.

    Raises:
        InputError: a needed field is None, or shapes disagree.
    """
    fields = {name: getattr(scores, f"{side}_{name}") for name in FIELDS}
    check_shapes(fields, scores.chosen_logps.shape, side)
    missing = [f"{side}_{name}: None, but this objective reads it; give a [B, T] tensor"
               for name in needed if fields[name] is None]  # fmt: skip
    if missing:
        raise InputError(*missing)
    mask = fields["mask"].to(torch.bool)
    logps = masked(fields["logps"], mask)
    assert logps is not None
    optional = {
        name: masked(fields[name], mask) for name in FIELDS if name not in ("logps", "mask", "chunks")
    }
    chunks = None if fields["chunks"] is None else fields["chunks"].long()
    return Side(logps=logps, mask=mask, chunks=chunks, **optional)


def check_shapes(fields: dict[str, Tensor | None], shape: torch.Size, side: str) -> None:
    """Raise InputError for tensors of a side that do not have the shape [B, T] of `chosen_logps`."""
    wrong = [
        f"{side}_{name}: shape {tuple(value.shape)}, expected {tuple(shape)} ([B, T], as chosen_logps)"
        for name, value in fields.items()
        if value is not None and value.shape != shape
    ]
    if len(shape) != 2:
        wrong.insert(0, f"chosen_logps: shape {tuple(shape)}, expected two dimensions [B, T]")
    if wrong:
        raise InputError(*wrong)


def masked(values: Tensor | None, mask: Tensor) -> Tensor | None:
    """`values` where the mask is true, 0 elsewhere, in float32 (float64 stays). [B, T]"""
    if values is None:
        return None
    dtype = torch.promote_types(values.dtype, torch.float32)
    # A selection, not a product: a NaN outside the mask reaches neither the loss nor its gradient.
    return torch.where(mask, values.to(dtype), torch.zeros((), dtype=dtype, device=values.device))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the last dimension of the entries that the mask selects; 0 if it selects none. [B]"""
    zero = torch.zeros((), dtype=values.dtype, device=values.device)
    return torch.where(mask, values, zero).sum(-1) / mask.sum(-1).clamp(min=1)
