"""Every objective as a log model ratio u (rejected over chosen: smaller is better) and a loss of u.

Each function below is one paper's formula for u, without the loss that is applied to it: `softplus` for the
DPO family (or, with ties, a loss of `ties`), `(u + 1/(2 beta))^2` for IPO, any Bregman `loss_h` for TBPO and
BPO (see `objective`).

Shapes: B pairs, T answer tokens. w is the chosen side, l the rejected one; r_t = log pi - log pi_ref;
S = sum of r_t over the answer's own tokens (its mean with `normalization: token_mean`), K = sum of the
per-token KL(pi_ref || pi).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tbpo_ray.config.objective import Normalization, ObjectiveConfig, StateBaselineConfig
from tbpo_ray.objectives.baseline import baseline_difference, side_baseline
from tbpo_ray.objectives.types import Side, masked_mean


@dataclass(frozen=True)
class Params:
    """The numbers that the formulas read, with the defaults of the objective filled in."""

    beta: float
    label_smoothing: float
    alpha: float
    gamma: float
    select_ratio: tuple[float, float]
    normalization: Normalization
    base: str
    baseline: StateBaselineConfig

    @classmethod
    def from_config(cls, config: ObjectiveConfig) -> Params:
        """Take the numbers from a configuration section."""
        return cls(
            beta=config.effective_beta,
            label_smoothing=config.label_smoothing,
            alpha=config.effective_alpha,
            gamma=config.gamma,
            select_ratio=config.select_ratios,
            normalization=config.effective_normalization,
            base=config.base,
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
    return p.beta * (answer_log_ratio(rejected, p) - answer_log_ratio(chosen, p))


def answer_log_ratio(side: Side, p: Params) -> Tensor:
    """S: the sum of an answer's token log-ratios, or with `token_mean` their mean. [B]"""
    if p.normalization == "token_mean":
        return masked_mean(side.log_ratio, side.mask)
    return side.log_ratio.sum(-1)


def ipo(chosen: Side, rejected: Side, p: Params) -> Tensor:
    """u = S^l - S^w, without beta. [B]. Source: IPO, arXiv 2310.12036, eq. 17 (its tau is our beta).

    S is the mean over the tokens by default: TRL averages, and reports that the authors confirmed it.
    """
    return answer_log_ratio(rejected, p) - answer_log_ratio(chosen, p)


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
    """u = beta (sum o_t r_t^l - sum o_t r_t^w + alpha (D^w - D^l)), weights o_t without gradient. [B]

    D = sum of o_t KL(pi || pi_ref)_t, policy first, with its gradient; `*_baseline` has the KL, which is read
    for alpha > 0 only.

    Source: TIS-DPO, arXiv 2410.04350; `token_weights.contrastive_weights` estimates the weights. The released
    code has alpha 0.5 behind a switch that is off.
    """
    assert chosen.weights is not None and rejected.weights is not None
    w_chosen, w_rejected = chosen.weights.detach(), rejected.weights.detach()
    u = (w_rejected * rejected.log_ratio).sum(-1) - (w_chosen * chosen.log_ratio).sum(-1)
    if p.alpha > 0:
        assert chosen.baseline is not None and rejected.baseline is not None
        divergence = (w_chosen * chosen.baseline).sum(-1) - (w_rejected * rejected.baseline).sum(-1)
        u = u + p.alpha * divergence
    return p.beta * u


def sepo(chosen: Side, rejected: Side, p: Params) -> Tensor:
    """u = beta (mean of log pi^l over its lowest tokens - mean of log pi^w over its highest). [B]

    An oracle's token scores (`*_weights`) select max(1, floor(ratio |y|)) tokens of each answer: the highest
    of the chosen one and the lowest of the rejected one, each with its own ratio. Only these tokens enter the
    loss, normalized by their number and without a reference.

    Source: SePO, arXiv 2408.13518 and its released code, which has no factor beta (1 here) and drops answers
    of less than 8 tokens (kept here). The oracle is a small DPO-trained model; `token_weights.oracle_scores`
    computes its scores.
    """
    assert chosen.weights is not None and rejected.weights is not None
    high = top_tokens(chosen.weights, chosen.mask, p.select_ratio[0])
    low = top_tokens(-rejected.weights, rejected.mask, p.select_ratio[1])
    u = p.beta * (masked_mean(rejected.logps, low) - masked_mean(chosen.logps, high))
    read = chosen.weights + rejected.weights + chosen.logps + rejected.logps
    # A NaN among the scores, or at a token that was not selected, must not pass silently.
    return u + 0 * read.detach().sum(-1)


def top_tokens(scores: Tensor, mask: Tensor, ratio: float) -> Tensor:
    """Mask of the max(1, floor(ratio |y|)) highest-scored tokens of each row; earlier tokens first in a tie.

    [B, T]
    """
    lowest = torch.full((), -torch.inf, dtype=scores.dtype, device=scores.device)
    order = torch.where(mask, scores, lowest).argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    # In float64, where 0.3 * 10 is within 1e-9 of 3.
    count = (mask.sum(-1, keepdim=True).double() * ratio + 1e-9).floor().clamp(min=1)
    return mask & (rank < count)


def t_reg(chosen: Side, rejected: Side, p: Params) -> Tensor:
    """u of the base objective, `dpo` or `simpo`, to which `t_reg_pull` is added. [B]"""
    return (simpo if p.base == "simpo" else dpo)(chosen, rejected, p)


def t_reg_pull(u: Tensor, chosen: Side, rejected: Side, p: Params) -> Tensor:
    """alpha w (R(y_w) + R(y_l)), which pulls log pi by token rewards rho_t. [B]

    R(y) = -beta sum of rho_t log pi_t; on `simpo`, the same divided by |y|. w is the weight that the base
    loss gives its own gradient, sigmoid(u) (less the label smoothing), without gradient. So in gradient this
    is the base objective with token weights: on `dpo`, -w beta (1 + alpha rho_t) at the chosen tokens and
    w beta (1 - alpha rho_t) at the rejected ones.

    The rewards (`*_weights`), in (-1/2, 1/2), are those that the reference gives itself under a prompt that
    asks for a better answer and one that asks for a worse one (`token_weights.self_rewards`).

    Source: T-REG, arXiv 2412.02685; the form on `simpo` is derived here.
    """
    w = (torch.sigmoid(u) - p.label_smoothing).detach()
    return p.alpha * w * (_reward_pull(chosen, p) + _reward_pull(rejected, p))


def _reward_pull(side: Side, p: Params) -> Tensor:
    """R(y) of one answer. [B]"""
    assert side.weights is not None
    pull = side.weights.detach() * side.logps
    return -p.beta * (masked_mean(pull, side.mask) if p.base == "simpo" else pull.sum(-1))


def sft(chosen: Side) -> Tensor:
    """Cross-entropy of the chosen answer: the mean over its tokens of -log pi, in nats. [B]"""
    return masked_mean(-chosen.logps, chosen.mask)


def softplus(u: Tensor, beta: float) -> Tensor:
    """log(1 + e^u), the DPO family's loss of u. Elementwise."""
    return -functional.logsigmoid(-u)


def ipo_square(u: Tensor, beta: float) -> Tensor:
    """(u + 1/(2 beta))^2 = (S^w - S^l - 1/(2 beta))^2. Elementwise."""
    return (u + 1 / (2 * beta)) ** 2
