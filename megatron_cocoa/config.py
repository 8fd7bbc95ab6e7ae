"""Every setting of a run, as a tree of frozen dataclasses.

Read by jsonargparse in this order, later wins: the defaults below (the published CoCoA recipe where it is
published, see each field), a preset or YAML file, the command line. Unknown keys are errors. Relations between
fields are checked at construction, before any process group exists, so that a wrong number costs seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

STAGES = ("warmup", "bridge", "contrastive")
"""CoCoA's stages in their order; the paper's figure calls them 1, 2, 3, the authors' code 1, 1.5, 2."""

TEMPERATURE_RANGE = (0.01, 1.0)
"""Bounds of a learned temperature: cosines are scaled by 1 to 100, as in CLIP (arXiv 2103.00020) and OpenCLIP."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _require_ratio(name: str, value: float) -> None:
    _require(0.0 < value <= 1.0, f"{name} is {value}: a ratio must lie in (0, 1]")


@dataclass(frozen=True)
class ModelSettings:
    """Which model, in which precision, on which kernels.

    Args:
        path: folder with a Hugging Face ``config.json``, tokenizer and ``preprocessor_config.json``. Its
            safetensors are loaded if it has any, else the weights are drawn from ``seed``.
        load: Megatron checkpoint to start from instead of the weights in ``path``.
        dtype: parameters and activations; gradients and master weights stay FP32 under ``bf16``.
        transformer_impl: ``local`` is torch and Megatron-Core alone, ``transformer_engine`` needs the package
            and a GPU, ``auto`` takes Transformer Engine where both are present.
        attention_backend: ``auto`` takes the fastest that is present and can serve.
        vision_attention_backend: of the tower; None is the same as ``attention_backend``.
        fp8: recipe for the language model's linear layers under Transformer Engine. ``delayed`` and ``tensorwise``
            (current scaling) serve from Ada and Hopper on, ``blockwise`` from Hopper, ``mxfp8`` from Blackwell.
        fp8_vision: the tower's layers as well; its packs are padded inside of the tower, its ffn by
            ``vision_ffn_multiple``. Otherwise the tower stays in ``dtype``.
        fp8_param: keep the weights of those layers in FP8 and gather them so; the master weights stay FP32 in the
            distributed optimizer.
        vision_ffn_multiple: zero-pad the tower's ffn width to a multiple of this (exact; the published 3420
            needs 128 for FP8 or for tensor parallel degrees that do not divide it). 1 pads nothing.
        make_vocab_size_divisible_by: vocabulary rows are padded to a multiple of this times the tensor
            parallel degree, as in Megatron-LM.
        mask_token: token that replaces masked text; its id is the first unused row of the tokenizer.
        bridge_token: token that carries the embedding.
    """

    path: str | None = None
    load: str | None = None
    dtype: Literal["fp32", "bf16"] = "bf16"
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    attention_backend: Literal["auto", "sdpa", "flash", "transformer_engine", "flex"] = "auto"
    vision_attention_backend: Literal["auto", "sdpa", "flash", "transformer_engine", "flex"] | None = None
    fp8: Literal["delayed", "tensorwise", "mxfp8", "blockwise"] | None = None
    fp8_vision: bool = False
    fp8_param: bool = False
    vision_ffn_multiple: int = 1
    make_vocab_size_divisible_by: int = 128
    mask_token: str = "<|mask|>"
    bridge_token: str = "<|im_end|>"

    def __post_init__(self) -> None:
        _require(self.vision_ffn_multiple >= 1, f"vision_ffn_multiple is {self.vision_ffn_multiple}, needs 1 or more")
        _require(
            self.make_vocab_size_divisible_by >= 1,
            f"make_vocab_size_divisible_by is {self.make_vocab_size_divisible_by}, needs 1 or more",
        )
        _require(
            self.fp8 is None or self.transformer_impl != "local",
            "fp8 needs Transformer Engine: set model.transformer_impl to transformer_engine, or model.fp8 to null",
        )
        for name in ("fp8_vision", "fp8_param"):
            _require(
                self.fp8 is not None or not getattr(self, name),
                f"model.{name} needs a recipe: set model.fp8 (delayed or tensorwise on Hopper), or {name} to false",
            )
        _require(
            not self.fp8_param or self.dtype == "bf16",
            f"model.fp8_param needs model.dtype bf16, found {self.dtype}",
        )


@dataclass(frozen=True)
class FreezeSettings:
    """Parts that do not train. The image decoder and the mask token's row always do.

    Args:
        vision: the tower without its merger.
        merger: the tower's patch merger.
        language: decoder, embeddings and output layer.
    """

    vision: bool = False
    merger: bool = False
    language: bool = False


LANGUAGE_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear modules of a language layer that adapters can sit on, as Hugging Face names them."""

