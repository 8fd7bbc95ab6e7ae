"""A whole run: the chosen stages, what is measured between them, and the report at the end."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_cocoa.checkpoint.store import read_info
from megatron_cocoa.config import TrainSettings
from megatron_cocoa.evaluation.report import render_report, render_table
from megatron_cocoa.evaluation.report_data import (
    TWEMOJI_CREDIT,
    BridgeEvidence,
    RecallRow,
    Reconstruction,
    ReportData,
    RetrievalStrip,
    StageCurve,
)
from megatron_cocoa.model.build import Model
from megatron_cocoa.parallel import device, topology
from megatron_cocoa.parallel.topology import LaunchInfo
from megatron_cocoa.recipes.context import RunContext, check_output, clear_output, prepare_context
from megatron_cocoa.recipes.evidence import bridge_evidence, reconstructions
from megatron_cocoa.recipes.retrieval import RetrievalProbe, recall_as_json
from megatron_cocoa.recipes.stages import StageSummary, build_loader, build_with_weights, check_microbatches, run_stage
from megatron_cocoa.settings import save_settings
from megatron_cocoa.training.log import read_metrics

PACKAGES = ("megatron-core", "torch", "transformers", "sentencepiece", "numpy")
LOSS_UNITS = {"mntp": "nats per token", "mae": "mean squared error", "contrastive": "nats per pair"}


@dataclass
class Findings:
    """What the run has measured so far."""

    stages: list[StageSummary] = field(default_factory=list)
    recall: list[RecallRow] = field(default_factory=list)
    bridge: list[BridgeEvidence] = field(default_factory=list)
    reconstructions: list[Reconstruction] = field(default_factory=list)
    strips: list[RetrievalStrip] = field(default_factory=list)


def run(settings: TrainSettings, launch: LaunchInfo) -> None:
    """Run the stages of ``settings`` on this rank.

    Raises:
        ValueError: for anything that a user can mend, before the first step where possible.
    """
    started = time.perf_counter()
    settings.parallel.data_parallel_size(launch.world_size)
    if launch.rank == 0:
        check_output(settings)
    context = prepare_context(settings)
    topology.initialize(settings.parallel, launch, seed=settings.seed)
    _announce(context, launch)
    _check_stages(context)
    if launch.rank == 0:
        clear_output(settings)
        save_settings(context.settings, context.output / "settings.yaml")
    findings = _run_stages(context)
    if launch.rank == 0:
        _write_results(context, launch, findings, time.perf_counter() - started)
    # Not after an error: other ranks may wait in a collective, which an orderly end would wait for too.
    topology.shutdown()


def _check_stages(context: RunContext) -> None:
    """Find what would stop a later stage before the first one starts: its rows, its batch sizes, its weights.

    Raises:
        ValueError: as the stage would raise it.
    """
    settings = context.settings
    if settings.model.load is not None:
        read_info(settings.model.load)
    for stage in {*settings.stages, *(["contrastive"] if settings.with_baseline else [])}:
        check_microbatches(context, stage)
        build_loader(context, stage).close()


def say(*lines: str) -> None:
    """Print on the first rank, at once."""
    if topology.is_first_rank():
        print(*lines, sep="\n", flush=True)


def _announce(context: RunContext, launch: LaunchInfo) -> None:
    settings, parallel = context.settings, context.settings.parallel
    what = "Toy preset: a small random model on emoji pictures" if context.is_toy else f"Model {settings.model.path}"
    stand_ins = {"Transformer Engine": "Megatron-Core local layers", "apex": "torch AdamW", "flash-attn": "torch SDPA"}
    kernels = [
        f"{name} {version}" if version else f"no {name} ({stand_ins[name]} instead)"
        for name, version in device.optional_kernels().items()
    ]
    say(
        f"{what}; stages {', '.join(settings.stages)}; output {context.output}",
        f"Kernels: {'; '.join(kernels)}",
        f"Layout: {launch.world_size} rank(s) on {device.device().type} = "
        f"tensor {parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} x "
        f"context {parallel.context_parallel_size} x data {topology.data_parallel_size()}",
        f"Weights: {context.weight_source(None).describe()}",
    )


def _run_stages(context: RunContext) -> Findings:
    settings, findings = context.settings, Findings()
    probe = None
    if settings.evaluate:
        probe = RetrievalProbe(context, image_size=settings.contrastive.image_size)
        untrained = build_with_weights(context, checkpoint=None, with_image_decoder=False)
        findings.recall += probe.recall(untrained, label="untrained", kind="untrained")
        del untrained
        device.release_memory()
    checkpoint: Path | None = None
    for stage in settings.stages:

        def after(name: str, model: Model) -> None:
            _measure(context, probe, findings, name, model)

        summary = run_stage(context, stage, checkpoint=checkpoint, after=after)
        findings.stages.append(summary)
        checkpoint = summary.checkpoint
        _say_stage(summary)
        device.release_memory()
    if settings.with_baseline:

        def after_baseline(name: str, model: Model) -> None:
            if probe is not None:
                findings.recall += probe.recall(model, label="contrastive alone", kind="baseline")

        summary = run_stage(context, "contrastive", checkpoint=None, name="baseline", after=after_baseline)
        findings.stages.append(summary)
        _say_stage(summary)
    return findings


def _say_stage(summary: StageSummary) -> None:
    say(_describe(summary))


def _describe(summary: StageSummary) -> str:
    """One sentence on how a stage went; the counts are the first data-parallel rank's."""
    counts = ", ".join(f"{name} {value:.4g}" for name, value in summary.statistics.items())
    return f"Stage {summary.name} took {summary.seconds:.0f} s, {summary.skipped} steps skipped; {counts}"


