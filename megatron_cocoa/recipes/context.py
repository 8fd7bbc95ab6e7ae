"""What all stages of a run share, read once from its model folder: tokenizer, architecture, table of names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.checkpoint.info import is_complete
from megatron_cocoa.checkpoint.initial import WeightSource
from megatron_cocoa.checkpoint.mapping import NameTable
from megatron_cocoa.config import EmbeddingForm, StageSettings, TrainSettings
from megatron_cocoa.conversion.hf_to_mcore import read_config
from megatron_cocoa.conversion.same_model import check_same_model
from megatron_cocoa.data.collate import PackOptions
from megatron_cocoa.data.evaluation_batches import evaluation_builder
from megatron_cocoa.data.samples import SampleBuilder
from megatron_cocoa.data.tokenizer import TokenizerBundle, load_tokenizer
from megatron_cocoa.data.toy import prepare_toy
from megatron_cocoa.model.build import row_multiple
from megatron_cocoa.model.language import padded_vocab_size
from megatron_cocoa.training.output_owner import OutputOwner

TOY_FOLDER = "outputs/toy"
"""Where the toy preset's data and model folder are prepared, relative to the working directory."""

POOLS = {"heldout": "eval_heldout.jsonl", "training": "eval_train.jsonl"}
"""Files of the data folder that retrieval is measured on, by the pool's name."""


def pool_files(folder: str | None) -> dict[str, Path]:
    """Those of ``POOLS`` that a data folder has; none without one, as in a run that reads ``data.sources``."""
    files = {} if folder is None else {name: Path(folder) / file for name, file in POOLS.items()}
    return {name: path for name, path in files.items() if path.is_file()}


@dataclass(frozen=True)
class RunContext:
    """One run's settings with every path filled in, what follows from its model folder, and its claim to ``output``."""

    settings: TrainSettings
    output: Path
    bundle: TokenizerBundle
    architecture: QwenVLArchitecture
    table: NameTable
    hf_config: dict
    is_toy: bool
    owner: OutputOwner

    def weight_source(self, checkpoint: Path | None) -> WeightSource:
        """Where a model's weights come from: ``checkpoint`` if given, else ``model.load``, else the model folder."""
        settings = self.settings
        if checkpoint is None and settings.model.load is not None:
            checkpoint = Path(settings.model.load)
        return WeightSource(
            folder=Path(settings.model.path),
            may_be_random=settings.model.random_weights,
            checkpoint=checkpoint,
            seed=settings.seed,
            mask_token_id=self.bundle.mask_token_id,
            used_rows=self.bundle.vocab_size_used,
            initializer_range=self.hf_config["text_config"]["initializer_range"],
            decoder_init=settings.warmup.decoder_init,
        )

    @property
    def pad_to_multiple_of(self) -> int:
        """A pack's length must be a multiple of this, so that layers can divide each context-parallel share's rows."""
        return self.settings.parallel.context_parallel_size * row_multiple(self.settings)


def evaluation_parts(
    context: RunContext, stage: StageSettings, *, form: EmbeddingForm | None = None, needs_pixels: bool = True
) -> tuple[SampleBuilder, PackOptions]:
    """The builder of samples and the packing options of evaluation batches, for the run's folders at its layout.

    Packs are as long as their samples, even where training pads a step's packs to one length: each is run by itself.

    Args:
        context: of the run.
        stage: pictures are sized as this stage sizes them, and inputs laid out in the form it embeds in.
        form: another form to embed in.
        needs_pixels: False on ranks without the tower, which then prepare none.
    """
    settings = context.settings
    return evaluation_builder(
        settings.data.path,
        model_path=settings.model.path,
        bundle=context.bundle,
        vision=context.architecture.vision,
        max_length=settings.data.max_length,
        image_size=stage.image_size,
        min_image_tokens=stage.min_image_tokens,
        max_image_tokens=stage.max_image_tokens,
        pad_to_multiple_of=context.pad_to_multiple_of,
        needs_pixels=needs_pixels,
        form=form or stage.embedding_form,
    )


def _is_loadable(checkpoint: Path) -> bool:
    """Whether a checkpoint is seen to be complete; any other is refused where it is loaded.

    A run that resumes may not need it any more.
    """
    try:
        return is_complete(checkpoint)
    except OSError:
        return False


def prepare_context(settings: TrainSettings) -> RunContext:
    """Read the model folder; without ``model.path``, make the toy model and (without ``data.path``) the toy data first.

    Raises:
        ValueError: for a folder that is no Qwen2-VL or Qwen2.5-VL model or describes another one than ``model.load``
            holds, data packages that are missing, or ``evaluate`` or ``validation.interval`` with nothing to measure
            on.
    """
    is_toy = settings.model.path is None
    if is_toy:
        toy = prepare_toy(TOY_FOLDER)
        data = settings.data if settings.data.path else replace(settings.data, path=str(toy.pairs))
        settings = replace(settings, model=replace(settings.model, path=str(toy.model)), data=data)
    _check_pools(settings)
    config = read_config(settings.model.path)
    architecture = QwenVLArchitecture.from_huggingface(config)
    if settings.model.load is not None and _is_loadable(Path(settings.model.load)):
        check_same_model(Path(settings.model.load), settings.model.path, architecture)
    bundle = load_tokenizer(
        settings.model.path,
        mask_token=settings.model.mask_token,
        bridge_token=settings.model.bridge_token,
        vocab_size=architecture.text.vocab_size,
    )
    rows = padded_vocab_size(
        architecture.text.vocab_size,
        settings.model.make_vocab_size_divisible_by,
        settings.parallel.tensor_model_parallel_size,
    )
    return RunContext(
        settings=settings,
        output=Path(settings.output_dir),
        bundle=bundle,
        architecture=architecture,
        table=NameTable.from_config(
            config, padded_vocab_size=rows, vision_ffn_multiple=settings.model.vision_ffn_multiple
        ),
        hf_config=config.to_dict(),
        is_toy=is_toy,
        owner=OutputOwner(Path(settings.output_dir)),
    )


def _check_pools(settings: TrainSettings) -> None:
    """Refuse a run that is asked for measurements, and whose data folder has nothing to take them on."""
    folder = settings.data.path
    pools = pool_files(folder)
    if settings.validation.interval is not None and "heldout" not in pools:
        raise ValueError(
            f"validation.interval is {settings.validation.interval}, but data.path {folder} has no {POOLS['heldout']} "
            f"to validate on: write one (see docs/data.md), or set validation.interval to null"
        )
    if settings.evaluate and not pools:
        raise ValueError(
            f"evaluate is true, but data.path {folder} has neither {' nor '.join(POOLS.values())} to measure on: write "
            f"one (see docs/data.md), or set evaluate to false"
        )
