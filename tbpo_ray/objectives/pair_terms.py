"""What is added to the loss of a pair, or multiplies it, whatever the objective.

    loss of a pair = weight (wpo_weight preference loss(u + margin) + nll_weight NLL)

Shapes: B pairs, T answer tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbpo_ray.config.objective_options import NllNormalization
from tbpo_ray.errors import InputError
from tbpo_ray.objectives.types import Side, TokenScores, masked_mean


def nll(chosen: Side, normalization: NllNormalization) -> Tensor:
    """-log pi of the chosen answer: the mean over its tokens, or the sum. [B]

    The mean is taken for each pair, so that a pair weighs the same in every micro-batch. Source of the term:
    arXiv 2404.19733.
    """
    if normalization == "sum":
        return -chosen.logps.sum(-1)
    return masked_mean(-chosen.logps, chosen.mask)


def pair_values(scores: TokenScores, name: str, dtype: torch.dtype) -> Tensor:
    """A field of the scores with one number per pair, in the dtype of the losses. [B]

    Raises:
        InputError: it is None, or has a shape other than [B].
    """
    values: Tensor | None = getattr(scores, name)
    pairs = scores.chosen_logps.shape[0]
    if values is None:
        raise InputError(f"{name}: None, but this objective reads it; give a [B] tensor")
    if values.shape != (pairs,):
        raise InputError(f"{name}: shape {tuple(values.shape)}, expected ({pairs},) (one value per pair)")
    return values.detach().to(dtype)


# 1 / collision probability is at most the size of the vocabulary, so that no real weight reaches e^30.
MAX_LOG_WEIGHT = 30.0


def wpo_weight(chosen: Side, rejected: Side) -> Tensor:
    """v^w v^l, without gradient: how likely the policy is to write the two answers, per token. [B]

    log v = mean over the answer's tokens of log pi(y_t) - log sum_v pi(v | s_t)^2. The second term, 0 unless
    the scores have it, gives tokens that the policy samples itself a v of about 1.

    Source: WPO, arXiv 2406.11827, eq. 2.
    """
    total = _log_likelihood(chosen) + _log_likelihood(rejected)
    return total.detach().clamp(max=MAX_LOG_WEIGHT).exp()


def _log_likelihood(side: Side) -> Tensor:
    values = side.logps if side.log_collision is None else side.logps - side.log_collision
    return masked_mean(values, side.mask)
