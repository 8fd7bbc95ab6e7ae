"""The three stages: length, batch, learning rate, and what each reconstructs or compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from megatron_cocoa.config.checks import nearest_divisors, nearest_multiples, require, require_ratio
from megatron_cocoa.config.names import TEMPERATURE_RANGE


@dataclass(frozen=True)
class EmbeddingForm:
    """How inputs are laid out and attended to. Embeddings are meaningful only in the form that a model was trained in.

    Args:
        attention: of the language model.
        image_placeholder: which tokens stand for a picture, see ``ContrastiveSettings``.
    """

    attention: Literal["bidirectional", "causal"] = "bidirectional"
    image_placeholder: Literal["full", "bare"] = "full"


@dataclass(frozen=True)
class StageSettings:
    """What the three stages share.

    Args:
        steps: optimizer steps.
        global_batch_size: samples (stage ``contrastive``: pairs) per step over all ranks.
        micro_batch_size: samples (pairs) per pack, at most a rank's share of the global batch.
        lr: peak learning rate; linear warm-up over ``lr_warmup_steps``, then ``lr_decay_style`` down to
            ``min_lr``, at which the last step is taken; ``constant`` stays at ``lr``.
        image_size: pictures are resized to this many pixels square (336, 448, 672); None keeps their shape.
        min_image_tokens, max_image_tokens: limits on the merged units of a picture that keeps its shape; None for those
            of ``preprocessor_config.json``.
    """

    stage: ClassVar[str] = "stage"

    steps: int = 1000
    global_batch_size: int = 128
    micro_batch_size: int = 16
    lr: float = 2e-5
    min_lr: float = 0.0
    lr_warmup_steps: int = 100
    lr_decay_style: Literal["linear", "cosine", "constant"] = "linear"
    image_size: int | None = None
    min_image_tokens: int | None = None
    max_image_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size", "micro_batch_size"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, needs 1 or more")
        require(self.image_size is None or self.image_size >= 1, f"image_size is {self.image_size}, needs 1 or more")
        require(self.lr > 0 and 0 <= self.min_lr <= self.lr, f"need 0 <= min_lr <= lr, found {self.min_lr}, {self.lr}")
        require(
            self.lr_decay_style != "constant" or self.min_lr == 0,
            f"min_lr is {self.min_lr}, and lr_decay_style constant never falls to it: set it to 0, or another style",
        )
        low, high = self.min_image_tokens, self.max_image_tokens
        require(
            self.image_size is None or low is high is None,
            f"image_size {self.image_size} fixes the size of every picture: min_image_tokens {low} and "
            f"max_image_tokens {high} would have no effect; set image_size to null, or them",
        )
        require(
            all(limit is None or limit >= 1 for limit in (low, high)) and (low is None or high is None or low <= high),
            f"need 1 <= min_image_tokens <= max_image_tokens, found {low} and {high}",
        )
        require(
            0 <= self.lr_warmup_steps <= self.steps,
            f"lr_warmup_steps is {self.lr_warmup_steps}, must lie in [0, steps = {self.steps}]",
        )

    @property
    def embedding_form(self) -> EmbeddingForm:
        """How embeddings of the stage's model are computed; reconstruction trains with bidirectional attention."""
        return EmbeddingForm()

    def samples_per_rank(self, data_parallel_size: int) -> int:
        """A rank's share of the global batch.

        Raises:
            ValueError: if the global batch does not divide over the ranks.
        """
        require(
            self.global_batch_size % data_parallel_size == 0,
            f"{self.stage}.global_batch_size {self.global_batch_size} is not divisible by data parallel size "
            f"{data_parallel_size}: {nearest_multiples(self.global_batch_size, data_parallel_size)} would be",
        )
        return self.global_batch_size // data_parallel_size

    def samples_per_microbatch(self, data_parallel_size: int) -> int:
        """``micro_batch_size``, or a rank's whole share of the global batch if that is less.

        Not used under ``data.tokens_per_microbatch``: packs then hold what fits.

        Raises:
            ValueError: if the global batch does not divide over the ranks, or a share over packs.
        """
        share = self.samples_per_rank(data_parallel_size)
        size = min(self.micro_batch_size, share)
        require(
            share % size == 0,
            f"{self.stage}.global_batch_size {self.global_batch_size} over data parallel size {data_parallel_size} "
            f"gives {share} samples a rank, which are not divisible by {self.stage}.micro_batch_size {size}: they are "
            f"by {nearest_divisors(share, size)}",
        )
        return size

    def num_microbatches(self, data_parallel_size: int) -> int:
        """Packs per rank and step; raises as ``samples_per_microbatch``."""
        return self.global_batch_size // (data_parallel_size * self.samples_per_microbatch(data_parallel_size))


