"""Checks of computed memory: a real training step at a layout, its live tensors counted, beside the computation."""

from __future__ import annotations

import functools
from dataclasses import fields, replace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cocoa.architecture import QwenVLArchitecture, TextArchitecture, VisionArchitecture
from megatron_cocoa.batch import MaskKind, PackedBatch
from megatron_cocoa.config import (
    STAGES,
    AdapterSettings,
    BridgeSettings,
    ContrastiveSettings,
    FreezeSettings,
    ModelSettings,
    ParallelSettings,
    RecomputeSettings,
    TrainSettings,
    WarmupSettings,
)
from megatron_cocoa.model.adapters import attach_adapters
from megatron_cocoa.model.build import Model, build_model
from megatron_cocoa.objectives import build_objective
from megatron_cocoa.parallel import topology
from megatron_cocoa.parallel.device_memory import release_memory
from megatron_cocoa.planning.activations import CPU_KERNELS
from megatron_cocoa.planning.memory import stage_memory
from megatron_cocoa.planning.packs import PackShape, largest
from megatron_cocoa.training.data_parallel import wrap_data_parallel
from megatron_cocoa.training.optimizer import build_optimizer
from megatron_cocoa.training.step import forward_backward
from tests.distributed.check import Check
from tests.live_bytes import LiveBytes

TEXT_LENGTHS = (23, 41, 30, 36)
"""Text tokens of the samples of a pack: packs of unequal samples, as in training."""

WINDOWED = dict(
    normalization="RMSNorm", activation="silu", gated=True, window_size=112, fullatt_block_indexes=(1,)
)  # fmt: skip
PLAIN = dict(normalization="LayerNorm", activation="quick_gelu", gated=False)


def small_architecture(family: str, *, tied: bool = True) -> QwenVLArchitecture:
    """The published shapes' proportions at a width that a CPU trains in seconds."""
    vision = VisionArchitecture(
        depth=4,
        hidden_size=128,
        intermediate_size=344,
        num_heads=4,
        out_hidden_size=256,
        in_channels=3,
        patch_size=14,
        temporal_patch_size=2,
        spatial_merge_size=2,
        rope_theta=10_000.0,
        **(WINDOWED if family == "qwen2_5_vl" else PLAIN),
    )
    text = TextArchitecture(
        vocab_size=3000,
        hidden_size=256,
        intermediate_size=1376,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        mrope_section=(8, 12, 12),
        max_position_embeddings=4096,
    )
    return QwenVLArchitecture(family, vision, text, tied, 1, 2, 3, 4)


def small_batch(architecture: QwenVLArchitecture, stage: str, *, multiple: int, seed: int) -> PackedBatch:
    """A pack of four samples with a picture each, laid out as the stage's collator would."""
    generator = torch.Generator().manual_seed(seed)
    vision, grid = architecture.vision, (1, 16, 16)
    units = grid[1] * grid[2] // vision.patches_per_unit
    lengths = [units + text for text in TEXT_LENGTHS]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    tail = -sum(lengths) % multiple
    tokens = sum(lengths) + tail
    pictures = torch.cat([torch.arange(start, start + units) for start in starts])
    texts = torch.cat([torch.arange(start + units, start + n) for start, n in zip(starts, lengths)])
    fields: dict = {}
    if stage in ("warmup", "bridge"):
        rows = texts[::4]
        fields |= dict(text_positions=rows, text_labels=torch.randint(0, 2900, rows.shape, generator=generator))
    if stage == "warmup":
        masked = pictures[::2]
        targets = torch.randn(len(masked), vision.unit_dim, generator=generator)
        fields |= dict(unit_positions=masked, unit_targets=targets)
    if stage == "contrastive":
        ends, pairs = torch.tensor([start + n - 1 for start, n in zip(starts, lengths)]), torch.arange(len(lengths))
        fields |= dict(embedding_positions=ends, query_rows=pairs[0::2], target_rows=pairs[1::2])
    return PackedBatch(
        input_ids=torch.randint(10, 2900, (tokens,), generator=generator),
        position_ids=torch.arange(tokens).expand(3, tokens).contiguous(),
        sample_lengths=tuple(lengths),
        mask_kind=MaskKind.EOS_BRIDGED if stage == "bridge" else MaskKind.BIDIRECTIONAL,
        bridge_positions=tuple(start + units + 10 for start in starts),
        tail_length=tail,
        grid_thw=(grid,) * len(lengths),
        pixel_values=torch.randn(4 * grid[1] * grid[2], vision.patch_dim, generator=generator),
        feature_positions=pictures,
        **fields,
    )


def _as_loaded(batch: PackedBatch) -> PackedBatch:
    """What a rank's loader leaves out: pixels but on the first pipeline stage, their targets but on the last."""
    if not topology.is_pipeline_first_stage():
        batch = replace(batch, pixel_values=None)
    if batch.unit_targets is not None and not topology.is_pipeline_last_stage():
        batch = replace(batch, unit_targets=batch.unit_targets[:, :0])
    return batch


