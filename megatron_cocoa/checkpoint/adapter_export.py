"""Adapters by themselves, as a folder that peft loads onto Hugging Face's model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megatron_cocoa.checkpoint.adapter_mapping import LORA_A, peft_name
from megatron_cocoa.checkpoint.mapping import nested_spelling
from megatron_cocoa.checkpoint.placement import check_target, new_folder
from megatron_cocoa.checkpoint.safetensors_stream import write_safetensors
from megatron_cocoa.config import AdapterSettings

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"


def export_adapters(
    target: str | Path, tensors: Mapping[str, Tensor], settings: AdapterSettings, *, base_model: str
) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``; whole, or not at all.

    Args:
        target: folder to create; an earlier export there is replaced.
        tensors: by Hugging Face's names in the flat spelling, as ``gather_adapters`` gives them.
        settings: what the adapters are.
        base_model: the weights that they change, for ``base_model_name_or_path``.

    Raises:
        ValueError: if the target is something else than an earlier export, or the disk has no room.
    """
    target = Path(target).absolute()
    check_target(target, Path(base_model), marker=CONFIG_FILE, kind="folder of adapters", overwrite=True)
    named = {peft_name(nested_spelling(name)): tensor for name, tensor in tensors.items()}
    with new_folder(target, num_bytes=sum(tensor.nbytes for tensor in named.values())) as work:
        write_safetensors(work / WEIGHTS_FILE, named.items(), {name: tuple(t.shape) for name, t in named.items()})
        text = json.dumps(peft_config(tensors, settings, base_model=base_model), indent=2)
        (work / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def peft_config(tensors: Mapping[str, Tensor], settings: AdapterSettings, *, base_model: str) -> dict:
    """The fields of ``peft.LoraConfig`` that are not its defaults, or that a reader looks for."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "r": settings.rank,
        "lora_alpha": int(settings.alpha) if settings.alpha == int(settings.alpha) else settings.alpha,
        "lora_dropout": settings.dropout,
        "use_dora": settings.kind == "dora",
        "use_rslora": settings.rslora,
        "init_lora_weights": "gaussian" if settings.init == "gaussian" else True,
        "target_modules": _target_pattern(tensors),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _target_pattern(tensors: Mapping[str, Tensor]) -> str:
    """One expression that matches the adapted modules and nothing else.

    peft takes a list by the ends of names, which would put an adapter of the tower's ``gate_proj`` on the language
    model's as well.
    """
    suffix = f".{LORA_A}.weight"
    modules = [nested_spelling(name.removesuffix(suffix)) for name in tensors if name.endswith(suffix)]
    patterns = [re.sub(r"(\\\.(?:layers|blocks)\\\.)\d+", r"\1\\d+", re.escape(module)) for module in modules]
    return "|".join(dict.fromkeys(patterns))
