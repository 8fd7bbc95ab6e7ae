"""From a Hugging Face folder to a Megatron checkpoint: what the command line tool calls."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, Qwen2_5_VLConfig, Qwen2VLConfig

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.checkpoint.huggingface import refuse_adapters
from megatron_cocoa.checkpoint.import_hf import ImportReport, import_huggingface
from megatron_cocoa.checkpoint.info import IMPORT_STAGE, CheckpointInfo
from megatron_cocoa.checkpoint.mapping import NameTable
from megatron_cocoa.checkpoint.progress import Progress
from megatron_cocoa.conversion.embedding_form import form_of_config
from megatron_cocoa.data.tokenizer import load_tokenizer

UNKNOWN_TOKEN = -1
"""Token ids of an imported checkpoint whose folder has no tokenizer."""

_CONFIGS = {"qwen2_vl": Qwen2VLConfig, "qwen2_5_vl": Qwen2_5_VLConfig}


def convert_hf_to_mcore(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    mask_token: str = "<|mask|>",
    bridge_token: str = "<|im_end|>",
    vision_ffn_multiple: int = 1,
    dialect: str = "sharded",
    progress: Progress | None = None,
) -> ImportReport:
    """Write ``source`` as a distributed checkpoint of stage ``import``; no weight is changed.

    Args:
        source: Hugging Face folder of a Qwen2-VL or Qwen2.5-VL.
        target: folder to create.
        dtype: cast to it; None keeps the dtype on disk.
        overwrite: replace an earlier checkpoint at ``target``.
        mask_token, bridge_token: as in training; their ids are noted in the checkpoint.
        vision_ffn_multiple: the setting ``model.vision_ffn_multiple`` of the run that will load the checkpoint.
        dialect: whose tensor names; one of ``mapping.DIALECTS``.
        progress: see ``import_huggingface``.

    Raises:
        ValueError: for anything that does not fit, before or while writing; nothing is left at the target then.
    """
    config = read_config(source)
    table = NameTable.from_config(config, vision_ffn_multiple=vision_ffn_multiple, dialect=dialect)
    mask_id, bridge_id = _token_ids(Path(source), mask_token, bridge_token, table.vocab_size)
    content = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    info = CheckpointInfo(
        stage=IMPORT_STAGE,
        step=0,
        mask_token_id=mask_id,
        bridge_token_id=bridge_id,
        hf_config=content,
        **asdict(form_of_config(content)),
    )
    return import_huggingface(source, table, target, info=info, dtype=dtype, overwrite=overwrite, progress=progress)


def read_config(folder: str | Path) -> PretrainedConfig:
    """The ``config.json`` of a Hugging Face folder.

    Raises:
        ValueError: if it is missing, damaged, or of another architecture.
    """
    folder = Path(folder)
    file = folder / "config.json"
    if not folder.exists():
        could_be_name = len(folder.parts) == 2 and not folder.is_absolute() and folder.parts[0] not in ("~", "..")
        hub = f"; if that is a name on the Hub: hf download {folder} --local-dir {folder.name}" if could_be_name else ""
        raise ValueError(f"{folder} does not exist: needed a Qwen2-VL or Qwen2.5-VL folder{hub}")
    if not file.is_file():
        refuse_adapters(folder)
        raise ValueError(f"{folder} has no config.json: needed the Hugging Face folder of a Qwen2-VL or Qwen2.5-VL")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not readable JSON: {error}") from error
    return config_of(content, origin=str(file))


def read_architecture(folder: str | Path) -> QwenVLArchitecture:
    """What ``read_config`` finds in a folder; raises as that and ``QwenVLArchitecture.from_huggingface``."""
    return QwenVLArchitecture.from_huggingface(read_config(folder))


def config_of(content: dict, *, origin: str) -> PretrainedConfig:
    """The configuration object of a ``config.json``'s content.

    Raises:
        ValueError: naming ``origin``, if it is of another architecture or incomplete.
    """
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind not in _CONFIGS:
        raise ValueError(f"{origin} has model_type {kind!r}: only {' and '.join(_CONFIGS)} are implemented")
    try:
        return _CONFIGS[kind].from_dict(content)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise ValueError(f"{origin} is no valid configuration of {kind}: {error}") from error


def _token_ids(folder: Path, mask_token: str, bridge_token: str, vocab_size: int) -> tuple[int, int]:
    if not (folder / "tokenizer.json").is_file():
        return UNKNOWN_TOKEN, UNKNOWN_TOKEN
    bundle = load_tokenizer(folder, mask_token=mask_token, bridge_token=bridge_token, vocab_size=vocab_size)
    return bundle.mask_token_id, bundle.bridge_token_id
