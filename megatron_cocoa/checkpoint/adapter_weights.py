"""Adapter tensors of a live model: drawn at the start of a stage, gathered at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megatron_cocoa.checkpoint.adapter_mapping import LORA_A, LORA_B
from megatron_cocoa.checkpoint.live import copy_shard, global_name
from megatron_cocoa.checkpoint.random_weights import draw
from megatron_cocoa.checkpoint.sharding import Sharding
from megatron_cocoa.checkpoint.tensor_mapping import Mapping
from megatron_cocoa.config import AdapterSettings
from megatron_cocoa.parallel import topology

_MARK = "_adapter."

MAX_DRIFT = 0.01
"""Of a replicated tensor's length, by which copies may differ; BF16 rounds each value to within 0.004 of itself."""


def num_parameters(mappings: Sequence[Mapping]) -> int:
    """Trainable values of all adapters, as peft counts them: unsharded and without padding."""
    return sum(torch.Size(shape).numel() for mapping in mappings for shape in mapping.hf_shapes)


def draw_adapters(
    chunks: Sequence[nn.Module], mappings: Sequence[Mapping], settings: AdapterSettings, *, seed: int
) -> None:
    """Draw A and set B to zero; a function of seed and name alone, whatever the layout. Magnitudes stay as they are.

    Args:
        chunks: this rank's chunks with adapters attached.
        mappings: of their adapters.
        settings: how A is drawn.
        seed: of the run.
    """

    def read(mapping: Mapping) -> Tensor | None:
        if mapping.megatron_name.endswith(LORA_B):
            return torch.zeros(mapping.megatron_shape)
        if mapping.megatron_name.endswith(LORA_A):
            return mapping.merge([_draw(n, s, settings, seed) for n, s in zip(mapping.hf_names, mapping.hf_shapes)])
        return None

    fill_adapters(chunks, mappings, read)


def _draw(name: str, shape: tuple[int, ...], settings: AdapterSettings, seed: int) -> Tensor:
    """float32 ``(rank, input width)``."""
    if settings.init == "gaussian":
        return draw(name, shape, seed=seed, spread=1 / settings.rank)
    # Uniform from normal by its distribution function, so that there is one source of layout-independent numbers.
    uniform = torch.special.ndtr(draw(name, shape, seed=seed, spread=1.0))
    return (2 * uniform - 1) / shape[1] ** 0.5


def fill_adapters(
    chunks: Sequence[nn.Module], mappings: Sequence[Mapping], read: Callable[[Mapping], Tensor | None]
) -> None:
    """Copy this rank's part of the whole tensors that ``read`` gives into the adapters; None leaves one as it is.

    Raises:
        ValueError: if a tensor does not have the shape that its projection needs.
    """
    place = topology.tensor_parallel_place()
    for mapping, parameter in _parameters(chunks, mappings):
        tensor = read(mapping)
        if tensor is not None:
            copy_shard(parameter, mapping, tensor.to(parameter.device), **place)


@torch.no_grad()
def gather_adapters(chunks: Sequence[nn.Module], mappings: Sequence[Mapping]) -> dict[str, Tensor] | None:
    """All adapter tensors by their Hugging Face names in the flat spelling, on rank 0's CPU; every rank calls it.

    Returns:
        Whole tensors in the order of ``mappings`` on rank 0, None on the others.

    Raises:
        ValueError: if copies of a replicated tensor are further apart over tensor-parallel ranks than rounding takes
            them, or rows without an adapter or padding are not zero: something has trained that must not.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    mine: dict[str, Tensor] = {}
    for mapping, parameter in _parameters(chunks, mappings):
        shards = [torch.empty_like(parameter) for _ in range(group.size())]
        dist.all_gather(shards, parameter.detach().contiguous(), group=group)
        if mapping.sharding is Sharding.REPLICATED:
            shards = [_first_copy(shards, mapping.megatron_name)]
        parts = mapping.split(mapping.unshard(shards))
        mine |= {name: part.cpu().contiguous() for name, part in zip(mapping.hf_names, parts)}
    is_sender = (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )
    received: list | None = None
    if is_sender:
        # One pipeline. Over the world every part would be padded to the largest, all of them on rank 0's GPU.
        pipeline = parallel_state.get_pipeline_model_parallel_group()
        received = [None] * pipeline.size() if dist.get_rank() == 0 else None
        dist.gather_object(mine, received, dst=0, group=pipeline)
    if received is None:
        return None
    found = {name: tensor for part in received for name, tensor in part.items()}
    return {name: found[name] for mapping in mappings for name in mapping.hf_names}


def _first_copy(copies: Sequence[Tensor], name: str) -> Tensor:
    """The first rank's copy of a replicated tensor, which is what a checkpoint keeps as well.

    Each tensor-parallel rank sums gradients in a data-parallel group of its own. NCCL may add in another order there,
    so that a copy is a rounding or two off after a long run.
    """
    first = copies[0].float()
    scale = torch.linalg.vector_norm(first).clamp(min=torch.finfo(torch.float32).tiny)
    drift = [float(torch.linalg.vector_norm(copy.float() - first) / scale) for copy in copies]
    # Written so that NaN, which training would have ended at, is too far as well.
    apart = [f"{rank}: {value:.2g}" for rank, value in enumerate(drift) if not value <= MAX_DRIFT]
    if apart:
        raise ValueError(
            f"{name}: copies on tensor-parallel ranks are apart from rank 0's by ({', '.join(apart)}) of its length, "
            f"more than rounding explains ({MAX_DRIFT}): their gradients were not the same"
        )
    return copies[0]


def _parameters(chunks: Sequence[nn.Module], mappings: Sequence[Mapping]) -> Iterator[tuple[Mapping, nn.Parameter]]:
    by_name = {mapping.megatron_name: mapping for mapping in mappings}
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if _MARK in name:
                yield by_name[global_name(chunk, name)], parameter
