"""``cocoa.safetensors``: what a trained checkpoint holds beyond Hugging Face's model, beside an exported one.

transformers and sentence-transformers do not look at it. It holds the image decoder as the checkpoint stores it, the
mask token's row of each vocabulary table, and the rows beyond the vocabulary, which padding adds and training moves;
its metadata says which stage wrote the checkpoint. The import puts all of it back, so that training goes on from a
folder as it would have from the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megatron_cocoa.checkpoint.bits import same_bits
from megatron_cocoa.checkpoint.info import CheckpointInfo
from megatron_cocoa.checkpoint.layouts import VocabularyRows
from megatron_cocoa.checkpoint.mapping import LOGIT_SCALE, OWN_PREFIXES, NameTable
from megatron_cocoa.checkpoint.safetensors_file import SafetensorsFile
from megatron_cocoa.checkpoint.safetensors_stream import write_safetensors
from megatron_cocoa.checkpoint.stacked import StackedTensors
from megatron_cocoa.checkpoint.tensor_mapping import Mapping

OWN_FILE = "cocoa.safetensors"
_MASK_ROW, _MORE_ROWS = ":mask_token_row", ":rows_beyond_vocabulary"
_INFO = ("stage", "step", "mask_token_id", "bridge_token_id", "attention", "image_placeholder", "pictures")


def write_own_tensors(
    folder: Path, tensors: StackedTensors, table: NameTable, info: CheckpointInfo, *, dtype: torch.dtype | None = None
) -> str:
    """Write ``cocoa.safetensors`` into ``folder``, one tensor in memory at a time.

    Args:
        folder: where the model is being written.
        tensors: of the checkpoint.
        table: name table of the model.
        info: of the checkpoint.
        dtype: cast to it, the learned temperature excepted; None keeps each tensor's.

    Returns:
        A line that lists what was written.

    Raises:
        ValueError: if the mask token has no row in the vocabulary's tables.
    """
    reader = tensors.reader
    heads = sorted(key for key in reader.keys() if key.startswith(OWN_PREFIXES))
    shapes = {key: reader.shape(key) for key in heads}
    rows = {}
    for mapping in _vocabulary(table):
        for suffix, part in _rows(mapping, tensors(mapping.megatron_name), info.mask_token_id):
            rows[mapping.megatron_name + suffix] = part.clone()
    shapes |= {name: tuple(part.shape) for name, part in rows.items()}

    def parts() -> Iterator[tuple[str, Tensor]]:
        for name in shapes:
            tensor = rows[name] if name in rows else reader.read(name)
            yield name, tensor if dtype is None or name == LOGIT_SCALE else tensor.to(dtype)

    states = [key for key in reader.state_keys() if key.startswith(OWN_PREFIXES)]
    about = {name: getattr(info, name) for name in _INFO} | {"empty_states": states}
    write_safetensors(folder / OWN_FILE, parts(), shapes, metadata={"cocoa": json.dumps(about)})
    listed = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items() if name not in heads)
    return (
        f"{OWN_FILE}: {len(heads)} tensor(s) of the image decoder; {listed or 'no rows of a mask token'}; "
        f"stage {info.stage}, step {info.step}"
    )


@dataclass(frozen=True)
class OwnTensors:
    """The content of a ``cocoa.safetensors``.

    Args:
        file: open.
        about: what its metadata says.
    """

    file: SafetensorsFile
    about: dict

    @property
    def heads(self) -> list[str]:
        """Keys of the image decoder's tensors, as in the checkpoint."""
        return [key for key in self.file.keys() if key.startswith(OWN_PREFIXES)]

    @property
    def empty_states(self) -> list[str]:
        return self.about["empty_states"]

    def info(self, imported: CheckpointInfo) -> CheckpointInfo:
        """``imported`` with the stage, token ids, form and picture sizes of the checkpoint behind the folder.

        Raises:
            ValueError: if the folder's tokenizer gives the mask or bridge token another id.
        """
        for name in ("mask_token_id", "bridge_token_id"):
            ours, theirs = getattr(imported, name), self.about[name]
            if min(ours, theirs) >= 0 and ours != theirs:
                raise ValueError(
                    f"{self.file.path} was written by a run whose {name} is {theirs}, the folder's tokenizer gives "
                    f"{ours}: name that run's --mask-token and --bridge-token, or remove {OWN_FILE}"
                )
        return replace(imported, **{name: self.about[name] for name in _INFO if name in self.about})

    def with_rows(self, mapping: Mapping, tensor: Tensor, *, limit: int) -> Tensor:
        """A vocabulary table with the rows beyond the vocabulary appended; other tensors as they are.

        Args:
            mapping: of the tensor.
            tensor: whole, without padding.
            limit: rows that the checkpoint has room for.

        Raises:
            ValueError: if the mask token's row is not the table's, or the rows do not fit.
        """
        if not isinstance(mapping.layout, VocabularyRows):
            return tensor
        keys = self.file.keys()
        row, more = mapping.megatron_name + _MASK_ROW, mapping.megatron_name + _MORE_ROWS
        token = self.about["mask_token_id"]
        if row in keys and not same_bits(self.file.read(row), tensor[token : token + 1]):
            raise ValueError(
                f"{self.file.path} and {mapping.hf_names[0]} disagree on row {token}, the mask token's: one of them "
                f"was changed after the export. Remove {OWN_FILE} to go on with the table's"
            )
        if more not in keys:
            return tensor
        extra = self.file.read(more)
        if tensor.shape[0] + extra.shape[0] > limit or extra.shape[1:] != tensor.shape[1:]:
            raise ValueError(
                f"{more} in {self.file.path} has shape {tuple(extra.shape)}, {mapping.hf_names[0]} has "
                f"{tuple(tensor.shape)}, and there is room for {limit} rows"
            )
        return torch.cat([tensor, extra.to(tensor.dtype)])

    def line(self) -> str:
        """For the terminal."""
        return f"read {OWN_FILE}: {len(self.file.keys())} tensor(s), of stage {self.about['stage']}"


