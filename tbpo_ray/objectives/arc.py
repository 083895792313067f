"""ARC-BPO: every chunk of an answer has a score of its own to reach.

With a_c = beta times the sum of r_t over chunk c, and its target tau_c, the loss of a pair is

    mean_c D(e^-tau_c, e^-a_c) over the chosen answer's chunks + the same mean over the rejected one's,

D(b, R) = h(b) - h(R) - h'(R) (b - R) with h = sba(lam, scale): 0 at a = tau, and a pull toward tau from
either side. The targets are +margin/2 p_c on the chosen side and -margin/2 p_c on the rejected one, where the
shares p_c of a side add up to 1.

Source: the released code and specification of ARC-BPO (repository Thang1703hrsh/ARC-BPO).

Shapes: B pairs, T answer tokens; chunks are counted from 0, so that no answer has more than T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tbpo_ray.config.objective_options import ArcConfig
from tbpo_ray.objectives.losses import Params
from tbpo_ray.objectives.types import Side, masked_mean

LIMIT = 30.0
SMALLEST_MAD = 1e-8
LOWEST = -1e30


def loss(chosen: Side, rejected: Side, margins: Tensor | None, p: Params) -> tuple[Tensor, Tensor]:
    """The loss of each pair, and the share of its chunks whose score or target was clamped. [B] each

    Args:
        margins: the margin of each pair, instead of `arc.delta`. [B]
    """
    total = torch.full_like(chosen.logps[:, 0], p.arc.delta) if margins is None else margins
    losses, clamped, chunks = [], [], []
    for side, sign in ((chosen, 1.0), (rejected, -1.0)):
        scores, present = chunk_sums(side.log_ratio, side)
        scores = p.beta * scores
        targets = sign * total[:, None] / 2 * shares(side, present, sign, p.arc)
        outside = present & ((scores.abs() > LIMIT) | (targets.abs() > LIMIT))
        distance = divergence(scores.clamp(-LIMIT, LIMIT), targets.clamp(-LIMIT, LIMIT), p)
        losses.append(masked_mean(distance, present))
        clamped.append(outside.sum(-1))
        chunks.append(present.sum(-1))
    share = (clamped[0] + clamped[1]).to(total.dtype) / (chunks[0] + chunks[1]).clamp(min=1)
    return losses[0] + losses[1], share.detach()


def chunk_sums(values: Tensor, side: Side) -> tuple[Tensor, Tensor]:
    """Sums over each chunk's tokens, and which chunks there are. [B, T] each; entry c is chunk c."""
    assert side.chunks is not None
    pairs, tokens = values.shape
    # Tokens outside the mask go to one entry more, which is cut off.
    at = torch.where(side.mask, side.chunks.clamp(0, tokens - 1), tokens)
    sums = values.new_zeros(pairs, tokens + 1).scatter_add(1, at, values)
    counts = values.new_zeros(pairs, tokens + 1).scatter_add(1, at, side.mask.to(values.dtype))
    return sums[:, :tokens], counts[:, :tokens].detach() > 0


def shares(side: Side, present: Tensor, sign: float, arc: ArcConfig) -> Tensor:
    """p_c >= 0, which add up to 1 over the chunks of an answer; without gradient. [B, T]

    `uniform`, or for `advantage` the softmax of +-A_c / temperature, A_c being the sum of the chunk's token
    advantages (`*_weights`), winsorized: more of the margin to chunks that are good in the chosen answer, bad
    in the rejected one.
    """
    if arc.shape == "uniform":
        return present.to(side.logps.dtype) / present.sum(-1, keepdim=True).clamp(min=1)
    assert side.weights is not None
    advantages, _ = chunk_sums(side.weights.detach(), side)
    if arc.winsorize:
        advantages = winsorized(advantages, present, arc.kappa)
    logits = torch.where(present, sign * advantages / arc.temperature, LOWEST)
    return torch.where(present, logits.softmax(-1), 0)


def winsorized(values: Tensor, mask: Tensor, kappa: float) -> Tensor:
    """Values clipped to the median +- kappa times the median absolute deviation, by row. Same shape."""
    median = lower_median(values, mask)
    spread = lower_median((values - median).abs(), mask).clamp(min=SMALLEST_MAD)
    return torch.minimum(torch.maximum(values, median - kappa * spread), median + kappa * spread)


def lower_median(values: Tensor, mask: Tensor) -> Tensor:
    """The median of the entries that the mask selects, of an even number the lower one. [B, 1]"""
    ordered = torch.where(mask, values, torch.inf).sort(-1).values
    middle = (mask.sum(-1, keepdim=True) - 1).clamp(min=0) // 2
    median = ordered.gather(-1, middle)
    return torch.where(mask.any(-1, keepdim=True), median, 0)


def divergence(a: Tensor, tau: Tensor, p: Params) -> Tensor:
    """D(e^-tau, e^-a) >= 0, and 0 exactly at a = tau. Elementwise.

    dD/da = e^(-lam a) (e^-tau - e^-a) / scale.
    """
    lam, k = p.lam, 1 + p.lam
    d = a - tau
    # Near 0 the difference of two exponentials would lose its digits; far below, expm1 would overflow.
    near = d > -1
    close, far = torch.where(near, d, 0), torch.where(near, tau, a)
    first = torch.where(near, (-k * tau).exp() * torch.expm1(-k * close), (-k * far).exp() - (-k * tau).exp())
    if lam == 0:
        second = -(-tau).exp() * d
    else:
        apart = (-lam * far - tau).exp() - (-k * tau).exp()
        second = torch.where(near, (-k * tau).exp() * torch.expm1(-lam * close), apart) / lam
    return (first / k - second) / p.scale
