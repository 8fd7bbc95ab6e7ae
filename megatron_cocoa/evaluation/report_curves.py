"""Losses by stage, as both pages show them."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_cocoa.evaluation import markup
from megatron_cocoa.evaluation.markup import text
from megatron_cocoa.evaluation.report_data import StageCurve
from megatron_cocoa.evaluation.svg import curve_chart


def curves_section(curves: Sequence[StageCurve], *, otherwise: str = "No losses were recorded.") -> list[str]:
    """A chart for each loss of each stage; the sentence ``otherwise`` where there are no stages."""
    if not curves:
        return [markup.missing(otherwise)]
    return [
        f'<div class="panels">{"".join(_stage_figure(curve) for curve in curves)}</div>',
        markup.note("Each loss has its own scale, whose axis need not start at zero."),
    ]


def _stage_figure(curve: StageCurve) -> str:
    if not curve.steps or not curve.losses:
        return f'<div class="wide">{markup.missing(f"Stage {curve.stage}: no losses were recorded.")}</div>'
    panels = "".join(
        curve_chart(curve.steps, values, title=name, unit=curve.units.get(name, "loss"), series=index % 3)
        for index, (name, values) in enumerate(curve.losses.items())
    )
    took = "" if curve.seconds is None else f", {curve.seconds:.0f} s"
    told = f"{len(curve.steps)} recorded steps{took}."
    wide = ' class="wide"' if len(curve.losses) > 1 else ""
    return (
        f'<figure{wide}><h3>Stage {text(curve.stage)}</h3><div class="panels">{panels}</div>'
        f"<figcaption>{text(told)}</figcaption></figure>"
    )
