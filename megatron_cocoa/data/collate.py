"""Prepared samples to one packed micro-batch, a pure function for each stage.

Pictures of all samples are cut into patches in one go, and noise is written over masked units in normalised pixel
space, before the tower sees them. The whole pack is checked before it leaves.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_cocoa.architecture import VisionGeometry
from megatron_cocoa.batch import MaskKind, PackedBatch
from megatron_cocoa.data.deferred import DeferredFloats, joined
from megatron_cocoa.data.prepared import NO_ROWS, PreparedSample
from megatron_cocoa.data.preprocess import PictureLoader


@dataclass(frozen=True)
class PackOptions:
    """What a pack must look like, beside its samples.

    Args:
        pictures: normalises and cuts pictures.
        vision: sizes of the tower.
        pad_token_id: fills the tail.
        pad_to_multiple_of: fill every pack to a multiple of this (sequence and context parallel, FP8).
        needs_pixels: False on ranks that hold no tower: ``pixel_values`` stays None.
        needs_unit_targets: False on ranks that hold no image decoder: ``unit_targets`` is ``(masked_units, 0)``, so
            that every rank still counts the same units.
        normalize_unit_targets: zero mean and unit variance per patch.
        embedding_mask: attention under which things are embedded.
        defer_floats: leave ``pixel_values`` and ``unit_targets`` to ``PackedBatch.materialized``, so that a step of
            many packs holds 8-bit pictures and not floats, which take eight times the memory.
    """

    pictures: PictureLoader
    vision: VisionGeometry
    pad_token_id: int
    pad_to_multiple_of: int = 1
    needs_pixels: bool = True
    needs_unit_targets: bool = True
    normalize_unit_targets: bool = False
    embedding_mask: MaskKind = MaskKind.BIDIRECTIONAL
    defer_floats: bool = False


def collate_warmup(samples: list[PreparedSample], options: PackOptions) -> PackedBatch:
    """Masked picture-caption samples: text labels, and pixels of the masked units as targets."""
    return _pack(samples, options, mask_kind=MaskKind.BIDIRECTIONAL, supervise_text=True, supervise_units=True)


def collate_bridge(
    samples: list[PreparedSample], options: PackOptions, *, mask_kind: MaskKind = MaskKind.EOS_BRIDGED
) -> PackedBatch:
    """``[A][bridge][B]`` samples: labels in block B only. ``mask_kind`` is one of the two EOS-bridged ones."""
    assert mask_kind.needs_bridge, mask_kind
    return _pack(samples, options, mask_kind=mask_kind, supervise_text=True)


def collate_contrastive(
    samples: list[PreparedSample], options: PackOptions, *, num_hard_negatives: int = 0
) -> PackedBatch:
    """Pairs, each a query, its target and at most ``num_hard_negatives`` negatives, one embedding each.

    Samples are told apart by their ``role``; a query opens a pair, whatever follows belongs to it.
    """
    roles = [sample.role for sample in samples]
    queries = [index for index, role in enumerate(roles) if role == "query"]
    targets = [index for index, role in enumerate(roles) if role == "target"]
    assert len(queries) == len(targets) and set(roles) <= {"query", "target", "negative"}, roles
    # Nothing is compared with a query, and to hash its pictures would take a twentieth of the time to make them.
    keys = [0 if sample.role == "query" else _content_key(sample) for sample in samples]
    pairs: dict[str, Tensor] = {}
    if num_hard_negatives:
        rows = _negative_rows(roles, num_hard_negatives)
        pairs["negative_rows"] = torch.tensor(rows)
        pairs["negative_keys"] = torch.tensor([[keys[i] if i >= 0 else 0 for i in line] for line in rows])
    return _pack(
        samples,
        options,
        mask_kind=options.embedding_mask,
        embeddings=True,
        query_rows=torch.tensor(queries),
        target_rows=torch.tensor(targets),
        target_keys=torch.tensor([keys[i] for i in targets]),
        **pairs,
    )


def _negative_rows(roles: list[str], places: int) -> list[list[int]]:
    """For each query its negatives' indices, filled with -1."""
    rows: list[list[int]] = []
    for index, role in enumerate(roles):
        if role == "query":
            rows.append([])
        elif role == "negative":
            rows[-1].append(index)
    assert all(len(line) <= places for line in rows), (rows, places)
    return [line + [-1] * (places - len(line)) for line in rows]


def _content_key(sample: PreparedSample) -> int:
    """The same for samples of the same tokens and pixels, on every rank; int64."""
    # Processors have instructions for SHA-256: twice as fast as BLAKE2 over a picture.
    digest = hashlib.sha256(sample.input_ids.tobytes())
    for picture in sample.pictures:
        digest.update(picture)
    return int.from_bytes(digest.digest()[:8], "little", signed=True)


