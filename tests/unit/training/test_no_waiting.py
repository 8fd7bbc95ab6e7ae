"""A step is queued on the device as a whole: the host asks it for nothing in between.

The meta device has shapes and no values, so that whatever reads a value there raises. A GPU that is asked for one
first finishes all that is queued, and is idle until the host has queued more.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.batch import MaskKind, PackedBatch
from megatron_cocoa.config import ContrastiveSettings, ModelSettings, ParallelSettings, TrainSettings
from megatron_cocoa.model import varlen, varlen_kernels
from megatron_cocoa.objectives.registry import build_objective
from megatron_cocoa.parallel import device
from megatron_cocoa.parallel.cpu_route import activate_cpu_route
from megatron_cocoa.parallel.random_states import seed_everything
from megatron_cocoa.training import step
from tests.meta_build import model_on_meta
from tests.parity import reference

LAYOUTS = {
    "single": ParallelSettings(),
    "cp2": ParallelSettings(context_parallel_size=2),
    "tp2-sp": ParallelSettings(tensor_model_parallel_size=2, sequence_parallel=True),
}
STAGES = {
    "warmup": MaskKind.BIDIRECTIONAL,
    "bridge": MaskKind.EOS_BRIDGED,
    "contrastive": MaskKind.BIDIRECTIONAL,
}
CASES = [
    ("single", "warmup", "flash"),
    ("single", "contrastive", "sdpa"),
    ("cp2", "warmup", "flash"),
    ("cp2", "bridge", "sdpa"),
    ("cp2", "contrastive", "flash"),
    ("tp2-sp", "bridge", "flash"),
]
READ, RUN = "the host reads", "a micro-batch runs"
MANY = 1000.0
"""What the host reads: more than all units of a step, as which a local objective takes it."""


def packs(stage: str) -> list[PackedBatch]:
    """Two micro-batches of five samples with pictures."""
    config = reference.tiny_config("qwen2_5_vl")
    kind, generator = STAGES[stage], torch.Generator().manual_seed(1)
    samples = [
        reference.encode(sample, config, generator, index=i, kind=kind)
        for i, sample in enumerate(reference.SAMPLES["mixed"])
    ]
    positions = [torch.arange(len(sample.input_ids)).expand(3, -1) for sample in samples]
    batch = reference.pack(samples, positions, kind, multiple=4, with_units=stage == "warmup")
    if stage != "contrastive":
        return [replace(batch, embedding_positions=None)] * 2
    text = dict(text_positions=None, text_labels=None)
    pairs = dict(query_rows=torch.tensor([0, 1]), target_rows=torch.tensor([2, 3]), target_keys=torch.tensor([5, 6]))
    hard = dict(negative_rows=torch.tensor([[4], [-1]]), negative_keys=torch.tensor([[7], [0]]))
    return [replace(batch, **text, **pairs, **hard)] * 2


def flash(query, key, value, table, scale):
    return varlen.attend_with(varlen_kernels._torch_flash, query, key, value, table, scale)


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """What the host reads from the device, and the micro-batches that run, in their order."""
    if torch.cuda.is_available():
        pytest.skip("runs Megatron's random states on the CPU route, which a GPU forbids")
    activate_cpu_route()
    happened: list[str] = []

    def read(tensor):
        if not tensor.is_meta:
            return torch._C.TensorBase.tolist(tensor)
        happened.append(READ)
        return torch.full(tensor.shape, MANY).tolist()

    monkeypatch.setattr(torch.Tensor, "tolist", read)
    return happened


@pytest.mark.parametrize("layout, stage, backend", CASES)
def test_the_device_is_read_before_and_after_a_step_alone(events, monkeypatch, layout, stage, backend):
    """Claim: forward and backward of all micro-batches, both passes of gradient caching and the loss never wait."""
    architecture = QwenVLArchitecture.from_huggingface(reference.tiny_config("qwen2_5_vl"))
    settings = TrainSettings(
        model=ModelSettings(path="unread", dtype="bf16", make_vocab_size_divisible_by=8),
        parallel=LAYOUTS[layout],
        contrastive=ContrastiveSettings(mask_equal_targets=True, symmetric=False),
    )
    with model_on_meta(architecture, settings, with_image_decoder=stage == "warmup") as model:
        seed_everything(1)
        monkeypatch.setattr(device, "device", lambda: torch.device("meta"))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
        model.chunks[0].register_forward_pre_hook(lambda *_: events.append(RUN))
        if backend == "flash":
            for module in model.chunks[0].modules():
                if hasattr(module, "attend"):
                    module.attend = flash
        metrics = step.forward_backward(model, build_objective(stage, settings), packs(stage))
    assert "loss" in metrics
    passes = [RUN] * (3 if stage == "contrastive" else 2)
    assert events == [*([] if stage == "contrastive" else [READ]), *passes, READ]
    assert all(p.grad is not None for p in model.chunks[0].parameters() if p.requires_grad)
