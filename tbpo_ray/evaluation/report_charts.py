"""The charts of a comparison: quality against length, diversity and KL, and the training curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tbpo_ray.evaluation.charts import Line, Point, lines, scatter
from tbpo_ray.evaluation.collect import Entry
from tbpo_ray.evaluation.columns import BY_METRIC, Column, quality_metric
from tbpo_ray.evaluation.measures import Estimate


@dataclass(frozen=True)
class ScatterSpec:
    """Which metrics a scatter plot shows."""

    x: str
    y: str | None
    """None: the metric that measures quality best."""
    caption: str
    shade: str | None = None
    """Metric in [0, 1] that fills the dots."""
    unshaded_caption: str = ""
    """The caption if no policy has the metric `shade`."""


SCATTERS = (
    ScatterSpec(
        "length_tokens",
        "win_rate",
        "Win rate against length: a policy at the upper left wins without longer answers.",
    ),
    ScatterSpec(
        "predictive_entropy",
        "distinct_1",
        "Distinct-1 against entropy. The darker a dot, the higher is self-BLEU.",
        "self_bleu",
        "Distinct-1 against entropy (self-BLEU needs several samples per prompt).",
    ),
    ScatterSpec(
        "kl_k1",
        None,
        "Quality against the KL from the reference: the higher and the further left, the better.",
    ),
)
CURVES = (
    ("loss", "Loss"),
    ("rewards/margin", "Reward margin"),
    ("rewards/accuracy", "Reward accuracy"),
    ("eval/rewards/accuracy", "Reward accuracy on held-out pairs"),
    ("logps/chosen", "Log-prob of the chosen answer"),
    ("kl", "KL from the reference"),
)
"""Keys of `metrics.jsonl` and their captions."""
_MAX_POINTS = 400
"""Points of a curve; a page with every step of a long run would take megabytes."""


def scatter_charts(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """The scatter plots for which any policy has both metrics."""
    charts = []
    for spec in SCATTERS:
        x, y = BY_METRIC[spec.x], BY_METRIC[spec.y or quality_metric(entries[0].policy.metrics)]
        candidates = [_point(entry, i, x, y, spec.shade) for i, entry in enumerate(entries)]
        points = [point for point in candidates if point is not None]
        if points:
            unshaded = spec.shade is not None and all(point.shade is None for point in points)
            caption = spec.unshaded_caption if unshaded else spec.caption
            charts.append({"svg": scatter(points, x.label, y.label), "caption": caption})
    return charts


def _point(entry: Entry, series: int, x: Column, y: Column, shade: str | None) -> Point | None:
    metrics = entry.policy.metrics
    x_value, y_value = metrics.get(x.metric), metrics.get(y.metric)
    if y_value is None and y.metric == "win_rate" and entry.policy.name == entry.verdict.baseline:
        y_value = Estimate(0.5)  # the baseline against itself
    if x_value is None or y_value is None:
        return None
    fill = metrics.get(shade) if shade is not None else None
    return Point(
        entry.label,
        x_value.value * x.factor,
        y_value.value * y.factor,
        series,
        _interval(x_value, x.factor),
        _interval(y_value, y.factor),
        fill.value if fill is not None else None,
    )


def _interval(estimate: Estimate, factor: int) -> tuple[float, float] | None:
    if estimate.low is None or estimate.high is None:
        return None
    return estimate.low * factor, estimate.high * factor


def curve_charts(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """The training curves for which any policy has at least two points."""
    charts = []
    for key, caption in CURVES:
        candidates = [_curve(entry, i, key) for i, entry in enumerate(entries)]
        curves = [curve for curve in candidates if curve is not None]
        if any(math.isfinite(y) for curve in curves for y in curve.ys):
            charts.append({"svg": lines(curves, "step", key), "caption": caption})
    return charts


def _curve(entry: Entry, series: int, key: str) -> Line | None:
    rows = [row for row in entry.curve if isinstance(row.get(key), int | float)]
    rows = rows[:: math.ceil(len(rows) / _MAX_POINTS)] if rows else []
    if len(rows) < 2:
        return None
    return Line(entry.label, [row["step"] for row in rows], [row[key] for row in rows], series)
