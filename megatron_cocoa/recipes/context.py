"""What all stages of a run share: paths, tokenizer, architecture, name table."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoConfig

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.checkpoint.initial import WeightSource
from megatron_cocoa.checkpoint.mapping import NameTable
from megatron_cocoa.checkpoint.store import INFO_FILE
from megatron_cocoa.config import EmbeddingForm, StageSettings, TrainSettings
from megatron_cocoa.data.collate import PackOptions
from megatron_cocoa.data.evaluation_batches import evaluation_builder
from megatron_cocoa.data.geometry import VisionGeometry
from megatron_cocoa.data.samples import SampleBuilder
from megatron_cocoa.data.tokenizer import TokenizerBundle, load_tokenizer
from megatron_cocoa.data.toy import prepare_toy
from megatron_cocoa.model.build import row_multiple
from megatron_cocoa.model.language import padded_vocab_size
from megatron_cocoa.recipes.resume import JOB_FILE, SETTINGS_FILE, holds_run
from megatron_cocoa.training.log import import_wandb

TOY_FOLDER = "outputs/toy"
"""Where the toy preset's data and model folder are prepared, relative to the working directory."""

POOLS = {"heldout": "eval_heldout.jsonl", "training": "eval_train.jsonl"}
"""Files of the data folder that retrieval is measured on, by the pool's name."""


@dataclass(frozen=True)
class RunContext:
    """One run's settings with every path filled in, and what follows from its model folder."""

    settings: TrainSettings
    output: Path
    bundle: TokenizerBundle
    geometry: VisionGeometry
    architecture: QwenVLArchitecture
    table: NameTable
    hf_config: dict
    is_toy: bool

    def weight_source(self, checkpoint: Path | None) -> WeightSource:
        """Where weights come from: ``checkpoint`` if given, else ``model.load``, else the model folder."""
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
        """Packs must be divisible by this: into context-parallel shares, each by what layers need of their rows."""
        return self.settings.parallel.context_parallel_size * row_multiple(self.settings)


def evaluation_parts(
    context: RunContext, stage: StageSettings, *, form: EmbeddingForm | None = None, needs_pixels: bool = True
) -> tuple[SampleBuilder, PackOptions]:
    """What evaluation batches are built with, for the run's data and model folders at its layout.

    Pictures are sized as ``stage`` sizes them, and things embedded in its form, or in ``form``.

    Packs are as long as their samples also where training fills a fixed budget: each is run by itself.
    """
    settings = context.settings
    return evaluation_builder(
        settings.data.path,
        model_path=settings.model.path,
        bundle=context.bundle,
        vision=context.geometry,
        max_length=settings.data.max_length,
        image_size=stage.image_size,
        min_image_tokens=stage.min_image_tokens,
        max_image_tokens=stage.max_image_tokens,
        pad_to_multiple_of=context.pad_to_multiple_of,
        needs_pixels=needs_pixels,
        form=form or stage.embedding_form,
    )


def prepare_context(settings: TrainSettings) -> RunContext:
    """Fill in the toy set where no model or data is named, and read the model folder.

    Raises:
        ValueError: for a folder that is no Qwen2-VL or Qwen2.5-VL model, data packages that are missing, or
            ``evaluate`` with nothing to measure on.
    """
    is_toy = settings.model.path is None
    if is_toy:
        toy = prepare_toy(TOY_FOLDER)
        data = settings.data if settings.data.path else replace(settings.data, path=str(toy.pairs))
        settings = replace(settings, model=replace(settings.model, path=str(toy.model)), data=data)
    _check_pools(settings)
    config = read_config(Path(settings.model.path))
    architecture = QwenVLArchitecture.from_huggingface(config)
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
        geometry=VisionGeometry.from_model_folder(settings.model.path),
        architecture=architecture,
        table=NameTable.from_config(
            config, padded_vocab_size=rows, vision_ffn_multiple=settings.model.vision_ffn_multiple
        ),
        hf_config=config.to_dict(),
        is_toy=is_toy,
    )


