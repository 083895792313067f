"""Every objective as a log model ratio u (rejected over chosen: smaller is better) and a loss of u.

Each function below is one paper's formula for u, without the loss that is applied to it: `softplus` for the
DPO family, `(u + 1/(2 beta))^2` for IPO, any Bregman `loss_h` for TBPO and BPO (see `objective`).

Shapes: B pairs, T answer tokens. w is the chosen side, l the rejected one; r_t = log pi - log pi_ref;
S = sum of r_t over the answer's own tokens, K = sum of the per-token KL(pi_ref || pi).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tbpo_ray.config.objective import ObjectiveConfig, StateBaselineConfig
from tbpo_ray.objectives.baseline import baseline_difference, side_baseline
from tbpo_ray.objectives.types import Side, masked_mean


@dataclass(frozen=True)
class Params:
    """The numbers that the formulas read, with the defaults of the objective filled in."""

    beta: float
    label_smoothing: float
    alpha: float
    gamma: float
    select_ratio: float
    baseline: StateBaselineConfig

    @classmethod
    def from_config(cls, config: ObjectiveConfig) -> Params:
        """Take the numbers from a configuration section."""
        return cls(
            beta=config.effective_beta,
            label_smoothing=config.label_smoothing,
            alpha=config.effective_alpha,
            gamma=config.gamma,
            select_ratio=config.select_ratio,
            baseline=config.effective_baseline,
        )


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
    """u = -beta (S^w - S^l - (K^l - K^w)); `*_baseline` has the KL. [B]

    Source: TDPO, arXiv 2404.11999, method 1.
    """
    assert chosen.baseline is not None and rejected.baseline is not None
    return dpo(chosen, rejected, p) + p.beta * (rejected.baseline.sum(-1) - chosen.baseline.sum(-1))


def tdpo2(chosen: Side, rejected: Side, p: Params) -> Tensor:
    """u = -beta (S^w - S^l - alpha (K^l - stopgrad K^w)); `*_baseline` has the KL. [B]

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

    An oracle's token scores (`*_weights`) select ceil(select_ratio * |y|) tokens of each answer: the highest
    of the chosen one and the lowest of the rejected one. Only these tokens enter the loss, normalized by
    their number and without a reference.

    Source: SePO, arXiv 2408.13518. The oracle is a small DPO-trained model; `token_weights.oracle_scores`
    computes its scores. The paper normalizes by |y| * select_ratio, which differs from the number of selected
    tokens by rounding.
    """
    assert chosen.weights is not None and rejected.weights is not None
    high = top_tokens(chosen.weights, chosen.mask, p.select_ratio)
    low = top_tokens(-rejected.weights, rejected.mask, p.select_ratio)
    u = p.beta * (masked_mean(rejected.logps, low) - masked_mean(chosen.logps, high))
    read = chosen.weights + rejected.weights + chosen.logps + rejected.logps
    # A NaN among the scores, or at a token that was not selected, must not pass silently.
    return u + 0 * read.detach().sum(-1)


def top_tokens(scores: Tensor, mask: Tensor, ratio: float) -> Tensor:
    """Mask of the ceil(ratio * |y|) highest-scored tokens of each row; ties go to earlier tokens. [B, T]"""
    lowest = torch.full((), -torch.inf, dtype=scores.dtype, device=scores.device)
    order = torch.where(mask, scores, lowest).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    # The small subtrahend keeps 0.3 * 10 at 3 in fp32 as well.
    count = (mask.sum(-1, keepdim=True) * ratio - 1e-6).ceil()
    return mask & (rank < count)


def t_reg_penalty(chosen: Side, rejected: Side, p: Params) -> Tensor:
    """alpha times the mean squared distance between implicit token rewards beta r_t and target rewards. [B]

    The targets (`*_weights`) are the rewards that the model assigns to itself under contrastive prompts
    (`token_weights.self_rewards`). Each answer contributes the mean over its tokens. The penalty is added to
    the DPO loss of the pair.

    Source: T-REG, arXiv 2412.02685: DPO plus a regularizer that pulls the implicit token rewards toward
    self-assigned ones. The paper leaves the form of the distance open; the square, and the equal weight of
    both answers whatever their length and margin, are choices made here.
    """
    return p.alpha * (reward_distance(chosen, p.beta) + reward_distance(rejected, p.beta))


def reward_distance(side: Side, beta: float) -> Tensor:
    """Mean over an answer's tokens of (beta r_t - target reward)^2. [B]"""
    assert side.weights is not None
    return masked_mean((beta * side.log_ratio - side.weights.detach()) ** 2, side.mask)


def sft(chosen: Side) -> Tensor:
    """Cross-entropy of the chosen answer: the mean over its tokens of -log pi, in nats. [B]"""
    return masked_mean(-chosen.logps, chosen.mask)


def softplus(u: Tensor, beta: float) -> Tensor:
    """log(1 + e^u), the DPO family's loss of u. Elementwise."""
    return -functional.logsigmoid(-u)


def ipo_square(u: Tensor, beta: float) -> Tensor:
    """(u + 1/(2 beta))^2 = (S^w - S^l - 1/(2 beta))^2. Elementwise."""
    return (u + 1 / (2 * beta)) ** 2