@dataclass(frozen=True)
class WarmupSettings(StageSettings):
    """Stage 1: bidirectional warm-up by joint reconstruction, MNTP + ``mae_weight`` x MAE.

    Args:
        text_mask_ratio: share of eligible text tokens replaced by the mask token (published: 0.2).
        eligible_tokens: which tokens may be masked: ``non_special`` (MoCa), ``words`` (non-special ones that hold a
            letter or digit, so that no mask is spent on punctuation and blanks), or ``all_but_image`` (also the marks
            around a picture; text itself never holds a special token).
        masked_unit: ``merged`` hides whole merged units (MoCa). ``patch`` draws for each patch of a unit separately;
            the loss is then the mean over hidden patches.
        unit_mask_ratio: share of units (or patches) replaced by noise (figure 0.5, code 0.3; here 0.5).
        mae_weight: weight of the pixel loss (CoCoA 0.5, MoCa 0.1; here 0.5).
        mae_noise: what replaces a masked unit, in normalised pixel space: independent standard-normal values
            (``normal``), one patch of such values in every masked patch of a global batch (``shared``; MoCa: of a
            rank's batch), ``zero``, or the unit's ``mean``.
        mae_target: ``pixels`` as the processor normalises them (MoCa), or ``normalized``: zero mean and unit
            variance per patch (MAE, arXiv 2111.06377).
        mask_at_least_one: mask one eligible token where the draw masked none.
        decoder_layers: layers of the image decoder, each as wide as the language model's (MoCa: 1).
        decoder_init: their initial weights: ``middle_layer`` copies consecutive layers of the language model from its
            middle on (MoCa), ``random`` draws them. The linear map to pixels is always drawn.
    """

    stage: ClassVar[str] = "warmup"

    steps: int = 3000
    global_batch_size: int = 128
    image_size: int | None = 336
    text_mask_ratio: float = 0.2
    eligible_tokens: Literal["non_special", "words", "all_but_image"] = "non_special"
    masked_unit: Literal["merged", "patch"] = "merged"
    unit_mask_ratio: float = 0.5
    mae_weight: float = 0.5
    mae_noise: Literal["normal", "shared", "zero", "mean"] = "normal"
    mae_target: Literal["pixels", "normalized"] = "pixels"
    mask_at_least_one: bool = True
    decoder_layers: int = 1
    decoder_init: Literal["middle_layer", "random"] = "middle_layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.decoder_layers >= 1, f"warmup.decoder_layers is {self.decoder_layers}, needs 1 or more")
        require_ratio("warmup.text_mask_ratio", self.text_mask_ratio)
        require_ratio("warmup.unit_mask_ratio", self.unit_mask_ratio)
        require(self.mae_weight >= 0, f"warmup.mae_weight is {self.mae_weight}, must not be negative")


@dataclass(frozen=True)
class BridgeSettings(StageSettings):
    """Stage 2: EOS-bridged reconstruction of block B through the bridge alone.

    Args:
        target_mask_ratio: share of block B's eligible tokens that are masked (published: 0.7).
        eligible_tokens: which tokens of block B may be masked: ``non_special`` or ``words``, as in stage ``warmup``.
        bridge_sees_target: whether the bridge's row attends to block B (published code and figure: yes). False
            is the strict variant, whose training-time embedding equals the one at inference.
        query_unit_mask_ratio: share of block A's image units replaced by noise (published: none).
        mask_at_least_one: mask one eligible token where the draw masked none.
    """

    stage: ClassVar[str] = "bridge"

    steps: int = 2000
    global_batch_size: int = 64
    micro_batch_size: int = 8
    image_size: int | None = 448
    target_mask_ratio: float = 0.7
    eligible_tokens: Literal["non_special", "words"] = "non_special"
    bridge_sees_target: bool = True
    query_unit_mask_ratio: float = 0.0
    mask_at_least_one: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_ratio("bridge.target_mask_ratio", self.target_mask_ratio)
        require(
            0.0 <= self.query_unit_mask_ratio < 1.0,
            f"bridge.query_unit_mask_ratio is {self.query_unit_mask_ratio}, must lie in [0, 1)",
        )