def _check_pools(settings: TrainSettings) -> None:
    """Refuse a run that is asked for measurements, and whose data folder has nothing to take them on."""
    folder = settings.data.path
    pools = [] if folder is None else [file for file in POOLS.values() if (Path(folder) / file).is_file()]
    if settings.evaluate and not pools:
        raise ValueError(
            f"evaluate is true, but data.path {folder} has neither {' nor '.join(POOLS.values())} to measure on: write "
            f"one (see docs/data.md), or set evaluate to false"
        )


def read_config(folder: Path):
    """The ``config.json`` of a Hugging Face folder.

    Raises:
        ValueError: if it is missing, unreadable or of another family.
    """
    if not folder.exists():
        could_be_name = len(folder.parts) == 2 and not folder.is_absolute()
        hub = f"; if that is a name on the Hub: hf download {folder} --local-dir {folder.name}" if could_be_name else ""
        raise ValueError(f"{folder} does not exist: model.path must be a Qwen2-VL or Qwen2.5-VL folder{hub}")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: model.path must be a Qwen2-VL or Qwen2.5-VL folder")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{folder / 'config.json'} cannot be read: {error}") from error


def check_output(settings: TrainSettings) -> None:
    """Refuse an output folder that cannot be written, holds an earlier run that may not go, or feeds this one.

    So is a Weights & Biases project without its package, which would be missed only once the model is loaded.
    What a start that never took a step has left does not count as a run. Nothing else is removed yet. For the first
    rank alone: the others could see its probe of the disk.

    Raises:
        ValueError: naming the folder or the package, and what to change.
    """
    if settings.wandb_project is not None:
        import_wandb(settings.wandb_project)
    output = Path(settings.output_dir)
    if output.exists() and not output.is_dir():
        raise ValueError(f"output_dir {output} is a file: name a folder")
    was_trained = output.is_dir() and not all(_is_left_by_a_start(path, output) for path in output.rglob("*"))
    if was_trained:
        if not (settings.overwrite or settings.resume):
            raise ValueError(
                f"{output} holds an earlier run: name another --output_dir, pass --resume true to go on with it, or "
                f"--overwrite true to remove it"
            )
        if not holds_run(output):
            raise ValueError(
                f"{output} is not empty and holds no {SETTINGS_FILE} of an earlier run: it is left as it is"
            )
        for name, source in (("model.load", settings.model.load), ("model.path", settings.model.path)):
            if settings.overwrite and source and Path(source).resolve().is_relative_to(output.resolve()):
                raise ValueError(f"{name} {source} lies in output_dir {output}, which would be overwritten")
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not was_trained:
            # Resumed by a corrected command, they would be held against it.
            (output / SETTINGS_FILE).unlink(missing_ok=True)
        probe = output / ".write-test"
        probe.write_bytes(b"\0" * 65536)
        probe.unlink()
    except OSError as error:
        raise ValueError(f"output_dir {output} cannot be written: {error}; free space or name another one") from error


def _is_left_by_a_start(path: Path, output: Path) -> bool:
    """Whether ``path`` below ``output`` is what a run writes before its first step, and nothing that cost a step."""
    if path.is_dir() and not path.is_symlink():
        return True
    match path.relative_to(output).parts:
        case (name,):
            return name in (SETTINGS_FILE, JOB_FILE)
        case (_, "metrics.jsonl" | "validation.jsonl"):
            return path.stat().st_size == 0
        case (_, "wandb.id") | (_, "tensorboard" | "wandb", *_):
            return True
    return False


RUN_FILES = (SETTINGS_FILE, JOB_FILE, "report.html", "results.json")


def clear_output(settings: TrainSettings) -> None:
    """Remove what an earlier run wrote to the output folder, and nothing else."""
    output = Path(settings.output_dir)
    for name in RUN_FILES:
        (output / name).unlink(missing_ok=True)
    for folder in output.iterdir():
        if (folder / "metrics.jsonl").is_file() or (folder / INFO_FILE).is_file():
            shutil.rmtree(folder)
