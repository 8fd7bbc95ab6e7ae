"""What a score depends on besides the data, written down: settings as they took effect, weights, versions."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from megatron_cocoa.config import NATIVE, EvaluationSettings
from megatron_cocoa.data.collate import PackOptions
from megatron_cocoa.data.samples import SampleBuilder
from megatron_cocoa.evaluation.metrics import TIE_TOLERANCE
from megatron_cocoa.evaluation.mmeb_files import Identity, folder_sha256
from megatron_cocoa.evaluation.mmeb_tasks import Benchmark
from megatron_cocoa.parallel import device
from megatron_cocoa.parallel.collectives import on_first_rank

PACKAGES = ("torch", "transformers", "tokenizers", "megatron-core", "pillow", "numpy", "pyarrow")


def identity_of(
    settings: EvaluationSettings, *, model_path: str | Path, processor_path: str | Path | None = None
) -> Callable[[SampleBuilder, PackOptions, Benchmark], Identity]:
    """Hash the model's files now, on the first rank, and join that with what the loaded model says later.

    Every rank calls it.

    Args:
        settings: of the evaluation.
        model_path: whose weights are evaluated; all its files are read, about a second for a gigabyte.
        processor_path: where a checkpoint's tokenizer is, if not beside it.

    Raises:
        ValueError: if a folder is missing.
    """
    model_sha256 = on_first_rank(lambda: folder_sha256(model_path), is_long=True)
    hashes = {"name": Path(model_path).resolve().name, "sha256": model_sha256}
    if processor_path is not None:
        hashes["processor_sha256"] = on_first_rank(lambda: folder_sha256(processor_path), is_long=True)

    def complete(builder: SampleBuilder, options: PackOptions, benchmark: Benchmark) -> Identity:
        bundle, pictures = builder.bundle, builder.pictures
        limits = pictures.pixel_limits
        recorded: dict[str, Any] = {
            # As pictures are sized, not as was asked: what is not asked for is left to the model.
            "image_size": pictures.image_size or NATIVE,
            "pixel_limits": None if limits is None else list(limits),
            "max_length": builder.max_length,
            "dtype": settings.dtype,
            "prompts": "as in the files",
            "bridge_token": bundle.tokenizer.convert_ids_to_tokens(bundle.bridge_token_id),
            "bridge_token_id": bundle.bridge_token_id,
            "attention": options.embedding_mask.value,
            "image_placeholder": builder.image_placeholder,
            "normalization": "l2",
            "tie_tolerance": TIE_TOLERANCE,
            "baselines": settings.baselines,
        }
        return Identity(recorded, hashes, benchmark.to_json())

    return complete


def versions() -> dict[str, Any]:
    """Of the software and the kind of device, for the record."""
    kernels = {name: found for name, found in device.optional_kernels().items() if found}
    found = {name: version(name) for name in PACKAGES} | kernels
    return {"python": platform.python_version(), **found, "device": device.device_name() or "CPU"}
