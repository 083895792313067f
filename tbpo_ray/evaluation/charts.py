"""Charts as inline SVG that follow the page's light or dark color scheme. No dependencies.

Colors are CSS classes: series `s0` to `s7`, `axis`, `grid`. Sizes are CSS pixels; a chart fits on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 60, 12, 12, 38
SERIES = 8


@dataclass(frozen=True)
class Point:
    """A labelled dot of a scatter plot."""

    label: str
    x: float
    y: float
    series: int
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    shade: float | None = None
    """Opacity of the dot's fill in [0, 1], for a third quantity."""


@dataclass(frozen=True)
class Line:
    """A curve."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    series: int


def scatter(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Draw labelled dots with 95 % error bars."""
    axes = _Axes(
        [v for p in points for v in (p.x, *(p.x_range or ()))],
        [v for p in points for v in (p.y, *(p.y_range or ()))],
        x_label,
        y_label,
    )
    parts = []
    taken: list[tuple[float, float]] = []
    for p in points:
        x, y, color = axes.x(p.x), axes.y(p.y), f"s{p.series % SERIES}"
        if p.x_range:
            parts.append(_segment(axes.x(p.x_range[0]), y, axes.x(p.x_range[1]), y, f"bar {color}"))
        if p.y_range:
            parts.append(_segment(x, axes.y(p.y_range[0]), x, axes.y(p.y_range[1]), f"bar {color}"))
        fill = "" if p.shade is None else f' style="fill-opacity:{0.1 + 0.9 * min(max(p.shade, 0), 1):.2f}"'
        title = escape(f"{p.label}: {number(p.x)}, {number(p.y)}")
        parts.append(
            f'<circle class="dot {color}" cx="{x:.1f}" cy="{y:.1f}" r="5"{fill}>'
            f"<title>{title}</title></circle>"
        )
        parts.append(_label(p.label, x, y, taken))
    return axes.frame("".join(parts), f"{y_label} against {x_label}")


def lines(curves: Sequence[Line], x_label: str, y_label: str) -> str:
    """Draw curves over a common axis; values that are not finite interrupt a curve."""
    finite = [(x, y) for c in curves for x, y in zip(c.xs, c.ys, strict=True) if math.isfinite(y)]
    axes = _Axes([x for x, _ in finite], [y for _, y in finite], x_label, y_label)
    parts = []
    for curve in curves:
        title, color = f"<title>{escape(curve.label)}</title>", f"s{curve.series % SERIES}"
        points = [(axes.x(x), axes.y(y)) for x, y in zip(curve.xs, curve.ys, strict=True)]
        stretches = [list(s) for finite, s in groupby(points, lambda at: math.isfinite(at[1])) if finite]
        path = " ".join("M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in s) for s in stretches)
        parts.append(f'<path class="line {color}" d="{path}">{title}</path>')
        for (x, y), *more in stretches:
            if not more:  # a path of a single point is invisible
                parts.append(f'<circle class="dot {color}" cx="{x:.1f}" cy="{y:.1f}" r="3">{title}</circle>')
    return axes.frame("".join(parts), f"{y_label} over {x_label}")


def number(value: float) -> str:
    """Format a number with at most four significant digits."""
    return f"{value:.4g}"


class _Axes:
    """Scales and frame of one chart."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], x_label: str, y_label: str):
        self.x_ticks, self.y_ticks = _ticks(xs, 5), _ticks(ys, 5)
        self.x_low, self.x_high = _limits(xs, self.x_ticks)
        self.y_low, self.y_high = _limits(ys, self.y_ticks)
        self.x_label, self.y_label = x_label, y_label

    def x(self, value: float) -> float:
        return LEFT + (value - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)

    def frame(self, inside: str, title: str) -> str:
        floor = HEIGHT - BOTTOM
        parts = [
            _segment(LEFT, floor, WIDTH - RIGHT, floor, "axis"),
            _segment(LEFT, TOP, LEFT, floor, "axis"),
        ]
        for tick in self.x_ticks:
            parts.append(_text(self.x(tick), floor + 14, number(tick), "middle"))
        for tick in self.y_ticks:
            parts.append(_segment(LEFT, self.y(tick), WIDTH - RIGHT, self.y(tick), "grid"))
            parts.append(_text(LEFT - 5, self.y(tick) + 3.5, number(tick), "end"))
        parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, self.x_label, "middle"))
        turn = f' transform="rotate(-90 11 {(TOP + floor) / 2:.0f})"'
        parts.append(_text(11, (TOP + floor) / 2, self.y_label, "middle", turn))
        return (
            f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
            f"{''.join(parts)}{inside}</svg>"
        )


def _ticks(values: Sequence[float], count: int) -> list[float]:
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - 0.5 * max(abs(low), 1.0) * 0.2, high + 0.5 * max(abs(high), 1.0) * 0.2
    raw = (high - low) / (count - 1)
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _limits(values: Sequence[float], ticks: Sequence[float]) -> tuple[float, float]:
    return min([*values, ticks[0]]), max([*values, ticks[-1]])


def _segment(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line class="{style}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(text)}</text>'


def _label(text: str, x: float, y: float, taken: list[tuple[float, float]]) -> str:
    """Draw a dot's name beside it, moved down until it overlaps no other name."""
    short = text if len(text) <= 22 else text[:21] + "…"
    right = x < WIDTH * 0.6
    at = max(y - 8, TOP)
    while (
        any(abs(at - other) < 11 and abs(x - where) < 110 for where, other in taken)
        and at < HEIGHT - BOTTOM - 12
    ):
        at += 11
    taken.append((x, at))
    return _text(x + (8 if right else -8), at, short, "start" if right else "end", ' class="name"')
