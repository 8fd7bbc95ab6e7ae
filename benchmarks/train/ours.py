"""This project's side of the training benchmark: a packed step through Megatron's schedule and optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.train.examples import Example
from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.batch import MaskKind, PackedBatch
from megatron_cocoa.checkpoint.initial import WeightSource, load_initial_weights
from megatron_cocoa.checkpoint.mapping import NameTable
from megatron_cocoa.config import TrainSettings
from megatron_cocoa.model.build import build_model
from megatron_cocoa.model.language import padded_vocab_size
from megatron_cocoa.model.workload import Workload
from megatron_cocoa.objectives import build_objective
from megatron_cocoa.parallel import device
from megatron_cocoa.training.data_parallel import wrap_data_parallel
from megatron_cocoa.training.optimizer import build_optimizer
from megatron_cocoa.training.step import forward_backward

MASK_KINDS = {"bridge": MaskKind.EOS_BRIDGED}


class Ours:
    """Model and optimizer of one stage at the layout that is initialised.

    Args:
        folder: of Hugging Face weights and config.
        config: of the same.
        stage: of ``config.STAGES``.
        settings: of a run; model, parallel, recompute, optimizer and the stage's own part count.
    """

    def __init__(self, folder: Path, config, stage: str, settings: TrainSettings) -> None:
        self.stage, self.settings = stage, settings
        self.architecture = QwenVLArchitecture.from_huggingface(config)
        bare = build_model(self.architecture, settings, with_image_decoder=stage == "warmup")
        rows = padded_vocab_size(
            self.architecture.text.vocab_size,
            settings.model.make_vocab_size_divisible_by,
            settings.parallel.tensor_model_parallel_size,
        )
        multiple = settings.model.vision_ffn_multiple
        table = NameTable.from_config(config, padded_vocab_size=rows, vision_ffn_multiple=multiple)
        vocabulary = self.architecture.text.vocab_size
        # Row 0 hides text here, as it is on disk; the mean is put into a row that no example holds.
        source = WeightSource(folder, None, seed=0, mask_token_id=vocabulary - 1, used_rows=vocabulary)
        load_initial_weights(bare.chunks, table, source)
        self.model = wrap_data_parallel(bare, settings.parallel)
        self.model.train()
        self.optimizer, self.schedule = build_optimizer(
            self.model, settings.stage(stage), settings.optimizer, settings.parallel
        )
        self.objective = build_objective(stage, settings)

    def batches(self, examples: Sequence[Example], samples_per_pack: int) -> list[PackedBatch]:
        """The examples in packs of this many, in order."""
        groups = [examples[i : i + samples_per_pack] for i in range(0, len(examples), samples_per_pack)]
        batches = [pack(group, MASK_KINDS.get(self.stage, MaskKind.BIDIRECTIONAL), self.stage) for group in groups]
        return [batch.to(device.device()) for batch in batches]

    def workload(self, batches: Sequence[PackedBatch]) -> Workload:
        return sum((Workload.of(batch, self.architecture.vision) for batch in batches), Workload())

    def step(self, batches: Sequence[PackedBatch]) -> tuple[float, float]:
        """One optimizer step, as the trainer takes it; its loss, and the gradient's norm before clipping."""
        for chunk in self.model.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        self.schedule.step(increment=1)
        loss = forward_backward(self.model, self.objective, batches)["loss"]
        _, grad_norm, _ = self.optimizer.step()
        return loss, float(grad_norm)


def pack(examples: Sequence[Example], kind: MaskKind, stage: str) -> PackedBatch:
    """One micro-batch without padding."""
    starts = torch.tensor([0, *(e.num_tokens for e in examples)]).cumsum(0)[:-1].tolist()
    rows = lambda name: _rows([getattr(e, name) for e in examples], starts)  # noqa: E731
    joined = lambda name: _joined([getattr(e, name) for e in examples])  # noqa: E731
    bridges = tuple(None if e.bridge is None else start + e.bridge for e, start in zip(examples, starts))
    pairs: dict = {}
    if stage == "contrastive":
        numbers = torch.arange(len(examples))
        pairs = dict(
            embedding_positions=torch.tensor(bridges),
            query_rows=numbers[0::2],
            target_rows=numbers[1::2],
            target_keys=numbers[1::2],
        )
    batch = PackedBatch(
        input_ids=joined("ids"),
        position_ids=torch.cat([e.positions for e in examples], dim=1),
        sample_lengths=tuple(e.num_tokens for e in examples),
        mask_kind=kind,
        bridge_positions=bridges,
        grid_thw=tuple(e.grid for e in examples if e.grid is not None),
        sample_ids=tuple(str(i) for i in range(len(examples))),
        pixel_values=joined("pixels"),
        feature_positions=rows("feature_rows"),
        text_positions=rows("text_rows"),
        text_labels=joined("text_labels"),
        unit_positions=rows("unit_rows"),
        unit_targets=joined("unit_targets"),
        **pairs,
    )
    batch.validate(spatial_merge_size=2)
    return batch


def _rows(local: list, starts: list[int]):
    found = [rows + start for rows, start in zip(local, starts) if rows is not None]
    return torch.cat(found) if found else None


def _joined(parts: list):
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None
