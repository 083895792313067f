"""The charts of a study's report: what they show of the trials."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from tbpo_ray.config.loading import stage_config
from tbpo_ray.config.objective import BregmanConfig
from tbpo_ray.config.schema import Config, TuneConfig
from tbpo_ray.evaluation.charts import Line, Point, lines, number, scatter
from tbpo_ray.training.metrics_file import read_metrics
from tbpo_ray.tuning.figures import (
    MapMark,
    MapPoint,
    TrialPath,
    color_map,
    format_value,
    parallel_coordinates,
)
from tbpo_ray.tuning.parameter import DISCRETE, Parameter
from tbpo_ray.tuning.space import Space
from tbpo_ray.tuning.study_state import Trial

KL_METRICS = ("eval/kl/k3", "kl/k3", "evaluation/kl_k1")
"""Metrics that measure the distance from the reference, in order of preference."""
OTHER, BEST = 7, 0
"""Color series of the charts."""
FINISHED_SERIES = range(1, 7)
MAX_LABELLED_POINTS = 14


def trial_paths(
    space: Space, trials: Sequence[Trial], values: Mapping[int, float], best: Trial, metric: str
) -> str:
    """Parallel coordinates of the parameters and, on the right, the metric.

    Args:
        values: the metric by trial number; trials without one are skipped.
    """
    low, high = (min(values.values()), max(values.values())) if values else (0.0, 1.0)
    axes = [(p.key, format_value(p.values[0]), format_value(p.values[-1])) for p in space.parameters.values()]
    axes.append((metric, number(low), number(high)))
    paths = []
    for trial in trials:
        if trial.number not in values:
            continue
        value = values[trial.number]
        positions = [_axis_position(p, trial) for p in space.parameters.values()]
        positions.append((value - low) / (high - low) if high > low else 0.5)
        label = f"{trial.name} ({trial.state}): {metric} {number(value)}"
        series = BEST if trial is best else OTHER
        paths.append(TrialPath(label, positions, series, trial.state == "stopped"))
    return parallel_coordinates(axes, paths)


def _axis_position(p: Parameter, trial: Trial) -> float | None:
    if p.key not in trial.params:
        return None
    if p.kind in DISCRETE and len(p.values) == 1:
        return 0.5
    return p.position(trial.params[p.key])


PLANE_KEYS = tuple(f"objective.bregman.{name}" for name in ("a", "b", "a_plus_b", "a_minus_b"))
NAMED_POINTS = (
    ("logistic", 0.0, 0.0),
    ("boosting", -0.5, -0.5),
    ("kliep, sba 0", 0.0, -1.0),
    ("lsif, sba 1", 1.0, -2.0),
    ("Brier (1, 1)", 1.0, 1.0),
    ("(2, 2)", 2.0, 2.0),
    ("(2, 0.5)", 2.0, 0.5),
)
"""Points (a, b) of the plane that have a name, with a >= b."""


def plane_map(
    config: Config, space: Space, trials: Sequence[Trial], values: Mapping[int, float], best: Trial
) -> str:
    """The plane of the generator `beta_family`, with each trial's metric as a color; empty if the study does
    not search it.

    The loss is symmetric in a and b, so every point is drawn on the side a >= b. Trials with a generator that
    is a point of the plane are drawn there.

    Args:
        values: the metric by trial number; trials without one are skipped.
    """
    if not any(key in space.parameters for key in PLANE_KEYS):
        return ""
    metric, better = config.tune.metrics[0], config.tune.modes[0] == "max"
    points = []
    for trial in trials:
        at = plane_point(stage_config(config, trial.params).objective.effective_bregman)
        if trial.number not in values or at is None:
            continue
        value = values[trial.number]
        label = f"{trial.name} ({trial.state}): a {at[0]:.3g}, b {at[1]:.3g}, {metric} {number(value)}"
        points.append(MapPoint(label, sum(at), at[0] - at[1], value, trial.state == "stopped", trial is best))
    if not points:
        return ""
    marks = [MapMark(name, a + b, a - b) for name, a, b in NAMED_POINTS]
    horizontal = ("a + b", *_map_range([p.x for p in points], -1.5, 3.0))
    vertical = ("a − b", *_map_range([p.y for p in points], 0.0, 3.0))
    shown = [m for m in marks if m.x <= horizontal[2] and m.y <= vertical[2]]
    return color_map(points, shown, (horizontal, vertical), metric, higher_is_better=better)


def _map_range(values: Sequence[float], low: float, high: float) -> tuple[float, float]:
    """The range of an axis: at least that of the shipped search space, with a margin for the dots."""
    low, high = min([low, *values]), max([high, *values])
    margin = 0.05 * (high - low)
    return low - margin, high + margin


def plane_point(bregman: BregmanConfig) -> tuple[float, float] | None:
    """The point (a, b) with a >= b of a generator, up to a factor; None for a function of the user's own."""
    lam = 0.0 if bregman.lam is None else bregman.lam
    points: dict[str, tuple[float, float]] = {
        "logistic": (0.0, 0.0),
        "kliep": (0.0, -1.0),
        "lsif": (1.0, -2.0),
        "ba": (lam, -1 - lam),
        "sba": (lam, -1 - lam),
        "beta_family": bregman.point,
    }
    if bregman.generator not in points:
        return None
    a, b = points[bregman.generator]
    return max(a, b), min(a, b)


