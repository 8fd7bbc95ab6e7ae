"""Chart geometry: round ticks that cover the data, unbiased smoothing, spikes that survive thinning."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cocoa.evaluation.svg import DotRow, Mark, curve_chart, dot_chart, moving_average, nice_ticks

FINITE = st.floats(-1e6, 1e6, allow_nan=False).filter(lambda v: v == 0 or abs(v) > 1e-6)


@settings(max_examples=60, deadline=None)
@given(FINITE, FINITE)
def test_ticks_are_round_and_cover_the_range(a, b):
    """Claim: any range, a single value included, gets evenly spaced ticks around it."""
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    slack = 1e-6 * step
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack and 2 <= len(ticks) <= 12
    if high - low > 1e-6 * max(1.0, abs(low)):
        mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
        assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-3


def test_moving_average_equals_plain_means():
    """Claim: each value is the mean of its neighbours within half a window, of those that exist at the ends."""
    values = [float(i * i % 7) for i in range(20)]
    expected = [sum(values[max(0, i - 2) : i + 3]) / len(values[max(0, i - 2) : i + 3]) for i in range(20)]
    # Differences of running sums of small integers.
    assert moving_average(values, 5) == pytest.approx(expected, abs=1e-12)
    assert moving_average(values, 1) == pytest.approx(values, abs=1e-12)


def test_a_long_curve_keeps_its_spike_and_stays_small():
    """Claim: thinning bounds the file, not what the reader sees."""
    values = [1.0] * 50_000
    values[31_337] = 9.0
    chart = curve_chart(range(50_000), values, title="loss", unit="nats")
    assert len(chart) < 30_000
    raw = re.search(r'class="raw s0" d="M([^"]*)"', chart).group(1)
    heights = [float(node.split()[1]) for node in raw.split("L")]
    assert min(heights) < max(heights) - 100


def test_constant_and_single_values_are_drawn():
    """Claim: a flat or one-point curve has finite coordinates and is visible."""
    for steps, values in (((1, 2), (2.0, 2.0)), ((7,), (2.0,)), ((1, 2), (0.0, 0.0))):
        root = ElementTree.fromstring(curve_chart(steps, values, title="loss", unit="nats"))
        assert "nan" not in ElementTree.tostring(root, encoding="unicode")


def test_dot_chart_places_values_and_intervals_to_scale():
    """Claim: marks and whiskers lie where the axis says."""
    rows = [DotRow("a", (Mark(0, 50.0, 25.0, 100.0),)), DotRow("b", ())]
    root = ElementTree.fromstring(dot_chart(rows, title="t", unit="%", series=["s"], references={"chance": 10.0}))
    labels = {e.text: float(e.get("x")) for e in root.iter("text")}
    # Coordinates are written with one decimal.
    middle = next(e for e in root.iter("circle") if float(e.get("cy")) > 60)
    assert float(middle.get("cx")) == pytest.approx((labels["0"] + labels["100"]) / 2, abs=0.11)
    whisker = next(e.get("d") for e in root.iter("path") if "whisker" in e.get("class"))
    start, stop = float(re.match(r"M([\d.]+) ", whisker).group(1)), float(whisker.split("H")[1])
    assert stop == pytest.approx(labels["100"], abs=0.11)
    assert start == pytest.approx(labels["0"] + (labels["100"] - labels["0"]) / 4, abs=0.11)
    assert dot_chart([DotRow("a", ())], title="t", unit="%", series=["s"]).startswith('<p class="missing">')
