"""State baselines c_t: what makes tokens taken in different states comparable.

Token t of the chosen answer and token t of the rejected one continue different prefixes, so whatever
depends on the prefix alone does not cancel in their log-ratio difference. TBPO adds c_t to make it so:

    u_t = beta * (r_t^l - r_t^w + c_t^l - c_t^w),        r_t = log pi - log pi_ref

Shapes: B pairs, T answer tokens. Source: TBPO, arXiv 2605.12288.

| kind       | c_t                                                          | where it comes from          |
|------------|--------------------------------------------------------------|------------------------------|
| none       | 0 (the ablation)                                             | a given c_t is ignored       |
| learned    | b_phi(s_t), the log partition function (TBPO-Q)              | a head, see `heads`          |
| exact_kl   | KL(pi_ref || pi) over the vocabulary (TBPO-A)                | `token_log_probs`, want kl   |
| k3         | (rho - 1) - log rho at the label, rho = pi/pi_ref            | computed here unless given   |
| k3_sampled | the mean of the same over n tokens drawn from pi_ref         | `token_log_probs`, want k3   |
| mixed      | g_t b_phi(s_t) + (1 - g_t) KL, g_t a learned gate per state  | a head, see `heads`          |
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tbpo_ray.errors import InputError
from tbpo_ray.objectives.types import Side, masked_mean

KINDS = ("none", "learned", "exact_kl", "k3", "k3_sampled", "mixed")
MAX_LOG_RATIO = 30.0


@dataclass(frozen=True)
class StateBaseline:
    """Which baseline and what is done to it before it enters u.

    Args:
        kind: one of KINDS.
        center: subtract from each side its mean over the pair's compared tokens.
        clip: clamp c^l - c^w to [-clip, clip] (after centring), or None.
        detach: stop the gradient through c_t. Not for a learned baseline, which could not learn.
        samples: reference tokens drawn per state (`k3_sampled`).
        lr: learning rate of the head's own AdamW (`learned`, `mixed`); read by the training loop.
        hidden: width of the head's hidden layer, 0 for a linear head.
    """

    kind: str = "none"
    center: bool = False
    clip: float | None = None
    detach: bool = False
    samples: int = 4
    lr: float = 1e-3
    hidden: int = 1024

    @property
    def learned(self) -> bool:
        """Whether a head has to be trained."""
        return self.kind in ("learned", "mixed")

    @property
    def needs_kl(self) -> bool:
        """Whether the exact KL from both distributions goes into it."""
        return self.kind in ("exact_kl", "mixed")


def k3(log_ratio: Tensor) -> Tensor:
    """K3 = (rho - 1) - log rho with rho = exp(log_ratio) = pi/pi_ref. Non-negative, same shape.

    Two cautions. It is an unbiased estimate of KL(pi_ref || pi) only for tokens drawn from the reference,
    which label tokens are not. And with the gradient left in, r_t + K3_t = rho_t - 1: the log-ratios
    cancel and u_t = beta (rho_t^l - rho_t^w). rho is clamped at e^30 so that it stays finite.

    Source: J. Schulman, "Approximating KL divergence" (2020); TBPO appendix.
    """
    return torch.expm1(log_ratio.clamp(max=MAX_LOG_RATIO)) - log_ratio


def side_baseline(spec: StateBaseline, side: Side, name: str) -> Tensor:
    """c_t of one side, before centring and clipping. [B, T]

    Raises:
        InputError: the kind is one that has to be given and `*_baseline` is None.
    """
    if spec.kind == "none":
        return torch.zeros_like(side.logps)
    given = side.baseline
    if given is None and spec.kind == "k3":
        given = k3(side.log_ratio)
    if given is None:
        raise InputError(
            f"{name}_baseline: None, but objective.state_baseline.kind is {spec.kind!r}, which reads it; "
            "give a [B, T] tensor, or set the kind to 'none' or 'k3'"
        )
    return given.detach() if spec.detach else given


def baseline_difference(spec: StateBaseline, c_chosen: Tensor, c_rejected: Tensor, mask: Tensor) -> Tensor:
    """c^l - c^w, centred over the compared tokens and clipped as the spec says. [B, T]"""
    difference = c_rejected - c_chosen
    if spec.center:
        difference = difference - masked_mean(difference, mask)[:, None]
    if spec.clip is not None:
        difference = difference.clamp(-spec.clip, spec.clip)
    return difference
