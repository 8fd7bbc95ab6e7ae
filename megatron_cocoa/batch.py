"""The contract that data, model and objectives share.

Data emits token ids, positions, the places of features and labels, and a mask *kind*; the model turns these into
hidden states and head outputs; objectives turn those into a loss. None of the three imports another: they meet
here. A batch is one micro-batch, packed: its samples follow each other in a single sequence without padding
between them. Where a layout needs a length that divides, or a step's packs one length, one *tail* segment at the end
pads the pack.

Every rank of a data-parallel replica holds the whole micro-batch; the model slices what its tensor-,
pipeline- or context-parallel rank needs. Positions in a batch are therefore *global* row numbers of the pack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from enum import Enum

import torch
from torch import Tensor


class MaskKind(str, Enum):
    """Who may attend to whom inside one packed sample ``[0, n)`` with bridge ``e``. Nobody crosses samples.

    ``CAUSAL``: row ``i`` sees ``[0, i]``. ``BIDIRECTIONAL``: every row sees ``[0, n)``.
    ``EOS_BRIDGED`` (CoCoA, arXiv 2603.01471, stage 2, as published): block A = ``[0, e)`` sees ``[0, e]``, block
    B = ``(e, n)`` sees ``[e, n)``, the bridge sees ``[0, n)``.
    ``EOS_BRIDGED_STRICT``: the same, but the bridge sees ``[0, e]`` only, so that the embedding it carries in
    training equals the one at inference, where there is no block B.
    """

    CAUSAL = "causal"
    BIDIRECTIONAL = "bidirectional"
    EOS_BRIDGED = "eos_bridged"
    EOS_BRIDGED_STRICT = "eos_bridged_strict"

    @classmethod
    def of_bridge_stage(cls, *, bridge_sees_target: bool) -> MaskKind:
        """The mask of stage ``bridge``, as published or strict (``BridgeSettings.bridge_sees_target``)."""
        return cls.EOS_BRIDGED if bridge_sees_target else cls.EOS_BRIDGED_STRICT

    @property
    def needs_bridge(self) -> bool:
        """Whether each sample must name the row of its bridge."""
        return self in (MaskKind.EOS_BRIDGED, MaskKind.EOS_BRIDGED_STRICT)


_IN_HOST_MEMORY = ("text_positions", "unit_positions", "embedding_positions")


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch, packed. ``tokens`` is the pack's length, samples and tail together.

    Host-side layout (plain ints, so that no step ever waits for the device to learn a shape):

    sample_lengths:      tokens of each sample, in pack order; ``sum(sample_lengths) + tail_length == tokens``.
    bridge_positions:    for each sample the global row of its bridge, or None where the sample has none.
    tail_length:         rows after the last sample; they attend to each other only and carry no label.
    grid_thw:            ``(t, h, w)`` in patches of each image or video, in pack order.
    sample_ids:          names of the samples, for error messages and seeds.

    Tensors that stay in host memory, because how many of their rows a context-parallel rank holds is a shape:

    text_positions:      int64 ``(supervised,)``: row whose hidden state predicts the label (``i - 1`` for the
                         masked token ``i``).
    unit_positions:      int64 ``(masked_units,)``: row of each masked merged unit.
    embedding_positions: int64 ``(embeddings,)``: rows whose final hidden state is an embedding (bridges).

    Tensors:

    input_ids:           int64 ``(tokens,)``.
    position_ids:        int64 ``(3, tokens)``: M-RoPE time, height, width; restarts at each sample.
    pixel_values:        float ``(patches, channels * temporal_patch_size * patch_size**2)`` in the order of
                         ``grid_thw`` (the layout of Hugging Face's image processor), or None without images.
    feature_positions:   int64 ``(merged_units,)``: row of each placeholder token, in the order in which the
                         tower emits merged units. ``merged_units == patches / spatial_merge_size**2``.
    text_labels:         int64 ``(supervised,)``: the original token id.
    unit_targets:        float ``(masked_units, spatial_merge_size**2 * patch_dim)``: its original pixels.
    unit_patches:        bool ``(masked_units, spatial_merge_size**2)``: which of its patches are masked, in the order
                         of its pixels; None where units are masked whole.
    query_rows, target_rows: int64 ``(pairs,)``: which embeddings are queries, and which their targets.
    target_keys:         int64 ``(pairs,)``: equal for targets that are the same text and pictures.
    negative_rows:       int64 ``(pairs, hard_negatives)``: which embeddings are a pair's explicit negatives, -1
                         where it has fewer; None without any.
    negative_keys:       int64 ``(pairs, hard_negatives)``: comparable with ``target_keys``, 0 where there is none.

    Float tensors are the bulk of a batch, and a step has many batches. So ``deferred`` may stand for some of them: a
    function that returns these fields by name, called by ``materialized`` each time they are needed.
    """

    input_ids: Tensor
    position_ids: Tensor
    sample_lengths: tuple[int, ...]
    mask_kind: MaskKind
    bridge_positions: tuple[int | None, ...] = ()
    tail_length: int = 0
    grid_thw: tuple[tuple[int, int, int], ...] = ()
    sample_ids: tuple[str, ...] = ()
    pixel_values: Tensor | None = None
    feature_positions: Tensor | None = None
    text_positions: Tensor | None = None
    text_labels: Tensor | None = None
    unit_positions: Tensor | None = None
    unit_targets: Tensor | None = None
    unit_patches: Tensor | None = None
    embedding_positions: Tensor | None = None
    query_rows: Tensor | None = None
    target_rows: Tensor | None = None
    target_keys: Tensor | None = None
    negative_rows: Tensor | None = None
    negative_keys: Tensor | None = None
    deferred: Callable[[], dict[str, Tensor]] | None = None

    @property
    def num_tokens(self) -> int:
        """Rows of the pack, the tail included."""
        return self.input_ids.shape[0]

    @property
    def num_patches(self) -> int:
        return sum(t * h * w for t, h, w in self.grid_thw)

    def materialized(self) -> PackedBatch:
        """The batch with its deferred fields computed; fields that are set already stay as they are."""
        if self.deferred is None:
            return self
        made = {name: value for name, value in self.deferred().items() if getattr(self, name) is None}
        return replace(self, deferred=None, **made)

    def to(self, device: torch.device | str, *, dtype: torch.dtype | None = None) -> PackedBatch:
        """Copy the tensors, deferred ones too, to ``device``; ``dtype`` casts the floats (pixels and targets).

        Those that stay in host memory stay there.
        """

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype=dtype if tensor.is_floating_point() else None, non_blocking=True)

        return self.materialized().mapped(move)

    def mapped(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        """The batch with ``function`` applied to each tensor that the device needs; deferred ones stay deferred."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _IN_HOST_MEMORY}
        return replace(self, **{name: function(x) for name, x in values.items() if isinstance(x, Tensor)})

    def filled_to(self, num_tokens: int, *, pad_token_id: int) -> PackedBatch:
        """The batch with its tail lengthened to ``num_tokens`` rows in all; on the host."""
        more = num_tokens - self.num_tokens
        assert more >= 0, (num_tokens, self.num_tokens)
        tail = self.tail_length + more
        return replace(
            self,
            input_ids=torch.cat([self.input_ids, self.input_ids.new_full((more,), pad_token_id)]),
            position_ids=torch.cat([self.position_ids, torch.arange(self.tail_length, tail).expand(3, more)], dim=1),
            tail_length=tail,
        )

    def validate(self, *, spatial_merge_size: int) -> None:
        """Refuse a batch whose parts do not fit together.

        Raises:
            ValueError: with the numbers, where a mismatch would otherwise corrupt a run silently: lengths that
                do not cover the tokens, patches that do not match the grids, placeholders that do not match
                the merged units, a bridge outside of its sample or missing for a mask kind that needs one,
                positions outside of the pack, labels without positions.
        """
        tokens = self.num_tokens
        if sum(self.sample_lengths) + self.tail_length != tokens:
            raise ValueError(
                f"sample_lengths sum to {sum(self.sample_lengths)} and the tail has {self.tail_length}, but the "
                f"pack has {tokens} tokens: the three must agree"
            )
        if any(n < 1 for n in self.sample_lengths) or self.tail_length < 0:
            raise ValueError(f"every sample needs at least one token, found lengths {self.sample_lengths}")
        if tuple(self.position_ids.shape) != (3, tokens):
            raise ValueError(f"position_ids has shape {tuple(self.position_ids.shape)}, needed (3, {tokens})")
        self._validate_bridges()
        self._validate_vision(spatial_merge_size)
        for positions, values in (
            ("text_positions", "text_labels"),
            ("unit_positions", "unit_targets"),
            ("query_rows", "target_rows"),
            ("negative_rows", "negative_keys"),
        ):
            p, v = getattr(self, positions), getattr(self, values)
            if v is None and values == "unit_targets" and self.deferred is not None:
                continue
            if (p is None) != (v is None) or (p is not None and p.shape[0] != v.shape[0]):
                found = tuple(None if x is None else x.shape[0] for x in (p, v))
                raise ValueError(f"{positions} and {values} must come together and in equal number, found {found}")
        if self.unit_patches is not None:
            units = 0 if self.unit_positions is None else self.unit_positions.shape[0]
            needed, found = (units, spatial_merge_size**2), tuple(self.unit_patches.shape)
            if found != needed:
                raise ValueError(f"unit_patches has shape {found}, needed {needed}: a line for each masked unit")
        for name in ("feature_positions", "text_positions", "unit_positions", "embedding_positions"):
            rows = getattr(self, name)
            if rows is not None and rows.numel() and not (0 <= int(rows.min()) and int(rows.max()) < tokens):
                low, high = int(rows.min()), int(rows.max())
                raise ValueError(f"{name} spans [{low}, {high}], the pack has rows [0, {tokens})")
        if self.negative_rows is not None:
            self._validate_negatives()

    def _validate_negatives(self) -> None:
        pairs = 0 if self.query_rows is None else self.query_rows.shape[0]
        if self.negative_rows.dim() != 2 or self.negative_rows.shape[0] != pairs:
            raise ValueError(
                f"negative_rows has shape {tuple(self.negative_rows.shape)}, needed ({pairs}, hard_negatives): one "
                f"line for each pair"
            )
        if self.target_keys is None:
            raise ValueError("negative_rows come without target_keys: negatives and targets must be comparable")
        embeddings = 0 if self.embedding_positions is None else self.embedding_positions.shape[0]
        if self.negative_rows.numel() and int(self.negative_rows.max()) >= embeddings:
            raise ValueError(f"negative_rows names row {int(self.negative_rows.max())} of {embeddings} embeddings")

    def _validate_bridges(self) -> None:
        if not self.bridge_positions and not self.mask_kind.needs_bridge:
            return
        if len(self.bridge_positions) != len(self.sample_lengths):
            raise ValueError(
                f"{len(self.bridge_positions)} bridge positions for {len(self.sample_lengths)} samples: each sample "
                f"needs exactly one entry (None for a sample without a bridge)"
            )
        start = 0
        for index, (length, bridge) in enumerate(zip(self.sample_lengths, self.bridge_positions)):
            if bridge is None and self.mask_kind.needs_bridge:
                raise ValueError(f"sample {index} has no bridge, and mask kind {self.mask_kind.value} needs one")
            if bridge is not None and not start <= bridge < start + length:
                raise ValueError(f"sample {index} spans rows [{start}, {start + length}), its bridge is at {bridge}")
            start += length

    def _validate_vision(self, spatial_merge_size: int) -> None:
        for grid in self.grid_thw:
            if grid[0] < 1 or any(side < 1 or side % spatial_merge_size for side in grid[1:]):
                raise ValueError(f"grid {grid} has a side that spatial_merge_size {spatial_merge_size} does not divide")
        patches = self.num_patches
        found = 0 if self.pixel_values is None else self.pixel_values.shape[0]
        if self.pixel_values is not None and found != patches:
            raise ValueError(f"pixel_values has {found} patches, the grids {self.grid_thw} need {patches}")
        units = patches // spatial_merge_size**2
        placeholders = 0 if self.feature_positions is None else self.feature_positions.shape[0]
        if placeholders != units:
            raise ValueError(
                f"{placeholders} image placeholder tokens for {units} image features: "
                f"truncation must never cut image tokens"
            )


@dataclass
class ModelOutput:
    """What the last pipeline stage returns for one micro-batch.

    A head runs where the batch holds positions for it, and nowhere else: no logits without labels.

    hidden_states:   ``(tokens, hidden)`` after the final norm, full sequence, in the model's dtype. For tests
                     and inspection, on request; training never gathers it.
    token_nll:       float32 ``(supervised_local,)``: cross-entropy in nats at the supervised positions that lie
                     on this context-parallel rank; full (not sharded) over tensor parallel.
    predicted_units: ``(masked_units_local, unit_dim)``: the image decoder's pixels, rows as in ``token_nll``.
    unit_targets, unit_patches: the rows of ``PackedBatch``'s fields that belong to ``predicted_units``.
    embeddings:      ``(embeddings, hidden)``, *not* normalised, gathered over context parallel (every rank holds
                     all; the backward pass gives each rank the gradient of its own rows only).
    logit_scale:     float32 scalar, log(1 / temperature), the same on every rank; None if the model does not learn it.
    """

    hidden_states: Tensor | None = None
    token_nll: Tensor | None = None
    predicted_units: Tensor | None = None
    unit_targets: Tensor | None = None
    unit_patches: Tensor | None = None
    embeddings: Tensor | None = None
    logit_scale: Tensor | None = None
