"""Checks of the core attention under context parallelism: every mask kind against its dense definition."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_cocoa.batch import MaskKind
from megatron_cocoa.config import ParallelSettings
from megatron_cocoa.model.attention import SegmentAttention, SequenceContext, rotate
from megatron_cocoa.model.segments import compile_segments
from megatron_cocoa.parallel import topology
from tests.distributed.check import Check
from tests.parity.masks import dense_attention, dense_mask

HEADS, HEAD_DIM, PACKS = 8, 6, 6


def random_pack(generator: np.random.Generator, multiple: int) -> tuple[list[int], list[int], int]:
    """Lengths, bridges and tail; the bridge is the first or last row of some samples, so that a block is empty."""
    lengths = generator.integers(1, 12, size=generator.integers(1, 6)).tolist()
    bridges, start = [], 0
    for length in lengths:
        inside = int(generator.integers(0, length))
        bridges.append(start + int(generator.choice([0, length - 1, inside])))
        start += length
    return lengths, bridges, -start % multiple


def attention_of_kind(kind: MaskKind, world_size: int, groups: int) -> dict[str, float]:
    """Worst relative error of outputs and gradients over random packs; ``groups`` key-value heads."""
    topology.set_layout(ParallelSettings(context_parallel_size=world_size), seed=0)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        kv_channels=HEAD_DIM,
        context_parallel_size=world_size,
        attention_dropout=0.0,
        use_cpu_initialization=True,
    )
    attention = SegmentAttention(config, 1, AttnMaskType.no_mask, "self", backend="sdpa")
    generator = np.random.default_rng(0)
    worst = dict(output=0.0, gradient=0.0)
    for seed in range(PACKS):
        lengths, bridges, tail = random_pack(generator, world_size)
        for name, error in _compare(attention, kind, lengths, bridges, tail, groups, seed).items():
            worst[name] = max(worst[name], error)
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, worst)
    return {name: max(found[name] for found in gathered) for name in worst}


def _compare(attention, kind, lengths, bridges, tail, groups, seed) -> dict[str, float]:
    rank, size = dist.get_rank(), dist.get_world_size()
    tokens = sum(lengths) + tail
    generator = torch.Generator().manual_seed(seed)
    whole = [torch.randn(tokens, n, HEAD_DIM, generator=generator).requires_grad_() for n in (HEADS, groups, groups)]
    weight = torch.randn(tokens, HEADS, HEAD_DIM, generator=generator)
    angles = torch.rand(tokens, HEAD_DIM // 2, generator=generator) * 6
    cos, sin = angles.cos(), angles.sin()

    mask = dense_mask(kind, lengths, bridges, tail)
    query, key = (rotate(x, cos, sin) for x in whole[:2])
    wanted = dense_attention(query, key, whole[2], mask, HEAD_DIM**-0.5)
    (wanted * weight).sum().backward()

    context = SequenceContext(segments=compile_segments(kind, lengths, bridges, tail), cos=cos, sin=sin)
    mine = [x.detach().chunk(size)[rank].clone().requires_grad_() for x in whole]
    found = attention(*(x.unsqueeze(1) for x in mine), packed_seq_params=context)
    found = found.reshape(-1, HEADS, HEAD_DIM)
    (found * weight.chunk(size)[rank]).sum().backward()

    pairs = [(x.grad, y.grad.chunk(size)[rank]) for x, y in zip(mine, whole)]
    return dict(
        output=float((found - wanted.chunk(size)[rank]).abs().max() / wanted.abs().max()),
        gradient=max(float((x - y).abs().max()) for x, y in pairs) / max(float(x.grad.abs().max()) for x in whole),
    )


CHECKS = {
    f"mask-{kind.value}-cp{size}-kv{groups}": Check(size, functools.partial(attention_of_kind, kind, size, groups))
    for kind in MaskKind
    for size in (1, 2, 4)
    for groups in (1, 2)
}
