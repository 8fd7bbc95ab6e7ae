"""Checks of adapters at a layout: equality with peft, training as in one process, and what a stage hands over."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.batch import MaskKind
from megatron_cocoa.checkpoint.adapter_mapping import adapter_mappings, peft_name
from megatron_cocoa.checkpoint.adapter_weights import gather_adapters
from megatron_cocoa.checkpoint.info import CheckpointInfo
from megatron_cocoa.checkpoint.mapping import nested_spelling
from megatron_cocoa.checkpoint.random_weights import RandomWeights
from megatron_cocoa.checkpoint.stacked import StackedTensors
from megatron_cocoa.checkpoint.store import load_checkpoint, save_checkpoint
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.config import VISION_TARGETS, AdapterSettings, ParallelSettings
from megatron_cocoa.model.adapters import attach_adapters, merge_adapters
from megatron_cocoa.model.build import build_model
from megatron_cocoa.objectives import build_objective
from megatron_cocoa.parallel import topology
from megatron_cocoa.recipes.adapters import add_adapters
from megatron_cocoa.recipes.context import RunContext, prepare_context
from megatron_cocoa.recipes.initial_model import build_with_weights
from megatron_cocoa.recipes.stage_loader import build_loader
from megatron_cocoa.recipes.stages import run_stage
from megatron_cocoa.training.data_parallel import wrap_data_parallel
from megatron_cocoa.training.trainer import train_stage
from tests.distributed.check import Check, degrees
from tests.distributed.folders import rank_folders
from tests.distributed.tiny_run import tiny_settings, write_folders
from tests.distributed.training import _Losses
from tests.parity import adapters, compare, reference
from tests.parity.cases import FULL, Case

EVERYWHERE = AdapterSettings(kind="dora", rank=4, alpha=6.0, dropout=0.0, vision_targets=VISION_TARGETS)
SOME = AdapterSettings(
    kind="lora",
    rank=3,
    alpha=6.0,
    dropout=0.0,
    language_targets=("q_proj", "v_proj", "up_proj"),
    vision_targets=("qkv",),
)


class PeftResult(compare.HuggingFaceResult):
    """Outputs and gradients of peft's adapters on Hugging Face's model."""

    def __init__(self, case: Case, adapter: AdapterSettings, mappings):
        self.mappings, self.adapter = mappings, adapter
        shape = dict(tied=case.tied, key_value_heads=case.key_value_heads, layers=case.layers)
        super().__init__(case.family, case.samples, case.kind, False, shape)

    def build(self, config) -> torch.nn.Module:
        plain = reference.tiny_huggingface(config)
        self.weights = {compare.flat_spelling(name): p.detach() for name, p in plain.named_parameters()}
        self.peft = adapters.with_peft(plain, self.mappings, self.adapter)
        self.values = adapters.randomize(self.peft)
        return self.peft.base_model.model

    @property
    def adapter_gradients(self) -> dict[str, torch.Tensor]:
        return {name: p.grad for name, p in adapters.peft_parameters(self.peft).items()}


def equality_with_peft(adapter: AdapterSettings, case: Case) -> dict[str, float | str]:
    """Worst relative error over all ranks of hidden states and losses, and of the adapters' gradients."""
    settings = replace(compare.settings_of(case), adapter=adapter)
    topology.set_layout(settings.parallel, seed=0)
    config = reference.tiny_config(
        case.family, tied=case.tied, key_value_heads=case.key_value_heads, layers=case.layers
    )
    table = compare.name_table(config, settings)
    mappings = adapter_mappings(table, adapter)
    result = PeftResult(case, adapter, mappings)
    bare = build_model(QwenVLArchitecture.from_huggingface(config), settings, with_image_decoder=False)
    compare.copy_weights(bare, table, result.weights)
    attach_adapters(bare, settings, mask_token_id=None)
    adapters.copy_adapters(bare, mappings, result.values)
    model = wrap_data_parallel(bare, settings.parallel)
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    size, rank = topology.data_parallel_size(), topology.data_parallel_rank()
    mine = compare.make_batches(case, result, size)[rank * case.num_microbatches : (rank + 1) * case.num_microbatches]
    errors = compare.compare_heads(model, mine, result)
    compare.gather_gradient_shards(model)
    gradient, where, count = _worst_gradient(model, mappings, result.adapter_gradients)
    found: list = [None] * dist.get_world_size()
    dist.all_gather_object(found, (errors["hidden"], errors["loss"], gradient, where))
    hidden, loss, gradient = (max(rank[i] for rank in found) for i in range(3))
    # A round trip through all ranks' shards.
    gathered = gather_adapters(model.bare_chunks, mappings)
    same = gathered is None or all(torch.equal(gathered[name], value) for name, value in result.values.items())
    return dict(hidden=hidden, loss=loss, gradient=gradient, where=max(found, key=lambda f: f[2])[3], same=same)