@dataclass(frozen=True)
class ContrastiveSettings(StageSettings):
    """Stage 3: InfoNCE over the bridge's normalised hidden state, in-batch negatives across all ranks.

    Args:
        attention: of the language model: ``bidirectional`` (the authors' script) or ``causal`` (the class that their
            code builds). Checkpoints and exports record it, and everything that embeds with them follows it.
        image_placeholder: the tokens of a picture: ``full`` is ``<|vision_start|><|image_pad|><|vision_end|>``,
            ``bare`` the pads alone (the authors' stage 3), whose positions then count like text's, so that the model
            sees no rows and columns. Recorded and followed like ``attention``.
        temperature: divides the cosine similarities (published: 0.02).
        learnable_temperature: train log(1 / temperature), starting at ``temperature``, as in CLIP (arXiv 2103.00020),
            at the stage's learning rate, within [0.01, 1]; published: fixed. If the stage starts from a checkpoint
            that holds a learned temperature, it continues with that one.
        symmetric: average with the target-to-query direction (published: query to target only).
        mask_equal_targets: leave a target or hard negative out of a row's negatives where it equals the row's own
            target (published: no).
        num_hard_negatives: explicit negatives per query, drawn anew each epoch from a row's ``neg_text`` and
            ``neg_image_path`` where it has more; rows with fewer use what they have (published: 0).
        hard_negatives_shared: every query sees all hard negatives of the step; False: only its own.
        per_source_batches: all pairs of a step come from one source (column ``source``, else the source's name in
            ``data.sources``, which then have no weights). Rows of a source that do not fill a step are left out of
            the epoch, different ones in each (published: sources are mixed).
        matryoshka_dims: average the losses on the first d dimensions, renormalised, for each d listed (arXiv
            2205.13147); list the whole width, too, to include it. Empty: the whole width alone (published).
        matryoshka_weights: of ``matryoshka_dims``, in the same order; empty weighs them equally.
    """

    stage: ClassVar[str] = "contrastive"

    steps: int = 2000
    global_batch_size: int = 1024
    micro_batch_size: int = 32
    lr_warmup_steps: int = 200
    image_size: int | None = None
    attention: Literal["bidirectional", "causal"] = "bidirectional"
    image_placeholder: Literal["full", "bare"] = "full"
    temperature: float = 0.02
    learnable_temperature: bool = False
    symmetric: bool = False
    mask_equal_targets: bool = False
    num_hard_negatives: int = 0
    hard_negatives_shared: bool = True
    per_source_batches: bool = False
    matryoshka_dims: tuple[int, ...] = ()
    matryoshka_weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.temperature > 0, f"contrastive.temperature is {self.temperature}, must be positive")
        low, high = TEMPERATURE_RANGE
        require(
            not self.learnable_temperature or low <= self.temperature <= high,
            f"contrastive.temperature is {self.temperature}: a learnable one must start within [{low}, {high}]",
        )
        require(
            self.num_hard_negatives >= 0,
            f"contrastive.num_hard_negatives is {self.num_hard_negatives}, must not be negative",
        )
        require(
            self.hard_negatives_shared or self.num_hard_negatives > 0,
            "contrastive.hard_negatives_shared false has no effect without hard negatives: set num_hard_negatives",
        )
        self._check_matryoshka()

    @property
    def embedding_form(self) -> EmbeddingForm:
        """How embeddings are computed in this stage, and from its model on."""
        return EmbeddingForm(self.attention, self.image_placeholder)

    def _check_matryoshka(self) -> None:
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        require(
            all(dim >= 1 for dim in dims) and len(set(dims)) == len(dims),
            f"contrastive.matryoshka_dims are {list(dims)}: each must be 1 or more and occur once",
        )
        require(
            not weights or len(weights) == len(dims),
            f"contrastive.matryoshka_weights has {len(weights)} entries for {len(dims)} matryoshka_dims",
        )
        require(
            all(weight > 0 for weight in weights),
            f"contrastive.matryoshka_weights are {list(weights)}: each must be positive",
        )
