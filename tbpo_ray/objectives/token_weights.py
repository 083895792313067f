"""The per-token weights, scores and rewards that some objectives read, computed from two models.

Every function takes log-probs of the same label tokens under two models (or two prompts) and returns a value
for `TokenScores.*_weights`. Shapes: B pairs, T answer tokens; every argument and result is [B, T].
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbpo_ray.errors import InputError


def contrastive_weights(
    positive_logps: Tensor,
    negative_logps: Tensor,
    *,
    chosen: bool,
    k: float = 1.0,
    low: float = -0.5,
    high: float = 1.5,
) -> Tensor:
    """TIS-DPO importance weights w_t = k exp(mu clamp(log pi+ - log pi-, low, high)).

    mu is 1 on the chosen side and -1 on the rejected side. pi+ and pi- are two contrastive models: one
    trained (or prompted) toward chosen answers, one toward rejected ones.

    Source: TIS-DPO, arXiv 2410.04350, with its k = 1, low = -0.5, high = 1.5.

    Raises:
        InputError: shapes disagree, or low is not below high.
    """
    check_same_shape(positive_logps, negative_logps)
    if not low < high:
        raise InputError(f"low, high: {low}, {high}; low must be below high")
    reward = (positive_logps - negative_logps).detach().clamp(low, high)
    return k * torch.exp(reward if chosen else -reward)


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

    The same model scores the same answer under two revised prompts, one that asks for a better answer and
    one that asks for a worse one.

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