def charts(tune: TuneConfig, trials: Sequence[Trial], best: Trial, folder: Path) -> list[dict[str, str]]:
    """The metric against the distance from the reference, then each metric over the steps.

    Returns:
        `{"svg", "caption"}` of each chart that has data.
    """
    kl = next((name for name in KL_METRICS if any(name in t.values for t in trials)), None)
    out = [_gain_chart(tune, trials, kl)] if kl is not None else []
    names = dict.fromkeys([*tune.metrics, *([kl] if kl else [])])
    out += [_curve_chart(name, trials, best, folder) for name in names]
    return [chart for chart in out if chart is not None]


def _gain_chart(tune: TuneConfig, trials: Sequence[Trial], kl: str) -> dict[str, str] | None:
    metric = tune.metrics[0]
    points = {
        t.name: (t.values[kl], t.values[metric])
        for t in trials
        if t.state == "finished" and _is_finite(t, kl) and _is_finite(t, metric)
    }
    if not points:
        return None
    front = _least_distance_front(points, sign=1 if tune.modes[0] == "max" else -1)
    dots = [
        Point(
            name if name in front or len(points) <= MAX_LABELLED_POINTS else "",
            x,
            y,
            BEST if name in front else OTHER,
        )
        for name, (x, y) in points.items()
    ]
    caption = (
        f"{metric} against the distance from the reference ({kl}, nats per token) of the finished trials. "
        "Blue: the Pareto front, where no other trial has gained as much at a smaller distance."
    )
    return {"svg": scatter(dots, kl, metric), "caption": caption}


def _is_finite(trial: Trial, metric: str) -> bool:
    return math.isfinite(trial.values.get(metric, math.nan))


def _least_distance_front(points: Mapping[str, tuple[float, float]], sign: int) -> set[str]:
    """Names of the points (distance, gain) that no other point dominates."""

    def is_dominated(x: float, y: float) -> bool:
        others = (other for other in points.values() if other != (x, y))
        return any(ox <= x and sign * oy >= sign * y for ox, oy in others)

    return {name for name, (x, y) in points.items() if not is_dominated(x, y)}


def _curve_chart(name: str, trials: Sequence[Trial], best: Trial, folder: Path) -> dict[str, str] | None:
    curves = [_curve(name, i, trial, best, folder) for i, trial in enumerate(trials)]
    drawn = [curve for curve in curves if curve.xs]
    if not any(math.isfinite(y) for curve in drawn for y in curve.ys):
        return None
    caption = f"{name} over the steps. Blue: the best trial; grey: the trials that did not finish."
    return {"svg": lines(drawn, "step", name), "caption": caption}


def _curve(name: str, index: int, trial: Trial, best: Trial, folder: Path) -> Line:
    logged = read_metrics(folder / "trials" / trial.run_name)
    rows = [row for row in logged if isinstance(row.get(name), int | float)]
    # A stopped trial's workers may log a few more steps after Tune has stopped it.
    if trial.state == "stopped":
        rows = [row for row in rows if row["step"] <= trial.step]
    if trial is best:
        series = BEST
    elif trial.state != "finished":
        series = OTHER
    else:
        series = FINISHED_SERIES[index % len(FINISHED_SERIES)]
    return Line(trial.name, [row["step"] for row in rows], [row[name] for row in rows], series)