def _measure(context: RunContext, probe: RetrievalProbe | None, findings: Findings, name: str, model: Model) -> None:
    if probe is None:
        return
    findings.recall += probe.recall(model, label=f"after {name}", kind="stage")
    if name == "warmup":
        findings.reconstructions = reconstructions(context, model)
    if name == "bridge":
        for pool, pictures in (("heldout", "held-out pictures"), ("training", "training pictures")):
            evidence = bridge_evidence(context, model, pool=pool, label=f"after {name}, {pictures}")
            findings.bridge += [] if evidence is None else [evidence]
    if name == context.settings.stages[-1]:
        findings.strips = probe.strips(model, Path(context.settings.data.path))


def _write_results(context: RunContext, launch: LaunchInfo, findings: Findings, seconds: float) -> None:
    peak = device.peak_memory_bytes() / 2**30
    say(f"Whole run: {seconds:.0f} s, peak memory of the first rank {peak:.2f} GiB")
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
    (context.output / "results.json").write_text(recall_as_json(findings.recall), encoding="utf-8")
    report = context.output / "report.html"
    report.write_text(render_report(_report_data(context, launch, findings, seconds, peak)), encoding="utf-8")
    print(f"Report: {report}", flush=True)


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
        resolved=(context.output / "settings.yaml").read_text(encoding="utf-8"),
        recall=tuple(findings.recall),
        curves=tuple(_curve(context, summary) for summary in findings.stages),
        bridge=tuple(findings.bridge),
        reconstructions=tuple(findings.reconstructions),
        strips=tuple(findings.strips),
        credits=(TWEMOJI_CREDIT,) if context.is_toy else (),
        environment=_environment(),
        notes=tuple(_describe(summary) for summary in findings.stages),
    )


def _curve(context: RunContext, summary: StageSummary) -> StageCurve:
    lines = read_metrics(context.output / summary.name)
    names = [name for name in LOSS_UNITS if lines and name in lines[0]]
    return StageCurve(
        stage=summary.name,
        steps=tuple(int(line["step"]) for line in lines),
        losses={name: tuple(line[name] for line in lines) for name in names},
        units={name: LOSS_UNITS[name] for name in names},
        seconds=summary.seconds,
    )


def _environment() -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {
        "python": sys.version.split()[0],
        **versions,
        **{name: version or "absent" for name, version in device.optional_kernels().items()},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads on the first rank",
    }