def measured_step(
    stage: str = "warmup",
    family: str = "qwen2_5_vl",
    dtype: str = "fp32",
    recompute: str = "none",
    recomputed_layers: int | None = None,
    num_microbatches: int = 1,
    freeze: dict | None = None,
    adapter: dict | None = None,
    tied: bool = True,
    **parallel,
) -> dict:
    """Bytes of a training step on every rank: measured, and computed for its pipeline stage."""
    layout = ParallelSettings(**parallel)
    topology.set_layout(layout, seed=0)
    replicas = topology.data_parallel_size()
    per_pack = 2 if stage == "contrastive" else 4
    sizes = dict(global_batch_size=per_pack * num_microbatches * replicas, micro_batch_size=per_pack, lr_warmup_steps=0)
    settings = TrainSettings(
        model=ModelSettings(dtype=dtype, transformer_impl="local"),
        parallel=layout,
        recompute=RecomputeSettings(recompute, recompute, recomputed_layers, recomputed_layers),
        freeze=FreezeSettings(**(freeze or {})),
        adapter=AdapterSettings(**(adapter or {})),
        warmup=WarmupSettings(**sizes),
        bridge=BridgeSettings(**sizes),
        contrastive=ContrastiveSettings(**sizes),
    )
    architecture = small_architecture(family, tied=tied)
    multiple = layout.tensor_model_parallel_size * layout.context_parallel_size
    batches = [small_batch(architecture, stage, multiple=multiple, seed=i) for i in range(num_microbatches)]
    packs = [PackShape.of(batch, architecture) for batch in batches]
    batches = [_as_loaded(batch) for batch in batches]
    measured = _measure(architecture, settings, stage, batches)
    plan = stage_memory(
        architecture,
        settings,
        stage,
        world_size=dist.get_world_size(),
        pack=largest(packs),
        kernels=CPU_KERNELS,
    )[parallel_state.get_pipeline_model_parallel_rank()]
    computed = dict(
        parameters=plan.parameters,
        gradients=plan.gradients,
        optimizer=plan.optimizer,
        activations=plan.activations + plan.transient,
        total=plan.total,
    )
    ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, {"measured": measured, "computed": computed})
    return {"ranks": ranks}


def _measure(architecture, settings: TrainSettings, stage: str, batches: list[PackedBatch]) -> dict[str, int]:
    release_memory()
    with pytest.MonkeyPatch.context() as patch, LiveBytes() as memory:
        patch.setattr(PackedBatch, "to", _copied)
        bare = build_model(architecture, settings, with_image_decoder=stage == "warmup", mask_token_id=7)
        with torch.no_grad():
            for chunk in bare.chunks:
                for parameter in chunk.parameters():
                    parameter.normal_(0.0, 0.02)
        if settings.adapter.is_used:
            attach_adapters(bare, settings, mask_token_id=7)
        model = wrap_data_parallel(bare, settings.parallel)
        optimizer, _ = build_optimizer(model, settings.stage(stage), settings.optimizer, settings.parallel)
        objective = build_objective(stage, settings)
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        release_memory()
        before = memory.live
        peaks = []
        for _ in range(2):
            memory.reset_peak()
            forward_backward(model, objective, batches)
            peaks.append(memory.peak)
        # Gloo's threads may hold what they exchanged for a moment longer, which can only add to a peak.
        activations = min(peaks) - before
        # Adam makes its moments now; from the second step on they lie beside the activations.
        optimizer.step()
    parameters, gradients = _persistent(model)
    held = _optimizer_bytes(model, optimizer)
    return dict(
        parameters=parameters,
        gradients=gradients,
        optimizer=held,
        activations=activations,
        total=parameters + gradients + held + activations,
    )


def _copied(batch: PackedBatch, device, *, dtype: torch.dtype | None = None) -> PackedBatch:
    """``PackedBatch.to`` as it is between two devices, where nothing is shared."""
    tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
    tensors = {name: value for name, value in tensors.items() if isinstance(value, torch.Tensor)}
    return replace(
        batch,
        **{
            name: value.to(dtype=dtype if value.is_floating_point() else None, copy=True)
            for name, value in tensors.items()
        },
    )


def _persistent(model: Model) -> tuple[int, int]:
    parameters = [p for chunk in model.bare_chunks for p in chunk.parameters()]
    return (
        sum(p.numel() * p.element_size() for p in parameters),
        sum(p.main_grad.numel() * p.main_grad.element_size() for p in parameters if p.requires_grad),
    )


