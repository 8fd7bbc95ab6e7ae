"""A global batch whose masks and pictures fall unevenly, for every objective, on a tiny model.

Eight rows in their global order. The first four have pictures and no masked token, the last four masked tokens and no
picture: at data parallel 2 one rank has no masked token at all and the other none of the images, and the same goes for
halves of the sequence under context parallelism, and for micro-batches.
"""

from __future__ import annotations

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_cocoa.batch import MaskKind, PackedBatch
from megatron_cocoa.config import ParallelSettings, TrainSettings
from megatron_cocoa.data.collate import PackOptions, collate_bridge, collate_contrastive, collate_warmup
from megatron_cocoa.data.prepared import NO_ROWS, CorruptionSettings, PreparedSample
from megatron_cocoa.data.samples import SampleBuilder
from megatron_cocoa.data.sources import IMAGE_TOKEN, CaptionRow, Content, PairRow
from megatron_cocoa.recipes.context import RunContext, evaluation_parts, prepare_context
from tests.distributed.tiny_run import tiny_settings, write_folders

ROWS = 8
HARD_NEGATIVES = 2
TEXTS = [f"{'red green blue cat dog '[: 4 * (i + 2)]}{i}" for i in range(ROWS)]
PICTURE_ROWS = range(ROWS // 2)
CORRUPTION = CorruptionSettings(seed=3, text_mask_ratio=0.5, unit_mask_ratio=0.5)

HARD = dict(num_hard_negatives=HARD_NEGATIVES)
OBJECTIVES: dict[str, tuple[str, dict]] = {
    "warmup": ("warmup", {}),
    "warmup-by-patch": ("warmup", dict(masked_unit="patch", decoder_layers=2, decoder_init="random")),
    "bridge-faithful": ("bridge", {}),
    "bridge-strict": ("bridge", dict(bridge_sees_target=False)),
    "contrastive": ("contrastive", {}),
    "contrastive-causal-bare": ("contrastive", dict(attention="causal", image_placeholder="bare")),
    "contrastive-symmetric": ("contrastive", dict(symmetric=True, mask_equal_targets=True)),
    "contrastive-hard-negatives": ("contrastive", HARD),
    "contrastive-own-hard-negatives": ("contrastive", HARD | dict(hard_negatives_shared=False)),
    "contrastive-matryoshka": ("contrastive", dict(matryoshka_dims=(64, 16), matryoshka_weights=(1.0, 2.0))),
    "contrastive-learned-temperature": (
        "contrastive",
        HARD | dict(learnable_temperature=True, symmetric=True, mask_equal_targets=True, matryoshka_dims=(64, 16)),
    ),
}
"""Stage and its settings by name."""


@functools.cache
def _folder() -> Path:
    """One for the life of the process; every rank has its own, with the same contents."""
    holder = tempfile.TemporaryDirectory()
    _HOLDERS.append(holder)
    write_folders(Path(holder.name))
    return Path(holder.name)


_HOLDERS: list = []


def uneven_context(objective: str, parallel: ParallelSettings, **more) -> RunContext:
    """Settings of ``objective`` at a layout; ``more`` are further fields of ``TrainSettings``."""
    stage, changed = OBJECTIVES[objective]
    settings = tiny_settings(_folder(), parallel=parallel, **more)
    return prepare_context(replace(settings, **{stage: replace(settings.stage(stage), **changed)}))


def uneven_batches(context: RunContext, stage: str, *, packs: int) -> list[PackedBatch]:
    """The global batch in ``packs`` micro-batches; deferred floats where there are several."""
    builder, options = evaluation_parts(context, context.settings.stage(stage))
    options = replace(options, defer_floats=packs > 1)
    make, collate = _STAGES[stage]
    if context.settings.warmup.masked_unit == "patch":
        make = functools.partial(make, corruption=replace(CORRUPTION, by_patch=True))
    size = ROWS // packs
    groups = [range(start, start + size) for start in range(0, ROWS, size)]
    return [collate([s for row in group for s in make(builder, row)], options, context.settings) for group in groups]


def _warmup(
    builder: SampleBuilder, row: int, *, corruption: CorruptionSettings = CORRUPTION
) -> list[PreparedSample]:
    if row in PICTURE_ROWS:
        sample = builder.warmup(CaptionRow(str(row), f"images/{row}.png", TEXTS[row]), corruption, epoch=0)
        return [replace(sample, text_rows=NO_ROWS, text_labels=NO_ROWS)]
    sample = builder.embedding(str(row), Content(TEXTS[row]))
    rows = np.arange(0, sample.input_ids.size - 1, 2)
    return [replace(sample, text_rows=rows, text_labels=sample.input_ids[rows + 1])]


def _bridge(builder: SampleBuilder, row: int) -> list[PreparedSample]:
    content = Content(IMAGE_TOKEN, f"images/{row}.png") if row in PICTURE_ROWS else Content(f"find {row}")
    text_only = replace(CORRUPTION, unit_mask_ratio=0.0)
    sample = builder.join_blocks(builder.bridge_blocks(str(row), content, TEXTS[row], text_only, epoch=0))
    return [replace(sample, text_rows=NO_ROWS, text_labels=NO_ROWS) if row in PICTURE_ROWS else sample]


def _contrastive(builder: SampleBuilder, row: int, *, negatives: bool) -> list[PreparedSample]:
    query = Content(IMAGE_TOKEN, f"images/{row}.png") if row in PICTURE_ROWS else Content(f"find {TEXTS[row]}")
    # Rows 1 and 6 have one target; row 4 has its own target among its negatives; some rows have fewer or none.
    target = Content(TEXTS[1 if row == 6 else row])
    number = (2, 1, 0, 0, 2, 0, 1, 2)[row]
    hard = [Content(f"{TEXTS[(row + 3 + k) % ROWS]} not") for k in range(number)]
    if row == 4:
        hard[0] = target
    return builder.pair(PairRow(str(row), query, target), hard if negatives else ())


def _collate_contrastive(samples: list[PreparedSample], options: PackOptions, settings: TrainSettings) -> PackedBatch:
    number = settings.contrastive.num_hard_negatives
    kept = [sample for sample in samples if number or sample.role != "negative"]
    return collate_contrastive(kept, options, num_hard_negatives=number)


def _collate_bridge(samples: list[PreparedSample], options: PackOptions, settings: TrainSettings) -> PackedBatch:
    kind = MaskKind.EOS_BRIDGED if settings.bridge.bridge_sees_target else MaskKind.EOS_BRIDGED_STRICT
    return collate_bridge(samples, options, mask_kind=kind)


_STAGES = {
    "warmup": (_warmup, lambda samples, options, settings: collate_warmup(samples, options)),
    "bridge": (_bridge, _collate_bridge),
    "contrastive": (functools.partial(_contrastive, negatives=True), _collate_contrastive),
}
