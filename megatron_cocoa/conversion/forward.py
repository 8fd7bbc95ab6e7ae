"""Whether a converted model computes what Hugging Face's does: both run in fp32 on the same inputs.

Hugging Face's model derives positions and masks by itself and runs each input alone; ours packs all inputs into one
sequence and is loaded through Megatron's own ``dist_checkpointing`` (in this project's dialect). The two are in memory
one after the other, their layers in the dtype on disk (see ``fp32_layers``).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.batch import MaskKind
from megatron_cocoa.checkpoint.huggingface import HuggingFaceReader
from megatron_cocoa.checkpoint.live import fill_parameters
from megatron_cocoa.checkpoint.mapping import NameTable
from megatron_cocoa.checkpoint.stacked import StackedTensors
from megatron_cocoa.checkpoint.tensor_mapping import Mapping
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.config import ModelSettings, TrainSettings
from megatron_cocoa.conversion.fp32_layers import held_dtype, run_in_fp32
from megatron_cocoa.conversion.hf_to_mcore import read_architecture
from megatron_cocoa.conversion.load_in_place import load_in_place
from megatron_cocoa.conversion.probe_inputs import Probe, make_probes, pack
from megatron_cocoa.model.build import Model, build_model
from megatron_cocoa.model.language import padded_vocab_size
from megatron_cocoa.parallel import device, topology

LOGIT_BOUND = 1e-4
"""Largest logit difference over the largest logit. Two correct fp32 programs differ by the order of their sums: by 1e-6
with initial weights at the 3B's depths, by 8e-6 with large random weights at four layers. One weight matrix scaled by
1.001 moves the logits of the latter by 3e-4 or more, one bias by 3e-5 or more (the comparison of bits finds it)."""

COSINE_BOUND = 1e-8
"""Bound on one minus the cosine of an embedding, taken in fp64: it is of the order of a relative difference squared."""

_KINDS = {"causal": MaskKind.CAUSAL, "bidirectional": MaskKind.BIDIRECTIONAL}
_CLASSES = {"qwen2_vl": "Qwen2VLForConditionalGeneration", "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration"}


@dataclass(frozen=True)
class Agreement:
    """How far two models are apart under one mask, over all inputs.

    Args:
        mask: ``causal`` or ``bidirectional``.
        logits: largest difference over the largest logit.
        cosine: smallest cosine between embeddings (the last token's final hidden state).
        top_token: share of positions whose highest-scored token is the same.
        ties: positions where it is not, but Hugging Face scores the two within ``LOGIT_BOUND`` of each other.
        positions: positions compared.
    """

    mask: str
    logits: float
    cosine: float
    top_token: float
    ties: int
    positions: int

    @property
    def passed(self) -> bool:
        agree = round(self.top_token * self.positions) + self.ties
        return self.logits <= LOGIT_BOUND and 1 - self.cosine <= COSINE_BOUND and agree == self.positions

    def line(self) -> str:
        """For the terminal."""
        return (
            f"{self.mask}: {'ok' if self.passed else 'FAIL'}, largest logit difference {self.logits:.2e} of the "
            f"largest logit (bound {LOGIT_BOUND:.0e}), "
            f"1 - cosine of the embedding {1 - self.cosine:.2e} (bound {COSINE_BOUND:.0e}), top token agrees at "
            f"{self.top_token:.2%} of {self.positions} positions ({self.ties} ties)"
        )


@torch.no_grad()
def compare_forward(
    huggingface: str | Path,
    megatron: str | Path,
    *,
    vision_ffn_multiple: int = 1,
    round_to: torch.dtype | None = None,
) -> list[Agreement]:
    """Run both models on text and pictures, causal and bidirectional.

    Takes the memory of one model in the dtype on disk at a time, and of the embeddings and one layer in fp32 (on a
    GPU, where ours runs if there is one, of a whole fp32 model). Starts a process group of one rank where none is
    running.

    Args:
        huggingface: model folder.
        megatron: distributed checkpoint.
        vision_ffn_multiple: the checkpoint's padding of the tower.
        round_to: dtype that all weights are rounded to first, where one of the two was cast to it.

    Raises:
        ValueError: if either cannot be loaded.
    """
    architecture = read_architecture(huggingface)
    probes = make_probes(architecture)
    wanted = _run_huggingface(Path(huggingface), architecture, probes, round_to)
    found = _run_megatron(Path(megatron), architecture, probes, vision_ffn_multiple, round_to)
    return [_compare(name, probes, *found[name], *wanted[name]) for name in _KINDS]


def _run_huggingface(
    folder: Path, architecture: QwenVLArchitecture, probes: list[Probe], round_to: torch.dtype | None
) -> dict[str, tuple[Tensor, Tensor]]:
    """Hidden states and logits of all inputs by mask. On the CPU, whose fp32 is fp32 in every kernel."""
    with HuggingFaceReader(folder) as reader:
        held = held_dtype(reader.dtypes)
    # In the dtype on disk the parameters are the files themselves, mapped into memory: a cast would add to them.
    model = getattr(transformers, _CLASSES[architecture.model_type]).from_pretrained(
        folder, dtype=held, local_files_only=True, use_safetensors=True, attn_implementation="sdpa"
    )
    model.eval()
    run_in_fp32(model, [*model.model.visual.blocks, *model.model.language_model.layers], round_to=round_to)
    results = {}
    for name, kind in _KINDS.items():
        model.model.language_model.config.is_causal = kind is MaskKind.CAUSAL
        hidden = torch.cat([_huggingface_hidden(model, probe) for probe in probes])
        results[name] = hidden, model.lm_head(hidden)
    return results


def _huggingface_hidden(model: torch.nn.Module, probe: Probe) -> Tensor:
    inputs = {"input_ids": probe.input_ids[None], "mm_token_type_ids": probe.token_types[None]}
    if probe.grids:
        inputs |= {"pixel_values": probe.pixels, "image_grid_thw": torch.tensor(probe.grids)}
    return model.model(**inputs, use_cache=False).last_hidden_state[0]


def _run_megatron(
    folder: Path,
    architecture: QwenVLArchitecture,
    probes: list[Probe],
    vision_ffn_multiple: int,
    round_to: torch.dtype | None,
) -> dict[str, tuple[Tensor, Tensor]]:
    settings = TrainSettings(
        model=ModelSettings(dtype="fp32", vision_ffn_multiple=vision_ffn_multiple, transformer_impl="local")
    )
    topology.initialize_alone()
    model = build_model(architecture, settings, with_image_decoder=False)
    chunk = model.bare_chunks[0]
    layers = [*chunk.vision_model.decoder.layers, *chunk.language_model.decoder.layers]
    with TorchDistReader(folder) as reader:
        tensors = StackedTensors(reader)
        held = held_dtype(tensors.dtypes)
        for parameter in (parameter for layer in layers for parameter in layer.parameters()):
            # What is let go here was never written to: on a CPU it has taken no memory.
            parameter.data = torch.empty_like(parameter, dtype=held)
        if tensors.dialect == "sharded":
            load_in_place(folder, model.bare_chunks)
        else:
            _fill_from_dialect(model, tensors, settings.model.make_vocab_size_divisible_by)
    model.train(False)
    run_in_fp32(chunk, layers, round_to=round_to)
    results = {}
    for name, kind in _KINDS.items():
        hidden = chunk(pack(probes, kind).to(device.device()), return_hidden_states=True).hidden_states
        results[name] = hidden.cpu(), chunk.full_logits(hidden).cpu()
    return results


def _fill_from_dialect(model: Model, tensors: StackedTensors, vocab_multiple: int) -> None:
    """Fill our model from a checkpoint of another dialect, through Hugging Face's tensors."""
    theirs = {name: m for m in NameTable(model.architecture, dialect=tensors.dialect) for name in m.hf_names}
    rows = padded_vocab_size(model.architecture.text.vocab_size, vocab_multiple, 1)

    def part(name: str) -> Tensor:
        mapping = theirs[name]
        return mapping.split(tensors(mapping.megatron_name))[mapping.hf_names.index(name)]

    def read(mapping: Mapping) -> Tensor:
        return mapping.merge([part(name) for name in mapping.hf_names])

    fill_parameters(
        model.bare_chunks, read, NameTable(model.architecture, padded_vocab_size=rows), tp_rank=0, tp_size=1
    )


def _compare(
    mask: str, probes: list[Probe], hidden: Tensor, logits: Tensor, hf_hidden: Tensor, hf_logits: Tensor
) -> Agreement:
    ends = torch.tensor([len(probe.input_ids) for probe in probes]).cumsum(0) - 1
    cosine = torch.nn.functional.cosine_similarity(hidden[ends].double(), hf_hidden[ends].double())
    scale = float(hf_logits.abs().max())
    ours, theirs = logits.argmax(dim=1), hf_logits.argmax(dim=1)
    gap = (hf_logits.amax(dim=1) - hf_logits.gather(1, ours[:, None])[:, 0]) / scale
    # A comparison with NaN is never true, so that NaN on either side fails.
    return Agreement(
        mask=mask,
        logits=float((logits - hf_logits).abs().max()) / scale,
        cosine=float(cosine.min()),
        top_token=float((ours == theirs).double().mean()),
        ties=int(((ours != theirs) & (gap <= LOGIT_BOUND)).sum()),
        positions=len(ours),
    )
