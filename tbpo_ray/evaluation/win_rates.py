"""Win rates with intervals, and a ranking of several policies. NumPy and SciPy only.

All rates are shares in [0, 1]; all intervals cover 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tbpo_ray.errors import InputError

Floats = NDArray[np.float64]

Z = 1.959963984540054
"""The normal quantile of a two-sided 95 % interval."""
RIDGE = 0.01
"""Precision of the normal prior on the coefficients of a logistic fit: without it, the coefficients of
separable data diverge."""
LENGTH_RIDGE = 1.0
"""Precision of the prior on the length effect. Where a candidate is always much shorter or longer than the
baseline, the length term hardly varies and is not identifiable from the constant; a standard normal prior
keeps the extrapolation to equal lengths bounded. It weighs as much as about ten examples."""


@dataclass(frozen=True)
class Rate:
    """A share in [0, 1] with its 95 % interval, from `n` examples."""

    rate: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class ControlledRate(Rate):
    """A length-controlled rate."""

    length_effect: float
    """Coefficient of the length term, in log-odds; positive if the judge prefers longer answers."""


@dataclass(frozen=True)
class StyleControlledRate(Rate):
    """A style-controlled rate."""

    effects: tuple[float, ...]
    """Coefficient of each feature, in log-odds per standard deviation of its difference."""


@dataclass(frozen=True)
class Strength:
    """A policy's Bradley-Terry strength in log-odds; the strengths of a ranking sum to zero."""

    name: str
    strength: float
    low: float
    high: float


def win_rate(preferences: ArrayLike) -> Rate:
    """Mean preference with a 95 % Wilson score interval that accounts for ties.

    Wilson's interval assumes the variance of a binary variable, p(1 - p), which is too large where there are
    ties or fractions. Here n is replaced by the effective size n p(1 - p) / s^2, with
    s^2 = (sum (x - p)^2 + z^2 p(1 - p)) / (n + z^2). Without ties this is exactly Wilson's interval. With
    only ties it is Tango's (1998) score interval for paired proportions, which is not a point.

    Args:
        preferences: [N] in [0, 1], one per independent example: 1 the candidate wins, 0.5 a tie, 0 it
            loses, fractions for averages. Average several samples of the same prompt first.

    Raises:
        InputError: no examples, or one outside [0, 1].
    """
    x = _shares(preferences)
    n, p = len(x), float(x.mean())
    bound = p * (1 - p)
    if bound > 0:
        spread = (float(((x - p) ** 2).sum()) + Z**2 * bound) / (n + Z**2)
        effective = n * bound / spread
    else:
        effective = float(n)
    center = (p + Z**2 / (2 * effective)) / (1 + Z**2 / effective)
    half = Z / (1 + Z**2 / effective) * float(np.sqrt(bound / effective + Z**2 / (4 * effective**2)))
    return Rate(p, min(max(center - half, 0.0), p), max(min(center + half, 1.0), p), n)


def length_controlled_win_rate(
    preferences: ArrayLike,
    candidate_lengths: ArrayLike,
    baseline_lengths: ArrayLike,
    *,
    difficulty: ArrayLike | None = None,
) -> ControlledRate:
    """The win rate that is expected for answers of equal length (AlpacaEval 2, Dubois et al. 2024).

    The preference is regressed, by logistic regression, on a constant, tanh(d / std(d)) with d the length
    difference candidate minus baseline, and, if given, the instruction's difficulty. The rate is the mean
    prediction with the length term set to zero. The regularization differs from the leaderboard's code: it is
    a normal prior (:data:`LENGTH_RIDGE` on the length effect, :data:`RIDGE` on the rest), where the
    leaderboard uses a cross-validated L1 penalty and verdicts on deliberately long and short baseline
    answers, which exist only for its 805 instructions. The interval is computed by the delta method in
    log-odds from the covariance of the fit, scaled by the dispersion, which is below 1 with ties. If all
    differences are equal there is nothing to control for, and the length effect is 0.

    Args:
        preferences: [N] in [0, 1], as in :func:`win_rate`.
        candidate_lengths, baseline_lengths: [N], both in the same unit (characters or tokens).
        difficulty: [N], in any unit, higher for instructions that the candidate answers better.

    Raises:
        InputError: lengths that do not match the preferences, or invalid preferences.
    """
    y = _shares(preferences)
    delta = _column("candidate_lengths", candidate_lengths, y) - _column(
        "baseline_lengths", baseline_lengths, y
    )
    spread = float(delta.std(ddof=1)) if len(delta) > 1 else 0.0
    controlled = spread > 0
    columns = [np.ones_like(y)]
    if controlled:
        columns.append(np.tanh(delta / spread))
    if difficulty is not None:
        columns.append(_column("difficulty", difficulty, y))
    design = np.stack(columns, axis=1)
    penalty = np.full(design.shape[1], RIDGE)
    if controlled:
        penalty[1] = LENGTH_RIDGE
    fit = _neutral_rate(design, y, penalty, slice(1, 2) if controlled else slice(0, 0))
    effect = float(fit.coefficients[1]) if controlled else 0.0
    return ControlledRate(fit.rate, fit.low, fit.high, len(y), effect)


