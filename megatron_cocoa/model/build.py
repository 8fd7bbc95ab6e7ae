"""From settings to the model chunks of this rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.config import TrainSettings
from megatron_cocoa.model.attention import attend_function
from megatron_cocoa.model.fp8 import fp8_multiple, pad_rows
from megatron_cocoa.model.qwen_vl import QwenVL
from megatron_cocoa.model.specs import build_provider, resolve_implementation
from megatron_cocoa.model.transformer_configs import ModelConfigs, build_configs
from megatron_cocoa.parallel import device
from megatron_cocoa.parallel.fp8_parameters import forget_construction


@dataclass(frozen=True)
class Model:
    """This rank's part of the model.

    chunks: one per virtual pipeline stage (a single one without interleaving), each in Megatron's DDP, or bare
            for inference.
    config: the language model's config, which Megatron's schedules read.
    """

    chunks: list[nn.Module]
    config: TransformerConfig
    architecture: QwenVLArchitecture

    @property
    def bare_chunks(self) -> list[QwenVL]:
        """The chunks without their data-parallel wrapper."""
        return [chunk if isinstance(chunk, QwenVL) else chunk.module for chunk in self.chunks]

    def train(self, mode: bool = True) -> None:
        for chunk in self.chunks:
            chunk.train(mode)


def check_model(architecture: QwenVLArchitecture, settings: TrainSettings) -> None:
    """Refuse what ``build_model``, or the first step, would refuse: before rows are read and weights are loaded.

    Raises:
        ValueError: if the layout or the recompute does not fit the architecture, or kernels are asked for that are not
            here or cannot train here.
    """
    _configs(architecture, settings)
    resolve_implementation(settings.model)
    on_gpu, half_precision = device.has_gpu(), settings.model.dtype == "bf16"
    for part in ("", "vision_"):
        name = f"{part}attention_backend"
        backend = getattr(settings.model, name) or settings.model.attention_backend
        attend_function(backend, on_gpu=on_gpu, half_precision=half_precision, setting=f"model.{name}")
        if backend == "flex" and not on_gpu:
            raise ValueError(f"attention backend flex has no backward pass on a CPU: choose model.{name}=sdpa instead")


def _configs(architecture: QwenVLArchitecture, settings: TrainSettings) -> ModelConfigs:
    return build_configs(
        architecture,
        model=settings.model,
        parallel=settings.parallel,
        recompute=settings.recompute,
        fixed_sequence_length=settings.data.tokens_per_microbatch is not None,
        decoder_layers=settings.warmup.decoder_layers,
    )


def build_model(
    architecture: QwenVLArchitecture,
    settings: TrainSettings,
    *,
    with_image_decoder: bool,
    mask_token_id: int | None = None,
    learned_temperature: float | None = None,
    target: torch.device | None = None,
) -> Model:
    """Build this rank's chunks at the layout that is initialised; weights are not set.

    Args:
        architecture: the model's numbers.
        settings: of the run.
        with_image_decoder: stage ``warmup`` needs it.
        mask_token_id: row of the embedding that trains even where the language model is frozen; None for none.
        learned_temperature: see ``QwenVL``.
        target: where the parameters go, this rank's device by default. The meta device, as the default device of
            the caller's ``with`` block too, builds shapes without memory.

    Raises:
        ValueError: if the layout does not fit the architecture.
    """
    configs = _configs(architecture, settings)
    provider, tower_provider = (
        build_provider(settings.model, recompute=settings.recompute, is_adapted=settings.adapter.is_used, tower=tower)
        for tower in (False, True)
    )
    num_chunks = settings.parallel.num_chunks
    rank, size = parallel_state.get_pipeline_model_parallel_rank(), settings.parallel.pipeline_model_parallel_size
    chunks = [
        QwenVL(
            architecture,
            configs,
            provider,
            tower_provider=tower_provider,
            vocab_multiple=settings.model.make_vocab_size_divisible_by,
            pre_process=rank == 0 and index == 0,
            post_process=rank == size - 1 and index == num_chunks - 1,
            with_image_decoder=with_image_decoder,
            learned_temperature=learned_temperature,
            row_multiple=row_multiple(settings),
            vp_stage=index if num_chunks > 1 else None,
        ).to(target or device.device())
        for index in range(num_chunks)
    ]
    for chunk in chunks:
        for parameter in chunk.parameters():
            forget_construction(parameter)
        mark_tensor_parallel(chunk)
        freeze(chunk, settings, mask_token_id)
        if settings.model.fp8_vision and chunk.pre_process:
            pad_rows(chunk.vision_model.decoder, fp8_multiple(settings.model.fp8))
    return Model(chunks, configs.language, architecture)


def row_multiple(settings: TrainSettings) -> int:
    """What the rows of a context-parallel share must be divisible by.

    Sequence parallelism gives each tensor-parallel rank an equal part, FP8 kernels take whole blocks of rows.
    """
    parallel = settings.parallel
    tensor = parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
    return tensor * fp8_multiple(settings.model.fp8)


def mark_tensor_parallel(chunk: nn.Module) -> None:
    """Mark sharded weights as such, which Megatron does only while it draws initial values.

    Without the mark its gradient norm would count the shard of one tensor-parallel rank alone.
    """
    for module in chunk.modules():
        if isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding)):
            dim = 1 if isinstance(module, RowParallelLinear) else 0
            if module.weight is not None and not hasattr(module.weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(module.weight, True, dim, getattr(module, "stride", 1))


def freeze(chunk: QwenVL, settings: TrainSettings, mask_token_id: int | None = None) -> None:
    """Turn off gradients of the parts that ``settings.freeze`` names."""
    parts: list[nn.Module] = []
    if chunk.pre_process and settings.freeze.vision:
        parts += [chunk.vision_model.patch_embed, chunk.vision_model.decoder.layers]
    if chunk.pre_process and settings.freeze.merger:
        parts += [chunk.vision_model.decoder.final_layernorm, chunk.vision_model.projection]
    if settings.freeze.language:
        parts.append(chunk.language_model)
    for part in parts:
        part.requires_grad_(False)
    if settings.freeze.language and mask_token_id is not None:
        # Weight decay would shrink the other rows: TrainSettings refuses it.
        _train_one_row(chunk, mask_token_id)


def freeze_pretrained(chunk: QwenVL, mask_token_id: int | None) -> None:
    """Turn off gradients of all but the image decoder and the mask token's row, for adapters to train beside them."""
    for name, part in chunk.named_children():
        if name != "image_decoder":
            part.requires_grad_(False)
            for parameter in part.parameters():
                # Loaded while it trained: no master weight will ask for the values that wait for one.
                forget_construction(parameter)
    if mask_token_id is not None:
        _train_one_row(chunk, mask_token_id)


def _train_one_row(chunk: QwenVL, row: int) -> None:
    """Let one row of the word embeddings train: on the first stage, and on a tied last stage that holds a copy."""
    tied_copy = chunk.post_process and chunk.share_embeddings_and_output_weights
    if not (chunk.pre_process or tied_copy):
        return
    weight = chunk.shared_embedding_or_output_weight()
    local = row - parallel_state.get_tensor_model_parallel_rank() * weight.shape[0]
    kept = torch.zeros(weight.shape[0], 1, dtype=weight.dtype, device=weight.device)
    if 0 <= local < weight.shape[0]:
        kept[local] = 1
    weight.requires_grad_(True)
    weight.register_hook(lambda grad: grad * kept)
