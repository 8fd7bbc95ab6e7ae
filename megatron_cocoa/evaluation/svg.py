"""Two kinds of inline chart: a curve over steps, and dots with intervals by row.

Plain SVG strings without scripts. Colours and fonts come from the page's CSS classes, so that one drawing serves
light and dark; series differ in shape as well as colour. Coordinates are rounded to a tenth, which no eye sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from megatron_cocoa.evaluation.markup import text

WIDTH = 460
MAX_POINTS = 400


@dataclass(frozen=True)
class Mark:
    """A dot of series ``series`` (index), with an optional interval."""

    series: int
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class DotRow:
    """One labelled row of a dot chart."""

    label: str
    marks: tuple[Mark, ...] = field(default_factory=tuple)


@dataclass(frozen=True)
class Scale:
    """Linear map from ``[low, high]`` to the pixels ``[start, stop]``."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def nice_ticks(low: float, high: float, *, count: int = 6) -> list[float]:
    """About ``count`` round numbers (1, 2 or 5 times a power of ten apart) that cover ``[low, high]``."""
    if not high > low:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    raw = (high - low) / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def moving_average(values: Sequence[float], window: int) -> list[float]:
    """Centred mean over ``window`` values, over those that there are towards both ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    means = []
    for index in range(len(values)):
        start, stop = max(0, index - window // 2), min(len(values), index + window // 2 + 1)
        means.append((sums[stop] - sums[start]) / (stop - start))
    return means


def curve_chart(steps: Sequence[int], values: Sequence[float], *, title: str, unit: str, series: int = 0) -> str:
    """A loss over optimizer steps: each value faint, their moving average strong.

    Args:
        steps, values: one value a step; non-finite values are left out and counted below the heading.
        title: name of the loss.
        unit: label of the vertical axis.
        series: index of the colour.

    Returns:
        An ``<svg>`` element, or a sentence where no finite value is left.
    """
    points = [(s, v) for s, v in zip(steps, values) if math.isfinite(v)]
    left_out = len(values) - len(points)
    if not points:
        return f'<p class="missing">{text(title)}: none of {len(values)} recorded values is finite.</p>'
    window = max(1, 2 * (len(points) // 40) + 1)
    smooth = moving_average([v for _, v in points], window)
    height, top, bottom, left, right = 250, 46, 42, 54, 14
    ticks_y = nice_ticks(min(v for _, v in points), max(v for _, v in points))
    ticks_x = nice_ticks(points[0][0], points[-1][0])
    y = Scale(ticks_y[0], ticks_y[-1], height - bottom, top)
    first, last = points[0][0], points[-1][0]
    x = Scale(first, last if last > first else first + 1, left, WIDTH - right)
    tail = points[-window:]
    heading = f"{title}: {_number(points[0][1])} at first, {_number(math.fsum(v for _, v in tail) / len(tail))} at last"
    legend = f"thin: each step; thick, and at last: mean of {window}" if window > 1 else "each step"
    if left_out:
        legend += f"; {left_out} non-finite left out"
    smooth_points = _thin([(s, m) for (s, _), m in zip(points, smooth)])
    body = [
        _label(left, 18, heading, css="chart-title"),
        _label(left, 35, legend, css="tick"),
        *_y_axis(y, ticks_y, left=left, right=WIDTH - right, label=unit),
        *_x_axis(x, [t for t in ticks_x if first <= t <= last], bottom=height - bottom, label="optimizer step"),
        _path(_thin(points), x, y, css=f"raw s{series}"),
        _path(smooth_points, x, y, css=f"smooth s{series}"),
    ]
    if len(points) == 1:
        body.append(_shape(series, x(first), y(points[0][1])))
    description = f"{heading} ({legend}), {unit}, over steps {first} to {last}"
    return _svg(height, description, body)


def dot_chart(
    rows: Sequence[DotRow],
    *,
    title: str,
    unit: str,
    series: Sequence[str],
    references: Mapping[str, float] | None = None,
    from_zero: bool = True,
) -> str:
    """Dots with intervals, one row a model, one shape and colour a series.

    Args:
        rows: labels and marks, top to bottom.
        title, unit: heading, and label of the horizontal axis.
        series: names in the legend.
        references: named vertical lines, such as chance.
        from_zero: start the axis at zero.

    Returns:
        An ``<svg>`` element, or a sentence where there is nothing to draw.
    """
    references = references or {}
    ends = [e for row in rows for m in row.marks for e in (m.value, m.low, m.high) if e is not None]
    if not ends:
        return f'<p class="missing">{text(title)}: nothing was measured.</p>'
    left = 30 + 6.6 * min(26, max(len(row.label) for row in rows))
    top, line, bottom = 66, 30, 40
    height = int(top + line * len(rows) + bottom)
    ends += references.values()
    ticks = nice_ticks(0.0 if from_zero else min(ends), max(ends))
    x = Scale(ticks[0], ticks[-1], left, WIDTH - 22)
    floor = top + line * len(rows)
    body = [_label(8, 18, title, css="chart-title"), *_legend(series, references)]
    body += _x_axis(x, ticks, bottom=floor, label=unit, grid_top=top - 6)
    for value in references.values():
        body.append(f'<path class="reference" d="M{x(value):.1f} {top - 6}V{floor}"/>')
    for index, row in enumerate(rows):
        middle = top + line * (index + 0.5)
        body.append(_label(left - 10, middle + 4, _shorten(row.label), css="row-label"))
        body += _marks(row, x, middle, series, unit)
    told = "; ".join(
        f"{row.label}: " + ", ".join(f"{series[m.series]} {_number(m.value)}" for m in row.marks) for row in rows
    )
    return _svg(height, f"{title}, {unit}. {told}", body)


def _marks(row: DotRow, x: Scale, middle: float, series: Sequence[str], unit: str) -> Iterable[str]:
    spread = 9.0
    for position, mark in enumerate(row.marks):
        y = middle + spread * (position - (len(row.marks) - 1) / 2)
        told = f"{row.label}, {series[mark.series]}: {_number(mark.value)} {unit}"
        parts = []
        if mark.low is not None and mark.high is not None:
            told += f" (95% interval {_number(mark.low)} to {_number(mark.high)})"
            parts.append(f'<path class="whisker s{mark.series}" d="M{x(mark.low):.1f} {y:.1f}H{x(mark.high):.1f}"/>')
        parts.append(_shape(mark.series, x(mark.value), y))
        yield f"<g><title>{text(told)}</title>{''.join(parts)}</g>"


def _legend(series: Sequence[str], references: Mapping[str, float]) -> Iterable[str]:
    x = 12.0
    for index, name in enumerate(series):
        yield _shape(index, x, 40)
        yield _label(x + 10, 44, name, css="tick")
        x += 26 + 6.2 * len(name)
    for name in references:
        yield f'<path class="reference" d="M{x:.1f} 40h16"/>'
        yield _label(x + 22, 44, name, css="tick")
        x += 38 + 6.2 * len(name)


def _shape(series: int, x: float, y: float) -> str:
    """Circle, square or diamond, so that a series is told without its colour."""
    outlines = (
        f'<circle class="mark s0" cx="{x:.1f}" cy="{y:.1f}" r="4"/>',
        f'<rect class="mark s1" x="{x - 3.6:.1f}" y="{y - 3.6:.1f}" width="7.2" height="7.2"/>',
        f'<path class="mark s2" d="M{x:.1f} {y - 5:.1f}l5 5l-5 5l-5 -5z"/>',
    )
    return outlines[series % 3]


def _x_axis(x: Scale, ticks: Sequence[float], *, bottom: float, label: str, grid_top: float | None = None) -> list[str]:
    parts = [f'<path class="axis" d="M{x.start:.1f} {bottom:.1f}H{x.stop:.1f}"/>']
    for tick in ticks:
        if grid_top is not None:
            parts.append(f'<path class="grid" d="M{x(tick):.1f} {grid_top:.1f}V{bottom:.1f}"/>')
        parts.append(_label(x(tick), bottom + 15, _number(tick), css="tick middle"))
    parts.append(_label((x.start + x.stop) / 2, bottom + 32, label, css="tick middle"))
    return parts


def _y_axis(y: Scale, ticks: Sequence[float], *, left: float, right: float, label: str) -> list[str]:
    parts = []
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{left:.1f} {y(tick):.1f}H{right:.1f}"/>')
        parts.append(_label(left - 6, y(tick) + 4, _number(tick), css="tick end"))
    middle = (y.start + y.stop) / 2
    turn = f'transform="rotate(-90 12 {middle:.1f})"'
    parts.append(f'<text class="tick middle" x="12" y="{middle:.1f}" {turn}>{text(label)}</text>')
    return parts


def _path(points: Sequence[tuple[float, float]], x: Scale, y: Scale, *, css: str) -> str:
    nodes = "L".join(f"{x(s):.1f} {y(v):.1f}" for s, v in points)
    return f'<path class="{css}" d="M{nodes}"/>'


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Lowest and highest point of each bucket where there are too many, so that spikes stay visible."""
    if len(points) <= MAX_POINTS:
        return list(points)
    size = math.ceil(len(points) / (MAX_POINTS // 2))
    kept = [points[0]]
    for start in range(0, len(points), size):
        bucket = points[start : start + size]
        kept += sorted({min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])})
    return [*kept, points[-1]]


def _label(x: float, y: float, content: str, *, css: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}">{text(content)}</text>'


def _shorten(label: str) -> str:
    return label if len(label) <= 26 else label[:25] + "\u2026"


def _number(value: float) -> str:
    """Three significant digits without an exponent where that stays short."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return f"{value:.2g}"


def _svg(height: int, description: str, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{text(description)}">'
        f"<title>{text(description)}</title>{''.join(body)}</svg>"
    )
