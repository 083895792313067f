"""Losses of pairs that a judge could not decide, for objectives with one logistic loss per pair.

Both models add a third outcome to Bradley and Terry's, with a strength v that says how likely it is between
equals: (v - 1) / (v + 1) for Rao and Kupper, v / (1 + v) for Davidson. u is the log model ratio, rejected
over chosen.

| model        | decided pair                     | tie                                                     |
|--------------|----------------------------------|---------------------------------------------------------|
| `rao_kupper` | softplus(log v + u)              | softplus(log v + u) + softplus(log v - u) - log(v^2 - 1) |
| `davidson`   | log(1 + e^u + 2v e^{u/2})        | the same - u/2 - log(2v)                                |

Sources: P. Rao and L. Kupper, "Ties in paired-comparison experiments" (1967); R. Davidson, "On extending the
Bradley-Terry model to accommodate ties" (1970); in preference optimization, arXiv 2409.17431.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from tbpo_ray.config.objective_traits import TieModel


def loss(u: Tensor, tie: Tensor, model: TieModel, strength: float) -> Tensor:
    """The loss of decided pairs and ties under a model of ties, at least 0. u and tie: [B]. [B]"""
    decided, tied = _rao_kupper(u, strength) if model == "rao_kupper" else _davidson(u, strength)
    return torch.where(tie, tied, decided)


def _rao_kupper(u: Tensor, v: float) -> tuple[Tensor, Tensor]:
    decided = _softplus(u + math.log(v))
    return decided, decided + _softplus(math.log(v) - u) - math.log(v**2 - 1)


def _davidson(u: Tensor, v: float) -> tuple[Tensor, Tensor]:
    tie_term = u / 2 + math.log(2 * v)
    decided = torch.logsumexp(torch.stack([torch.zeros_like(u), u, tie_term]), dim=0)
    return decided, decided - tie_term


def _softplus(x: Tensor) -> Tensor:
    return -functional.logsigmoid(-x)