def _worst_gradient(model, mappings, gradients: dict[str, torch.Tensor]) -> tuple[float, str, int]:
    by_name = {mapping.megatron_name: mapping for mapping in mappings}
    place = dict(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
    )
    worst, where, count = 0.0, "", 0
    for name, parameter in compare.parameters(model):
        if name not in by_name:
            assert not parameter.requires_grad, f"{name} is no adapter and must not train here"
            continue
        mapping = by_name[name]
        whole = mapping.merge([gradients[hf] for hf in mapping.hf_names])
        scale = float(whole.abs().max())
        difference = parameter.main_grad - mapping.shard(whole, **place)
        error = compare.largest(difference) / scale
        worst, where = max((worst, where), (error, name))
        count += 1
    return worst, where, count


STAGE, STEPS = "warmup", 3


def _prepare(folder: Path, parallel: ParallelSettings, adapter: AdapterSettings) -> RunContext:
    return prepare_context(tiny_settings(folder, steps=STEPS, parallel=parallel, adapter=adapter))


def _train(context: RunContext):
    """Some steps of a stage with adapters; returns the model, losses and gradient norms."""
    bare = build_with_weights(context, checkpoint=None, with_image_decoder=True)
    add_adapters(context, bare, STAGE)
    model, log = wrap_data_parallel(bare, context.settings.parallel), _Losses()
    train_stage(
        model,
        build_objective(STAGE, context.settings),
        build_loader(context, STAGE),
        stage=context.settings.stage(STAGE),
        settings=context.settings,
        log=log,
    )
    return model, log.values, log.grad_norms


def _info(context: RunContext) -> CheckpointInfo:
    ids = context.bundle.mask_token_id, context.bundle.bridge_token_id
    return CheckpointInfo(STAGE, STEPS, *ids, {})


