"""Run one case on the ranks at hand and measure how far outputs and gradients are from Hugging Face's."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.nn import functional as F

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.batch import MaskKind, ModelOutput, PackedBatch
from megatron_cocoa.checkpoint.live import global_name
from megatron_cocoa.checkpoint.mapping import NameTable, flat_spelling
from megatron_cocoa.checkpoint.sharding import Sharding, shard
from megatron_cocoa.config import (
    FreezeSettings,
    ModelSettings,
    ParallelSettings,
    RecomputeSettings,
    TrainSettings,
    WarmupSettings,
)
from megatron_cocoa.model.build import Model, build_model
from megatron_cocoa.model.heads import local_rows
from megatron_cocoa.model.language import padded_vocab_size
from megatron_cocoa.model.schedule import run_microbatches
from megatron_cocoa.parallel import topology
from megatron_cocoa.training.data_parallel import wrap_data_parallel
from tests.parity import reference
from tests.parity.cases import Case

MEASURES = ("hidden", "logits", "loss", "pixels", "gradient")
"""Final hidden states, logits, cross-entropy a row, decoded pixels, and the gradient of every parameter."""

PIXEL_WEIGHT = 0.7
"""Weight of the image decoder's squared error beside the cross-entropy."""


def settings_of(case: Case) -> TrainSettings:
    return TrainSettings(
        model=ModelSettings(dtype="fp32", make_vocab_size_divisible_by=8, **case.model),
        parallel=ParallelSettings(**case.parallel),
        recompute=RecomputeSettings(**case.recompute),
        freeze=FreezeSettings(**case.freeze),
        warmup=WarmupSettings(decoder_layers=case.decoder_layers),
    )


def name_table(config, settings: TrainSettings) -> NameTable:
    rows = padded_vocab_size(
        config.text_config.vocab_size,
        settings.model.make_vocab_size_divisible_by,
        settings.parallel.tensor_model_parallel_size,
    )
    return NameTable.from_config(
        config, padded_vocab_size=rows, vision_ffn_multiple=settings.model.vision_ffn_multiple
    )


def parameters(model: Model):
    """``(global Megatron name, parameter)`` of every parameter on this rank."""
    for chunk in model.bare_chunks:
        for name, parameter in chunk.named_parameters():
            yield global_name(chunk, name), parameter


@torch.no_grad()
def copy_weights(model: Model, table: NameTable, tensors: dict[str, torch.Tensor]) -> None:
    for name, parameter in parameters(model):
        parameter.copy_(local_shard(table, name, tensors))


