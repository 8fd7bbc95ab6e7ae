"""A trained model with what prepares its inputs, loaded from an exported folder or a Megatron checkpoint at any layout.

``CocoaEmbedder`` uses this on one rank; ``tools/evaluate_mmeb.py`` also uses it with the model divided over ranks.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_cocoa.checkpoint.info import INFO_FILE, CheckpointInfo, read_info, refuse_folder_around
from megatron_cocoa.checkpoint.stacked import StackedTensors
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.config import EmbeddingSettings, ModelSettings, ParallelSettings, TrainSettings
from megatron_cocoa.conversion.companions import find_companions, run_settings
from megatron_cocoa.conversion.embedding_form import form_of_config
from megatron_cocoa.conversion.hf_to_mcore import UNKNOWN_TOKEN
from megatron_cocoa.conversion.picture_sizes import PictureSizes
from megatron_cocoa.data.collate import PackOptions
from megatron_cocoa.data.evaluation_batches import evaluation_builder
from megatron_cocoa.data.samples import SampleBuilder
from megatron_cocoa.model.build import Model
from megatron_cocoa.parallel import topology
from megatron_cocoa.recipes.context import RunContext, prepare_context
from megatron_cocoa.recipes.initial_model import build_with_weights
from megatron_cocoa.settings.saved import SETTINGS_FILE

BRIDGE_KEY = "cocoa_bridge_token"
"""Key of an exported folder's ``config.json`` that names the token which carries the embedding."""


@dataclass(frozen=True)
class EmbeddingModel:
    """A model and what its inputs are made with.

    model:   this rank's part of it, in evaluation mode.
    builder: turns texts and pictures into tokens and patches.
    options: how samples are packed at the layout that is initialised.
    """

    model: Model
    builder: SampleBuilder
    options: PackOptions


def load_embedding_model(
    path: str | Path,
    settings: EmbeddingSettings,
    *,
    model_path: str | Path | None = None,
    parallel: ParallelSettings = ParallelSettings(),
) -> EmbeddingModel:
    """Load a model at the layout for which process groups are initialised; every rank calls it.

    Args:
        path, model_path: as for ``CocoaEmbedder.from_pretrained``.
        settings: how it embeds.
        parallel: that layout.

    Raises:
        ValueError: as ``CocoaEmbedder.from_pretrained``.
    """
    path = Path(path)
    info = _info_of(path)
    sizes = picture_sizes(path, settings)
    form = form_of_config(_config_of_export(path)) if info is None else info.embedding_form
    context = prepare_context(TrainSettings(model=_model_settings(path, info, model_path, settings), parallel=parallel))
    if info is not None:
        _check_fit(path, info, context)
    model = build_with_weights(context, checkpoint=None, with_image_decoder=False)
    model.train(False)
    builder, options = evaluation_builder(
        Path.cwd(),
        model_path=context.settings.model.path,
        bundle=context.bundle,
        vision=context.architecture.vision,
        max_length=settings.max_length or context.hf_config["text_config"]["max_position_embeddings"],
        pad_to_multiple_of=context.pad_to_multiple_of,
        needs_pixels=topology.is_pipeline_first_stage(),
        form=form,
        **asdict(sizes),
    )
    return EmbeddingModel(model, builder, options)


def picture_sizes(path: str | Path, asked: EmbeddingSettings) -> PictureSizes:
    """How pictures are sized for a model, without loading it: as ``asked``, or as the model says where it asks nothing.

    Raises:
        ValueError: if ``path`` is no model, or ``asked.image_size`` is no size.
    """
    path = Path(path)
    info = _info_of(path)
    own = PictureSizes.of_config(_config_of_export(path)) if info is None else PictureSizes.of_checkpoint(path, info)
    return own.overridden_by(
        image_size=asked.image_size,
        min_image_tokens=asked.min_image_tokens,
        max_image_tokens=asked.max_image_tokens,
    )


def _info_of(path: Path) -> CheckpointInfo | None:
    """What a checkpoint holds; None for an exported or published folder."""
    if (path / INFO_FILE).is_file():
        return read_info(path)
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return None
    refuse_folder_around(path)
    raise ValueError(
        f"{path} is neither a Hugging Face folder with config.json and safetensors, nor a Megatron checkpoint with "
        f"{INFO_FILE}"
    )


def _model_settings(
    path: Path, info: CheckpointInfo | None, model_path: str | Path | None, settings: EmbeddingSettings
) -> ModelSettings:
    """The model in ``path``, which is a checkpoint if there is ``info``, with the tokens that its folder names."""
    if info is not None:
        chosen, tokens = _folder_of_checkpoint(path, model_path)
        more: dict[str, Any] = {"load": str(path)} | tokens
        with TorchDistReader(path) as reader:
            more["vision_ffn_multiple"] = StackedTensors(reader).vision_ffn_multiple
    else:
        chosen, content = Path(model_path or path), _config_of_export(path)
        more = {"bridge_token": content[BRIDGE_KEY]} if BRIDGE_KEY in content else {}
        if chosen != path:
            raise ValueError(f"{path} is a Hugging Face folder, which brings its own tokenizer: leave model_path out")
    if settings.bridge_token is not None:
        more["bridge_token"] = settings.bridge_token
    return ModelSettings(path=str(chosen), dtype=settings.dtype, **more)


def _config_of_export(path: Path) -> dict[str, Any]:
    try:
        return json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'} is not readable JSON: {error}") from error


def _folder_of_checkpoint(path: Path, model_path: str | Path | None) -> tuple[Path, dict[str, str]]:
    """Where a checkpoint's tokenizer is, and the names of its tokens where a run's settings say them."""
    saved = run_settings(path).get("model") or {}
    tokens = {name: saved[name] for name in ("mask_token", "bridge_token") if saved.get(name)}
    if model_path is not None:
        return Path(model_path), tokens
    found = find_companions(path)
    if found is not None and (found / "tokenizer.json").is_file():
        return found, tokens
    named = saved.get("path")
    why = f"its run's {SETTINGS_FILE} names {named}, which has none here" if named else f"there is no {SETTINGS_FILE}"
    raise ValueError(f"{path} carries no tokenizer, and {why}: name the Hugging Face folder as model_path")


def _check_fit(path: Path, info: CheckpointInfo, context: RunContext) -> None:
    """Refuse a tokenizer folder that belongs to another model than the checkpoint: every vector would be wrong."""
    folder = context.settings.model.path
    if info.bridge_token_id not in (UNKNOWN_TOKEN, context.bundle.bridge_token_id):
        raise ValueError(
            f"{path} was trained with the bridge token's id {info.bridge_token_id}, the tokenizer in {folder} gives "
            f"{context.bundle.bridge_token_id}: name the run's own folder, or its bridge_token"
        )
