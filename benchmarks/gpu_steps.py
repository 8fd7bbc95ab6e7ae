"""Optimizer steps at published widths and few layers, and what they say about the whole model."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace

import torch

from benchmarks.side_by_side import kernel_seconds, peak_bytes, wait
from benchmarks.train.examples import ExampleMaker
from benchmarks.train.ours import pack
from benchmarks.train.shapes import model_config
from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.batch import MaskKind, PackedBatch
from megatron_cocoa.config import BridgeSettings, ModelSettings, TrainSettings
from megatron_cocoa.model.build import build_model
from megatron_cocoa.model.flops import step_flops
from megatron_cocoa.model.fp8 import fp8_multiple
from megatron_cocoa.model.workload import Workload
from megatron_cocoa.objectives import build_objective
from megatron_cocoa.parallel import device
from megatron_cocoa.parallel.device_memory import allocation_retries, memory_bytes, release_memory
from megatron_cocoa.parallel.peak_flops import peak_flops
from megatron_cocoa.planning.activations import CPU_KERNELS, GPU_KERNELS
from megatron_cocoa.planning.memory import stage_memory
from megatron_cocoa.planning.packs import PackShape
from megatron_cocoa.training.data_parallel import wrap_data_parallel
from megatron_cocoa.training.optimizer import build_optimizer
from megatron_cocoa.training.step import forward_backward

STAGE = "bridge"
WARM_UP, STEPS = 2, 5
MICRO_BATCHES = 4
"""Of a step. The optimizer's part is that of one GPU without others to share its state with: in a run of many it is
less, here it is a few per cent of these."""


@dataclass(frozen=True)
class Depth:
    """Layers of language model and tower."""

    language: int
    vision: int

    @classmethod
    def cut(cls, shape: str) -> tuple[Depth, Depth, Depth]:
        """A base, then one with more language layers and one with more tower blocks (each eighth sees frames).

        As many as a GPU of 80 GB holds with their optimizer's state: whatever a point is off counts several times in
        the whole model.
        """
        base, more = (4, 16) if shape == "3b" else (2, 6)
        return cls(base, 8), cls(more, 8), cls(base, 16)

    @classmethod
    def tiny(cls) -> tuple[Depth, Depth, Depth]:
        return cls(1, 1), cls(2, 1), cls(1, 2)


@dataclass(frozen=True)
class StepCase:
    """What a step is taken of.

    shape: of ``train.shapes``.  recipe: of FP8, None for none.  tiny: FP32, two samples, small pictures.
    fp8_vision: the tower's linears in FP8 as well.
    """

    shape: str
    recipe: str | None
    tiny: bool
    fp8_vision: bool = False

    @property
    def micro_batches(self) -> int:
        return 1 if self.tiny else MICRO_BATCHES

    @property
    def model(self) -> ModelSettings:
        dtype = "fp32" if self.tiny else "bf16"
        return ModelSettings(
            dtype=dtype,
            make_vocab_size_divisible_by=128,
            vision_ffn_multiple=128,
            fp8=self.recipe,
            fp8_vision=self.fp8_vision,
        )

    @property
    def samples(self) -> int:
        return 2 if self.tiny else 16

    def batch(self, config) -> PackedBatch:
        """One pack with long captions, its tail filled to what FP8 needs."""
        maker = ExampleMaker(config, "long", image_size=56 if self.tiny else 448)
        batch = pack(maker.step(STAGE, self.samples), MaskKind.EOS_BRIDGED, STAGE)
        return with_tail(batch, -batch.num_tokens % fp8_multiple(self.recipe)).to(device.device())


def with_tail(batch: PackedBatch, extra: int) -> PackedBatch:
    """The pack with ``extra`` rows more, which attend to themselves and carry no label."""
    ids = torch.nn.functional.pad(batch.input_ids, (0, extra))
    positions = torch.cat([batch.position_ids, torch.arange(extra).expand(3, extra)], dim=1)
    return replace(batch, input_ids=ids, position_ids=positions, tail_length=batch.tail_length + extra)


def measure_step(case: StepCase, depth: Depth) -> dict[str, object]:
    """Median seconds of an optimizer step, and its peak bytes above weights, gradients and optimizer state.

    Beside them stand each step's own seconds, those of the kernels in one more step, and how often the allocator had to
    start over: times that wander or are far above the kernels', or an allocator at its limit, say that something else
    than the kernels was measured. ``planned_peak_bytes`` is the peak as the planner computes it, ``standing_bytes``
    what weights, gradients and optimizer state take, and ``planned_standing_bytes`` what they should.
    """
    found = _measure(case, depth)
    release_memory()
    return found


def _measure(case: StepCase, depth: Depth) -> dict[str, object]:
    config = model_config(case.shape, layers=depth.language, vision_layers=depth.vision)
    architecture = QwenVLArchitecture.from_huggingface(config)
    samples = dict(micro_batch_size=case.samples, global_batch_size=case.samples * case.micro_batches)
    settings = TrainSettings(model=case.model, bridge=BridgeSettings(**samples))
    batches = [case.batch(config)] * case.micro_batches
    standing = memory_bytes()
    bare = build_model(architecture, settings, with_image_decoder=False)
    with torch.no_grad():
        for parameter in bare.bare_chunks[0].parameters():
            # Norms as one and all else small: times do not depend on values, but NaN would hide mistakes.
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, 0.02)
    model = wrap_data_parallel(bare, settings.parallel)
    model.train()
    optimizer, schedule = build_optimizer(model, settings.stage(STAGE), settings.optimizer, settings.parallel)
    objective = build_objective(STAGE, settings)

    def step() -> None:
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        schedule.step(increment=1)
        loss = forward_backward(model, objective, batches)["loss"]
        if not loss == loss:
            raise RuntimeError(f"the loss of {case.shape} with {depth} is not a number")
        optimizer.step()

    for _ in range(1 if case.tiny else WARM_UP):
        step()
    retries = allocation_retries()
    seconds = [_timed(step) for _ in range(1 if case.tiny else STEPS)]
    retries = allocation_retries() - retries
    standing = memory_bytes() - standing
    kernels = GPU_KERNELS if device.has_gpu() else CPU_KERNELS
    shape = PackShape.of(batches[0], architecture)
    (plan,) = stage_memory(architecture, settings, STAGE, world_size=1, pack=shape, kernels=kernels)
    return {
        "seconds": statistics.median(seconds),
        "peak_bytes": peak_bytes(step),
        "planned_peak_bytes": plan.activations + plan.transient,
        "standing_bytes": standing,
        "planned_standing_bytes": plan.persistent,
        "each": [round(value, 4) for value in seconds],
        "allocation_retries": retries,
        "kernel_seconds": kernel_seconds(step),
    }


def _timed(step) -> float:
    wait()
    begun = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - begun


def extrapolate(case: StepCase, depths: tuple[Depth, ...], points: list[dict[str, float]]) -> dict[str, object]:
    """The whole model's step by the cost of a layer of each part: a base and two points that differ in one depth.

    Utilisation counts the useful operations of the whole model; None where the chip has no known peak, or on a CPU.
    """
    config = model_config(case.shape)
    whole = QwenVLArchitecture.from_huggingface(config)
    base, more_language, more_vision = depths

    def of(key: str) -> float:
        per_language = (points[1][key] - points[0][key]) / (more_language.language - base.language)
        per_vision = (points[2][key] - points[0][key]) / (more_vision.vision - base.vision)
        return (
            points[0][key]
            + per_language * (whole.text.num_hidden_layers - base.language)
            + per_vision * (whole.vision.depth - base.vision)
        )

    flops = step_flops(whole, Workload.of(case.batch(config), whole.vision)).useful * case.micro_batches
    peak, seconds = peak_flops(device.device_name(), case.model), of("seconds")
    return {
        "measured": [{"layers": d.language, "vision_layers": d.vision, **p} for d, p in zip(depths, points)],
        "layers": whole.text.num_hidden_layers,
        "vision_layers": whole.vision.depth,
        "extrapolated_seconds": seconds,
        "extrapolated_peak_bytes": of("peak_bytes"),
        "useful_flops": flops,
        "mfu": None if peak is None or seconds <= 0 else flops / seconds / peak,
    }
