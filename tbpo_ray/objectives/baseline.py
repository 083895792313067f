"""State baselines c_t: what makes tokens taken in different states comparable.

Token t of the chosen answer and token t of the rejected one continue different prefixes, so a term that
depends on the prefix alone does not cancel in their log-ratio difference. TBPO adds c_t to cancel it:

    u_t = beta * (r_t^l - r_t^w + c_t^l - c_t^w),        r_t = log pi - log pi_ref

Shapes: B pairs, T answer tokens. Source: TBPO, arXiv 2605.12288.

| kind       | c_t                                                          | where it comes from          |
|------------|--------------------------------------------------------------|------------------------------|
| none       | 0 (the ablation)                                             | a given c_t is ignored       |
| learned    | b_phi(s_t), the log partition function (TBPO-Q)              | a head, see `heads`          |
| exact_kl   | KL(pi_ref || pi) over the vocabulary (TBPO-A)                | `token_log_probs`, kl        |
| k3         | (rho - 1) - log rho at the label, rho = pi/pi_ref            | computed here unless given   |
| k3_sampled | the mean of the same over n tokens drawn from pi_ref         | `token_log_probs`, k3        |
| mixed      | g_t b_phi(s_t) + (1 - g_t) KL, g_t a learned gate per state  | a head, see `heads`          |
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbpo_ray.config.objective import StateBaselineConfig
from tbpo_ray.errors import InputError
from tbpo_ray.objectives.types import Side, masked_mean

MAX_LOG_RATIO = 30.0


def k3(log_ratio: Tensor) -> Tensor:
    """K3 = (rho - 1) - log rho with rho = exp(log_ratio) = pi/pi_ref. Non-negative, same shape.

    Two cautions. It is an unbiased estimate of KL(pi_ref || pi) only for tokens drawn from the reference,
    which label tokens are not. And with the gradient left in, r_t + K3_t = rho_t - 1: the log-ratios
    cancel and u_t = beta (rho_t^l - rho_t^w). rho is clamped at e^30 so that it stays finite.

    Source: J. Schulman, "Approximating KL divergence" (2020); TBPO appendix.
    """
    return torch.expm1(log_ratio.clamp(max=MAX_LOG_RATIO)) - log_ratio


def side_baseline(config: StateBaselineConfig, side: Side, name: str) -> Tensor:
    """Return c_t of one side, before centering and clipping. [B, T]

    Raises:
        InputError: the kind requires `*_baseline`, which is None.
    """
    if config.kind == "none":
        return torch.zeros_like(side.logps)
    given = side.baseline
    if given is None and config.kind == "k3":
        given = k3(side.log_ratio)
    if given is None:
        raise InputError(
            f"{name}_baseline: None, but objective.state_baseline.kind is {config.kind!r}, which reads it; "
            "give a [B, T] tensor, or set the kind to 'none' or 'k3'"
        )
    return given.detach() if config.detach else given


def baseline_difference(
    config: StateBaselineConfig, c_chosen: Tensor, c_rejected: Tensor, mask: Tensor
) -> Tensor:
    """Return c^l - c^w, centered over the compared tokens and clipped as configured. [B, T]"""
    difference = c_rejected - c_chosen
    if config.center:
        difference = difference - masked_mean(difference, mask)[:, None]
    if config.clip is not None:
        difference = difference.clamp(-config.clip, config.clip)
    return difference
