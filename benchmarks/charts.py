"""Line charts on logarithmic axes as SVG, on a card of their own that suits white and dark pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 780, 420
LEFT, RIGHT, TOP, BOTTOM = 74, 206, 46, 54

COLOURS = {
    "sagacity": "#c8450b",
    "bare-parts": "#4a4f57",
    "dbos": "#0063a8",
    "python-cqrs": "#00805f",
    "eventsourcing": "#b4508b",
    "edda": "#a87400",
    "faststream": "#2f93c8",
}
OTHER_COLOUR = "#777777"

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One line: its name decides its colour; equal names share it."""

    system: str
    label: str
    points: tuple[Point, ...]
    dashed: bool = False
    bold: bool = False


def chart(title: str, x_label: str, y_label: str, lines: Sequence[Line]) -> str:
    """An SVG document. Both axes are logarithmic; points that are not positive are left out.

    Raises ValueError where there is nothing to show.
    """
    shown = [(line, sorted((x, y) for x, y in line.points if x > 0 and y > 0)) for line in lines]
    every = [point for _, points in shown for point in points]
    if not every:
        raise ValueError(f"chart {title!r}: expected points, got none")
    across = _Axis([x for x, _ in every], LEFT, WIDTH - RIGHT)
    up = _Axis([y for _, y in every], HEIGHT - BOTTOM, TOP, whole_decades=True)
    parts = [_FRAME.format(width=WIDTH, height=HEIGHT, title=escape(title))]
    parts += _grid(across, up)
    parts.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:g}" y="{HEIGHT - 12}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="axis" transform="translate(18 {(TOP + HEIGHT - BOTTOM) / 2:g}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    drawn = [(line, points) for line, points in shown if points]
    for line, points in drawn:
        parts.append(_drawn(line, [(across(x), up(y)) for x, y in points]))
    parts += _legend([line for line, _ in drawn])
    return "\n".join([*parts, "</svg>", ""])


class _Axis:
    """Values to places: logarithmic, from the least to the greatest."""

    def __init__(
        self, values: Sequence[float], start: float, end: float, *, whole_decades: bool = False
    ) -> None:
        low, high = math.log10(min(values)), math.log10(max(values))
        if whole_decades:
            low, high = math.floor(low), math.ceil(high)
        if high - low < 0.3:
            low, high = low - 0.3, high + 0.3
        self.low, self.high, self.start, self.end = low, high, start, end

    def __call__(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 1)

    def ticks(self) -> list[tuple[float, bool]]:
        """Values with a line: (value, whether it is named). Each decade, with 2 and 5 if few."""
        first, last = math.floor(self.low), math.ceil(self.high)
        named = (1, 2, 5) if self.high - self.low < 4 else (1,)
        slack = 1e-9
        return [
            (step * 10.0**power, step in named)
            for power in range(first, last + 1)
            for step in range(1, 10)
            if self.low - slack <= math.log10(step * 10.0**power) <= self.high + slack
        ]


_FRAME = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" \
width="{width}" height="{height}" role="img" aria-label="{title}">
<style>
text {{ font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; fill: #333; }}
.title {{ font-size: 15px; font-weight: 600; }}
.axis {{ font-size: 13px; }}
.grid {{ stroke: #e3e5e8; }}
.faint {{ stroke: #f3f4f6; }}
.border {{ fill: none; stroke: #9aa0a8; }}
path.line {{ fill: none; stroke-linejoin: round; }}
</style>
<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>
<text class="title" x="20" y="28">{title}</text>"""


def _grid(across: _Axis, up: _Axis) -> list[str]:
    top, bottom, left, right = TOP, HEIGHT - BOTTOM, LEFT, WIDTH - RIGHT
    parts: list[str] = []
    for value, named in across.ticks():
        x = across(value)
        parts.append(f'<path class="{_class(named)}" d="M{x} {top}V{bottom}"/>')
        if named:
            parts.append(
                f'<text x="{x}" y="{bottom + 18}" text-anchor="middle">{_number(value)}</text>'
            )
    for value, named in up.ticks():
        y = up(value)
        parts.append(f'<path class="{_class(named)}" d="M{left} {y}H{right}"/>')
        if named:
            parts.append(
                f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{_number(value)}</text>'
            )
    frame = f'x="{left}" y="{top}" width="{right - left}" height="{bottom - top}"'
    return [*parts, f'<rect class="border" {frame}/>']


def _class(named: bool) -> str:
    return "grid" if named else "faint"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def _style(line: Line) -> str:
    colour = COLOURS.get(line.system, OTHER_COLOUR)
    width = 3 if line.bold else 1.8
    dashes = ' stroke-dasharray="6 4"' if line.dashed else ""
    return f'stroke="{colour}" stroke-width="{width}"{dashes}'


def _drawn(line: Line, points: Sequence[Point]) -> str:
    path = "M" + "L".join(f"{x} {y}" for x, y in points)
    colour = COLOURS.get(line.system, OTHER_COLOUR)
    radius = 3.5 if line.bold else 2.6
    dots = "".join(f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{colour}"/>' for x, y in points)
    return f'<path class="line" {_style(line)} d="{path}"/>{dots}'


def _legend(lines: Sequence[Line]) -> list[str]:
    x = WIDTH - RIGHT + 16
    parts: list[str] = []
    for number, line in enumerate(lines):
        y = TOP + 12 + 20 * number
        parts.append(
            f'<path class="line" {_style(line)} d="M{x} {y}h26"/>'
            f'<text x="{x + 34}" y="{y + 4}">{escape(line.label)}</text>'
        )
    return parts