def _optimizer_bytes(model: Model, optimizer) -> int:
    """Adam's moments, and master weights where they are tensors of their own."""
    of_model = {p.untyped_storage().data_ptr() for chunk in model.bare_chunks for p in chunk.parameters()}
    total = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for master in (p for group in part.optimizer.param_groups for p in group["params"]):
            held = [v for v in part.optimizer.state[master].values() if isinstance(v, torch.Tensor)]
            if master.untyped_storage().data_ptr() not in of_model:
                held.append(master)
            total += sum(v.numel() * v.element_size() for v in held)
    return total


FAMILIES = ("qwen2_vl", "qwen2_5_vl")

ONE_RANK: dict[str, dict] = {
    f"memory-{stage}-{family}-{dtype}-{recompute}": dict(stage=stage, family=family, dtype=dtype, recompute=recompute)
    for stage in STAGES
    for family in FAMILIES
    for dtype in ("fp32", "bf16")
    for recompute in ("none", "mlp", "selective", "full")
} | {
    f"memory-frozen-{part}": dict(stage="bridge", freeze={part: True}) for part in ("vision", "merger", "language")
} | {
    "memory-contrastive-untied": dict(stage="contrastive", tied=False)
} | {
    f"memory-frozen-vision-{mode}": dict(stage="bridge", freeze={"vision": True}, recompute=mode)
    for mode in ("mlp", "full")
} | {
    f"memory-{kind}-{stage}-dropout-{dropout}-{recompute}": dict(
        stage=stage, family=family, dtype="bf16", recompute=recompute, adapter=dict(kind=kind, dropout=dropout)
    )
    for stage, family in (("warmup", "qwen2_vl"), ("bridge", "qwen2_5_vl"), ("contrastive", "qwen2_5_vl"))
    for kind in ("lora", "dora")
    for dropout in (0.1, 0.0)
    for recompute in ("none", "mlp", "selective", "full")
} | {
    f"memory-{kind}-{name}": dict(stage="bridge", adapter=dict(kind=kind, **targets))
    for kind in ("lora", "dora")
    for name, targets in {
        "language-alone": dict(vision_targets=()),
        "merger-alone": dict(language_targets=(), vision_targets=("mlp.0", "mlp.2")),
        "some": dict(language_targets=("q_proj", "v_proj", "up_proj"), vision_targets=("qkv", "mlp.0")),
    }.items()
}  # fmt: skip

TWO_RANKS: dict[str, dict] = {
    "memory-tp2": dict(stage="bridge", tensor_model_parallel_size=2),
    "memory-tp2-sp-full": dict(dtype="bf16", recompute="full", tensor_model_parallel_size=2, sequence_parallel=True),
    "memory-pp2-mlp-layers": dict(
        recompute="mlp", recomputed_layers=1, num_microbatches=4, pipeline_model_parallel_size=2
    ),
    "memory-pp2": dict(num_microbatches=4, pipeline_model_parallel_size=2),
    "memory-pp2-vpp2": dict(
        stage="contrastive", num_microbatches=4, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2
    ),
    "memory-cp2": dict(dtype="bf16", recompute="selective", context_parallel_size=2),
    "memory-dp2-distributed-optimizer": dict(stage="bridge", dtype="bf16", use_distributed_optimizer=True),
    "memory-dp2-distributed-optimizer-full": dict(dtype="bf16", recompute="full", use_distributed_optimizer=True),
    "memory-dp2-full": dict(dtype="bf16", recompute="full"),
    "memory-tp2-sp-dora": dict(
        dtype="bf16", adapter=dict(kind="dora"), tensor_model_parallel_size=2, sequence_parallel=True
    ),
    "memory-pp2-lora": dict(
        stage="bridge", adapter=dict(kind="lora"), num_microbatches=4, pipeline_model_parallel_size=2
    ),
    "memory-dp2-distributed-optimizer-dora": dict(
        dtype="bf16", adapter=dict(kind="dora"), recompute="mlp", use_distributed_optimizer=True
    ),
}

DEFAULT = (
    "memory-warmup-qwen2_5_vl-bf16-none",
    "memory-bridge-qwen2_vl-fp32-selective",
    "memory-bridge-qwen2_5_vl-fp32-mlp",
    "memory-contrastive-qwen2_5_vl-fp32-full",
    "memory-contrastive-untied",
    "memory-frozen-language",
    "memory-frozen-vision-full",
    "memory-dora-warmup-dropout-0.1-none",
    "memory-dora-contrastive-dropout-0.1-full",
    "memory-lora-bridge-dropout-0.1-mlp",
    "memory-lora-some",
    "memory-dora-merger-alone",
    *(name for name in TWO_RANKS if name != "memory-dp2-distributed-optimizer-full"),
)
"""Run by default; the others are of the opt-in tier. Of those of two ranks that is a mixture of three that stay."""

CHECKS = {
    **{name: Check(1, functools.partial(measured_step, **case)) for name, case in ONE_RANK.items()},
    **{name: Check(2, functools.partial(measured_step, **case)) for name, case in TWO_RANKS.items()},
}