def local_shard(table: NameTable, name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """This rank's part of the Megatron tensor ``name`` made of Hugging Face ``tensors`` (weights or gradients).

    The image decoder has no names at Hugging Face; its layer is cut like the language model's layer 0.
    """
    ranks = dict(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
    )
    if name.startswith("image_decoder.pixel_head."):
        return shard(tensors[name], Sharding.COLUMN, **ranks)
    own = table.is_own(name)
    mapping = table.megatron_to_hf(name.replace("image_decoder.", "language_model.", 1) if own else name)
    whole = mapping.merge([tensors[("image_decoder." if own else "") + hf] for hf in mapping.hf_names])
    return mapping.shard(whole, **ranks)


class HuggingFaceResult:
    """Outputs and gradients of all samples, each run by itself without padding.

    The loss is the mean cross-entropy over all text rows, plus a fixed random projection of the hidden state at each
    sample's bridge, plus the image decoder's mean squared error: it exercises all heads at once. It does not depend
    on how samples are packed, so that one result serves many layouts.
    """

    def __init__(self, family: str, samples: str, kind: MaskKind, decoder_layers: int, shape: dict):
        self.config = reference.tiny_config(family, **shape)
        self.model = self.build(self.config)
        self.decoder = reference.ImageDecoderReference(self.model, layers=decoder_layers) if decoder_layers else None
        generator = torch.Generator().manual_seed(1)
        self.samples = [
            reference.encode(s, self.config, generator, index=i, kind=kind)
            for i, s in enumerate(reference.SAMPLES[samples])
        ]
        self.probe = torch.randn(len(self.samples), self.config.text_config.hidden_size, generator=generator) * 0.1
        self.rows = sum(len(s.text_rows) for s in self.samples)
        self.units = max(1, sum(len(s.unit_rows) for s in self.samples))
        self.hidden, self.logits, self.positions, self.loss, self.pixels = [], [], [], [], []
        sum(self._run(index, sample, kind) for index, sample in enumerate(self.samples)).backward()
        self.tensors, self.gradients = self._named(lambda p: p.detach()), self._named(_gradient)

    def build(self, config) -> torch.nn.Module:
        """The model that is run; a subclass may put something on it."""
        return reference.tiny_huggingface(config)

    def _run(self, index: int, sample: reference.Encoded, kind: MaskKind) -> torch.Tensor:
        hidden, positions = reference.run_huggingface(self.model, sample, kind=kind)
        logits = self.model.lm_head(hidden)
        nll = F.cross_entropy(logits[sample.text_rows], sample.labels, reduction="none")
        loss = nll.sum() / self.rows + (hidden[sample.bridge] * self.probe[index]).sum()
        if self.decoder is not None:
            pixels = self.decoder(hidden, positions, sample.unit_rows)
            loss = loss + PIXEL_WEIGHT * (pixels - sample.unit_targets).square().sum() / self.units
            self.pixels.append(pixels.detach())
        outputs = (self.hidden, hidden), (self.logits, logits), (self.positions, positions), (self.loss, nll)
        for kept, value in outputs:
            kept.append(value.detach())
        return loss

    def _named(self, of) -> dict[str, torch.Tensor]:
        named = {flat_spelling(name): of(p) for name, p in self.model.named_parameters()}
        if self.decoder is not None:
            named |= {f"image_decoder.model.layers.{n}": of(p) for n, p in self.decoder.layers.named_parameters()}
            named |= {f"image_decoder.pixel_head.{n}": of(p) for n, p in self.decoder.pixel_head.named_parameters()}
        return named


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@functools.lru_cache(maxsize=None)
def huggingface_result(family, samples, kind, decoder_layers, tied, key_value_heads, layers) -> HuggingFaceResult:
    shape = dict(tied=tied, key_value_heads=key_value_heads, layers=layers)
    return HuggingFaceResult(family, samples, kind, decoder_layers, shape)


def make_batches(case: Case, result: HuggingFaceResult, data_parallel: int) -> list[tuple[PackedBatch, list[int]]]:
    """``(batch, sample indices)`` of every data-parallel rank and micro-batch in turn, samples dealt out in order."""
    parallel = case.parallel
    multiple = parallel.get("context_parallel_size", 1)
    if parallel.get("sequence_parallel"):
        multiple *= parallel["tensor_model_parallel_size"]
    groups = case.num_microbatches * data_parallel
    members = [list(range(len(result.samples)))[g::groups] for g in range(groups)]
    if any(not m for m in members):
        raise ValueError(f"{case.name}: {len(result.samples)} samples do not fill {groups} micro-batches")
    packed = [
        reference.pack(
            [result.samples[i] for i in m],
            [result.positions[i] for i in m],
            case.kind,
            multiple=multiple,
            with_units=case.image_decoder,
        )
        for m in members
    ]
    for batch in packed:
        batch.validate(spatial_merge_size=result.config.vision_config.spatial_merge_size)
    return list(zip(packed, members))


def relative(found: torch.Tensor, wanted: torch.Tensor, floor: float = 1e-30) -> float:
    """Largest difference over the largest entry; infinite where the shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    return largest(found - wanted) / max(float(wanted.abs().max()), floor)


def largest(values: torch.Tensor) -> float:
    """Of absolute values; infinite where one is no number, which ``max`` and comparisons would pass over. 0 of none."""
    return float(values.detach().abs().nan_to_num(nan=torch.inf, posinf=torch.inf).max()) if values.numel() else 0.0


def run_case(case: Case) -> dict[str, float | str]:
    """Worst relative error over all ranks of each of ``MEASURES``, and the parameter whose gradient is worst."""
    settings = settings_of(case)
    topology.set_layout(settings.parallel, seed=0)
    result = huggingface_result(
        case.family,
        case.samples,
        case.kind,
        case.decoder_layers if case.image_decoder else 0,
        case.tied,
        case.key_value_heads,
        case.layers,
    )
    table = name_table(result.config, settings)
    architecture = QwenVLArchitecture.from_huggingface(result.config)
    # As every run names the mask token: beside a frozen language model its row trains, else all rows do.
    row = int(result.samples[0].input_ids[0])
    bare = build_model(architecture, settings, with_image_decoder=case.image_decoder, mask_token_id=row)
    model = wrap_data_parallel(bare, settings.parallel)
    copy_weights(model, table, result.tensors)
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    size, rank = topology.data_parallel_size(), topology.data_parallel_rank()
    mine = make_batches(case, result, size)[rank * case.num_microbatches : (rank + 1) * case.num_microbatches]
    errors = compare_heads(model, mine, result)
    gather_gradient_shards(model)
    wanted = _with_one_row(result.gradients, row) if settings.freeze.language else result.gradients
    errors["gradient"], where = _worst_gradient(model, table, wanted)
    for measure, error in _compare_all_rows(model, mine, result).items():
        errors[measure] = max(errors.get(measure, 0.0), error)
    return _worst_over_ranks(errors, where)


def compare_heads(model: Model, mine: list, result: HuggingFaceResult) -> dict[str, float]:
    """Forward and backward as training runs them; what every head returns is compared on the way."""
    errors = dict.fromkeys(MEASURES, 0.0)
    group = parallel_state.get_context_parallel_group()

    def compare(measure: str, found: torch.Tensor, wanted: torch.Tensor) -> None:
        # A rank's share of the rows may be small: the scale is that of the whole result.
        scale = max(float(x.abs().max()) for x in getattr(result, measure) if x.numel())
        same = found.shape == wanted.shape
        errors[measure] = max(errors[measure], largest(found - wanted) / scale if same else float("inf"))

    def loss_function(index: int, output: ModelOutput, batch: PackedBatch):
        members = mine[index][1]
        rows = local_rows(batch.num_tokens, group)
        inside = rows.select(batch.text_positions, output.token_nll.device)
        compare("loss", output.token_nll, inside.of(torch.cat([result.loss[i] for i in members])))
        compare("hidden", output.embeddings, torch.stack([result.hidden[i][result.samples[i].bridge] for i in members]))
        # Every context-parallel rank holds all embeddings and hands each its own rows' gradient.
        loss = output.token_nll.sum() / result.rows + (output.embeddings * result.probe[members]).sum()
        if output.predicted_units is not None:
            inside = rows.select(batch.unit_positions, output.predicted_units.device)
            compare("pixels", output.predicted_units, inside.of(torch.cat([result.pixels[i] for i in members])))
            squares = (output.predicted_units - output.unit_targets).square().sum()
            loss = loss + PIXEL_WEIGHT * squares / result.units
        return loss, loss.detach()

    run_microbatches(model, [batch for batch, _ in mine], loss_function)
    return errors


def _compare_all_rows(model: Model, mine: list, result: HuggingFaceResult) -> dict[str, float]:
    """Every hidden state and logit, by asking for the embedding of every row."""
    errors = dict(hidden=0.0, logits=0.0)
    batches = [
        replace(
            batch,
            text_positions=None,
            text_labels=None,
            unit_positions=None,
            unit_targets=None,
            embedding_positions=torch.arange(sum(batch.sample_lengths)),
        )
        for batch, _ in mine
    ]

    def loss_function(index: int, output: ModelOutput, batch: PackedBatch):
        members = mine[index][1]
        logits = model.bare_chunks[-1].full_logits(output.embeddings)
        for measure, found in (("hidden", output.embeddings), ("logits", logits)):
            wanted = torch.cat([getattr(result, measure)[i] for i in members])
            errors[measure] = max(errors[measure], relative(found, wanted))
        return output.embeddings.new_zeros(()), None

    run_microbatches(model, batches, loss_function, forward_only=True)
    return errors


def gather_gradient_shards(model: Model) -> None:
    """Under the distributed optimizer a rank's gradient is whole in its shard alone: put the shards together."""
    for chunk in model.chunks:
        if not chunk.ddp_config.use_distributed_optimizer:
            continue
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        for group_of_bucket in chunk.bucket_groups:
            for bucket in group_of_bucket.buckets:
                mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather_into_tensor(bucket.grad_data, mine, group=group)


def _with_one_row(gradients: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """``gradients`` with all rows of the word embeddings but one at zero."""
    name = "model.embed_tokens.weight"
    kept = torch.zeros_like(gradients[name])
    kept[row] = gradients[name][row]
    return gradients | {name: kept}


def _worst_gradient(model: Model, table: NameTable, wanted: dict[str, torch.Tensor]) -> tuple[float, str]:
    # Gradients that cancel to nothing have no scale of their own: measure those by the largest of all.
    floor = 1e-6 * max(float(g.abs().max()) for g in wanted.values())
    worst, where = 0.0, ""
    for name, parameter in parameters(model):
        if not parameter.requires_grad:
            continue
        error = relative(parameter.main_grad, local_shard(table, name, wanted), floor)
        if not error <= worst:
            worst, where = error, name
    return worst, where


def _worst_over_ranks(errors: dict[str, float], where: str) -> dict[str, float | str]:
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, (errors, where))
    worst = {measure: max(found[measure] for found, _ in every) for measure in MEASURES}
    if not (worst["hidden"] and worst["loss"] and worst["gradient"]):
        raise AssertionError(f"exactly no difference is what is measured where nothing was compared: {worst}")
    return worst | {"worst": max(every, key=lambda pair: pair[0]["gradient"])[1]}
