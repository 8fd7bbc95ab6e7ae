"""Where a stage's weights come from: drawn from the seed, a Hugging Face folder, or a distributed checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.fp8_utils import is_float8tensor
from torch import Tensor, nn

from megatron_cocoa.checkpoint.huggingface import HuggingFaceReader
from megatron_cocoa.checkpoint.info import IMPORT_STAGE, INFO_FILE, CheckpointInfo, read_info
from megatron_cocoa.checkpoint.layouts import Gated, Padded
from megatron_cocoa.checkpoint.live import copy_shard, fill_parameters, global_name, load_huggingface_weights
from megatron_cocoa.checkpoint.mapping import LOGIT_SCALE, NameTable
from megatron_cocoa.checkpoint.random_weights import RandomWeights, draw
from megatron_cocoa.checkpoint.stacked import StackedTensors
from megatron_cocoa.checkpoint.store import load_checkpoint
from megatron_cocoa.checkpoint.tensor_mapping import Mapping
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.parallel import topology

IMAGE_DECODER, TOWER = "image_decoder.", "vision_model."


@dataclass(frozen=True)
class WeightSource:
    """One of three: ``checkpoint`` if given, else the safetensors in ``folder`` if it has any, else ``seed``.

    may_be_random: whether a folder without weights means that they are to be drawn.
    mask_token_id: embedding row that starts as the mean of the used rows, unless a checkpoint brings it.
    used_rows:     rows of the embedding that the tokenizer uses.
    initializer_range: spread of random weights.
    decoder_init: where an image decoder that a checkpoint does not bring starts, see ``WarmupSettings``.
    """

    folder: Path
    checkpoint: Path | None
    seed: int
    mask_token_id: int
    used_rows: int
    may_be_random: bool = False
    initializer_range: float = 0.02
    decoder_init: Literal["middle_layer", "random"] = "middle_layer"

    @property
    def has_safetensors(self) -> bool:
        return any(self.folder.glob("*.safetensors"))

    def check(self) -> None:
        """Look for the weights, before anything is built.

        Raises:
            ValueError: if the checkpoint or a file of the folder is missing or cut short, or the folder has no weights
                and may not.
        """
        if self.checkpoint is not None:
            if (self.checkpoint / "config.json").is_file() and not (self.checkpoint / INFO_FILE).is_file():
                raise ValueError(
                    f"{self.checkpoint} is a Hugging Face folder, model.load takes a Megatron checkpoint: name it as "
                    f"model.path instead"
                )
            read_info(self.checkpoint)
        elif self.has_safetensors:
            HuggingFaceReader(self.folder).close()
        elif not self.may_be_random:
            try:
                HuggingFaceReader(self.folder).close()
            except ValueError as error:
                raise ValueError(f"{error}; model.random_weights true draws weights instead of reading them") from error

    def describe(self) -> str:
        if self.checkpoint is not None:
            return f"Megatron checkpoint {self.checkpoint}"
        return f"Hugging Face folder {self.folder}" if self.has_safetensors else f"random weights of seed {self.seed}"


def load_initial_weights(chunks: Sequence[nn.Module], table: NameTable, source: WeightSource) -> None:
    """Fill this rank's bare chunks; every rank calls it.

    An image decoder that the source does not bring starts from the language model's middle layer (several from
    consecutive ones), and its linear map from N(0, 0.02), as in MoCa (arXiv 2506.23115), or from random layers. A
    learned temperature keeps the value it was built with.

    Raises:
        ValueError: if the source is incomplete or does not fit, or the image decoder has more layers than it can copy.
    """
    if source.checkpoint is not None:
        with TorchDistReader(source.checkpoint) as reader:
            tensors = StackedTensors(reader)
            info = _load_checkpoint(chunks, table, source.checkpoint, tensors)
            if info.stage == IMPORT_STAGE:
                _set_mask_row(chunks, source)
            elif info.mask_token_id != source.mask_token_id:
                raise ValueError(
                    f"{source.checkpoint} was trained with mask token id {info.mask_token_id}, this run's tokenizer "
                    f"gives {source.mask_token_id}: use the tokenizer folder of that run, or set model.mask_token"
                )
            if info.stage != "warmup":
                _start_image_decoder(chunks, table, lambda m: tensors(m.megatron_name), source)
        return
    place = topology.tensor_parallel_place()
    mean = dict(mean_row=source.mask_token_id, used_rows=source.used_rows)
    if source.has_safetensors:
        with HuggingFaceReader(source.folder) as reader:
            load_huggingface_weights(chunks, reader, table, **place, **mean)
            _start_image_decoder(chunks, table, reader.read, source)
    else:
        source.check()
        read = RandomWeights(seed=source.seed, initializer_range=source.initializer_range).read
        fill_parameters(chunks, read, table, **place, **mean)
        _start_image_decoder(chunks, table, read, source)


@torch.no_grad()
def _load_checkpoint(
    chunks: Sequence[nn.Module], table: NameTable, path: Path, tensors: StackedTensors
) -> CheckpointInfo:
    """Load the weights, whatever the tower's ffn is padded to in the checkpoint: layouts differ in what they need.

    Parameters in FP8 are set one by one as well: Megatron's loader would round them by a scale that is not theirs.
    """
    width = tensors.vision_ffn_multiple
    padded = [m for m in table if m.megatron_name.startswith(TOWER) and isinstance(m.layout, (Gated, Padded))]
    repadded = {m.megatron_name for m in padded if width not in (1, m.layout.padded_width)}
    singly = [_set_singly(chunk, repadded, tensors) for chunk in chunks]
    left_out = frozenset(local_name for chunk in singly for local_name in chunk)
    info = load_checkpoint(path, chunks, may_be_missing=(IMAGE_DECODER, LOGIT_SCALE), left_out=left_out)
    for chunk, names in zip(chunks, singly):
        for local_name, name in names.items():
            mapping, whole = table.megatron_to_hf(name), tensors(name)
            if name in repadded:
                whole = mapping.merge(mapping.padded_to(width).split(whole))
            copy_shard(chunk.get_parameter(local_name), mapping, whole, **topology.tensor_parallel_place())
    return info


def _set_singly(chunk: nn.Module, repadded: set[str], tensors: StackedTensors) -> dict[str, str]:
    """Global names, by this chunk's own, of what the checkpoint has and Megatron's loader must not set."""
    names = {local_name: global_name(chunk, local_name) for local_name, _ in chunk.named_parameters()}
    return {
        local_name: name
        for local_name, name in names.items()
        if name in tensors.names and (name in repadded or is_float8tensor(chunk.get_parameter(local_name)))
    }


@torch.no_grad()
def _set_mask_row(chunks: Sequence[nn.Module], source: WeightSource) -> None:
    """Start the mask token's row as the mean of the used rows, as for a folder; over tensor-parallel shards.

    A tied last stage holds a copy of the embedding and does the same to it.
    """
    for chunk in chunks:
        if not (chunk.pre_process or (chunk.post_process and chunk.share_embeddings_and_output_weights)):
            continue
        weight = chunk.shared_embedding_or_output_weight()
        rows = torch.arange(weight.shape[0], device=weight.device)
        rows += topology.tensor_parallel_place()["tp_rank"] * weight.shape[0]
        others = (rows < source.used_rows) & (rows != source.mask_token_id)
        total = (weight.float() * others.unsqueeze(1)).sum(0)
        count = others.sum().float()
        for part in (total, count):
            dist.all_reduce(part, group=parallel_state.get_tensor_model_parallel_group())
        weight[rows == source.mask_token_id] = (total / count).to(weight.dtype)


def _start_image_decoder(
    chunks: Sequence[nn.Module], table: NameTable, read: Callable[[Mapping], Tensor], source: WeightSource
) -> None:
    decoder = getattr(chunks[-1], "image_decoder", None)
    if decoder is None:
        return
    number, available = len(decoder.decoder.layers), chunks[-1].architecture.text.num_hidden_layers
    is_random = source.decoder_init == "random"
    if not is_random and number > available:
        raise ValueError(
            f"warmup.decoder_layers is {number}, and the language model has {available} layers to start them from: "
            f"lower it, or set warmup.decoder_init to random"
        )
    # From the middle on, earlier where the rest of the layers are fewer.
    first = min(available // 2, available - number)
    for index, layer in enumerate(decoder.decoder.layers):
        of_layer = first + index
        if is_random:
            # The shapes of any layer there is, and names of its own to be drawn by.
            of_layer, prefix = 0, f"{IMAGE_DECODER}{index}."
            read = RandomWeights(seed=source.seed, initializer_range=source.initializer_range, prefix=prefix).read
        for name, parameter in layer.named_parameters():
            mapping = table.megatron_to_hf(f"language_model.decoder.layers.{of_layer}.{name}")
            copy_shard(parameter, mapping, read(mapping), **topology.tensor_parallel_place())
    _draw_pixel_head(decoder, source.seed)


@torch.no_grad()
def _draw_pixel_head(decoder: nn.Module, seed: int) -> None:
    head, place = decoder.pixel_head, topology.tensor_parallel_place()
    rows, columns = head.weight.shape
    whole = draw(f"{IMAGE_DECODER}pixel_head.weight", (rows * place["tp_size"], columns), seed=seed, spread=0.02)
    head.weight.copy_(whole.chunk(place["tp_size"])[place["tp_rank"]])
    head.bias.zero_()