def _samples(path: Path, context: RunContext) -> dict[str, list[float]]:
    """Up to 64 values of each weight in a checkpoint, spread over it."""
    with TorchDistReader(path) as reader:
        tensors = StackedTensors(reader)
        assert not [name for name in tensors.names if "lora" in name]
        found = {}
        for mapping in context.table:
            values = torch.cat([part.flatten() for part in mapping.split(tensors(mapping.megatron_name))])
            found[mapping.megatron_name] = values[:: max(1, len(values) // 64)].tolist()
    return found


def training(adapter: AdapterSettings, degrees: dict) -> dict:
    """Losses and gradient norms of the first steps, and the merged weights of the checkpoint that is handed over."""
    parallel = ParallelSettings(**degrees)
    topology.set_layout(parallel, seed=0)
    with rank_folders() as (folder, shared):
        write_folders(folder)
        context = _prepare(folder, parallel, adapter)
        model, losses, norms = _train(context)
        refused = _refusal_without_adapters(model, context, shared / "unmerged")
        merge_adapters(model)
        save_checkpoint(shared / "merged", model.bare_chunks, _info(context))
        weights = _samples(shared / "merged", context) if dist.get_rank() == 0 else {}
    return dict(losses=losses, norms=norms, weights=weights, refused=refused)


def _refusal_without_adapters(model, context: RunContext, path: Path) -> str:
    """What a model without adapters says to a checkpoint that has them, on every rank."""
    save_checkpoint(path, model.bare_chunks, _info(context))
    plain = build_model(context.architecture, context.settings, with_image_decoder=True)
    try:
        load_checkpoint(path, plain.chunks)
    except ValueError as error:
        return str(error)
    return ""


def stage_hand_over(degrees: dict, dtype: str) -> dict:
    """A stage as a run trains it, with dropout: what its checkpoint holds beside what its export says that it holds."""
    parallel, adapter = ParallelSettings(**degrees), replace(EVERYWHERE, dropout=0.1)
    topology.set_layout(parallel, seed=0)
    with rank_folders() as (folder, shared):
        write_folders(folder)
        settings = tiny_settings(folder, steps=2, parallel=parallel, adapter=adapter)
        model = replace(settings.model, dtype=dtype)
        context = prepare_context(replace(settings, model=model, output_dir=str(shared / "out")))
        summary = run_stage(context, STAGE, checkpoint=None)
        errors = _hand_over_errors(context, summary.checkpoint) if dist.get_rank() == 0 else {}
    return errors


def _hand_over_errors(context: RunContext, checkpoint: Path) -> dict:
    """Largest difference of the checkpoint from initial weights + exported adapters, smallest change of a weight."""
    exported = load_file(checkpoint.parent / "adapter" / "adapter_model.safetensors")
    source = context.weight_source(None)
    initial = RandomWeights(seed=source.seed, initializer_range=source.initializer_range)
    worst, least, bf16 = 0.0, float("inf"), context.settings.model.dtype == "bf16"
    with TorchDistReader(checkpoint) as reader:
        tensors = StackedTensors(reader)
        for mapping in context.table:
            parts = mapping.split(tensors(mapping.megatron_name))
            for name, start, found in zip(mapping.hf_names, mapping.split(initial.read(mapping)), parts):
                start = start.bfloat16().float() if bf16 else start
                module = peft_name(nested_spelling(name.removesuffix(".weight")))
                if f"{module}.lora_A.weight" in exported:
                    a, b = (exported[f"{module}.lora_{x}.weight"].float() for x in "AB")
                    total = start + context.settings.adapter.scaling * b @ a
                    length = exported[f"{module}.lora_magnitude_vector"]
                    wanted = total * (length / total.norm(dim=1)).unsqueeze(1)
                    least = min(least, compare.relative(wanted, start))
                elif name == "model.embed_tokens.weight":
                    continue
                else:
                    wanted = start
                worst = max(worst, compare.relative(found.float(), wanted))
    return dict(worst=worst, least=least, tensors=len(exported))


BRIDGED = MaskKind.EOS_BRIDGED
OVERLAP = dict(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True)
PEFT_CASES = [
    *(Case(f"tp2-{family}", 2, family, parallel=degrees(tp=2)) for family in ("qwen2_vl", "qwen2_5_vl")),
    Case("tp2-sp", 2, parallel=degrees(tp=2, sequence_parallel=True)),
    Case("tp2-above-kv-heads", 2, key_value_heads=1, parallel=degrees(tp=2)),
    Case("tp2-vision-ffn-padded", 2, parallel=degrees(tp=2), model=dict(vision_ffn_multiple=48)),
    Case("tp2-sp-recompute", 2, parallel=degrees(tp=2, sequence_parallel=True), recompute=FULL),
    Case("pp2", 2, kind=BRIDGED, num_microbatches=5, parallel=degrees(pp=2)),
    Case("pp2-untied", 2, tied=False, num_microbatches=5, parallel=degrees(pp=2)),
    Case("cp2", 2, kind=BRIDGED, parallel=degrees(cp=2)),
    Case("dp2-distributed-optimizer", 2, num_microbatches=2, parallel=degrees(use_distributed_optimizer=True)),
    Case("dp2-overlap", 2, samples="halves", num_microbatches=2, parallel=degrees(**OVERLAP)),
    Case("tp4-sp-above-kv-heads", 4, parallel=degrees(tp=4, sequence_parallel=True)),
    Case("tp2-sp-pp2", 4, num_microbatches=5, parallel=degrees(tp=2, pp=2, sequence_parallel=True)),
    Case("tp2-sp-cp2", 4, parallel=degrees(tp=2, cp=2, sequence_parallel=True)),
]

LAYOUTS: dict[str, tuple[int, dict]] = {
    "adapters-single": (1, degrees()),
    "adapters-tp2": (2, degrees(tp=2)),
    "adapters-tp2-sp": (2, degrees(tp=2, sequence_parallel=True)),
    "adapters-pp2": (2, degrees(pp=2)),
    "adapters-cp2": (2, degrees(cp=2)),
    "adapters-dp2-distributed-optimizer": (2, degrees(use_distributed_optimizer=True)),
    "adapters-dp2-overlap": (2, degrees(**OVERLAP)),
    "adapters-tp2-pp2": (4, degrees(tp=2, pp=2)),
}

HAND_OVERS: dict[str, tuple[int, dict, str]] = {
    "adapters-stage-tp2-bf16": (2, degrees(tp=2, sequence_parallel=True, use_distributed_optimizer=True), "bf16"),
    "adapters-stage-tp2-pp2": (4, degrees(tp=2, pp=2), "fp32"),
}

PEFT = {
    **{
        f"peft-dora-{case.name}": Check(case.world_size, functools.partial(equality_with_peft, EVERYWHERE, case))
        for case in PEFT_CASES
    },
    **{
        f"peft-lora-{case.name}": Check(case.world_size, functools.partial(equality_with_peft, SOME, case))
        for case in PEFT_CASES
        if case.name in ("tp2-sp", "tp2-above-kv-heads")
    },
}
"""LoRA on some targets alone where a rank may hold no row of one, DoRA on all of them everywhere."""

SLOW = {
    *(f"peft-dora-tp2-{family}" for family in ("qwen2_vl", "qwen2_5_vl")),
    "peft-dora-tp2-above-kv-heads",
    "peft-dora-tp2-sp-recompute",
    "peft-dora-pp2-untied",
    "peft-dora-dp2-distributed-optimizer",
    "peft-dora-tp4-sp-above-kv-heads",
    "peft-dora-tp2-sp-cp2",
    "adapters-tp2",
    "adapters-dp2-overlap",
}
"""Each of these is a mixture of others that run by default."""

CHECKS = {
    **PEFT,
    **{
        name: Check(size, functools.partial(training, EVERYWHERE, degrees)) for name, (size, degrees) in LAYOUTS.items()
    },
    **{name: Check(size, functools.partial(stage_hand_over, *how)) for name, (size, *how) in HAND_OVERS.items()},
}
