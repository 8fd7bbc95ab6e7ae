"""The same adapters on Hugging Face's model, by peft, and on ours."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, get_peft_model

from megatron_cocoa.batch import MaskKind
from megatron_cocoa.checkpoint.adapter_export import peft_config
from megatron_cocoa.checkpoint.adapter_mapping import adapter_mappings, peft_name
from megatron_cocoa.checkpoint.adapter_weights import fill_adapters
from megatron_cocoa.checkpoint.live import global_name
from megatron_cocoa.checkpoint.mapping import NameTable, flat_spelling
from megatron_cocoa.checkpoint.tensor_mapping import Mapping
from megatron_cocoa.config import AdapterSettings, TrainSettings
from megatron_cocoa.model.adapters import attach_adapters
from megatron_cocoa.model.build import Model, build_model
from tests.parity import compare, reference
from tests.parity.cases import Case

SAMPLES = [reference.Sample((7,)), reference.Sample((2, (1, 4, 6), 3))]


@dataclass
class Adapted:
    """Our model and peft's with the same weights and the same adapters, whose every value is random."""

    model: Model
    peft: torch.nn.Module
    settings: TrainSettings
    table: NameTable
    mappings: tuple[Mapping, ...]
    batch: object
    encoded: list
    kind: MaskKind

    @property
    def chunk(self):
        return self.model.bare_chunks[0]


def adapter_settings(settings: AdapterSettings, **model) -> TrainSettings:
    return replace(compare.settings_of(Case("adapters", model=model)), adapter=settings)


def bare_model(tiny, settings: TrainSettings, *, image_decoder: bool = False) -> Model:
    """A model with the tiny model's weights, to which adapters may be attached."""
    model = build_model(tiny.chunk.architecture, settings, with_image_decoder=image_decoder)
    table = compare.name_table(tiny.huggingface.config, settings)
    tensors = {flat_spelling(name): p.detach() for name, p in tiny.huggingface.named_parameters()}
    with torch.no_grad():
        for name, parameter in compare.parameters(model):
            if not table.is_own(name):
                parameter.copy_(compare.local_shard(table, name, tensors))
    return model


def adapted(tiny, adapter: AdapterSettings, *, kind: MaskKind = MaskKind.BIDIRECTIONAL, **model_settings) -> Adapted:
    """Both models; A, B and magnitudes are drawn, so that no term is zero by chance."""
    settings = adapter_settings(adapter, **model_settings)
    table = compare.name_table(tiny.huggingface.config, settings)
    mappings = adapter_mappings(table, adapter)
    model = with_peft(copy.deepcopy(tiny.huggingface), mappings, adapter)
    values = randomize(model)
    ours = bare_model(tiny, settings)
    attach_adapters(ours, settings, mask_token_id=None)
    copy_adapters(ours, mappings, values)
    encoded = tiny.encode(SAMPLES, kind)
    return Adapted(ours, model, settings, table, mappings, tiny.pack(encoded, kind), encoded, kind)


def copy_adapters(model: Model, mappings: tuple[Mapping, ...], values: dict[str, torch.Tensor]) -> None:
    """Fill the adapters with this rank's part of whole tensors, by their Hugging Face names in the flat spelling."""

    def read(mapping: Mapping) -> torch.Tensor:
        return mapping.merge([values[name] for name in mapping.hf_names])

    fill_adapters(model.bare_chunks, mappings, read)


def with_peft(huggingface, mappings: tuple[Mapping, ...], adapter: AdapterSettings):
    """peft's adapters on Hugging Face's model, by the configuration that an export has."""
    shapes = {name: torch.empty(s) for m in mappings for name, s in zip(m.hf_names, m.hf_shapes)}
    config = LoraConfig(**peft_config(shapes, adapter, base_model="tiny") | {"inference_mode": False})
    model = get_peft_model(huggingface, config)
    assert peft_parameters(model).keys() == shapes.keys()
    return model


@torch.no_grad()
def randomize(model) -> dict[str, torch.Tensor]:
    """Draw every adapter value of peft's model; returns them by our names."""
    generator = torch.Generator().manual_seed(3)
    parameters = peft_parameters(model)
    for name, parameter in parameters.items():
        noise = torch.randn(parameter.shape, generator=generator)
        # A magnitude stays near the length that it starts from, as in training.
        parameter.copy_(parameter * (1 + 0.2 * noise) if "magnitude" in name else 0.1 * noise)
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def peft_parameters(model) -> dict[str, torch.nn.Parameter]:
    """peft's trainable parameters by our flat names."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            saved = name.replace(".default.weight", ".weight").replace("magnitude_vector.weight", "magnitude_vector")
            found[flat_spelling(saved.removeprefix(peft_name("")))] = parameter
    return found


def our_parts(case: Adapted, of) -> dict[str, torch.Tensor]:
    """``of(parameter)`` of every adapter parameter, taken apart into peft's tensors; one tensor-parallel rank."""
    by_name = {mapping.megatron_name: mapping for mapping in case.mappings}
    parts = {}
    for name, parameter in case.chunk.named_parameters():
        mapping = by_name.get(global_name(case.chunk, name))
        if mapping is not None:
            parts |= dict(zip(mapping.hf_names, mapping.split(of(parameter))))
    return parts


def loss_weights(case: Adapted) -> list[torch.Tensor]:
    """A fixed random projection of every hidden state, so that each output has a gradient of its own."""
    width = case.chunk.architecture.text.hidden_size
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(len(sample.input_ids), width, generator=generator) for sample in case.encoded]


def run_peft(case: Adapted) -> torch.Tensor:
    """Hidden states of all samples, one after the other, with gradients left on peft's parameters."""
    outputs = [reference.run_huggingface(case.peft.base_model.model, s, kind=case.kind)[0] for s in case.encoded]
    sum((out * weight).sum() for out, weight in zip(outputs, loss_weights(case))).backward()
    return torch.cat(outputs).detach()


def run_ours(case: Adapted) -> torch.Tensor:
    """The same for our model."""
    hidden = case.chunk(case.batch, return_hidden_states=True).hidden_states
    (hidden * torch.cat(loss_weights(case))).sum().backward()
    return hidden.detach()
