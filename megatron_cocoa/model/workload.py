"""What packs ask of each part of the model, counted from their layout: rows, query-key pairs, patches.

Everything is a sum of integers over the pack's host-side layout, so no device is asked. Quantities of several packs
add up, on one rank or over ranks; ``model/flops.py`` makes operations of the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache

from megatron_cocoa.architecture import VisionArchitecture
from megatron_cocoa.batch import PackedBatch
from megatron_cocoa.model.segments import compile_segments


@dataclass(frozen=True)
class Workload:
    """What packs ask of each part of the model. All are counts, so workloads of several packs add up.

    samples:          packed sequences; for pairs, both sides count.
    tokens:           rows of samples.
    tail_tokens:      rows after the last sample, which are padding.
    tail_read_rows:   those that the last language layer runs to its end: all where the image decoder runs, else none.
    pairs:            query-key pairs of one language layer, by the exact segments of the mask kind.
    tail_pairs:       those among tail rows.
    patches:          patches of all pictures.
    frame_pairs:      query-key pairs of one tower block that sees whole frames.
    window_pairs:     those of a block that sees windows; equal to ``frame_pairs`` for a tower without windows.
    read_rows:        rows of the last language layer's output that something reads: all of them where the image decoder
                      runs, else those of token head and embeddings.
    supervised:       rows of the token head.
    masked_units:     rows of the image decoder's last linear.
    decoder_tokens, decoder_pairs: rows and pairs of each of the image decoder's layers: the pack's, where it runs.
    decoder_read_rows: rows of its last layer's output that something reads.
    """

    samples: int = 0
    tokens: int = 0
    tail_tokens: int = 0
    tail_read_rows: int = 0
    pairs: int = 0
    tail_pairs: int = 0
    patches: int = 0
    frame_pairs: int = 0
    window_pairs: int = 0
    read_rows: int = 0
    supervised: int = 0
    masked_units: int = 0
    decoder_tokens: int = 0
    decoder_pairs: int = 0
    decoder_read_rows: int = 0

    @classmethod
    def of(cls, batch: PackedBatch, vision: VisionArchitecture) -> Workload:
        """The workload of one whole micro-batch, whatever part of it this rank computes.

        The image decoder counts as running where the batch has unit positions: build batches without them for a
        model without one. Reads shapes and host-side fields alone.
        """
        tail = batch.tail_length
        table = compile_segments(batch.mask_kind, batch.sample_lengths, batch.bridge_positions)
        tokens, pairs = table.length, table.num_score_entries()
        runs_decoder = batch.unit_positions is not None
        supervised, embeddings, masked = (
            0 if positions is None else positions.shape[0]
            for positions in (batch.text_positions, batch.embedding_positions, batch.unit_positions)
        )
        grids = [grid_pairs(tuple(grid), vision) for grid in batch.grid_thw]
        return cls(
            samples=len(batch.sample_lengths),
            tokens=tokens,
            tail_tokens=tail,
            tail_read_rows=tail if runs_decoder else 0,
            pairs=pairs,
            tail_pairs=tail * tail,
            patches=batch.num_patches,
            frame_pairs=sum(frames for frames, _ in grids),
            window_pairs=sum(windows for _, windows in grids),
            read_rows=tokens if runs_decoder else supervised + embeddings,
            supervised=supervised,
            masked_units=masked,
            decoder_tokens=tokens if runs_decoder else 0,
            decoder_pairs=pairs if runs_decoder else 0,
            decoder_read_rows=masked,
        )

    def __add__(self, other: Workload) -> Workload:
        return Workload(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def counts(self) -> dict[str, int]:
        """By name, for a reduction over data-parallel ranks; ``from_counts`` is the way back."""
        return asdict(self)

    @classmethod
    def from_counts(cls, counts: Mapping[str, float]) -> Workload:
        return cls(**{f.name: round(counts[f.name]) for f in fields(cls)})


@lru_cache(maxsize=4096)
def grid_pairs(grid: tuple[int, int, int], vision: VisionArchitecture) -> tuple[int, int]:
    """Query-key pairs of one head for a picture or video of ``(t, h, w)`` patches: whole frames, and windows.

    Windows cut rows and columns apart, the last of each may be short: the sum of squared window areas is the
    product of the two sums of squares.
    """
    t, h, w = grid
    frames = t * (h * w) ** 2
    side = vision.window_units
    if side is None:
        return frames, frames
    merge = vision.spatial_merge_size
    squares = [sum(min(side, units - at) ** 2 for at in range(0, units, side)) for units in (h // merge, w // merge)]
    return frames, t * squares[0] * squares[1] * merge**4
