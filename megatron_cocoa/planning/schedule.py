"""How many micro-batches a pipeline stage holds at once, under the schedules that Megatron-Core runs."""

from __future__ import annotations

from megatron_cocoa.config import ParallelSettings


def in_flight(parallel: ParallelSettings, *, pipeline_rank: int, num_microbatches: int) -> list[tuple[int, ...]]:
    """Micro-batches whose forward has run and whose backward has not, at a stage's fullest moments.

    Without interleaving (1F1B, arXiv 2104.04473): one more than the stages behind this one, as far as there are that
    many. Interleaved: the order of chunks is replayed, as ``schedules.forward_backward_pipelining_with_interleaving``
    walks through it, and every distinct moment between a forward and a backward pass is returned: which is the
    fullest depends on what each chunk holds.

    Args:
        num_microbatches: of a rank and step; interleaving needs a multiple of the pipeline size.

    Returns:
        For each moment one number per virtual chunk (a single one without interleaving).
    """
    size, chunks = parallel.pipeline_model_parallel_size, parallel.num_chunks
    if chunks == 1:
        return [(min(size - pipeline_rank, num_microbatches),)]
    total = num_microbatches * chunks
    warmup = min(2 * (size - pipeline_rank - 1) + (chunks - 1) * size, total)
    held, moments = [0] * chunks, set()
    for index in range(total):
        held[index // size % chunks] += 1
        moments.add(tuple(held))
        if index >= warmup:
            held[chunks - 1 - (index - warmup) // size % chunks] -= 1
    return sorted(moments)
