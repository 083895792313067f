"""The Beta family: one plane (a, b) of proper losses that holds every divergence used here.

Density-ratio matching is class-probability estimation: a generator h and a proper loss with the weight
omega(c), c = R / (1 + R), are one thing, h''(R) = omega(c) / (1 + R)^3. The Beta family takes
omega(c) = c^(a-1) (1-c)^(b-1). With s = sigmoid(u) and t = sigmoid(-u) the loss of a log model ratio u is

    dloss/du = 2^(a+b-1) (s^(a+1) t^b + t^a s^(b+1)),    loss(0) = 0,

which has slope 1/2 at 0 for every (a, b), is strictly increasing, and is symmetric in a and b.

| point (a, b)     | is                               | for u -> infinity (model or label wrong)  |
|------------------|----------------------------------|-------------------------------------------|
| (0, 0)           | `logistic`                       | slope 1                                   |
| (lam, -1 - lam)  | `sba` of order lam at scale 4    | grows as e^{max(-a, -b) u}                |
| (0, -1), (1, -2) | `kliep` / 4, `lsif` / 8          | e^u, e^{2u}                               |
| (-1/2, -1/2)     | the exponential loss of boosting | e^{u/2}                                   |
| (1, 1)           | the squared (Brier) loss         | slope 0: a flipped pair stops pulling     |

Sources: Buja, Stuetzle and Shen, "Loss functions for binary class probability estimation and classification"
(2005); for losses that are not convex in u, arXiv 2507.07855.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

PANELS, NODES = 128, 10
"""Panels of the quadrature over [-limit, limit], and Gauss-Legendre nodes in each: errors below 1e-13."""
SEARCH_STEPS = 4000


def slope(u: Tensor, a: float, b: float) -> Tensor:
    """dloss/du, elementwise. Computed from logarithms, so that no factor overflows on its own."""
    log_s, log_t = functional.logsigmoid(u), functional.logsigmoid(-u)
    log_sum = torch.logaddexp((a + 1) * log_s + b * log_t, a * log_t + (b + 1) * log_s)
    return (log_sum + (a + b - 1) * math.log(2)).exp()


def value(u: Tensor, a: float, b: float, limit: float) -> Tensor:
    """The loss, elementwise for u in [-limit, limit]: a closed form where there is one, else a quadrature."""
    if (a, b) == (0, 0):
        return -functional.logsigmoid(-u) - math.log(2)
    if a + b == -1:
        return (_exponential_term(u, -b) + _exponential_term(u, -a)) / 4
    if a == b and a in (1, 2):
        h = torch.tanh(u / 2)  # s = (1 + h) / 2; the polynomial in s, without its cancellation at 0
        return h + h**2 / 2 if a == 1 else h + h**2 / 2 - h**3 / 3 - h**4 / 4
    return _quadrature(u, a, b, limit)


def _exponential_term(u: Tensor, rate: float) -> Tensor:
    """(e^(rate u) - 1) / rate, which is u for rate 0: the integral of e^(rate u)."""
    return u if rate == 0 else torch.expm1(rate * u) / rate


def _quadrature(u: Tensor, a: float, b: float, limit: float) -> Tensor:
    """The integral of the slope from 0 to u: whole panels from a table, the last one by its own nodes."""
    starts, totals = _panel_table(a, b, limit, u.dtype, u.device)
    panel = ((u + limit) * (PANELS / (2 * limit))).long().clamp(0, PANELS - 1)
    start = starts[panel]
    half = (u - start) / 2
    nodes, weights = gauss_legendre(NODES)
    rest = torch.zeros_like(u)
    for node, weight in zip(nodes, weights, strict=True):
        rest += weight * slope(start + half * (1 + node), a, b)
    return totals[panel] + half * rest


@lru_cache(maxsize=64)  # copied to the device once, not in every step
def _panel_table(
    a: float, b: float, limit: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Where each panel starts, and the integral of the slope from 0 to there. [PANELS] each"""
    starts = torch.linspace(-limit, limit, PANELS + 1, dtype=torch.float64)[:-1]
    nodes, weights = (torch.tensor(x, dtype=torch.float64) for x in gauss_legendre(2 * NODES))
    half = limit / PANELS
    areas = half * (slope(starts[:, None] + half * (1 + nodes), a, b) @ weights)
    # Summed outward from 0, which is the edge in the middle: large values on one side cost no digits.
    left, right = areas[: PANELS // 2], areas[PANELS // 2 : -1]
    totals = torch.cat([-left.flip(0).cumsum(0).flip(0), areas.new_zeros(1), right.cumsum(0)])
    return starts.to(dtype).to(device), totals.to(dtype).to(device)


@lru_cache
def gauss_legendre(count: int) -> tuple[list[float], list[float]]:
    """Nodes and weights of the Gauss-Legendre rule on [-1, 1], by the eigenvalues of its Jacobi matrix."""
    k = torch.arange(1, count, dtype=torch.float64)
    off_diagonal = k / (4 * k**2 - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off_diagonal, 1) + torch.diag(off_diagonal, -1))
    return nodes.tolist(), (2 * vectors[0] ** 2).tolist()


class BetaFamilyLoss(torch.autograd.Function):
    """The loss with its analytic gradient, which is exact whatever the quadrature of the value does."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, a: float, b: float, limit: float) -> Tensor:
        ctx.save_for_backward(u)
        ctx.point = (a, b)
        return value(u, a, b, limit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, None, None, None]:
        (u,) = ctx.saved_tensors
        return grad_out * slope(u, *ctx.point), None, None, None


def loss(u: Tensor, a: float, b: float, limit: float) -> Tensor:
    """The loss of the point (a, b), elementwise for u in [-limit, limit]; differentiable once."""
    out: Tensor = BetaFamilyLoss.apply(u, a, b, limit)  # type: ignore[no-untyped-call]
    return out


def turning_point(a: float, b: float, limit: float) -> float:
    """The u beyond which the slope only falls: pairs beyond it count less the more wrong they are.

    Returns:
        Infinity if the slope does not fall towards `limit`, as for every point with a or b below 0.
    """
    a, b = max(a, b), min(a, b)

    def rises(u: float) -> bool:
        # The sign of the slope's derivative, divided by s^(a+2) t^b.
        first = (a + 1) * math.exp(-u) - b
        return first + math.exp((b - a) * u) * ((b + 1) * math.exp(-u) - a) >= 0

    if b < 0 or rises(limit):
        return math.inf
    # Every maximum of the two terms is above -5 for exponents up to 100.
    step = (limit + 5) / SEARCH_STEPS
    low = next((u for i in range(SEARCH_STEPS) if rises(u := limit - i * step)), -5.0)
    high = low + step
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rises(middle) else (low, middle)
    return high