def style_controlled_win_rate(
    preferences: ArrayLike, candidate_styles: ArrayLike, baseline_styles: ArrayLike
) -> StyleControlledRate:
    """The win rate that is expected for answers of the same style, as in Chatbot Arena's style control.

    The preference is regressed, by logistic regression, on a constant and, for each feature, on
    (a - b) / (a + b), candidate minus baseline (0 where both are 0), divided by its standard deviation. The
    rate is the prediction with all of these terms set to zero. Each has a standard normal prior
    (:data:`LENGTH_RIDGE`); the interval is that of :func:`length_controlled_win_rate`. A feature that does
    not vary has the effect 0.

    Args:
        preferences: [N] in [0, 1], as in :func:`win_rate`.
        candidate_styles, baseline_styles: [N, F] counts, not negative, such as those of
            :func:`tbpo_ray.evaluation.style.style_features`.

    Raises:
        InputError: styles that do not match the preferences or each other, or invalid preferences.
    """
    y = _shares(preferences)
    a, b = (np.asarray(x, dtype=np.float64) for x in (candidate_styles, baseline_styles))
    if a.shape != b.shape or a.ndim != 2 or len(a) != len(y) or not ((a >= 0) & (b >= 0)).all():
        raise InputError(
            f"candidate_styles, baseline_styles: must both be {len(y)} rows of the same counts, none of them "
            f"negative, got shapes {a.shape} and {b.shape}"
        )
    total = a + b
    delta = np.divide(a - b, total, out=np.zeros_like(total), where=total > 0)
    spread = delta.std(axis=0, ddof=1) if len(y) > 1 else np.zeros(a.shape[1])
    varies = spread > 0
    design = np.concatenate([np.ones((len(y), 1)), delta[:, varies] / spread[varies]], axis=1)
    penalty = np.concatenate([[RIDGE], np.full(int(varies.sum()), LENGTH_RIDGE)])
    fit = _neutral_rate(design, y, penalty, slice(1, None))
    effects = np.zeros(a.shape[1])
    effects[varies] = fit.coefficients[1:]
    return StyleControlledRate(fit.rate, fit.low, fit.high, len(y), tuple(effects.tolist()))


@dataclass(frozen=True)
class _Fit:
    coefficients: Floats
    rate: float
    low: float
    high: float


def _neutral_rate(design: Floats, y: Floats, penalty: Floats, controlled: slice) -> _Fit:
    """Fit the preferences, and predict their mean with the controlled columns set to zero."""
    theta, covariance = _logistic_fit(design, y, penalty)
    neutral = design.copy()
    neutral[:, controlled] = 0.0
    predicted = _sigmoid(neutral @ theta)
    rate = float(predicted.mean())
    gradient = (neutral * (predicted * (1 - predicted))[:, None]).mean(axis=0)
    error = float(np.sqrt(gradient @ covariance @ gradient)) / max(rate * (1 - rate), 1e-300)
    center = float(np.log(rate) - np.log1p(-rate))
    low, high = (float(_sigmoid(np.asarray(center + sign * Z * error))) for sign in (-1, 1))
    return _Fit(theta, rate, low, high)