def collate_embedding(samples: list[PreparedSample], options: PackOptions) -> PackedBatch:
    """Samples to be embedded, one embedding each, in order."""
    return _pack(samples, options, mask_kind=options.embedding_mask, embeddings=True)


def _pack(
    samples: list[PreparedSample],
    options: PackOptions,
    *,
    mask_kind: MaskKind = MaskKind.BIDIRECTIONAL,
    supervise_text: bool = False,
    supervise_units: bool = False,
    embeddings: bool = False,
    **pairs: Tensor,
) -> PackedBatch:
    lengths = tuple(sample.input_ids.size for sample in samples)
    starts = np.cumsum((0, *lengths[:-1])).tolist()
    bridges = tuple(None if s.bridge is None else start + s.bridge for s, start in zip(samples, starts))
    fields: dict = dict(pairs)
    if supervise_text:
        fields["text_positions"] = _rows([s.text_rows for s in samples], starts)
        fields["text_labels"] = torch.from_numpy(np.concatenate([s.text_labels for s in samples]))
    if embeddings:
        fields["embedding_positions"] = torch.tensor(bridges, dtype=torch.int64)
    batch = PackedBatch(
        input_ids=torch.from_numpy(np.concatenate([s.input_ids for s in samples])),
        position_ids=torch.from_numpy(np.concatenate([s.position_ids for s in samples], axis=1)),
        sample_lengths=lengths,
        mask_kind=mask_kind,
        bridge_positions=bridges,
        grid_thw=tuple(grid for s in samples for grid in s.grid_thw),
        sample_ids=tuple(s.sample_id for s in samples),
        **fields,
        **_vision_fields(samples, starts, options, supervise_units=supervise_units),
    )
    tail = -batch.num_tokens % options.pad_to_multiple_of
    batch = batch.filled_to(batch.num_tokens + tail, pad_token_id=options.pad_token_id)
    batch.validate(spatial_merge_size=options.vision.spatial_merge_size)
    return batch


def _vision_fields(
    samples: list[PreparedSample], starts: list[int], options: PackOptions, *, supervise_units: bool
) -> dict:
    feature_rows = _rows([s.feature_rows for s in samples], starts)
    unit_starts = np.cumsum([0] + [s.feature_rows.size for s in samples[:-1]]).tolist()
    masked = _rows([s.masked_units for s in samples], unit_starts)
    fields: dict = {"feature_positions": feature_rows} if any(s.pictures for s in samples) else {}
    if supervise_units:
        fields["unit_positions"] = feature_rows[masked]
    patches = _masked_patches(samples, unit_starts, options.vision.patches_per_unit)
    if supervise_units and patches is not None:
        is_masked = np.zeros((feature_rows.numel(), options.vision.patches_per_unit), dtype=bool)
        is_masked.reshape(-1)[patches] = True
        fields["unit_patches"] = torch.from_numpy(is_masked[masked.numpy()])
    make = _floats(samples, masked.numpy(), patches, options, supervise_units=supervise_units)
    return fields | ({"deferred": make} if options.defer_floats else make())


def _masked_patches(samples: list[PreparedSample], unit_starts: list[int], per_unit: int) -> np.ndarray | None:
    """Patches of the pack that are hidden; None where units are hidden whole."""
    by_patch = {s.masked_patches is not None for s in samples if s.pictures}
    assert len(by_patch) <= 1, "a pack hides units or patches, not both"
    if True not in by_patch:
        return None
    patches = [NO_ROWS if s.masked_patches is None else s.masked_patches for s in samples]
    return _rows(patches, [start * per_unit for start in unit_starts]).numpy()


def _floats(
    samples: list[PreparedSample],
    masked: np.ndarray,
    masked_patches: np.ndarray | None,
    options: PackOptions,
    *,
    supervise_units: bool,
) -> DeferredFloats:
    is_read = options.needs_pixels or (supervise_units and options.needs_unit_targets)
    return DeferredFloats(
        cutter=options.pictures.cutter,
        grid_thw=tuple(grid for s in samples for grid in s.grid_thw),
        pictures=joined([picture for s in samples for picture in s.pictures]) if is_read else None,
        masked=masked,
        masked_patches=masked_patches,
        noise=tuple(s.unit_noise for s in samples if s.masked_units.size),
        is_supervised=supervise_units,
        needs_pixels=options.needs_pixels,
        needs_unit_targets=options.needs_unit_targets,
        normalize_unit_targets=options.normalize_unit_targets,
    )


def _rows(local: list[np.ndarray], starts: list[int]) -> Tensor:
    """Rows of the pack from rows of each sample."""
    sizes = [rows.size for rows in local]
    return torch.from_numpy(np.concatenate(local) + np.repeat(np.asarray(starts, dtype=np.int64), sizes))
