"""A plain SVG scatter plot in the manner of ``svg.py``: classes for colours, shapes that differ by series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_cocoa.evaluation.markup import text

SIDE = 300
_HEAD = 50


def scatter_chart(series: Mapping[str, Sequence[Sequence[float]]], *, title: str) -> str:
    """Points in the plane, both axes on one scale.

    Args:
        series: name to points ``(x, y)``; at most three series.
        title: heading.

    Returns:
        An ``<svg>`` element, or a sentence where there is no point.
    """
    points = [point for members in series.values() for point in members]
    if not points:
        return f'<p class="missing">{text(title)}: no points.</p>'
    lows = [min(point[axis] for point in points) for axis in (0, 1)]
    highs = [max(point[axis] for point in points) for axis in (0, 1)]
    # One point, or all points in one place, are drawn in the middle.
    span = max(high - low for low, high in zip(lows, highs)) or 1.0
    middles = [(low + high) / 2 for low, high in zip(lows, highs)]
    scale = (SIDE - 24) / span
    body = [f'<text class="chart-title" x="8" y="18">{text(title)}</text>']
    left = 12.0
    for index, (name, members) in enumerate(series.items()):
        body.append(_shape(index, left, 36))
        body.append(f'<text class="tick" x="{left + 10:.0f}" y="40">{text(name)} ({len(members)})</text>')
        left += 60 + 6.2 * len(name)
        for x, y in members:
            body.append(
                _shape(index, SIDE / 2 + (x - middles[0]) * scale, _HEAD + SIDE / 2 - (y - middles[1]) * scale)
            )
    body.append(f'<rect class="axis" x="1" y="{_HEAD}" width="{SIDE - 2}" height="{SIDE - 2}"/>')
    described = f"{title}: " + ", ".join(f"{len(members)} {name}" for name, members in series.items())
    return (
        f'<svg class="square" viewBox="0 0 {SIDE} {_HEAD + SIDE}" role="img" aria-label="{text(described)}">'
        f"<title>{text(described)}</title>{''.join(body)}</svg>"
    )


def _shape(series: int, x: float, y: float) -> str:
    outlines = (
        f'<circle class="mark s0" cx="{x:.1f}" cy="{y:.1f}" r="2.6" opacity=".7"/>',
        f'<rect class="mark s1" x="{x - 2.4:.1f}" y="{y - 2.4:.1f}" width="4.8" height="4.8" opacity=".7"/>',
        f'<path class="mark s2" d="M{x:.1f} {y - 3.4:.1f}l3.4 3.4l-3.4 3.4l-3.4 -3.4z" opacity=".7"/>',
    )
    return outlines[series]
