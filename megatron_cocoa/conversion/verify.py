"""``--verify``: is the converted model the one that it was made from?

Two checks that fail on different mistakes. The weights on both disks are compared bit for bit through the name table:
no change of a value is too small for that, but both directions share the table. The models are run on the same inputs,
which needs no table: a tensor that the table puts in the wrong place or layout shows there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from megatron_cocoa.checkpoint.comparison import compare_weights
from megatron_cocoa.checkpoint.huggingface import HuggingFaceReader
from megatron_cocoa.checkpoint.progress import Progress
from megatron_cocoa.checkpoint.stacked import StackedTensors
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.conversion.forward import compare_forward
from megatron_cocoa.conversion.mcore_to_hf import table_of

_SHOWN = 20


def verify(
    huggingface: str | Path,
    megatron: str | Path,
    *,
    source: Literal["huggingface", "megatron"],
    progress: Progress | None = None,
) -> bool:
    """Run both checks, print what they found, and tell whether both passed.

    Args:
        huggingface: model folder.
        megatron: distributed checkpoint.
        source: which of the two the other was made from.
        progress: see ``compare_weights``.

    Raises:
        ValueError: if one of the two cannot be read.
    """
    with TorchDistReader(megatron) as reader:
        tensors = StackedTensors(reader)
        table = table_of(Path(megatron), tensors, Path(huggingface))
        multiple, stored = tensors.vision_ffn_multiple, tensors.dtypes
    weights = compare_weights(huggingface, megatron, table, source=source, progress=progress)
    print(
        f"{weights.num_tensors - len(weights.different)} of {weights.num_tensors} tensors are equal bit for bit",
        flush=True,
    )
    for line in weights.different[:_SHOWN]:
        print(f"  different: {line}")
    round_to = _cast_to(huggingface, stored, source)
    agreements = compare_forward(huggingface, megatron, vision_ffn_multiple=multiple, round_to=round_to)
    for agreement in agreements:
        print(agreement.line())
    return not weights.different and all(agreement.passed for agreement in agreements)


def _cast_to(huggingface: str | Path, stored: set[torch.dtype], source: str) -> torch.dtype | None:
    """The dtype of the side that was made from the other, where the other's is another one."""
    with HuggingFaceReader(huggingface) as reader:
        on_disk = reader.dtypes
    made, origin = (stored, on_disk) if source == "huggingface" else (on_disk, stored)
    return next(iter(made)) if len(made) == 1 and made != origin else None
