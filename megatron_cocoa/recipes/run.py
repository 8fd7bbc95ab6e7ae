"""A whole run: the chosen stages, what is measured between them, and the report at the end."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megatron_cocoa.config import TrainSettings
from megatron_cocoa.data.loader import StageLoader
from megatron_cocoa.data.replica import ReplicaLoader
from megatron_cocoa.model.build import Model, check_model
from megatron_cocoa.parallel import device, topology
from megatron_cocoa.parallel.collectives import on_first_rank
from megatron_cocoa.parallel.device_memory import release_memory
from megatron_cocoa.parallel.topology import LaunchInfo
from megatron_cocoa.recipes.context import RunContext, prepare_context
from megatron_cocoa.recipes.evidence import bridge_evidence, reconstructions
from megatron_cocoa.recipes.findings import Findings, describe, write_results
from megatron_cocoa.recipes.initial_model import build_with_weights
from megatron_cocoa.recipes.output_folder import JOB_FILE, check_output, clear_output
from megatron_cocoa.recipes.resume import StagePlace, after_restart, check_same_run, clear_unfinished, find_places
from megatron_cocoa.recipes.retrieval import RetrievalProbe
from megatron_cocoa.recipes.stage_checks import check_contrastive, check_microbatches
from megatron_cocoa.recipes.stage_loader import build_loader
from megatron_cocoa.recipes.stage_summary import StageSummary
from megatron_cocoa.recipes.stages import run_stage
from megatron_cocoa.settings.saved import SETTINGS_FILE, save_settings
from megatron_cocoa.training.output_owner import OutputOwner
from megatron_cocoa.training.stopping import StopWatch

STORE_WARNING = (
    "Warning: restarts by torchrun may fail to connect the ranks: start it with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
)
BARE_WARNING = (
    "Warning: contrastive.image_placeholder is bare, as in the authors' stage 3: pictures get the positions of text "
    "there, without rows and columns, unlike in the earlier stages and in pretraining"
)

BASELINE = "baseline"
"""Folder of contrastive learning alone."""


def run(settings: TrainSettings, launch: LaunchInfo, *, seconds_since_start: float = 0.0) -> None:
    """Run the stages of ``settings`` on this rank, or what is left of them if the run is resumed.

    It also returns, normally, when a signal or the time budget stops the run: by then the last checkpoint is written,
    and the same command with ``resume`` continues from it.

    Args:
        settings: of the run.
        launch: this process's place among all ranks.
        seconds_since_start: time since the process started, which counts towards the time budget.

    Raises:
        ValueError: for anything that a user can correct, before the first step where possible.
        FloatingPointError: after ``optimizer.max_skipped_steps`` steps in a row that had to be skipped.
    """
    started = time.perf_counter()
    settings.parallel.data_parallel_size(launch.world_size)
    context = prepare_context(settings)
    topology.initialize(settings.parallel, launch, seed=settings.seed)
    context = replace(context, settings=after_restart(context.settings, launch), owner=_owner(context, launch))
    on_first_rank(context.owner.check_restart)
    holds_run = on_first_rank(lambda: check_output(context.settings))
    is_resumed = _is_resumed(context, holds_run=holds_run)
    _announce(context, launch)
    loaders = _checked_loaders(context, _find_places(context) if is_resumed else {})
    _claim_output(context, launch, is_resumed=is_resumed)
    # A run that this one takes the folder from may have come further in the meantime.
    places = _find_places(context) if is_resumed else {}
    announce_places(places)
    minutes = settings.checkpoint.time_budget_minutes
    with StopWatch(budget_minutes=minutes, spent_seconds=seconds_since_start) as stop:
        stages = _Stages(context, places, stop, loaders)
        findings = stages.run()
    for loader in loaders.values():
        loader.close()
    if stages.stopped is not None:
        say(f"Stopped {stages.stopped}. The same command with --resume true goes on from there")
    else:
        seconds = time.perf_counter() - started
        failure = f"all stages are complete, but their report cannot be written to {context.output}"
        on_first_rank(lambda: write_results(context, launch, findings, seconds), failure, is_long=True)
    # Not after an error: other ranks may wait in a collective, which an orderly end would wait for too.
    topology.shutdown()


def _owner(context: RunContext, launch: LaunchInfo) -> OutputOwner:
    launchers: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(launchers, launch.launcher)
    return OutputOwner(context.output, tuple(dict.fromkeys(name for name in launchers if name is not None)))


def _is_resumed(context: RunContext, *, holds_run: bool) -> bool:
    """Whether this process goes on with a run that an earlier one started.

    Settings of a start that took no step are compared with nothing: they may be what has been corrected.

    Raises:
        ValueError: if the run there was started under settings that train something else.
    """
    if not (context.settings.resume and holds_run):
        return False
    on_first_rank(lambda: check_same_run(context.settings, context.output))
    return True


def _find_places(context: RunContext) -> dict[str, StagePlace]:
    return find_places(context.output, _stage_folders(context))


def _stage_folders(context: RunContext) -> list[str]:
    return [*context.settings.stages, BASELINE]


def _claim_output(context: RunContext, launch: LaunchInfo, *, is_resumed: bool) -> None:
    """Make the output folder this run's own, on the first rank, while the others wait.

    Only now: a start that is refused takes it from nobody. And before anything else is written or removed: a run that
    still lives there writes nothing more from then on.

    They wait as for files: this is the first exchange after ``_checked_loaders``, in which ranks read rows for a long
    time, and not all of them equally long.
    """

    def claim() -> None:
        context.owner.claim()
        if is_resumed:
            clear_unfinished(context.output, _stage_folders(context))
        else:
            clear_output(context.settings)
        # To remove much takes long, and the settings of a run that has started in the meantime are to stay.
        context.owner.check()
        save_settings(context.settings, context.output / SETTINGS_FILE)
        (context.output / JOB_FILE).write_text("\n".join(launch.jobs), encoding="utf-8")

    on_first_rank(claim, f"cannot write to {context.output}", is_long=True)


def _checked_loaders(context: RunContext, places: dict[str, StagePlace]) -> dict[str, StageLoader | ReplicaLoader]:
    """Refuse, before the first stage starts, what would stop any of them: kernels, layout, weights, batch sizes, rows.

    Returns:
        The loaders of the stages that are not complete yet, by stage, so that no file is read twice.

    Raises:
        ValueError: as the stage would raise it.
    """
    settings = context.settings
    check_model(context.architecture, settings)
    context.weight_source(None).check()
    loaders = {}
    # In the same order on every rank: ranks of a replica build their loaders together.
    for stage in dict.fromkeys([*settings.stages, *(["contrastive"] if settings.with_baseline else [])]):
        if places.get(stage, StagePlace()).is_complete:
            continue
        check_microbatches(context, stage)
        if stage == "contrastive":
            check_contrastive(context)
        loaders[stage] = build_loader(context, stage)
    return loaders


def say(*lines: str) -> None:
    """Print on the first rank, at once."""
    if topology.is_first_rank():
        print(*lines, sep="\n", flush=True)


def _announce(context: RunContext, launch: LaunchInfo) -> None:
    settings, parallel = context.settings, context.settings.parallel
    what = "Toy preset: a small random model on emoji pictures" if context.is_toy else f"Model {settings.model.path}"
    found = {name: version for name, version in device.optional_kernels().items() if version}
    stand_ins = {"Transformer Engine": "Megatron-Core local layers", "apex": "torch AdamW"}
    if not device.usable_flash_attn():
        stand_ins["flash-attn"] = "torch's attention"
    kernels = [f"{name} {version}" for name, version in found.items()]
    kernels += [f"no {name} ({instead} instead)" for name, instead in stand_ins.items() if name not in found]
    say(
        f"{what}; stages {', '.join(settings.stages)}; output {context.output}",
        f"Kernels: {'; '.join(kernels)}",
        f"Layout: {launch.world_size} rank(s) on {device.device().type} = "
        f"tensor {parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size} x "
        f"context {parallel.context_parallel_size} x data {topology.data_parallel_size()}",
        f"Weights: {context.weight_source(None).describe()}",
        *([STORE_WARNING] if launch.shares_store else []),
        *([BARE_WARNING] if settings.contrastive.image_placeholder == "bare" else []),
    )


def announce_places(places: dict[str, StagePlace]) -> None:
    """Say where a resumed run goes on, and which checkpoints it cannot use, on the first rank."""
    resumed = [
        f"{name} {'is complete' if place.is_complete else f'goes on after step {place.step}'}"
        for name, place in places.items()
        if place.is_complete or place.step is not None
    ]
    if resumed:
        say(f"Resumed: {'; '.join(resumed)}")
    # A write names its checkpoint when it is whole. Who sees what is trained again may still copy it anew.
    for path in (path for place in places.values() for path in place.damaged):
        say(f"Passed over: {path} is incomplete, as where a copy was cut short; what only it held is trained again")


class _Stages:
    """Runs the stages of one run one after the other, and measures the model before the first and after each.

    Attributes:
        stopped: where and why the run ends before its end; None where it does not.
    """

    def __init__(
        self,
        context: RunContext,
        places: dict[str, StagePlace],
        stop: StopWatch,
        loaders: dict[str, StageLoader | ReplicaLoader],
    ) -> None:
        self.context, self.places, self.stop, self.loaders = context, places, stop, loaders
        self.findings = Findings()
        self.stopped: str | None = None
        self.probe = None
        if context.settings.evaluate:
            self.probe = RetrievalProbe(context, context.settings.contrastive)

    def run(self) -> Findings:
        """Train the stages that are not complete, until ``stopped``."""
        settings = self.context.settings
        self._measure_untrained()
        checkpoint: Path | None = None
        for stage in settings.stages:
            if self._is_ending(f"before stage {stage}"):
                break
            checkpoint = self._stage(stage, name=stage, checkpoint=checkpoint).checkpoint
        if settings.with_baseline and not self._is_ending(f"before stage {BASELINE}"):
            self._stage("contrastive", name=BASELINE, checkpoint=None)
        return self.findings

    def _is_ending(self, place: str) -> bool:
        """Whether the run stops here, or has stopped before. Every rank asks, before whatever takes long.

        To begin a stage, train a step of it and save its optimizer may take longer than a batch system waits.
        """
        if self.stopped is None:
            reason = self.stop.reason()
            self.stopped = None if reason is None else f"{place} ({reason})"
        return self.stopped is not None

    def _stage(self, stage: str, *, name: str, checkpoint: Path | None) -> StageSummary:
        place = self.places.get(name, StagePlace())
        if place.is_complete:
            summary = self._complete_stage(stage, name)
        else:
            summary = run_stage(
                self.context,
                stage,
                checkpoint=checkpoint,
                loader=self.loaders.pop(stage, None),
                name=name,
                resume_step=place.step,
                stop=self.stop,
                after=self._measure,
            )
        if summary.stopped is not None:
            steps = f"{summary.progress.step} of {self.context.settings.stage(stage).steps}"
            self.stopped = f"in stage {name} after step {steps} ({summary.stopped})"
        self.findings.stages.append(summary)
        say(describe(summary))
        release_memory()
        return summary

    def _complete_stage(self, stage: str, name: str) -> StageSummary:
        """The summary of a stage that an earlier process completed. Measurements are not saved: they are repeated."""
        summary = StageSummary.load(self.context.output / name, stage)
        if self.probe is not None and not self._is_ending(f"before measuring {name}"):
            decoder = stage == "warmup"
            model = build_with_weights(self.context, checkpoint=summary.checkpoint, with_image_decoder=decoder)
            self._measure(name, model)
        return summary

    def _measure_untrained(self) -> None:
        if self.probe is None or self._is_ending("before the first stage"):
            return
        model = build_with_weights(self.context, checkpoint=None, with_image_decoder=False)
        settings = self.context.settings
        probe = self.probe.in_form(settings.stage(settings.stages[0]).embedding_form)
        self.findings.recall += probe.recall(probe.embed_pools(model), label="untrained", kind="untrained")
        del model
        release_memory()

    def _measure(self, name: str, model: Model) -> None:
        if self.probe is None or self._is_ending(f"after stage {name}, before measuring it"):
            return
        context, findings = self.context, self.findings
        is_baseline = name == BASELINE
        stage = context.settings.stage("contrastive" if is_baseline else name)
        probe = self.probe.in_form(stage.embedding_form)
        found = probe.embed_pools(model)
        label, kind = ("contrastive alone", "baseline") if is_baseline else (f"after {name}", "stage")
        findings.recall += probe.recall(found, label=label, kind=kind)
        if name == "warmup":
            findings.reconstructions = reconstructions(context, model)
        if name == "bridge":
            for pool, pictures in (("heldout", "held-out pictures"), ("training", "training pictures")):
                evidence = bridge_evidence(context, model, pool=pool, label=f"after {name}, {pictures}")
                findings.bridge += [] if evidence is None else [evidence]
        if name == context.settings.stages[-1]:
            findings.strips, findings.maps = probe.examples(found)
