"""Charts of a search as inline SVG, in the style of :mod:`tbpo_ray.evaluation.charts`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tbpo_ray.evaluation.charts import SERIES, number

ROW, LABEL_WIDTH, BAR_WIDTH, REMARK_WIDTH = 24, 150, 140, 70
AXIS_GAP, HEIGHT, TOP, BOTTOM, SIDE = 108, 250, 34, 24, 72
MAX_LABEL, MAX_AXIS_NAME, MAX_END = 26, 24, 16
"""Characters of a bar's label, of an axis' name, and of the value at the end of an axis."""


@dataclass(frozen=True)
class TrialPath:
    """One trial as a line through all axes."""

    label: str
    positions: Sequence[float | None]
    """Where the line crosses each axis, from 0 at the bottom to 1 at the top; None skips the axis."""
    series: int
    faint: bool


MAP_WIDTH, MAP_HEIGHT, MAP_LEFT, MAP_RIGHT, MAP_TOP, MAP_BOTTOM = 420, 290, 48, 78, 12, 40
RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
"""Colors from low to high, equally spaced: those of Matplotlib's viridis, readable without color vision."""


@dataclass(frozen=True)
class MapPoint:
    """A dot of a map: where it is, what is measured there, and whether it is outlined."""

    label: str
    x: float
    y: float
    value: float
    faint: bool = False
    outlined: bool = False


@dataclass(frozen=True)
class MapMark:
    """A named place of a map, which has no measurement."""

    label: str
    x: float
    y: float


def color_map(
    points: Sequence[MapPoint],
    marks: Sequence[MapMark],
    axes: tuple[tuple[str, float, float], tuple[str, float, float]],
    value_name: str,
    *,
    higher_is_better: bool = True,
) -> str:
    """Dots in a plane, colored by their values with a legend, and crosses at named places.

    Args:
        axes: name, low end and high end of the horizontal and of the vertical axis.
        higher_is_better: whether the brightest color stands for the highest value, or for the lowest.
    """
    values = [point.value for point in points]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    frame = _MapFrame(*axes)
    # The best dots are drawn last, so that none covers them.
    sign = 1 if higher_is_better else -1
    ordered = sorted(points, key=lambda p: (p.outlined, sign * p.value))
    parts = [frame.lines()]
    for p in ordered:
        share = (p.value - low) / (high - low) if high > low else 1.0
        color = ramp_color(share if higher_is_better else 1 - share)
        style = f"fill:{color}" + (";fill-opacity:.45" if p.faint else "")
        ring = ' class="axis" style="fill:none;stroke-width:2"'
        x, y = frame.x(p.x), frame.y(p.y)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" style="{style}">'
            f"<title>{escape(p.label)}</title></circle>"
        )
        if p.outlined:
            parts.append(f'<circle{ring} cx="{x:.1f}" cy="{y:.1f}" r="9"/>')
    parts += [_mark(frame, mark) for mark in marks]
    parts.append(_legend(low, high, value_name, higher_is_better=higher_is_better))
    title = escape(f"{value_name} over {axes[0][0]} and {axes[1][0]}")
    return (
        f'<svg viewBox="0 0 {MAP_WIDTH} {MAP_HEIGHT}" style="max-width:{1.6 * MAP_WIDTH:.0f}px" '
        f'role="img" aria-label="{title}">{"".join(parts)}</svg>'
    )


def ramp_color(share: float) -> str:
    """The color at a position in [0, 1] between low and high, as CSS."""
    place = min(max(share, 0.0), 1.0) * (len(RAMP) - 1)
    index = min(int(place), len(RAMP) - 2)
    channels = (
        round(a + (b - a) * (place - index)) for a, b in zip(RAMP[index], RAMP[index + 1], strict=True)
    )
    return f"rgb({','.join(map(str, channels))})"


class _MapFrame:
    """Scales, frame and ticks of a map."""

    def __init__(self, horizontal: tuple[str, float, float], vertical: tuple[str, float, float]):
        self.horizontal, self.vertical = horizontal, vertical
        self.right, self.floor = MAP_WIDTH - MAP_RIGHT, MAP_HEIGHT - MAP_BOTTOM

    def x(self, value: float) -> float:
        _, low, high = self.horizontal
        return MAP_LEFT + (value - low) / (high - low) * (self.right - MAP_LEFT)

    def y(self, value: float) -> float:
        _, low, high = self.vertical
        return self.floor - (value - low) / (high - low) * (self.floor - MAP_TOP)

    def lines(self) -> str:
        name_x, name_y, floor = self.horizontal[0], self.vertical[0], self.floor
        middle = (MAP_TOP + floor) / 2
        parts = [
            f'<text class="name" x="{(MAP_LEFT + self.right) / 2:.0f}" y="{MAP_HEIGHT - 8}" '
            f'text-anchor="middle">{escape(name_x)}</text>',
            f'<text class="name" x="12" y="{middle:.0f}" text-anchor="middle" '
            f'transform="rotate(-90 12 {middle:.0f})">{escape(name_y)}</text>',
        ]
        for tick in _map_ticks(*self.horizontal[1:]):
            x = self.x(tick)
            parts.append(f'<line class="grid" x1="{x:.1f}" y1="{MAP_TOP}" x2="{x:.1f}" y2="{floor}"/>')
            parts.append(f'<text x="{x:.1f}" y="{floor + 14}" text-anchor="middle">{number(tick)}</text>')
        for tick in _map_ticks(*self.vertical[1:]):
            y = self.y(tick)
            parts.append(f'<line class="grid" x1="{MAP_LEFT}" y1="{y:.1f}" x2="{self.right}" y2="{y:.1f}"/>')
            parts.append(
                f'<text x="{MAP_LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{number(tick)}</text>'
            )
        return "".join(parts)