VISION_TARGETS = ("qkv", "proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2", "mlp.0", "mlp.2")
"""The same of the tower (``visual``): Qwen2.5-VL's MLP is gate, up and down, Qwen2-VL's fc1 and fc2; ``mlp.0`` and
``mlp.2`` are the merger's."""


@dataclass(frozen=True)
class AdapterSettings:
    """LoRA or DoRA adapters in place of full-parameter training.

    With adapters all pretrained weights are frozen, whatever ``freeze`` says; what trains is the adapters, the image
    decoder and the mask token's row. At the end of a stage they are merged into its checkpoint.

    Args:
        kind: ``none`` trains the weights themselves, ``lora`` adds ``alpha / rank * B A`` to each target (arXiv
            2106.09685), ``dora`` also trains the length of each row of the sum (arXiv 2402.09353; published).
        rank: rows of A and columns of B, ``r`` in peft (published: 8).
        alpha: numerator of the scale, ``lora_alpha`` in peft (published: 64).
        dropout: on the adapter's input, ``lora_dropout`` in peft (published: 0.1). Targets that are fused into one
            projection share the mask of their common input.
        init: of A, peft's ``init_lora_weights``: ``gaussian`` is normal with standard deviation 1 / rank (published),
            ``kaiming`` is uniform within 1 / sqrt(input width), which peft calls true. B starts at zero.
        rslora: scale by ``alpha / sqrt(rank)`` (arXiv 2312.03732), ``use_rslora`` in peft.
        language_targets: modules of the language model's layers, by Hugging Face's names.
        vision_targets: modules of the tower, by Hugging Face's names; those of the other family are passed over.
        export: write the adapters by themselves, in peft's format, to ``output_dir/<stage>/adapter``.
    """

    kind: Literal["none", "lora", "dora"] = "none"
    rank: int = 8
    alpha: float = 64.0
    dropout: float = 0.1
    init: Literal["gaussian", "kaiming"] = "gaussian"
    rslora: bool = False
    language_targets: tuple[str, ...] = LANGUAGE_TARGETS
    vision_targets: tuple[str, ...] = ("qkv", "proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")
    export: bool = True

    def __post_init__(self) -> None:
        _require(self.rank >= 1, f"adapter.rank is {self.rank}, needs 1 or more")
        _require(self.alpha > 0, f"adapter.alpha is {self.alpha}, must be positive")
        _require(0.0 <= self.dropout < 1.0, f"adapter.dropout is {self.dropout}, must lie in [0, 1)")
        for name, known in (("language_targets", LANGUAGE_TARGETS), ("vision_targets", VISION_TARGETS)):
            targets = getattr(self, name)
            unknown = [target for target in targets if target not in known]
            _require(not unknown, f"adapter.{name} has {unknown}: choose from {', '.join(known)}")
            _require(len(set(targets)) == len(targets), f"adapter.{name} names a target twice: {list(targets)}")
        if self.is_used:
            _require(
                bool(self.language_targets or self.vision_targets),
                f"adapter.kind is {self.kind}, and neither language_targets nor vision_targets names a module",
            )
        else:
            changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
            _require(
                not changed,
                f"adapter.{' and adapter.'.join(changed)} would have no effect: adapter.kind is none, set lora or dora",
            )

    @property
    def is_used(self) -> bool:
        """Whether there are adapters at all."""
        return self.kind != "none"

    @property
    def scaling(self) -> float:
        """Factor of ``B A``."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


@dataclass(frozen=True)
class RecomputeSettings:
    """Activation recompute, separately for tower and language model.

    Args:
        vision, language: ``selective`` recomputes core attention, ``full`` whole layers.
        language_num_layers, vision_num_layers: layers per recomputed block under ``full``.
    """

    vision: Literal["none", "selective", "full"] = "none"
    language: Literal["none", "selective", "full"] = "none"
    vision_num_layers: int = 1
    language_num_layers: int = 1


@dataclass(frozen=True)
class ParallelSettings:
    """Degrees and overlaps. What remains of the world size after TP x PP x CP is data parallel.

    Args:
        tensor_model_parallel_size: shards of each layer.
        pipeline_model_parallel_size: stages; the tower lives on the first.
        virtual_pipeline_model_parallel_size: chunks of layers per stage (interleaved schedule).
        context_parallel_size: shards of the sequence, exchanged over heads inside attention.
        sequence_parallel: shard norms and residuals of the language model over tensor parallel ranks.
        num_layers_in_first_pipeline_stage: fewer language layers where the tower is, to balance it.
        num_layers_in_last_pipeline_stage: fewer where the heads are.
        use_distributed_optimizer: shard optimizer state over data parallel ranks (ZeRO-1).
        overlap_grad_reduce, overlap_param_gather: hide data-parallel traffic behind compute.
        distributed_timeout_minutes: how long a collective may wait for a rank before all ranks end.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    distributed_timeout_minutes: float = 10.0

    def __post_init__(self) -> None:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
            _require(getattr(self, name) >= 1, f"parallel.{name} is {getattr(self, name)}, needs 1 or more")
        virtual = self.virtual_pipeline_model_parallel_size
        _require(
            virtual is None or (virtual >= 2 and self.pipeline_model_parallel_size > 1),
            f"virtual_pipeline_model_parallel_size {virtual} needs to be 2 or more, with a pipeline of at least two "
            f"stages (found {self.pipeline_model_parallel_size})",
        )
        _require(
            not self.overlap_param_gather or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce",
        )

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas that ``world_size`` ranks hold.

        Raises:
            ValueError: if the degrees do not divide the world size.
        """
        _require(
            world_size % self.model_parallel_size == 0,
            f"{world_size} rank(s) cannot be divided into replicas of {self.model_parallel_size} "
            f"(tensor {self.tensor_model_parallel_size} x pipeline {self.pipeline_model_parallel_size} x context "
            f"{self.context_parallel_size}): start a multiple of {self.model_parallel_size} ranks "
            f"(torchrun --nproc-per-node), or change parallel.*_parallel_size",
        )
        return world_size // self.model_parallel_size


@dataclass(frozen=True)
class SourceSettings:
    """One of several places that samples come from.

    Args:
        name: in the log and in manifests.
        path: what ``format`` reads: a file or a folder.
        format: ``jsonl`` (a file, or a folder with a file for each stage), ``mmeb-train`` (folder of one subset, with
            parquet files), ``hf-datasets`` (folder that ``save_to_disk`` wrote) or ``webdataset`` (tar shards).
        split: ``mmeb-train``: ``original``, ``diverse_instruction`` or ``train``; ``hf-datasets``: of a
            ``DatasetDict``. None takes the only one there is.
        image_root: folder that image paths are relative to and may not leave; None for the file's or dataset's own
            (``mmeb-train``: the folder above the subset's).
        weight: share of the samples, relative to the other sources; None in all of them takes each row once an epoch.
        max_rows: use at most this many rows, drawn by the seed.
        stages: that read this source.
        columns: our names of columns to the source's, such as ``{caption: text, image_path: image}``.
    """

    name: str
    path: str
    format: Literal["jsonl", "mmeb-train", "hf-datasets", "webdataset"] = "jsonl"
    split: str | None = None
    image_root: str | None = None
    weight: float | None = None
    max_rows: int | None = None
    stages: tuple[str, ...] = STAGES
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSettings:
    """Where samples come from and how they are packed.

    Args:
        path: folder with ``warmup.jsonl``, ``bridge.jsonl`` and ``contrastive.jsonl`` (see docs/data.md), whose
            image paths are relative to it.
        sources: read these instead of the files in ``path``, mixed; a list of records, in YAML.
        max_length: tokens per sample; longer texts are cut, image tokens never are.
        num_workers: processes per data-parallel replica that decode and pack ahead of training; 0 does it in between.
        tokens_per_microbatch: fill packs with as many samples as fit into this many tokens and pad them to exactly
            that, which spares pipeline stages the exchange of shapes; ``micro_batch_size`` does not count then. None
            gives every pack ``micro_batch_size`` samples and keeps it as long as they are.
    """

    path: str | None = None
    sources: tuple[SourceSettings, ...] = ()
    max_length: int = 2048
    num_workers: int = 0
    tokens_per_microbatch: int | None = None

    def __post_init__(self) -> None:
        _require(self.num_workers >= 0, f"data.num_workers is {self.num_workers}, must not be negative")
        fixed = self.tokens_per_microbatch
        _require(
            fixed is None or fixed >= self.max_length,
            f"data.tokens_per_microbatch {fixed} is less than data.max_length {self.max_length}: a sample of that "
            f"length would fit into no pack; raise the one or lower the other",
        )
        names = [source.name for source in self.sources]
        _require(len(set(names)) == len(names), f"data.sources have the names {names}: each must occur once")
        for source in self.sources:
            self._check_source(source)
        for stage in STAGES:
            weights = [source.weight for source in self.sources if stage in source.stages]
            _require(
                all(w is None for w in weights) or all(w is not None and w > 0 for w in weights),
                f"the weights of stage {stage}'s data.sources are {weights}: give each a positive one, or none any",
            )

    def _check_source(self, source: SourceSettings) -> None:
        unknown = [stage for stage in source.stages if stage not in STAGES]
        _require(not unknown, f"data.sources: {source.name} names the stage(s) {unknown}, known are {list(STAGES)}")
        _require(
            source.max_rows is None or source.max_rows >= 1,
            f"data.sources: max_rows of {source.name} is {source.max_rows}, needs 1 or more",
        )
        _require(
            source.split is None or source.format in ("mmeb-train", "hf-datasets"),
            f"data.sources: split {source.split!r} of {source.name} has no effect on format {source.format}",
        )


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW as Megatron-Core runs it.

    Args:
        weight_decay: decoupled; biases and norms are exempt.
        clip_grad: global gradient norm above which gradients are scaled down; 0 never clips.
        adam_beta1, adam_beta2, adam_eps: Adam's moments and epsilon.
        max_skipped_steps: a run stops after this many steps in a row whose loss or gradient was not finite.
    """

    weight_decay: float = 0.0
    clip_grad: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_eps: float = 1e-8
    max_skipped_steps: int = 10

    def __post_init__(self) -> None:
        _require(
            self.max_skipped_steps >= 1,
            f"optimizer.max_skipped_steps is {self.max_skipped_steps}, needs 1 or more",
        )


@dataclass(frozen=True)
class CheckpointSettings:
    """Checkpoints from which a stage can be resumed, beside the weights that each stage leaves at its end.

    Args:
        save_interval: steps between two of them; None writes one only where a run is stopped before its end.
        keep: how many of the newest are kept.
        asynchronous: write them in a background process while training goes on; costs a copy of the state in
            host memory.
        time_budget_minutes: write one and stop after this time, counted from the start of the process, so that a
            batch system's limit does not cost the steps since the last one.
    """

    save_interval: int | None = None
    keep: int = 2
    asynchronous: bool = False
    time_budget_minutes: float | None = None

    def __post_init__(self) -> None:
        _require(
            self.save_interval is None or self.save_interval >= 1,
            f"checkpoint.save_interval is {self.save_interval}, needs 1 or more, or null",
        )
        _require(self.keep >= 1, f"checkpoint.keep is {self.keep}, needs 1 or more")
        _require(
            self.time_budget_minutes is None or self.time_budget_minutes > 0,
            f"checkpoint.time_budget_minutes is {self.time_budget_minutes}, must be positive, or null",
        )


@dataclass(frozen=True)
class ValidationSettings:
    """Retrieval on held-out pairs (``eval_heldout.jsonl`` of the data folder) while a stage trains.

    Args:
        interval: steps between two validations; None validates never.
        metric: what decides which weights are kept as ``<stage>/best``, averaged over both directions.
    """

    interval: int | None = None
    metric: Literal["recall@1", "recall@5", "recall@10"] = "recall@1"

    def __post_init__(self) -> None:
        _require(
            self.interval is None or self.interval >= 1,
            f"validation.interval is {self.interval}, needs 1 or more, or null",
        )


@dataclass(frozen=True)
class StageSettings:
    """What the three stages share.

    Args:
        steps: optimizer steps.
        global_batch_size: samples (stage ``contrastive``: pairs) per step over all ranks.
        micro_batch_size: samples (pairs) per pack, at most a rank's share of the global batch.
        lr: peak learning rate; linear warm-up over ``lr_warmup_steps``, then ``lr_decay_style`` down to
            ``min_lr`` at ``steps``.
        image_size: pictures are resized to this many pixels square (336, 448, 672); None keeps their shape.
        min_image_tokens, max_image_tokens: merged units of a picture that keeps its shape; None for the limits of
            ``preprocessor_config.json``.
    """

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
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}, needs 1 or more")
        _require(self.lr > 0 and 0 <= self.min_lr <= self.lr, f"need 0 <= min_lr <= lr, found {self.min_lr}, {self.lr}")
        low, high = self.min_image_tokens, self.max_image_tokens
        _require(
            self.image_size is None or low is high is None,
            f"image_size {self.image_size} fixes the size of every picture: min_image_tokens {low} and "
            f"max_image_tokens {high} would have no effect; set image_size to null, or them",
        )
        _require(
            all(limit is None or limit >= 1 for limit in (low, high)) and (low is None or high is None or low <= high),
            f"need 1 <= min_image_tokens <= max_image_tokens, found {low} and {high}",
        )
        _require(
            0 <= self.lr_warmup_steps <= self.steps,
            f"lr_warmup_steps is {self.lr_warmup_steps}, must lie in [0, steps = {self.steps}]",
        )

    def samples_per_microbatch(self, data_parallel_size: int) -> int:
        """``micro_batch_size``, or a rank's whole share of the global batch where that is less.

        Raises:
            ValueError: if the global batch does not divide over the ranks, or a share over packs.
        """
        _require(
            self.global_batch_size % data_parallel_size == 0,
            f"global_batch_size {self.global_batch_size} is not divisible by data parallel size {data_parallel_size}",
        )
        share = self.global_batch_size // data_parallel_size
        size = min(self.micro_batch_size, share)
        _require(
            share % size == 0,
            f"global_batch_size {self.global_batch_size} over data parallel size {data_parallel_size} gives {share} "
            f"samples a rank, which are not divisible by micro_batch_size {size}",
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
        unit_mask_ratio: share of merged image units replaced by noise (figure 0.5, code 0.3; here 0.5).
        mae_weight: weight of the pixel loss (CoCoA 0.5, MoCa 0.1; here 0.5).
        mae_noise: what replaces a masked unit, in normalised pixel space: independent standard-normal values
            (``normal``), one such vector per global batch (``shared``; MoCa: per rank's batch), ``zero``, or the
            unit's ``mean``.
        mae_target: ``pixels`` as the processor normalises them (MoCa), or ``normalized``: zero mean and unit
            variance per patch (MAE, arXiv 2111.06377).
        mask_at_least_one: mask one eligible token where the draw masked none.
    """

    steps: int = 3000
    global_batch_size: int = 128
    image_size: int | None = 336
    text_mask_ratio: float = 0.2
    unit_mask_ratio: float = 0.5
    mae_weight: float = 0.5
    mae_noise: Literal["normal", "shared", "zero", "mean"] = "normal"
    mae_target: Literal["pixels", "normalized"] = "pixels"
    mask_at_least_one: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_ratio("warmup.text_mask_ratio", self.text_mask_ratio)
        _require_ratio("warmup.unit_mask_ratio", self.unit_mask_ratio)
        _require(self.mae_weight >= 0, f"warmup.mae_weight is {self.mae_weight}, must not be negative")


@dataclass(frozen=True)
class BridgeSettings(StageSettings):
    """Stage 2: EOS-bridged reconstruction of block B through the bridge alone.

    Args:
        target_mask_ratio: share of block B's eligible tokens that are masked (published: 0.7).
        bridge_sees_target: whether the bridge's row attends to block B (published code and figure: yes). False
            is the strict variant, whose training-time embedding equals the one at inference.
        query_unit_mask_ratio: share of block A's image units replaced by noise (published: none).
        mask_at_least_one: mask one eligible token where the draw masked none.
    """

    steps: int = 2000
    global_batch_size: int = 64
    micro_batch_size: int = 8
    image_size: int | None = 448
    target_mask_ratio: float = 0.7
    bridge_sees_target: bool = True
    query_unit_mask_ratio: float = 0.0
    mask_at_least_one: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_ratio("bridge.target_mask_ratio", self.target_mask_ratio)
        _require(
            0.0 <= self.query_unit_mask_ratio < 1.0,
            f"bridge.query_unit_mask_ratio is {self.query_unit_mask_ratio}, must lie in [0, 1)",
        )


@dataclass(frozen=True)
class ContrastiveSettings(StageSettings):
    """Stage 3: InfoNCE over the bridge's normalised hidden state, in-batch negatives across all ranks.

    Args:
        temperature: divides the cosine similarities (published: 0.02).
        learnable_temperature: train log(1 / temperature) from ``temperature`` on, as in CLIP (arXiv 2103.00020), at
            the stage's learning rate, within [0.01, 1]; published: fixed. A checkpoint that holds a learned
            temperature goes on from it.
        symmetric: average with the target-to-query direction (published: query to target only).
        mask_equal_targets: leave a target or hard negative out of a row's negatives where it equals the row's own
            target (published: no).
        num_hard_negatives: explicit negatives per query, drawn anew each epoch from a row's ``neg_text`` and
            ``neg_image_path`` where it has more; rows with fewer use what they have (published: 0).
        hard_negatives_shared: every query sees all hard negatives of the step; False: only its own.
        per_source_batches: all pairs of a step come from one source (column ``source``, else the source's name in
            ``data.sources``, which then have no weights). What is left of a source after its last full step sits out
            the epoch, other rows in each (published: sources are mixed).
        matryoshka_dims: take the loss on the first so many dimensions, each renormalised (arXiv 2205.13147), and
            average; name the whole width, too, to keep it. Empty: the whole width alone (published).
        matryoshka_weights: of ``matryoshka_dims``, in the same order; empty weighs them equally.
    """

    steps: int = 2000
    global_batch_size: int = 1024
    micro_batch_size: int = 32
    lr_warmup_steps: int = 200
    image_size: int | None = None
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
        _require(self.temperature > 0, f"contrastive.temperature is {self.temperature}, must be positive")
        low, high = TEMPERATURE_RANGE
        _require(
            not self.learnable_temperature or low <= self.temperature <= high,
            f"contrastive.temperature is {self.temperature}: a learnable one must start within [{low}, {high}]",
        )
        _require(
            self.num_hard_negatives >= 0,
            f"contrastive.num_hard_negatives is {self.num_hard_negatives}, must not be negative",
        )
        _require(
            self.hard_negatives_shared or self.num_hard_negatives > 0,
            "contrastive.hard_negatives_shared false has no effect without hard negatives: set num_hard_negatives",
        )
        self._check_matryoshka()

    def _check_matryoshka(self) -> None:
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        _require(
            all(dim >= 1 for dim in dims) and len(set(dims)) == len(dims),
            f"contrastive.matryoshka_dims are {list(dims)}: each must be 1 or more and occur once",
        )
        _require(
            not weights or len(weights) == len(dims),
            f"contrastive.matryoshka_weights has {len(weights)} entries for {len(dims)} matryoshka_dims",
        )
        _require(
            all(weight > 0 for weight in weights),
            f"contrastive.matryoshka_weights are {list(weights)}: each must be positive",
        )


@dataclass(frozen=True)
class TrainSettings:
    """One run: some of the three stages, one after the other, each starting from the previous one's weights.

    Args:
        stages: which stages, in CoCoA's order.
        output_dir: checkpoints, TensorBoard events, resolved configuration and reports go here.
        overwrite: allow ``output_dir`` to hold an earlier run, which is removed.
        resume: go on with the run in ``output_dir`` from its last complete checkpoint; starts it if there is none.
        seed: everything random follows from it: weights, masks, noise, order of samples.
        log_interval: steps between two updates of the progress bar and of the costlier metrics.
        wandb_project: also log to this Weights & Biases project (needs the ``wandb`` package).
        evaluate: measure retrieval on ``eval_*.jsonl`` of the data folder before the first and after each stage.
        with_baseline: also train stage ``contrastive`` alone from the same initial weights, for comparison.
    """

    stages: tuple[str, ...] = STAGES
    output_dir: str = "outputs/run"
    overwrite: bool = False
    resume: bool = False
    seed: int = 1234
    log_interval: int = 10
    wandb_project: str | None = None
    evaluate: bool = False
    with_baseline: bool = False
    model: ModelSettings = field(default_factory=ModelSettings)
    freeze: FreezeSettings = field(default_factory=FreezeSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    recompute: RecomputeSettings = field(default_factory=RecomputeSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    warmup: WarmupSettings = field(default_factory=WarmupSettings)
    bridge: BridgeSettings = field(default_factory=BridgeSettings)
    contrastive: ContrastiveSettings = field(default_factory=ContrastiveSettings)

    def __post_init__(self) -> None:
        unknown = [stage for stage in self.stages if stage not in STAGES]
        _require(not unknown, f"unknown stage(s) {unknown}: choose from {', '.join(STAGES)}")
        order = [STAGES.index(stage) for stage in self.stages]
        _require(
            bool(order) and order == sorted(set(order)),
            f"stages {list(self.stages)} must be one or more of {', '.join(STAGES)}, in this order, each once",
        )
        _require(self.log_interval >= 1, f"log_interval is {self.log_interval}, needs 1 or more")
        _require(
            not (self.resume and self.overwrite),
            "resume goes on with the run in output_dir and overwrite removes it: choose one of the two",
        )
        _require(
            not self.model.fp8_param or self.parallel.use_distributed_optimizer,
            "model.fp8_param needs master weights elsewhere: set parallel.use_distributed_optimizer to true",
        )
        if self.data.sources:
            self._check_sources()
        if self.adapter.is_used:
            self._check_adapter()

    def _check_sources(self) -> None:
        measured = self.evaluate or self.validation.interval is not None
        _require(
            not (measured and self.data.path is None),
            "evaluate and validation.interval measure on the pools in data.path, which data.sources does not replace: "
            "set data.path, too, to a folder with eval_heldout.jsonl",
        )
        weighted = [s.name for s in self.data.sources if "contrastive" in s.stages and s.weight is not None]
        _require(
            not (self.contrastive.per_source_batches and weighted),
            f"contrastive.per_source_batches gives each source the steps that its rows fill, so the weights of "
            f"data.sources {weighted} would have no effect: leave the weights out, or set per_source_batches to false",
        )

    def _check_adapter(self) -> None:
        for part, frozen in (("language", self.freeze.language), ("vision", self.freeze.vision)):
            targets = getattr(self.adapter, f"{part}_targets")
            _require(
                not (frozen and targets),
                f"freeze.{part} and adapter.{part}_targets {list(targets)} contradict each other: set freeze.{part} "
                f"to false, or adapter.{part}_targets to []",
            )
        _require(
            not (self.freeze.merger and {"mlp.0", "mlp.2"} & set(self.adapter.vision_targets)),
            "freeze.merger and the merger's mlp.0 or mlp.2 in adapter.vision_targets contradict each other",
        )
        _require(
            not self.optimizer.weight_decay,
            f"adapter.kind {self.adapter.kind} with optimizer.weight_decay {self.optimizer.weight_decay} would shrink "
            f"the frozen rows of the embedding, of which the mask token's row trains: set weight_decay to 0",
        )

    def stage(self, name: str) -> StageSettings:
        """The settings of stage ``name``."""
        return getattr(self, name)

    def learned_temperature(self, stage: str) -> float | None:
        """Where the temperature starts that ``stage`` trains, None where it trains none."""
        own = self.contrastive
        return own.temperature if stage == "contrastive" and own.learnable_temperature else None


@dataclass(frozen=True)
class EvaluationSettings:
    """How a benchmark's texts and pictures are embedded (``tools/evaluate_mmeb.py``); score files record all of it.

    Args:
        image_size: side in pixels of the square that every picture is resized to (CoCoA evaluates at 672; 336 and
            448 are its training sizes); None keeps their shape within the processor's limits (``native``).
        max_length: tokens per item, longer texts are cut and counted, image tokens never are; None for the model's
            ``max_position_embeddings``.
        dtype: of parameters and activations.
        bridge_token: carries the embedding; None for the run's or the export's own.
        batch_size: items per pack. Scores do not depend on it beyond rounding.
        num_workers: threads that decode pictures while the model works.
        baselines: also embed each query without its picture, and without its text.
    """

    image_size: int | None = None
    max_length: int | None = None
    dtype: Literal["fp32", "bf16"] = "fp32"
    bridge_token: str | None = None
    batch_size: int = 32
    num_workers: int = 2
    baselines: bool = False

    def __post_init__(self) -> None:
        for name in ("image_size", "max_length", "batch_size"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} is {value}, needs 1 or more")
        _require(self.num_workers >= 0, f"num_workers is {self.num_workers}, must not be negative")
