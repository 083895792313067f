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

from tbpo_ray.config.objective import ObjectiveConfig, StateBaselineConfig
from tbpo_ray.config.objective_options import ArcConfig, FDivergenceConfig, LdReference, NllNormalization
from tbpo_ray.config.objective_traits import Normalization
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
    nll_weight: float
    nll_normalization: NllNormalization
    f_divergence: FDivergenceConfig
    ld_alpha: float | None
    ld_reference: LdReference
    guide_beta: float
    arc: ArcConfig
    lam: float
    scale: float

    @classmethod
    def from_config(cls, config: ObjectiveConfig) -> Params:
        """Take the numbers from a configuration section."""
        return cls(
            beta=config.effective_beta,
            label_smoothing=config.label_smoothing,
            alpha=config.effective_alpha,
            gamma=config.effective_gamma,
            select_ratio=config.select_ratios,
            normalization=config.effective_normalization,
            base=config.base,
            baseline=config.effective_baseline,
            nll_weight=config.nll_weight,
            nll_normalization=config.nll_normalization,
            f_divergence=config.effective_f_divergence,
            ld_alpha=config.effective_ld_alpha,
            ld_reference=config.ld_reference,
            guide_beta=config.guide_beta,
            arc=config.arc,
            lam=config.effective_bregman.lam or 0.0,
            scale=config.bregman.scale,
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
    """u = beta (g(S^l) - g(S^w)), g(S) = S unless `f_divergence` says otherwise. [B]

    With `ld_alpha`, the tokens beyond the shorter answer count by that factor in S.

    Sources: DPO, arXiv 2305.18290, eq. 7; BPO, arXiv 2505.19601; f-DPO, arXiv 2309.16240; LD-DPO,
    arXiv 2409.06411.
    """
    if p.ld_alpha is not None:
        # Masks start at index 0, so what both have is what the shorter one has.
        both = chosen.mask & rejected.mask
        return p.beta * (ld_log_ratio(rejected, both, p) - ld_log_ratio(chosen, both, p))
    scores = [f_slope(answer_log_ratio(side, p), p.f_divergence) for side in (rejected, chosen)]
    return p.beta * (scores[0] - scores[1])


def ld_log_ratio(side: Side, both: Tensor, p: Params) -> Tensor:
    """Sum of r_t up to the shorter answer's length + ld_alpha times the sum of the rest. [B]

    With `ld_reference: full` the reference's log-probs all count in full, as in some implementations.
    """
    assert p.ld_alpha is not None and side.ref_logps is not None
    weight = torch.ones_like(side.logps).masked_fill(~both, p.ld_alpha)
    ref_weight = torch.ones_like(weight) if p.ld_reference == "full" else weight
    return (weight * side.logps - ref_weight * side.ref_logps).sum(-1)


MAX_EXPONENT = 30.0


def f_exponent(s: Tensor, f: FDivergenceConfig) -> Tensor | None:
    """The exponent of g(S) before it is clamped; None if g cannot overflow. Elementwise."""
    if f.kind == "forward_kl":
        return -s
    return -f.alpha * s if f.kind == "alpha" else None


def f_slope(s: Tensor, f: FDivergenceConfig) -> Tensor:
    """g(S) = f'(e^S) of an f-divergence, up to a constant. Elementwise.

    | reverse_kl | forward_kl | js             | alpha                        |
    |------------|------------|----------------|------------------------------|
    | S          | -e^-S      | -softplus(-S)  | (1 - e^(-alpha S)) / alpha   |

    The exponent is clamped, with gradient 0 beyond. Source: f-DPO, arXiv 2309.16240, table 1.
    """
    if f.kind == "js":
        return functional.logsigmoid(s)
    exponent = f_exponent(s, f)
    if exponent is None:
        return s
    exponent = exponent.clamp(max=MAX_EXPONENT)
    return -exponent.exp() if f.kind == "forward_kl" else -torch.expm1(exponent) / f.alpha


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


def confpo(chosen: Side, rejected: Side, p: Params) -> Tensor:
    """u = beta (mean log pi^l - mean log pi^w) + gamma over the tokens that the policy is unsure of. [B]

    SimPO on the tokens of `unsure_tokens`, normalized by their number, without a reference. The selection has
    no gradient.

    Source: ConfPO, arXiv 2506.08712, and its released code, from which "below the mean" is taken.
    """
    means = [masked_mean(side.logps, unsure_tokens(side)) for side in (rejected, chosen)]
    # A NaN at a token that was not selected must not pass silently.
    read = (chosen.logps + rejected.logps).detach().sum(-1)
    return p.beta * (means[0] - means[1]) + p.gamma + 0 * read


UNSURE = 1 - 1e-6  # so that rounding does not select one of several equal probabilities


def unsure_tokens(side: Side) -> Tensor:
    """Mask of the tokens whose probability is below the answer's mean probability. [B, T]"""
    probability = side.logps.detach().exp()
    mean = masked_mean(probability, side.mask)[:, None]
    return side.mask & (probability < UNSURE * mean)


def confpo_is_compared(chosen: Side, rejected: Side) -> Tensor:
    """Pairs of which both answers have unsure tokens, or a NaN; the others have loss 0. [B] bool

    An answer has none if it has one token, or equally likely ones.
    """
    unsure = unsure_tokens(chosen).any(-1) & unsure_tokens(rejected).any(-1)
    return unsure | (chosen.logps + rejected.logps).detach().sum(-1).isnan()


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


def tgdpo(chosen: Side, rejected: Side, p: Params) -> Tensor:
    """u = beta (sum (1 - alpha b rho_t^l) r_t^l - sum (1 + alpha b rho_t^w) r_t^w), no gradient in rho. [B]

    rho = log pi_guide - log pi_ref (`*_weights`), b = the guide's beta: a frozen guide stretches beta where
    it prefers a chosen token or dislikes a rejected one.

    Source: TGDPO, arXiv 2506.14574; the formula is that of the released code.
    """
    stretched = [(stretch(side, sign, p) * side.log_ratio).sum(-1)
                 for side, sign in ((rejected, -1.0), (chosen, 1.0))]  # fmt: skip
    return p.beta * (stretched[0] - stretched[1])


def stretch(side: Side, sign: float, p: Params) -> Tensor:
    """The factor 1 +- alpha b rho_t of each token. [B, T]"""
    assert side.weights is not None
    return 1 + sign * p.alpha * p.guide_beta * side.weights.detach()


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
