"""The search's own charts, in the manner of :mod:`tbpo_ray.evaluation.charts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from tbpo_ray.evaluation.charts import SERIES, number

ROW, NAME, BAR, TAIL = 24, 150, 140, 70
AXIS, TALL, TOP, BOTTOM, SIDE = 108, 250, 34, 24, 72


@dataclass(frozen=True)
class Path:
    """One trial through all axes."""

    label: str
    positions: Sequence[float | None]
    """Where it crosses each axis, 0 bottom to 1 top; None: the axis says nothing of it."""
    series: int
    faint: bool


def bars(items: Sequence[tuple[str, float, str]]) -> str:
    """Labelled horizontal bars: (name, share in [0, 1], remark)."""
    height = ROW * len(items) + 6
    parts = []
    for i, (name, share, remark) in enumerate(items):
        middle = i * ROW + ROW / 2
        short = ".".join(name.split(".")[-2:])
        short = short if len(short) <= 26 else "…" + short[-25:]
        parts.append(
            f'<text class="name" x="{NAME - 6}" y="{middle + 3.5:.1f}" text-anchor="end">{escape(short)}'
            f"<title>{escape(name)}</title></text>"
            f'<rect class="s0 fill" x="{NAME}" y="{middle - 7:.1f}" width="{max(1.0, BAR * share):.1f}" '
            f'height="14"/>'
            f'<text x="{NAME + max(1.0, BAR * share) + 5:.1f}" y="{middle + 3.5:.1f}">{escape(remark)}</text>'
        )
    return (
        f'<svg viewBox="0 0 {NAME + BAR + TAIL} {height}" style="max-width:{2 * (NAME + BAR + TAIL)}px" '
        f'role="img" aria-label="parameter importance">'
        f"{''.join(parts)}</svg>"
    )


def parallel(axes: Sequence[tuple[str, str, str]], paths: Sequence[Path]) -> str:
    """Parallel coordinates: axes (name, low end, high end) from left to right, one line per trial."""
    width = 2 * SIDE + AXIS * (len(axes) - 1)
    floor = TALL - BOTTOM

    def x(axis: int) -> float:
        return SIDE + axis * AXIS

    parts = []
    for path in sorted(paths, key=lambda p: not p.faint):
        drawn, pen = [], "M"
        for axis, position in enumerate(path.positions):
            if position is not None:
                drawn.append(f"{pen}{x(axis):.1f} {floor - position * (floor - TOP):.1f}")
                pen = "L"
        style = ' style="opacity:.45;stroke-dasharray:3 3"' if path.faint else ""
        parts.append(
            f'<path class="line s{path.series % SERIES}"{style} d="{" ".join(drawn)}">'
            f"<title>{escape(path.label)}</title></path>"
        )
    for axis, (name, low, high) in enumerate(axes):
        last = name.rsplit(".", 1)[-1] if "/" not in name else name
        up = 12 if axis % 2 else 0
        parts.append(
            f'<line class="axis" x1="{x(axis)}" y1="{TOP}" x2="{x(axis)}" y2="{floor}"/>'
            f'<text class="name" x="{x(axis)}" y="{10 + up}" text-anchor="middle">{escape(last[:24])}'
            f"<title>{escape(name)}</title></text>"
            f'<text x="{x(axis) + 4}" y="{floor + 12}" text-anchor="middle">{escape(low[:16])}</text>'
            f'<text x="{x(axis) + 4}" y="{TOP + 9}" text-anchor="start">{escape(high[:16])}</text>'
        )
    room = f"min-width:{width}px;max-width:{1.4 * width:.0f}px"
    return (
        f'<svg viewBox="0 0 {width} {TALL}" style="{room}" role="img" '
        f'aria-label="parallel coordinates">{"".join(parts)}</svg>'
    )


def shown(value: object) -> str:
    """A parameter's value for a reader."""
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "null"
    return number(value) if isinstance(value, int | float) else str(value)
