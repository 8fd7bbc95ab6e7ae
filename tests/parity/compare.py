"""Run one case on the ranks at hand and measure how far outputs and gradients are from Hugging Face's."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.batch import MaskKind
from megatron_cocoa.checkpoint.live import global_name
from megatron_cocoa.checkpoint.mapping import NameTable, flat_spelling
from megatron_cocoa.config import FreezeSettings, ModelSettings, ParallelSettings, RecomputeSettings, TrainSettings
from megatron_cocoa.model.language import padded_vocab_size
from megatron_cocoa.parallel import topology
from megatron_cocoa.model.build import Model, build_model
from megatron_cocoa.model.schedule import run_microbatches
from megatron_cocoa.training.data_parallel import wrap_data_parallel
from tests.parity import reference
from tests.parity.cases import Case


def settings_of(case: Case) -> TrainSettings:
    return TrainSettings(
        model=ModelSettings(dtype="fp32", make_vocab_size_divisible_by=8, **case.model),
        parallel=ParallelSettings(**case.parallel),
        recompute=RecomputeSettings(**case.recompute),
        freeze=FreezeSettings(**case.freeze),
    )


def name_table(huggingface, settings: TrainSettings) -> NameTable:
    rows = padded_vocab_size(
        huggingface.config.text_config.vocab_size,
        settings.model.make_vocab_size_divisible_by,
        settings.parallel.tensor_model_parallel_size,
    )
    return NameTable.from_config(
        huggingface.config, padded_vocab_size=rows, vision_ffn_multiple=settings.model.vision_ffn_multiple
    )


def parameters(model: Model):
    """``(global Megatron name, parameter)`` of every parameter on this rank."""
    for chunk in model.bare_chunks:
        for name, parameter in chunk.named_parameters():
            yield global_name(chunk, name), parameter


@torch.no_grad()
def copy_weights(model: Model, table: NameTable, tensors: dict[str, torch.Tensor]) -> None:
    for name, parameter in parameters(model):
        parameter.copy_(local_shard(table, name, tensors))


def local_shard(table: NameTable, name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """This rank's part of the Megatron tensor ``name`` made of Hugging Face ``tensors`` (weights or gradients)."""
    mapping = table.megatron_to_hf(name)
    whole = mapping.merge([tensors[hf] for hf in mapping.hf_names])
    return mapping.shard(
        whole,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
    )


class HuggingFaceResult:
    """Loss, hidden states and gradients of all samples, each run by itself without padding.

    The loss is the mean cross-entropy over all text rows plus a fixed random projection of each sample's last
    hidden state: it exercises token head and embedding head at once.
    """

    def __init__(self, case: Case):
        config = reference.tiny_config(case.family, tied=case.tied, key_value_heads=case.key_value_heads)
        self.model = reference.tiny_huggingface(config)
        generator = torch.Generator().manual_seed(1)
        self.samples = [reference.encode(s, config, generator) for s in reference.SAMPLES[case.samples]]
        self.probe = torch.randn(len(self.samples), config.text_config.hidden_size, generator=generator) * 0.1
        causal = case.kind is MaskKind.CAUSAL
        runs = [reference.run_huggingface(self.model, s, causal=causal) for s in self.samples]
        self.hidden, self.logits, self.positions = (list(x) for x in zip(*runs))
        self.rows = sum(int((s.token_types == 0).sum()) for s in self.samples)

    def backward(self, batches: list) -> None:
        """Gradients of the same loss that the packed batches have, labels taken from them."""
        loss = torch.zeros(())
        for batch, members in batches:
            starts = torch.tensor([0, *batch.sample_lengths]).cumsum(0)
            logits = torch.cat([self.logits[i] for i in members])
            loss = loss + torch.nn.functional.cross_entropy(
                logits[batch.text_positions], batch.text_labels, reduction="sum"
            ) / self.rows
            hidden = torch.cat([self.hidden[i] for i in members])
            loss = loss + (hidden[starts[1:] - 1] * self.probe[members]).sum()
        self.loss = loss.detach()
        loss.backward()

    def tensors(self, gradients: bool = False) -> dict[str, torch.Tensor]:
        named = {flat_spelling(n): p for n, p in self.model.named_parameters()}
        if not gradients:
            return {n: p.detach() for n, p in named.items()}
        return {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}