def bradley_terry(names: Sequence[str], comparisons: Sequence[tuple[int, int, float]]) -> list[Strength]:
    """Rank policies by maximum likelihood of the Bradley-Terry model, strongest first.

    Args:
        names: [P] policy names.
        comparisons: (i, j, preference in [0, 1] of policy i over policy j), ties 0.5.

    Raises:
        InputError: fewer than two policies, no comparisons, or an index out of range.
    """
    if len(names) < 2 or not comparisons:
        raise InputError("a ranking needs at least two policies and one comparison")
    design = np.zeros((len(comparisons), len(names)))
    for row, (i, j, _) in enumerate(comparisons):
        if not (0 <= i < len(names) and 0 <= j < len(names)) or i == j:
            raise InputError(
                f"comparison {row}: ({i}, {j}) must be two different indices in 0..{len(names) - 1}"
            )
        design[row, i], design[row, j] = 1.0, -1.0
    theta, covariance = _logistic_fit(design, _shares([c[2] for c in comparisons]))
    # Only differences are identifiable: report each strength relative to the mean of all.
    project = np.eye(len(names)) - 1 / len(names)
    theta, errors = project @ theta, np.sqrt(np.diag(project @ covariance @ project.T))
    ranked = [
        Strength(n, float(t), float(t - Z * e), float(t + Z * e))
        for n, t, e in zip(names, theta, errors, strict=True)
    ]
    return sorted(ranked, key=lambda s: -s.strength)


def _logistic_fit(design: Floats, y: Floats, penalty: Floats | None = None) -> tuple[Floats, Floats]:
    """Penalized quasi-binomial regression: coefficients [K] and their covariance [K, K].

    Args:
        penalty: [K] precisions of the normal priors; by default :data:`RIDGE` for each.
    """
    from scipy.optimize import minimize

    ridge = np.full(design.shape[1], RIDGE) if penalty is None else penalty

    def objective(theta: Floats) -> tuple[float, Floats]:
        eta = design @ theta
        value = np.logaddexp(0, eta).sum() - y @ eta + ridge @ theta**2 / 2
        return float(value), design.T @ (_sigmoid(eta) - y) + ridge * theta

    def curvature(theta: Floats) -> Floats:
        p = _sigmoid(design @ theta)
        return (design * (p * (1 - p))[:, None]).T @ design + np.diag(ridge)

    start = np.zeros(design.shape[1])
    theta = minimize(objective, start, jac=True, hess=curvature, method="trust-exact", tol=1e-9).x
    p = _sigmoid(design @ theta)
    variance = p * (1 - p)
    prior = Z**2 * float(variance.mean())
    dispersion = (float(((y - p) ** 2).sum()) + prior) / (float(variance.sum()) + prior)
    return theta, np.asarray(dispersion * np.linalg.inv(curvature(theta)), dtype=np.float64)


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(np.exp(-np.logaddexp(0, -x)), dtype=np.float64)  # 1 / (1 + exp(-x)) without overflow


def _shares(preferences: ArrayLike) -> Floats:
    x = np.asarray(preferences, dtype=np.float64)
    if x.ndim != 1 or len(x) == 0:
        raise InputError(f"preferences: must be a non-empty list of numbers, got shape {x.shape}")
    if not ((x >= 0) & (x <= 1)).all():
        raise InputError(f"preferences: {x[~((x >= 0) & (x <= 1))][0]} must be in [0, 1]")
    return x


def _column(name: str, values: ArrayLike, like: Floats) -> Floats:
    x = np.asarray(values, dtype=np.float64)
    if x.shape != like.shape or not np.isfinite(x).all():
        raise InputError(
            f"{name}: must be {len(like)} finite numbers, one per preference, got shape {x.shape}"
        )
    return x


def t_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and two-sided 95 % confidence interval (Student's t, n - 1 degrees of freedom).

    The bounds of a single value are NaN.
    """
    from scipy import stats

    count = len(values)
    mean = sum(values) / count
    if count < 2:
        return mean, math.nan, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    half = float(stats.t.ppf(0.975, count - 1)) * math.sqrt(variance / count)
    return mean, mean - half, mean + half
