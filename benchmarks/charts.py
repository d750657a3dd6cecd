"""Two kinds of pictures, as SVG: bars beside each other, and lines over logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

COLOURS = ("#1f6feb", "#d97706", "#6b7280", "#0d9488", "#be185d", "#7c3aed")
FONT = 'font-family="system-ui, sans-serif" font-size="12"'
Spread = tuple[float, float, float]
"""A median between its quartiles: low, median, high."""


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" role="img" '
            f'viewBox="0 0 {width} {height}" width="{width}" {FONT}>',
            f"<title>{escape(title)}</title>",
            f'<rect width="{width}" height="{height}" fill="white"/>',
            f'<text x="12" y="22" font-size="15" font-weight="600">{escape(title)}</text>',
            *parts,
            "</svg>",
            "",
        ]
    )


def _legend(names: Sequence[str], x: int, y: int) -> list[str]:
    parts = []
    for number, name in enumerate(names):
        parts.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{COLOURS[number % len(COLOURS)]}"/>')
        parts.append(f'<text x="{x + 17}" y="{y}">{escape(name)}</text>')
        x += 40 + 7 * len(name)
    return parts


def bars(title: str, groups: Mapping[str, Mapping[str, Spread]]) -> str:
    """Horizontal bars: for each group one of each name, with a line from low to high and the median in digits."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    largest = max((high for group in groups.values() for _, _, high in group.values()), default=0) or 1.0
    left, width, bar = 14 + 7 * max(map(len, groups), default=0), 420, 16
    parts, y = _legend(names, 12, 44), 58
    for group, values in groups.items():
        middle = y + bar * len(values) / 2 + 4
        parts.append(f'<text x="{left - 8}" y="{middle:g}" text-anchor="end">{escape(group)}</text>')
        for name, (low, median, high) in values.items():
            start, end, top = (left + width * value / largest for value in (low, median, high))
            colour = COLOURS[names.index(name) % len(COLOURS)]
            parts.append(
                f'<rect x="{left}" y="{y + 1}" width="{end - left:.1f}" height="{bar - 2}" fill="{colour}"/>'
                f'<path d="M{start:.1f} {y + bar / 2:g}H{top:.1f}" stroke="black"/>'
                f'<text x="{max(end, top) + 6:.1f}" y="{y + bar - 4}">{median:,g}</text>'
            )
            y += bar
        y += 10
    return _svg(left + width + 80, y + 4, title, parts)


def lines(title: str, x_name: str, y_name: str, curves: Mapping[str, Mapping[float, float]]) -> str:
    """Curves of y over x, both logarithmic, with a mark at each point."""
    points = [point for curve in curves.values() for point in curve.items()]
    (x_low, x_high), (y_low, y_high) = (_powers([point[axis] for point in points]) for axis in (0, 1))
    left, top, width, height = 64, 60, 480, 300

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x_low) / (x_high - x_low)
        return left + width * across, top + height * (1 - (math.log10(y) - y_low) / (y_high - y_low))

    parts = _legend(list(curves), left, 44)
    for x in sorted({x for x, _ in points}):
        at, _ = place(x, 10**y_low)
        parts.append(f'<path d="M{at:.1f} {top}V{top + height}" stroke="#ddd"/>')
        parts.append(f'<text x="{at:.1f}" y="{top + height + 18}" text-anchor="middle">{x:,g}</text>')
    for power in range(math.ceil(y_low), math.floor(y_high) + 1):
        _, at = place(10**x_low, 10**power)
        parts.append(f'<path d="M{left} {at:.1f}H{left + width}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for number, curve in enumerate(curves.values()):
        colour = COLOURS[number % len(COLOURS)]
        places = [place(x, y) for x, y in sorted(curve.items())]
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places]
    parts.append(f'<text x="{left + width / 2:g}" y="{top + height + 40}" text-anchor="middle">{escape(x_name)}</text>')
    parts.append(f'<text x="12" y="{top - 8}">{escape(y_name)}</text>')
    return _svg(left + width + 30, top + height + 56, title, parts)


def _powers(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis, as powers of ten, a little outside the values."""
    low, high = math.log10(min(values)), math.log10(max(values))
    edge = 0.05 * (high - low) or 0.5
    return low - edge, high + edge
