"""Checks of converted checkpoints: loaded by Megatron at other layouts, saved again, and turned back.

Each case has a Hugging Face folder; one whose name begins with ``every`` goes through all layouts, the others through
one.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.checkpoint import store
from megatron_cocoa.checkpoint.bits import same_bits
from megatron_cocoa.checkpoint.huggingface import HuggingFaceReader
from megatron_cocoa.checkpoint.info import read_info
from megatron_cocoa.checkpoint.live import global_name
from megatron_cocoa.checkpoint.mapping import NameTable
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.config import ModelSettings, ParallelSettings, TrainSettings
from megatron_cocoa.conversion.hf_to_mcore import convert_hf_to_mcore, read_config
from megatron_cocoa.conversion.mcore_to_hf import convert_mcore_to_hf
from megatron_cocoa.model.build import build_model
from megatron_cocoa.parallel import topology
from tests.distributed.check import Check
from tests.distributed.folders import rank_folders
from tests.huggingface_folders import different_weights, write_model

CASES = {
    "every-tied": ("qwen2_5_vl", True, torch.bfloat16),
    "every-untied": ("qwen2_vl", False, torch.float32),
    "untied": ("qwen2_5_vl", False, torch.bfloat16),
    "tied": ("qwen2_vl", True, torch.float32),
}
LAYOUTS = {
    "dp4": dict(),
    "tp4": dict(tensor_model_parallel_size=4),
    "pp4": dict(pipeline_model_parallel_size=4),
    "pp2-vpp2": dict(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2),
    "pp2-uneven": dict(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=1),
    "tp2-pp2": dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2),
}
RESAVED = "tp2-pp2"
VISION_FFN_MULTIPLE = 16


def build(folder: Path, layout: dict, dtype: str, *, with_image_decoder: bool = False):
    settings = TrainSettings(
        model=ModelSettings(dtype=dtype, vision_ffn_multiple=VISION_FFN_MULTIPLE, transformer_impl="local"),
        parallel=ParallelSettings(**layout),
    )
    topology.set_layout(settings.parallel, seed=0)
    architecture = QwenVLArchitecture.from_huggingface(read_config(folder))
    return build_model(architecture, settings, with_image_decoder=with_image_decoder)


@torch.no_grad()
def wrong_parameters(model, folder: Path) -> list[str]:
    """Parameters of this rank that are not the shard of Hugging Face's tensors, padding rows included."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    size = parallel_state.get_tensor_model_parallel_world_size()
    config = read_config(folder)
    rows = -(-config.text_config.vocab_size // (128 * size)) * 128 * size
    table = NameTable.from_config(config, padded_vocab_size=rows, vision_ffn_multiple=VISION_FFN_MULTIPLE)
    wrong = []
    with HuggingFaceReader(folder) as reader:
        for chunk in model.bare_chunks:
            for local, parameter in chunk.named_parameters():
                mapping = table.megatron_to_hf(global_name(chunk, local))
                if not torch.equal(parameter, mapping.shard(reader.read(mapping), tp_rank=rank, tp_size=size)):
                    wrong.append(mapping.megatron_name)
    return wrong


def spoil(model) -> None:
    """No parameter may keep a right value by chance."""
    with torch.no_grad():
        for chunk in model.bare_chunks:
            for parameter in chunk.parameters():
                parameter.fill_(float("nan"))


def converted(name: str) -> dict[str, list[str]]:
    """What is wrong after each step, over all ranks; nothing where all is right."""
    with rank_folders() as (_, shared):
        found = _run_case(name, shared)
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, found)
    return {step: sum((rank.get(step, []) for rank in everyone), []) for rank in everyone for step in rank}


