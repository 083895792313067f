"""The per-token weights, scores and rewards that some objectives read, computed from two models.

Every function takes log-probs of the same label tokens under two models (or two prompts) and returns a value
for `TokenScores.*_weights`. Shapes: B pairs, T answer tokens; every argument and result is [B, T].
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from tbpo_ray.config.objective_traits import WeightTransform
from tbpo_ray.errors import InputError

HALF_SPREAD = 0.3
"""The weights of `rank` and `scaled` lie within 1 - 0.3 and 1 + 0.3."""
SCALED_LIMIT = 1.5


def contrastive_weights(
    positive_logps: Tensor,
    negative_logps: Tensor,
    *,
    chosen: bool,
    transform: WeightTransform = "exp",
    mask: Tensor | None = None,
    k: float = 1.0,
    low: float = -0.5,
    high: float = 1.5,
) -> Tensor:
    """TIS-DPO importance weights from d_t = log pi+ - log pi-, or its negative on the rejected side.

    pi+ and pi- are two contrastive models: one trained (or prompted) toward chosen answers, one toward
    rejected ones.

    | transform | weight                                                           | source         |
    |-----------|------------------------------------------------------------------|----------------|
    | `exp`     | k exp(clamp(d, low, high))                                       | the paper      |
    | `rank`    | 0.7 (lowest d) to 1.3 by rank within the answer, 1 for one token | its command    |
    | `scaled`  | d clamped to [-1.5, 1.5], then linear from 0.7 to 1.3            | its option     |

    Source: TIS-DPO, arXiv 2410.04350, with its k = 1, low = -0.5, high = 1.5, and its released code.

    Args:
        mask: which tokens the answer has; weights are 0 elsewhere. By default every token of a row counts,
            which matters to `rank`. [B, T] bool

    Raises:
        InputError: shapes disagree, low is not below high, or an unknown transform.
    """
    check_same_shape(positive_logps, negative_logps)
    if not low < high:
        raise InputError(f"low, high: {low}, {high}; low must be below high")
    difference = (positive_logps - negative_logps).detach()
    d = difference if chosen else -difference
    mask = torch.ones_like(d, dtype=torch.bool) if mask is None else mask.to(torch.bool)
    if transform == "exp":
        weights = k * torch.exp(d.clamp(low, high))
    elif transform == "rank":
        weights = _rank_weights(d, mask)
    elif transform == "scaled":
        weights = 1 + HALF_SPREAD * (d / SCALED_LIMIT).clamp(-1, 1)
    else:
        raise InputError(f"transform: {transform!r}; must be one of {', '.join(get_args(WeightTransform))}")
    return torch.where(mask, weights, 0)


def _rank_weights(d: Tensor, mask: Tensor) -> Tensor:
    """Weights from 0.7 to 1.3 by the rank of d among the tokens that the mask selects. Same shape."""
    order = torch.where(mask, d, torch.inf).argsort(dim=-1, stable=True)
    rank = order.argsort(dim=-1).to(d.dtype)
    last = mask.sum(-1, keepdim=True) - 1
    position = torch.where(last > 0, 2 * rank / last.clamp(min=1) - 1, 0)
    # A NaN has no rank; it must not become a weight.
    return 1 + HALF_SPREAD * position + 0 * d


def oracle_scores(oracle_logps: Tensor, oracle_ref_logps: Tensor) -> Tensor:
    """SePO's token scores: log pi_oracle - log pi_ref of a DPO-trained oracle and its own reference.

    These are DPO's implicit token rewards without the factor beta, as only ranks within an answer matter.

    Source: SePO, arXiv 2408.13518.

    Raises:
        InputError: shapes disagree.
    """
    check_same_shape(oracle_logps, oracle_ref_logps)
    return (oracle_logps - oracle_ref_logps).detach()


def self_rewards(better_logps: Tensor, worse_logps: Tensor) -> Tensor:
    """T-REG's self-assigned token rewards, sigmoid(log pi(.|better) - log pi(.|worse)) - 1/2.

    The same model, the policy before training, scores the same answer under two revised prompts, one that
    asks for a better answer and one that asks for a worse one. The rewards are in (-1/2, 1/2).

    Source: T-REG, arXiv 2412.02685.

    Raises:
        InputError: shapes disagree.
    """
    check_same_shape(better_logps, worse_logps)
    return torch.sigmoid(better_logps - worse_logps).detach() - 0.5


def check_same_shape(a: Tensor, b: Tensor) -> None:
    """Raise InputError unless both tensors have the same shape."""
    if a.shape != b.shape:
        raise InputError(
            f"log-probs: shapes {tuple(a.shape)} and {tuple(b.shape)} disagree; must be the same [B, T]"
        )
