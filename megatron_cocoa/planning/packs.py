"""How large a micro-batch of a stage is: the sizes that its memory follows from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.batch import PackedBatch
from megatron_cocoa.config import TrainSettings

TEXT_TOKENS = 128
"""Text tokens of a sample where nothing else is known; captions and MMEB's texts are mostly shorter."""


@dataclass(frozen=True)
class PackShape:
    """Sizes of one micro-batch.

    tokens:       rows, the tail included.
    patches:      of all pictures.
    supervised:   rows of the token head.
    masked_units: rows of the image decoder's last linear.
    runs_decoder: whether the image decoder runs.
    embeddings:   rows that are embeddings; two a pair, and its hard negatives.
    """

    tokens: int
    patches: int
    supervised: int = 0
    masked_units: int = 0
    runs_decoder: bool = False
    embeddings: int = 0

    @classmethod
    def of(cls, batch: PackedBatch, architecture: QwenVLArchitecture) -> PackShape:
        """Of a batch at hand."""
        units = batch.unit_positions
        return cls(
            tokens=batch.num_tokens,
            patches=batch.num_patches,
            supervised=0 if batch.text_positions is None else batch.text_positions.shape[0],
            masked_units=0 if units is None else units.shape[0],
            runs_decoder=units is not None,
            embeddings=0 if batch.embedding_positions is None else batch.embedding_positions.shape[0],
        )


def expected_pack(
    architecture: QwenVLArchitecture, settings: TrainSettings, stage: str, *, data_parallel_size: int
) -> PackShape:
    """The largest pack that a stage is expected to meet, under variable-length kernels.

    Every sample holds ``TEXT_TOKENS`` and one picture of the stage's size; where that is None, as much picture as
    ``data.max_length`` leaves room for. In stage ``contrastive`` both sides of each pair and its hard negatives do:
    tasks that retrieve pictures with pictures have them, and a run must not end at the first batch of such a task.
    Under ``data.tokens_per_microbatch`` there are as many samples as fit, and the pack fills that budget where a rank's
    share of a step does.

    Raises:
        ValueError: if a sample would be longer than ``data.max_length``, or batch sizes do not divide.
    """
    values = settings.stage(stage)
    rows = _samples_per_row(settings, stage)
    units, length = _expected_sample(architecture, settings, stage)
    budget = settings.data.tokens_per_microbatch
    if budget is None:
        samples = values.samples_per_microbatch(data_parallel_size) * rows
        tokens = samples * length
    else:
        share = values.samples_per_rank(data_parallel_size) * rows
        samples = min(max(1, budget // length), share)
        # Of shorter samples more would fit, up to the budget.
        tokens = min(budget, share * length)
    supervised, masked_units = 0, 0
    if stage == "warmup":
        supervised = round(samples * TEXT_TOKENS * settings.warmup.text_mask_ratio)
        ratio = settings.warmup.unit_mask_ratio
        if settings.warmup.masked_unit == "patch":
            # A unit is predicted where any of its patches is hidden.
            ratio = 1 - (1 - ratio) ** architecture.vision.patches_per_unit
        masked_units = round(samples * units * ratio)
    elif stage == "bridge":
        supervised = round(samples * TEXT_TOKENS * settings.bridge.target_mask_ratio)
    return PackShape(
        tokens=tokens,
        patches=samples * units * architecture.vision.patches_per_unit,
        supervised=supervised,
        masked_units=masked_units,
        runs_decoder=stage == "warmup",
        embeddings=samples if stage == "contrastive" else 0,
    )


def expected_microbatches(
    architecture: QwenVLArchitecture, settings: TrainSettings, stage: str, *, data_parallel_size: int
) -> int:
    """Packs that a rank is expected to run in a step.

    Under ``data.tokens_per_microbatch`` as many as samples of the size that ``expected_pack`` takes fill, rounded up to
    a multiple of an interleaved pipeline's stages; shorter samples make them fewer.

    Raises:
        ValueError: as ``expected_pack``.
    """
    values, budget = settings.stage(stage), settings.data.tokens_per_microbatch
    if budget is None:
        return values.num_microbatches(data_parallel_size)
    _, length = _expected_sample(architecture, settings, stage)
    per_pack = max(1, budget // (length * _samples_per_row(settings, stage)))
    number = -(-values.samples_per_rank(data_parallel_size) // per_pack)
    parallel = settings.parallel
    multiple = parallel.pipeline_model_parallel_size if parallel.virtual_pipeline_model_parallel_size else 1
    return -(-number // multiple) * multiple


def _samples_per_row(settings: TrainSettings, stage: str) -> int:
    """Of a pair both sides and its hard negatives."""
    return 2 + settings.contrastive.num_hard_negatives if stage == "contrastive" else 1


def _expected_sample(architecture: QwenVLArchitecture, settings: TrainSettings, stage: str) -> tuple[int, int]:
    """Merged units of a sample's picture, and its tokens."""
    values = settings.stage(stage)
    side = architecture.vision.size_factor
    limit = settings.data.max_length
    units = max(limit - TEXT_TOKENS, 0) if values.image_size is None else max(1, round(values.image_size / side)) ** 2
    # A picture stands between a start and an end token, unless it stands bare.
    marks = 2 if values.embedding_form.image_placeholder == "full" else 0
    length = units + marks + TEXT_TOKENS if values.image_size is not None else limit
    if length > limit:
        raise ValueError(
            f"a sample of stage {stage} has {units} image and {TEXT_TOKENS} text tokens, above data.max_length {limit}"
        )
    return units, length


def largest(packs: Sequence[PackShape]) -> PackShape:
    """The pack with the most rows of tower and language model together."""
    return max(packs, key=lambda pack: pack.tokens + pack.patches)