def _run_case(name: str, case: Path) -> dict[str, list[str]]:
    source, mcore = case / "hf", case / "mcore"
    if dist.get_rank() == 0:
        write_model(source, *CASES[name])
        convert_hf_to_mcore(source, mcore, vision_ffn_multiple=VISION_FFN_MULTIPLE)
    dist.barrier()
    with TorchDistReader(mcore) as reader:
        words = {str(reader.dtype(key)) for key in reader.keys()}
    dtype = "bf16" if words == {"torch.bfloat16"} else "fp32"
    found: dict = {}
    for layout_name, layout in LAYOUTS.items():
        if layout_name != RESAVED and not name.startswith("every"):
            continue
        model = build(source, layout, dtype)
        spoil(model)
        store.load_checkpoint(mcore, model.bare_chunks)
        found[layout_name] = wrong_parameters(model, source)
        # Megatron's own call, with its default strictness: every key and every empty state must be there.
        dist_checkpointing.load(store.sharded_state(model.bare_chunks), str(mcore))
        if layout_name == RESAVED:
            info = read_info(mcore)
            store.save_checkpoint(case / "resaved", model.bare_chunks, info)
            model = build(source, LAYOUTS["dp4"], dtype)
            store.load_checkpoint(case / "resaved", model.bare_chunks)
            found["resaved"] = wrong_parameters(model, source)
    if name == "every-tied":
        found["decoder"] = decoder_differences(case, dtype)
    if dist.get_rank() == 0:
        convert_mcore_to_hf(case / "resaved", case / "back", companions=source)
        found["layout"] = layout_differences(mcore, case / "resaved")
        found["back"] = different_weights(source, case / "back")
    return found


def layout_differences(ours: Path, megatron: Path) -> list[str]:
    """How the keys, dtypes and shapes that we wrote differ from those that Megatron writes; vocabulary rows may."""
    with TorchDistReader(ours) as first, TorchDistReader(megatron) as second:
        wrong = sorted(set(first.keys()) ^ set(second.keys()))
        for key in set(first.keys()) & set(second.keys()):
            skip = 1 if "word_embeddings" in key or "output_layer" in key else 0
            if (first.dtype(key), first.shape(key)[skip:]) != (second.dtype(key), second.shape(key)[skip:]):
                wrong.append(key)
    return wrong


@torch.no_grad()
def decoder_differences(case: Path, dtype: str) -> list[str]:
    """What an export with ``cocoa.safetensors`` and an import change of a checkpoint with an image decoder.

    It is written by Megatron at one layout and loaded, with Megatron's default strictness, at another.
    """
    source, trained, again = case / "hf", case / "trained", case / "again"
    model = build(source, LAYOUTS["tp2-pp2"], dtype, with_image_decoder=True)
    store.load_checkpoint(case / "mcore", model.bare_chunks, may_be_missing=("image_decoder.",))
    for chunk in model.bare_chunks:
        for name, parameter in chunk.named_parameters():
            if name.startswith("image_decoder."):
                parameter.normal_()
    info = replace(read_info(case / "mcore"), stage="warmup", step=3)
    store.save_checkpoint(trained, model.bare_chunks, info)
    if dist.get_rank() == 0:
        convert_mcore_to_hf(trained, case / "with_decoder", companions=source, with_cocoa_tensors=True)
        convert_hf_to_mcore(case / "with_decoder", again, vision_ffn_multiple=VISION_FFN_MULTIPLE)
    dist.barrier()
    model = build(source, LAYOUTS["tp4"], dtype, with_image_decoder=True)
    spoil(model)
    store.load_checkpoint(again, model.bare_chunks)
    dist_checkpointing.load(store.sharded_state(model.bare_chunks), str(again))
    names = [n for chunk in model.bare_chunks for n, p in chunk.named_parameters() if bool(torch.isnan(p).any())]
    with TorchDistReader(trained) as first, TorchDistReader(again) as second:
        decoder = [key for key in first.keys() if key.startswith("image_decoder.")]
        names += [key for key in decoder if not same_bits(first.read(key), second.read(key))]
    return names if decoder else ["the checkpoint holds no image decoder"]


CHECKS = {f"convert-{name}": Check(4, functools.partial(converted, name)) for name in CASES}
