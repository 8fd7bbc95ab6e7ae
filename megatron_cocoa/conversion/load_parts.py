"""Loading a checkpoint through Megatron's ``dist_checkpointing``, one stacked tensor at a time.

``dist_checkpointing.load`` reads everything that it is asked for into tensors of the checkpoint's dtype before any
reaches a parameter: for a BF16 checkpoint and an FP32 model half of the model again. Asked for a part, it holds a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.core import dist_checkpointing
from torch import nn

from megatron_cocoa.checkpoint.store import sharded_state


def load_in_parts(path: Path, chunks: Sequence[nn.Module]) -> None:
    """Fill all parameters of ``chunks`` from the weights in a checkpoint; every rank calls it.

    All layers of a stacked tensor are one part: Megatron refuses to load some of its layers alone.

    Raises:
        ValueError: if the checkpoint lacks a parameter.
    """
    state = sharded_state(chunks, is_loading=True)
    present = set(dist_checkpointing.load_tensors_metadata(str(path)))
    parts: dict[str, list[tuple[str, str]]] = {}
    for chunk, entries in state.items():
        for name, value in entries.items():
            # What is no parameter, Megatron's empty states, has no place in a module's state here.
            if hasattr(value, "key") and not name.endswith("_extra_state"):
                parts.setdefault(value.key, []).append((chunk, name))
    absent = sorted(set(parts) - present)
    if absent:
        raise ValueError(f"{path} lacks {len(absent)} tensors of the model: {', '.join(absent[:20])}")
    missing = [set(dict(chunk.named_parameters())) for chunk in chunks]
    for members in parts.values():
        wanted: dict[str, dict] = {}
        for chunk, name in members:
            wanted.setdefault(chunk, {})[name] = state[chunk].pop(name)
        loaded = dist_checkpointing.load(wanted, str(path))
        for index, chunk in enumerate(chunks):
            values = loaded.get(f"model{index}", {})
            chunk.load_state_dict(values, strict=False)
            missing[index] -= set(values)
    unfilled = sorted(name for names in missing for name in names)
    if unfilled:
        raise ValueError(f"{path} left {len(unfilled)} parameters unfilled: {', '.join(unfilled[:20])}")
