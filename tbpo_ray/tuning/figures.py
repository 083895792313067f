"""Charts of a search as inline SVG, in the style of :mod:`tbpo_ray.evaluation.charts`."""

from __future__ import annotations

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
