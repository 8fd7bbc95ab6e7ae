"""A world of one rank, and tiny models of both families with Hugging Face's weights in it."""

from __future__ import annotations

import functools
import socket
from dataclasses import dataclass

import pytest
import torch

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.batch import MaskKind
from megatron_cocoa.config import ParallelSettings
from megatron_cocoa.model.build import Model, build_model
from megatron_cocoa.parallel import topology
from tests.parity import compare, reference
from tests.parity.cases import Case


@pytest.fixture(scope="module")
def single_rank():
    """Megatron's process groups over this process alone, for one file of tests."""
    if torch.cuda.is_available():
        pytest.skip("compares on the CPU route, which a GPU forbids: hide it with CUDA_VISIBLE_DEVICES=")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "localhost")
        patch.setenv("MASTER_PORT", str(port))
        topology.initialize(ParallelSettings(), topology.LaunchInfo(0, 1, 0), seed=0)
    yield
    _tiny.cache_clear()
    topology.shutdown()


@dataclass(frozen=True)
class Tiny:
    """Our model and Hugging Face's, with the same weights."""

    model: Model
    huggingface: torch.nn.Module

    @property
    def chunk(self):
        return self.model.bare_chunks[0]

    def encode(self, samples: list[reference.Sample], kind: MaskKind, *, seed: int = 1) -> list[reference.Encoded]:
        generator = torch.Generator().manual_seed(seed)
        config = self.huggingface.config
        return [reference.encode(s, config, generator, index=i, kind=kind) for i, s in enumerate(samples)]

    def pack(self, samples: list[reference.Encoded], kind: MaskKind, **more):
        positions = [reference.huggingface_positions(self.huggingface, s) for s in samples]
        return reference.pack(samples, positions, kind, **more)

    def hidden_states(self, batch) -> torch.Tensor:
        with torch.no_grad():
            return self.chunk(batch, return_hidden_states=True).hidden_states


@functools.lru_cache
def _tiny(family: str, image_decoder: bool = False) -> Tiny:
    config = reference.tiny_config(family)
    huggingface = reference.tiny_huggingface(config)
    settings = compare.settings_of(Case("unit"))
    model = build_model(QwenVLArchitecture.from_huggingface(config), settings, with_image_decoder=image_decoder)
    tensors = {compare.flat_spelling(name): p.detach() for name, p in huggingface.named_parameters()}
    table = compare.name_table(config, settings)
    with torch.no_grad():
        for name, parameter in compare.parameters(model):
            if table.is_own(name):
                parameter.normal_(0.0, 0.1)
            else:
                parameter.copy_(compare.local_shard(table, name, tensors))
    return Tiny(model, huggingface)


@pytest.fixture(params=["qwen2_vl", "qwen2_5_vl"])
def tiny(request, single_rank) -> Tiny:
    return _tiny(request.param)


@pytest.fixture
def tiny_with_decoder(single_rank) -> Tiny:
    return _tiny("qwen2_5_vl", True)