def make_batches(case: Case, result: HuggingFaceResult, data_parallel: int) -> list:
    """``(batch, sample indices)`` for every data-parallel rank and micro-batch, samples dealt in order."""
    parallel = case.parallel
    multiple = parallel.get("context_parallel_size", 1)
    if parallel.get("sequence_parallel"):
        multiple *= parallel["tensor_model_parallel_size"]
    groups = case.num_microbatches * data_parallel
    members = [list(range(len(result.samples)))[g::groups] for g in range(groups)]
    if any(not m for m in members):
        raise ValueError(f"{case.name}: {len(result.samples)} samples do not fill {groups} micro-batches")
    return [
        (
            reference.pack([result.samples[i] for i in m], [result.positions[i] for i in m], case.kind, multiple=multiple),
            m,
        )
        for m in members
    ]


def relative(found: torch.Tensor, wanted: torch.Tensor, floor: float = 1e-30) -> float:
    """Largest difference over the largest entry."""
    if not wanted.numel():
        return 0.0
    return float((found - wanted).abs().max() / max(float(wanted.abs().max()), floor))


def run_case(case: Case) -> dict[str, float | str]:
    """Worst relative errors over all ranks: ``hidden``, ``logits``, ``loss``, ``gradient`` and where it was worst."""
    settings = settings_of(case)
    topology.set_layout(settings.parallel, seed=0)
    result = HuggingFaceResult(case)
    table = name_table(result.model, settings)
    bare = build_model(QwenVLArchitecture.from_huggingface(result.model.config), settings, with_image_decoder=False)
    model = wrap_data_parallel(bare, settings.parallel)
    copy_weights(model, table, result.tensors())
    for chunk in model.chunks:
        chunk.zero_grad_buffer()
    size, rank = topology.data_parallel_size(), topology.data_parallel_rank()
    batches = make_batches(case, result, size)
    mine = batches[rank * case.num_microbatches : (rank + 1) * case.num_microbatches]
    result.backward(batches)
    errors = {"hidden": 0.0, "logits": 0.0}

    def loss_function(index, output, batch):
        members = mine[index][1]
        loss = output.token_nll.sum() / result.rows
        # Every context-parallel rank holds all embeddings and hands each its own rows' gradient.
        loss = loss + (output.embeddings * result.probe[members]).sum()
        wanted = torch.cat([result.hidden[i] for i in members]).detach()
        ends = torch.tensor(batch.sample_lengths).cumsum(0) - 1
        errors["hidden"] = max(errors["hidden"], relative(output.embeddings.detach(), wanted[ends]))
        return loss, loss.detach()

    run_microbatches(model, [batch for batch, _ in mine], loss_function)
    _compare_full_outputs(case, model, mine, result, errors)
    gradient, where = _worst_gradient(model, table, result)
    worst = torch.tensor([errors["hidden"], errors["logits"], gradient])
    gathered = [torch.empty_like(worst) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, worst)
    names: list = [None] * dist.get_world_size()
    dist.all_gather_object(names, where)
    at = int(torch.stack(gathered)[:, 2].argmax())
    hidden, logits, gradient = torch.stack(gathered).max(dim=0).values.tolist()
    return {"hidden": hidden, "logits": logits, "gradient": gradient, "worst": names[at]}


def _compare_full_outputs(case: Case, model: Model, mine: list, result: HuggingFaceResult, errors: dict) -> None:
    """All hidden states and logits, where one stage holds the whole model."""
    if settings_of(case).parallel.pipeline_model_parallel_size > 1:
        return
    chunk = model.bare_chunks[0]
    with torch.no_grad():
        for batch, members in mine:
            hidden = chunk(batch, return_hidden_states=True).hidden_states[: sum(batch.sample_lengths)]
            wanted = torch.cat([result.hidden[i] for i in members])
            errors["hidden"] = max(errors["hidden"], relative(hidden, wanted))
            logits = torch.cat([result.logits[i] for i in members])
            errors["logits"] = max(errors["logits"], relative(chunk.full_logits(hidden), logits))


def _worst_gradient(model: Model, table: NameTable, result: HuggingFaceResult) -> tuple[float, str]:
    gradients = result.tensors(gradients=True)
    floor = 1e-6 * max(float(g.abs().max()) for g in gradients.values())
    worst, where = 0.0, ""
    for name, parameter in parameters(model):
        if not parameter.requires_grad:
            continue
        error = relative(parameter.main_grad, local_shard(table, name, gradients), floor)
        if not error <= worst:
            worst, where = error, name
    return worst, where