@contextmanager
def own_tensors(folder: Path, table: NameTable) -> Iterator[OwnTensors | None]:
    """The ``cocoa.safetensors`` of a model folder, open; None where there is none.

    Raises:
        ValueError: if it is damaged, or a tensor in it belongs to no model of this table.
    """
    path = folder / OWN_FILE
    if not path.is_file():
        yield None
        return
    file = SafetensorsFile(path)
    try:
        yield OwnTensors(file, _checked(file, table))
    finally:
        file.close()


def _checked(file: SafetensorsFile, table: NameTable) -> dict:
    """What the metadata says; it and the names come from elsewhere."""
    try:
        about = json.loads(file.metadata["cocoa"])
        kinds = {"stage": str, "step": int, "mask_token_id": int, "bridge_token_id": int, "empty_states": list}
        # An export of an earlier version says nothing of the form: it had one, and nothing of pictures.
        later = {"attention": str, "image_placeholder": str, "pictures": dict}
        kinds |= {name: kind for name, kind in later.items() if name in about}
        wrong = [name for name, kind in kinds.items() if not isinstance(about[name], kind)]
        sizes = about.get("pictures", {}).items()
        wrong += [name for name, size in sizes if not (size is None or isinstance(size, int))]
        wrong += [key for key in about["empty_states"] if not key.startswith(OWN_PREFIXES)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file.path} was not written by the export, or is damaged: {error!r}") from error
    allowed = {m.megatron_name + suffix for m in _vocabulary(table) for suffix in (_MASK_ROW, _MORE_ROWS)}
    wrong += [key for key in file.keys() if key not in allowed and not key.startswith(OWN_PREFIXES)]
    if wrong:
        raise ValueError(f"{file.path} holds what this model has no place for: {', '.join(map(str, wrong[:20]))}")
    return about


def _vocabulary(table: NameTable) -> list[Mapping]:
    return [mapping for mapping in table if isinstance(mapping.layout, VocabularyRows)]


def _rows(mapping: Mapping, tensor: Tensor, mask_token_id: int) -> Iterator[tuple[str, Tensor]]:
    """The mask token's row, and the rows beyond the vocabulary up to the last that is not zero."""
    count = mapping.layout.rows
    if mask_token_id >= count:
        raise ValueError(f"the mask token's id is {mask_token_id}, {mapping.megatron_name} has {count} rows")
    if mask_token_id >= 0:
        yield _MASK_ROW, tensor[mask_token_id : mask_token_id + 1]
    used = tensor[count:].any(dim=1).nonzero()
    if used.numel():
        yield _MORE_ROWS, tensor[count : count + int(used.max()) + 1]
