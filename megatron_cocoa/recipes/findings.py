"""What a run has measured, and how it is shown: a table on the terminal, results.json and the report."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from dataclasses import dataclass, field

import torch

from megatron_cocoa.evaluation.embedding_map import EmbeddingMap
from megatron_cocoa.evaluation.report import render_report
from megatron_cocoa.evaluation.report_data import (
    TWEMOJI_CREDIT,
    BridgeEvidence,
    RecallRow,
    Reconstruction,
    ReportData,
    RetrievalStrip,
)
from megatron_cocoa.evaluation.report_table import render_table
from megatron_cocoa.parallel import device
from megatron_cocoa.parallel.device_memory import peak_memory_bytes
from megatron_cocoa.parallel.topology import LaunchInfo
from megatron_cocoa.recipes.context import RunContext
from megatron_cocoa.recipes.curves import stage_curve
from megatron_cocoa.recipes.output_folder import REPORT_FILE, RESULTS_FILE
from megatron_cocoa.recipes.retrieval import recall_as_json
from megatron_cocoa.recipes.stage_summary import StageSummary
from megatron_cocoa.settings.saved import SETTINGS_FILE

PACKAGES = ("megatron-core", "torch", "transformers", "sentencepiece", "numpy")


@dataclass
class Findings:
    """What the run has measured so far."""

    stages: list[StageSummary] = field(default_factory=list)
    recall: list[RecallRow] = field(default_factory=list)
    bridge: list[BridgeEvidence] = field(default_factory=list)
    reconstructions: list[Reconstruction] = field(default_factory=list)
    strips: list[RetrievalStrip] = field(default_factory=list)
    maps: dict[str, EmbeddingMap] = field(default_factory=dict)


def write_results(context: RunContext, launch: LaunchInfo, findings: Findings, seconds: float) -> None:
    """Print the run's measurements, and write ``results.json`` and ``report.html``; on the first rank."""
    peak = peak_memory_bytes() / 2**30
    print(f"Whole run: {seconds:.0f} s, peak memory of the first rank {peak:.2f} GiB", flush=True)
    if not findings.recall:
        return
    print(render_table(findings.recall), flush=True)
    for evidence in findings.bridge:
        gain, low, high = evidence.gain
        print(
            f"Block B, {evidence.model}: {evidence.own:.3f} nats per token with its own A, {evidence.other:.3f} with "
            f"another sample's A; difference {gain:.3f} [{low:.3f}, {high:.3f}]",
            flush=True,
        )
    context.owner.check()
    (context.output / RESULTS_FILE).write_text(recall_as_json(findings.recall), encoding="utf-8")
    report = context.output / REPORT_FILE
    report.write_text(render_report(_report_data(context, launch, findings, seconds, peak)), encoding="utf-8")
    print(f"Report: {report}", flush=True)


def describe(summary: StageSummary) -> str:
    """One sentence on how a stage went."""
    counts = ", ".join(f"{name} {value:.4g}" for name, value in summary.statistics.items())
    progress = summary.progress
    waited = 100 * progress.data_wait / progress.seconds if progress.seconds else 0.0
    took = f"Stage {summary.name} took {progress.seconds:.0f} s, {waited:.1f}% of it waiting for data"
    return f"{took}, {progress.skipped} steps skipped; {counts}"


def _report_data(
    context: RunContext, launch: LaunchInfo, findings: Findings, seconds: float, peak: float
) -> ReportData:
    settings = context.settings
    ran = {
        "model": "toy preset, random weights" if context.is_toy else str(settings.model.path),
        "stages": ", ".join(summary.name for summary in findings.stages),
        "ranks": f"{launch.world_size} on {device.device().type}",
        "wall time": f"{seconds:.0f} s",
        "peak memory, first rank": f"{peak:.2f} GiB",
    }
    return ReportData(
        title="CoCoA, three stages" if context.is_toy else f"CoCoA on {settings.model.path}",
        ran=ran,
        settings={
            name: f"{s.steps} steps of {s.global_batch_size}, learning rate {s.lr:g}"
            for name in settings.stages
            for s in [settings.stage(name)]
        },
        resolved=(context.output / SETTINGS_FILE).read_text(encoding="utf-8"),
        recall=tuple(findings.recall),
        curves=tuple(
            stage_curve(context.output / summary.name, seconds=summary.progress.seconds) for summary in findings.stages
        ),
        bridge=tuple(findings.bridge),
        reconstructions=tuple(findings.reconstructions),
        strips=tuple(findings.strips),
        maps=findings.maps,
        credits=(TWEMOJI_CREDIT,) if context.is_toy else (),
        environment=_environment(),
        notes=tuple(describe(summary) for summary in findings.stages),
    )


def _environment() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "python": sys.version.split()[0],
        **versions,
        **{name: version or "absent" for name, version in device.optional_kernels().items()},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads on the first rank",
    }
