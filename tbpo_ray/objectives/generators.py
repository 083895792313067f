"""Bregman generators h and the losses they induce on a log model ratio.

With R = exp(u), the density-ratio matching loss of one sample is

    loss_h(u) = h'(R) R - h(R) - h'(1/R)        (additive constants dropped)

and is computed from u, never from R, so that no intermediate value overflows. The ratio is rejected over
chosen: smaller u is better. Source: TBPO, arXiv 2605.12288; BPO, arXiv 2505.19601 (sequence level).

| name      | h(R)                                  | loss_h(u)                                          |
|-----------|---------------------------------------|----------------------------------------------------|
| logistic  | (R log R - (1+R) log(1+R)) / 2        | softplus(u)                                        |
| kliep     | R log R - R                           | e^u + u                                            |
| lsif      | (R-1)^2                               | e^{2u} - 2 e^{-u}                                  |
| ba        | (R^{1+lam} - R) / lam                 | e^{(1+lam)u} - (1+lam) expm1(-lam u)/lam           |
| sba       | (R^{1+lam} - R) / (scale lam (1+lam)) | [e^{(1+lam)u}/(1+lam) - expm1(-lam u)/lam] / scale |

The last two are continuous in lam at 0, in value and gradient, where they equal `kliep` (divided by `scale`
for `sba`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tbpo_ray.config.objective import BregmanConfig, GeneratorName
from tbpo_ray.config.validation import validate_section

_DEFAULTS = BregmanConfig()
MAX_EXPONENT = 30.0  # e^30 = 1e13: its square, summed in a gradient norm, still fits fp32 and bf16
TINY_LAM = 1e-18  # below it u - lam u^2 / 2 equals u in float64 for every u within the clamp


def power_term(u: Tensor, lam: float) -> Tensor:
    """-expm1(-lam u) / lam, which tends to u as lam tends to 0. Same shape as u."""
    if abs(lam) < TINY_LAM:
        return u
    return torch.expm1(-lam * u) / -lam


def logistic(u: Tensor, lam: float, scale: float) -> Tensor:
    return -functional.logsigmoid(-u)  # softplus without its linear shortcut above 20, which is off by 2e-9


def kliep(u: Tensor, lam: float, scale: float) -> Tensor:
    return u.exp() + u


def lsif(u: Tensor, lam: float, scale: float) -> Tensor:
    return (2 * u).exp() - 2 * (-u).exp()


def ba(u: Tensor, lam: float, scale: float) -> Tensor:
    return ((lam + 1) * u).exp() + (lam + 1) * power_term(u, lam)


def sba(u: Tensor, lam: float, scale: float) -> Tensor:
    return (((lam + 1) * u).exp() / (lam + 1) + power_term(u, lam)) / scale


LOSSES: dict[GeneratorName, Callable[[Tensor, float, float], Tensor]] = {
    "logistic": logistic,
    "kliep": kliep,
    "lsif": lsif,
    "ba": ba,
    "sba": sba,
}


@dataclass(frozen=True)
class Generator:
    """A Bregman generator with its parameters. Build one with `make_generator`.

    Attributes:
        limit: u is clamped to [-limit, limit], where its gradient is 0 beyond. Infinite for `logistic`, whose
            value and gradient are finite for every finite u; otherwise 30 / (largest exponent per unit of u).
    """

    name: GeneratorName
    lam: float
    scale: float
    limit: float

    def loss(self, u: Tensor) -> Tensor:
        """Return loss_h(u), elementwise: the shape of u, in float32 (or float64 for float64 input).

        Terms with |u| > limit are clamped: their value is finite and their gradient 0. NaN stays NaN.
        """
        u = u.to(torch.promote_types(u.dtype, torch.float32))
        return LOSSES[self.name](self.clamp(u), self.lam, self.scale)

    def clamp(self, u: Tensor) -> Tensor:
        """u within [-limit, limit]. Same shape."""
        return u if math.isinf(self.limit) else u.clamp(-self.limit, self.limit)

    def is_clamped(self, u: Tensor) -> Tensor:
        """True where `loss` clamps. Same shape, bool."""
        return u.abs() > self.limit


def make_generator(name: str, *, lam: float = _DEFAULTS.lam, scale: float = _DEFAULTS.scale) -> Generator:
    """Build a generator by name: logistic, kliep, lsif, ba(lam) or sba(lam, scale).

    Args:
        lam: order of `ba` and `sba`; the other generators do not read it.
        scale: divisor of `sba`.

    Raises:
        InputError: a value that `objective.bregman` does not accept.
    """
    config = validate_section(
        BregmanConfig, {"generator": name, "lam": lam, "scale": scale}, "objective.bregman"
    )
    # The largest exponent per unit of u decides where e^(rate u) would leave the range of MAX_EXPONENT.
    rates = {"logistic": 0.0, "kliep": 1.0, "lsif": 2.0}
    rate = rates.get(config.generator, max(1.0, 1.0 + config.lam))
    limit = MAX_EXPONENT / rate if rate else math.inf
    return Generator(config.generator, config.lam, config.scale, limit)
