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
for `sba`). `beta_family` holds all of them, up to a factor, as points of a plane: see `beta_family`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tbpo_ray.config.objective import GENERATORS, BregmanConfig
from tbpo_ray.config.validation import validate_section
from tbpo_ray.objectives import beta_family
from tbpo_ray.objectives.own_generator import CHECKED_RANGE, load_function

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


LOSSES: dict[str, Callable[[Tensor, float, float], Tensor]] = {
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
        name: one of `GENERATORS`, or the `path.py:NAME` of a function of the user's.
        limit: u is clamped to [-limit, limit], where its gradient is 0 beyond. Infinite for `logistic`, whose
            value and gradient are finite for every finite u; the checked range for a function of the user's;
            otherwise 30 / (largest exponent per unit of u).
        a, b: the point of `beta_family`.
        turning_point: the u beyond which the slope of `beta_family` only falls, or infinity.
        function: the user's.
    """

    name: str
    lam: float
    scale: float
    limit: float
    a: float = 0.0
    b: float = 0.0
    turning_point: float = math.inf
    function: Callable[[Tensor], Tensor] | None = None

    def loss(self, u: Tensor) -> Tensor:
        """Return loss_h(u), elementwise: the shape of u, in float32 (or float64 for float64 input).

        Terms with |u| > limit are clamped: their value is finite and their gradient 0. NaN stays NaN.
        """
        u = self.clamp(u.to(torch.promote_types(u.dtype, torch.float32)))
        if self.function is not None:
            return self.function(u)
        if self.name == "beta_family":
            return beta_family.loss(u, self.a, self.b, self.limit)
        return LOSSES[self.name](u, self.lam, self.scale)

    def clamp(self, u: Tensor) -> Tensor:
        """u within [-limit, limit]. Same shape."""
        return u if math.isinf(self.limit) else u.clamp(-self.limit, self.limit)

    def is_clamped(self, u: Tensor) -> Tensor:
        """True where `loss` clamps. Same shape, bool."""
        return u.abs() > self.limit

    def is_outlier(self, u: Tensor) -> Tensor:
        """True where the slope has begun to fall: the loss counts such a u less, the more wrong it is."""
        return u > self.turning_point


def make_generator(
    name: str,
    *,
    lam: float = 0.0,
    scale: float = _DEFAULTS.scale,
    a: float = _DEFAULTS.a,
    b: float = _DEFAULTS.b,
) -> Generator:
    """Build a generator by name: logistic, kliep, lsif, ba(lam), sba(lam, scale) or beta_family(a, b).

    Args:
        name: or `path.py:NAME`, a function of u of the user's, which is imported and checked.
        lam: order of `ba` and `sba`; the other generators do not read it.
        scale: divisor of `sba`.
        a, b: point of `beta_family`.

    Raises:
        InputError: a value that `objective.bregman` does not accept, or a function that is not a usable loss.
    """
    values = {"generator": name, "lam": lam, "scale": scale, "a": a, "b": b}
    return generator_from_config(validate_section(BregmanConfig, values, "objective.bregman"))


def generator_from_config(config: BregmanConfig) -> Generator:
    """Build the generator of an `objective.bregman` section.

    Raises:
        InputError: a function of the user's that is not a usable loss.
    """
    name, lam, scale = config.generator, config.lam or 0.0, config.scale
    if name not in GENERATORS:
        return Generator(name, lam, scale, CHECKED_RANGE, function=load_function(name))
    if name == "beta_family":
        a, b = config.point
        limit = MAX_EXPONENT / max(1.0, -a, -b)
        return Generator(name, lam, scale, limit, a, b, beta_family.turning_point(a, b, limit))
    # The largest exponent per unit of u decides where e^(rate u) would leave the range of MAX_EXPONENT.
    rates = {"logistic": 0.0, "kliep": 1.0, "lsif": 2.0}
    rate = rates.get(name, max(1.0, 1.0 + lam))
    return Generator(name, lam, scale, MAX_EXPONENT / rate if rate else math.inf)
