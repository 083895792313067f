"""Every objective as a log model ratio u (rejected over chosen: smaller is better) and a loss of u.

Each function below is one paper's formula for u, without the loss that is put on it: `softplus` for the
DPO family, `(u + 1/(2 beta))^2` for IPO, any Bregman `loss_h` for TBPO and BPO (see `objective`).

Shapes: B pairs, T answer tokens. w is the chosen side, l the rejected one; r_t = log pi - log pi_ref;
S = sum of r_t over the answer's own tokens, K = sum of the per-token KL(pi_ref || pi).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from tbpo_ray.objectives.baseline import StateBaseline, baseline_difference, side_baseline
from tbpo_ray.objectives.types import Side, masked_mean


@dataclass(frozen=True)
class Params:
    """The numbers the formulas read; see `build_objective` for their defaults."""

    beta: float
    label_smoothing: float = 0.0
    alpha: float = 0.5
    gamma: float = 0.5
    select_ratio: float = 0.3
    baseline: StateBaseline = field(default_factory=StateBaseline)


def tbpo(chosen: Side, rejected: Side, p: Params) -> Tensor:
    """u_t = beta (r_t^l - r_t^w + c_t^l - c_t^w), tokens compared by their index. [B, T]

    Source: TBPO, arXiv 2605.12288: TBPO-Q with a learned c_t, TBPO-A with c_t = KL(pi_ref || pi).
    """
    c_chosen = side_baseline(p.baseline, chosen, "chosen")
    c_rejected = side_baseline(p.baseline, rejected, "rejected")
    both = chosen.mask & rejected.mask
    difference = baseline_difference(p.baseline, c_chosen, c_rejected, both)
    return p.beta * (rejected.log_ratio - chosen.log_ratio + difference)


def dpo(chosen: Side, rejected: Side, p: Params) -> Tensor:
    """u = beta (S^l - S^w). [B]. Source: DPO, arXiv 2305.18290, eq. 7; BPO, arXiv 2505.19601."""
    return p.beta * (rejected.log_ratio.sum(-1) - chosen.log_ratio.sum(-1))


def ipo(chosen: Side, rejected: Side, p: Params) -> Tensor:
    """u = S^l - S^w, without beta. [B]. Source: IPO, arXiv 2310.12036, eq. 17 (its tau is our beta)."""
    return rejected.log_ratio.sum(-1) - chosen.log_ratio.sum(-1)


def simpo(chosen: Side, rejected: Side, p: Params) -> Tensor:
    """u = beta (mean log pi^l - mean log pi^w) + gamma, no reference. [B]

    Source: SimPO, arXiv 2405.14734, eq. 6.
    """
    mean_chosen = masked_mean(chosen.logps, chosen.mask)
    mean_rejected = masked_mean(rejected.logps, rejected.mask)
    return p.beta * (mean_rejected - mean_chosen) + p.gamma


def tdpo1(chosen: Side, rejected: Side, p: Params) -> Tensor:
    """u = -beta (S^w - S^l - (K^l - K^w)); the KL comes in `*_baseline`. [B]

    Source: TDPO, arXiv 2404.11999, method 1.
    """
    assert chosen.baseline is not None and rejected.baseline is not None
    return dpo(chosen, rejected, p) + p.beta * (rejected.baseline.sum(-1) - chosen.baseline.sum(-1))


def tdpo2(chosen: Side, rejected: Side, p: Params) -> Tensor:
    """u = -beta (S^w - S^l - alpha (K^l - stopgrad K^w)); the KL comes in `*_baseline`. [B]

    Source: TDPO, arXiv 2404.11999, method 2.
    """
    assert chosen.baseline is not None and rejected.baseline is not None
    kl = rejected.baseline.sum(-1) - chosen.baseline.detach().sum(-1)
    return dpo(chosen, rejected, p) + p.beta * p.alpha * kl


def tis_dpo(chosen: Side, rejected: Side, p: Params) -> Tensor:
    """u = -beta (sum w_t^w r_t^w - sum w_t^l r_t^l), weights without gradient. [B]

    Source: TIS-DPO, arXiv 2410.04350; `token_weights.contrastive_weights` estimates the weights.
    """
    assert chosen.weights is not None and rejected.weights is not None
    weighted_chosen = (chosen.weights.detach() * chosen.log_ratio).sum(-1)
    weighted_rejected = (rejected.weights.detach() * rejected.log_ratio).sum(-1)
    return p.beta * (weighted_rejected - weighted_chosen)


def sepo(chosen: Side, rejected: Side, p: Params) -> Tensor:
    """u = beta (mean of log pi^l over its lowest tokens - mean of log pi^w over its highest). [B]

    An oracle's token scores (`*_weights`) pick ceil(select_ratio * |y|) tokens of each answer: the highest
    of the chosen one, the lowest of the rejected one. The policy is compared with itself on those tokens
    alone: length-normalised, without a reference.

    Source: SePO, arXiv 2408.13518. The oracle is a small DPO-trained model, its scores
    `token_weights.oracle_scores`. The paper's normaliser is |y| * select_ratio where ours is the number of
    tokens selected, which differs by rounding.
    """
    assert chosen.weights is not None and rejected.weights is not None
    high = top_tokens(chosen.weights, chosen.mask, p.select_ratio)
    low = top_tokens(-rejected.weights, rejected.mask, p.select_ratio)
    u = p.beta * (masked_mean(rejected.logps, low) - masked_mean(chosen.logps, high))
    read = chosen.weights + rejected.weights + chosen.logps + rejected.logps
    return u + 0 * read.detach().sum(-1)  # a NaN that was ranked, or not selected, must not pass silently


def top_tokens(scores: Tensor, mask: Tensor, ratio: float) -> Tensor:
    """Mask of the ceil(ratio * |y|) highest-scored tokens of each row, earlier ones first in a tie. [B, T]"""
    lowest = torch.full((), -torch.inf, dtype=scores.dtype, device=scores.device)
    order = torch.where(mask, scores, lowest).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    count = (mask.sum(-1, keepdim=True) * ratio - 1e-6).ceil()  # 0.3 * 10 must be 3 in fp32 too
    return mask & (rank < count)


def t_reg_penalty(chosen: Side, rejected: Side, p: Params) -> Tensor:
    """alpha times the mean squared distance of the implicit token rewards beta r_t from given ones. [B]

    The given token rewards (`*_weights`) are those the model gives itself by contrastive prompts
    (`token_weights.self_rewards`). Both answers count, each by the mean over its tokens.

    Source: T-REG, arXiv 2412.02685: DPO plus a regulariser that draws the implicit token rewards towards
    self-given ones. That the distance is squared and that both answers weigh the same, whatever their
    length and margin, is our reading of it. Added to the DPO loss of the pair.
    """
    return p.alpha * (reward_distance(chosen, p.beta) + reward_distance(rejected, p.beta))


def reward_distance(side: Side, beta: float) -> Tensor:
    """Mean over an answer's tokens of (beta r_t - given reward)^2. [B]"""
    assert side.weights is not None
    return masked_mean((beta * side.log_ratio - side.weights.detach()) ** 2, side.mask)


def sft(chosen: Side) -> Tensor:
    """Cross-entropy of the chosen answer: the mean over its tokens of -log pi, in nats. [B]"""
    return masked_mean(-chosen.logps, chosen.mask)


def softplus(u: Tensor, beta: float) -> Tensor:
    """log(1 + e^u), the DPO family's loss of u. Elementwise."""
    return -F.logsigmoid(-u)


def ipo_square(u: Tensor, beta: float) -> Tensor:
    """(u + 1/(2 beta))^2 = (S^w - S^l - 1/(2 beta))^2. Elementwise."""
    return (u + 1 / (2 * beta)) ** 2