def _map_ticks(low: float, high: float) -> list[float]:
    step = next(step for step in (0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 50.0, 100.0) if (high - low) / step <= 7)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _mark(frame: _MapFrame, mark: MapMark) -> str:
    x, y = frame.x(mark.x), frame.y(mark.y)
    # At the right edge the name goes to the left, at the top below the cross.
    left = x > frame.right - 70
    at_x, anchor = (x - 8, "end") if left else (x + 8, "start")
    at_y = y + 14 if y < MAP_TOP + 14 else y - 5
    return (
        f'<path class="axis" style="stroke-width:1.6" d="M{x - 5:.1f} {y:.1f} H{x + 5:.1f} '
        f'M{x:.1f} {y - 5:.1f} V{y + 5:.1f}"/>'
        f'<text class="name" x="{at_x:.1f}" y="{at_y:.1f}" text-anchor="{anchor}">{escape(mark.label)}</text>'
    )


def _legend(low: float, high: float, name: str, *, higher_is_better: bool) -> str:
    x, height, steps = MAP_WIDTH - MAP_RIGHT + 16, MAP_HEIGHT - MAP_TOP - MAP_BOTTOM - 24, 32
    parts = []
    for i in range(steps):
        share = 1 - (i + 0.5) / steps
        color = ramp_color(share if higher_is_better else 1 - share)
        y = MAP_TOP + 12 + height * i / steps
        parts.append(
            f'<rect x="{x}" y="{y:.1f}" width="12" height="{height / steps + 0.5:.1f}" style="fill:{color}"/>'
        )
    parts.append(f'<text x="{x + 17}" y="{MAP_TOP + 20}">{number(high)}</text>')
    parts.append(f'<text x="{x + 17}" y="{MAP_TOP + 12 + height}">{number(low)}</text>')
    middle = MAP_TOP + 12 + height / 2
    parts.append(
        f'<text x="{x + 26}" y="{middle:.0f}" text-anchor="middle" '
        f'transform="rotate(90 {x + 26} {middle:.0f})">{escape(name)}</text>'
    )
    return "".join(parts)


def bars(items: Sequence[tuple[str, float, str]]) -> str:
    """Labelled horizontal bars: (name, share in [0, 1], remark)."""
    width, height = LABEL_WIDTH + BAR_WIDTH + REMARK_WIDTH, ROW * len(items) + 6
    rows = "".join(_bar(*item, middle=i * ROW + ROW / 2) for i, item in enumerate(items))
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{2 * width}px" '
        f'role="img" aria-label="parameter importance">{rows}</svg>'
    )


def _bar(name: str, share: float, remark: str, *, middle: float) -> str:
    label = ".".join(name.split(".")[-2:])
    label = label if len(label) <= MAX_LABEL else "…" + label[1 - MAX_LABEL :]
    length = max(1.0, BAR_WIDTH * share)
    return (
        f'<text class="name" x="{LABEL_WIDTH - 6}" y="{middle + 3.5:.1f}" text-anchor="end">{escape(label)}'
        f"<title>{escape(name)}</title></text>"
        f'<rect class="s0 fill" x="{LABEL_WIDTH}" y="{middle - 7:.1f}" width="{length:.1f}" '
        f'height="14"/>'
        f'<text x="{LABEL_WIDTH + length + 5:.1f}" y="{middle + 3.5:.1f}">{escape(remark)}</text>'
    )


def parallel_coordinates(axes: Sequence[tuple[str, str, str]], paths: Sequence[TrialPath]) -> str:
    """Axes (name, low end, high end) from left to right, with one line per trial."""
    width = 2 * SIDE + AXIS_GAP * (len(axes) - 1)
    # Faint lines are drawn first, so that the others are on top of them.
    parts = [_path(path) for path in sorted(paths, key=lambda p: not p.faint)]
    parts += [_axis(i, *axis) for i, axis in enumerate(axes)]
    return (
        f'<svg viewBox="0 0 {width} {HEIGHT}" style="min-width:{width}px;max-width:{1.4 * width:.0f}px" '
        f'role="img" aria-label="parallel coordinates">{"".join(parts)}</svg>'
    )


def _path(path: TrialPath) -> str:
    floor = HEIGHT - BOTTOM
    points = [
        f"{SIDE + axis * AXIS_GAP:.1f} {floor - position * (floor - TOP):.1f}"
        for axis, position in enumerate(path.positions)
        if position is not None
    ]
    style = ' style="opacity:.45;stroke-dasharray:3 3"' if path.faint else ""
    return (
        f'<path class="line s{path.series % SERIES}"{style} d="M{" L".join(points)}">'
        f"<title>{escape(path.label)}</title></path>"
    )


def _axis(index: int, name: str, low: str, high: str) -> str:
    x, floor = SIDE + index * AXIS_GAP, HEIGHT - BOTTOM
    label = name.rsplit(".", 1)[-1] if "/" not in name else name
    # Names alternate between two lines so that neighbors do not overlap.
    y = 22 if index % 2 else 10
    return (
        f'<line class="axis" x1="{x}" y1="{TOP}" x2="{x}" y2="{floor}"/>'
        f'<text class="name" x="{x}" y="{y}" text-anchor="middle">{escape(label[:MAX_AXIS_NAME])}'
        f"<title>{escape(name)}</title></text>"
        f'<text x="{x + 4}" y="{floor + 12}" text-anchor="middle">{escape(low[:MAX_END])}</text>'
        f'<text x="{x + 4}" y="{TOP + 9}" text-anchor="start">{escape(high[:MAX_END])}</text>'
    )


def format_value(value: object) -> str:
    """A parameter's value as it is written in YAML."""
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "null"
    return number(value) if isinstance(value, int | float) else str(value)
