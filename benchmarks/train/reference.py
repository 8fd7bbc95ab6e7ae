"""The other side: Hugging Face's model by the published recipe, written as plainly and fairly as it goes.

Padded batches, a dense n x n mask through SDPA, logits of every position, one process. What can be had for nothing is
had: positions, masks and pixels are made before the clock runs, masks are additive in the model's dtype (a Boolean
one would be converted in each layer) and left out where nothing is padded, the image decoder's last linear sees
masked units alone, AdamW is torch's fused one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen2_5_VLForConditionalGeneration

from benchmarks.train.examples import Example
from megatron_cocoa.model.workload import Workload

IGNORED = -100


@dataclass(frozen=True)
class PaddedBatch:
    """``rows`` samples, each padded to the longest.

    mask:      additive ``(rows, 1, n, n)``, or None where nothing is padded.
    labels:    int64 ``(rows, n)`` of the prediction made *at* each place, ``IGNORED`` elsewhere.
    units:     ``(row, column)`` of masked units, and their pixels.
    bridges:   int64 ``(rows,)``.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor | None
    pixels: Tensor | None
    grids: Tensor | None
    labels: Tensor | None = None
    units: tuple[Tensor, Tensor] | None = None
    unit_targets: Tensor | None = None
    bridges: Tensor | None = None
    num_masked_units: int = 0


class ImageDecoder(nn.Module):
    """One decoder layer, which starts as the middle one, and a linear map to pixels."""

    def __init__(self, model, pixel_head: dict[str, Tensor]) -> None:
        super().__init__()
        layers = model.model.language_model.layers
        self.layer = type(layers[0])(model.config.text_config, 0).to(model.dtype)
        self.layer.self_attn.is_causal = False
        self.layer.load_state_dict(layers[len(layers) // 2].state_dict())
        self.pixel_head = nn.Linear(pixel_head["weight"].shape[1], pixel_head["weight"].shape[0], dtype=model.dtype)
        self.pixel_head.load_state_dict(pixel_head)


class Reference:
    """Model and optimizer of one stage.

    Args:
        folder: of Hugging Face weights and config.
        config: of the same.
        stage: of ``config.STAGES``.
        stage_settings, optimizer_settings: of a run.
        pixel_head: weight and bias of our image decoder's last linear, in stage ``warmup``.
        target: device.
        dtype: of weights and activations.

    ``keep_gradients`` leaves them in memory between steps, as ours are: for measuring what stands above them.
    """

    def __init__(self, folder: Path, config, stage: str, stage_settings, optimizer_settings, pixel_head, target, dtype):
        self.stage, self.settings, self.optimizer_settings = stage, stage_settings, optimizer_settings
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation="sdpa"
        ).to(target)
        for part in (self.model.config.text_config, self.model.model.language_model.config):
            part.is_causal = False
        for layer in self.model.model.language_model.layers:
            # Where no mask is needed, and none is given, Hugging Face's SDPA asks the module instead of its config.
            layer.self_attn.is_causal = False
        self.decoder = ImageDecoder(self.model, pixel_head).to(target) if stage == "warmup" else None
        self.model.train()
        self.target = target
        own = [] if self.decoder is None else list(self.decoder.parameters())
        self.parameters = [*self.model.parameters(), *own]
        decayed = [p for p in self.parameters if p.dim() > 1]
        plain = [p for p in self.parameters if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                dict(params=decayed, weight_decay=optimizer_settings.weight_decay),
                dict(params=plain, weight_decay=0.0),
            ],
            lr=0.0,
            betas=(optimizer_settings.adam_beta1, optimizer_settings.adam_beta2),
            eps=optimizer_settings.adam_eps,
            fused=True,
        )
        self.steps = 0
        self.keep_gradients = False

    def batches(self, examples: Sequence[Example], samples_per_batch: int) -> list:
        """Padded batches of this many samples, in order; of pairs, queries and targets apart."""
        groups = [examples[i : i + samples_per_batch] for i in range(0, len(examples), samples_per_batch)]
        if self.stage == "contrastive":
            return [tuple(self._pad(group[i::2]) for i in (0, 1)) for group in groups]
        return [self._pad(group) for group in groups]

    def _pad(self, examples: Sequence[Example]) -> PaddedBatch:
        rows, width = len(examples), max(e.num_tokens for e in examples)
        ids = torch.zeros(rows, width, dtype=torch.int64)
        positions = torch.ones(3, rows, width, dtype=torch.int64)
        labels = torch.full((rows, width), IGNORED)
        visible = torch.zeros(rows, width, width, dtype=torch.bool)
        for i, example in enumerate(examples):
            n = example.num_tokens
            ids[i, :n], positions[:, i, :n] = example.ids, example.positions
            visible[i, :, :n] = True
            if self.stage == "bridge":
                visible[i, : example.bridge, example.bridge + 1 :] = False
                visible[i, example.bridge + 1 :, : example.bridge] = False
            if example.text_rows is not None:
                labels[i, example.text_rows] = example.text_labels
        mask = None
        if not visible.all():
            dtype = self.model.dtype
            mask = torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None]
        pixels = [e.pixels for e in examples if e.pixels is not None]
        masked = [(i, e) for i, e in enumerate(examples) if e.unit_rows is not None]
        units = [(torch.full_like(e.unit_rows, i), e.unit_rows) for i, e in masked]
        place = lambda x: None if x is None else x.to(self.target)  # noqa: E731
        return PaddedBatch(
            ids=place(ids),
            positions=place(positions),
            mask=place(mask),
            pixels=place(torch.cat(pixels).to(self.model.dtype)) if pixels else None,
            grids=place(torch.tensor([e.grid for e in examples if e.grid is not None])) if pixels else None,
            labels=place(labels) if self.stage != "contrastive" else None,
            units=tuple(place(torch.cat(x)) for x in zip(*units)) if units else None,
            unit_targets=place(torch.cat([e.unit_targets for _, e in masked])) if masked else None,
            bridges=place(torch.tensor([e.bridge for e in examples])) if self.stage == "contrastive" else None,
            num_masked_units=sum(len(rows) for _, rows in units),
        )

    def workload(self, batches: Sequence, real: Workload) -> Workload:
        """What it computes, in the terms of ``Workload``; ``real`` is the same of the samples themselves."""
        flat = [part for batch in batches for part in (batch if isinstance(batch, tuple) else (batch,))]
        tokens, pairs = sum(b.ids.numel() for b in flat), sum(b.ids.shape[0] * b.ids.shape[1] ** 2 for b in flat)
        runs_decoder = self.decoder is not None
        return Workload(
            samples=real.samples,
            tokens=tokens,
            pairs=pairs,
            patches=real.patches,
            frame_pairs=real.frame_pairs,
            window_pairs=real.window_pairs,
            read_rows=tokens,
            supervised=0 if self.stage == "contrastive" else tokens,
            masked_units=real.masked_units,
            decoder_tokens=tokens if runs_decoder else 0,
            decoder_pairs=pairs if runs_decoder else 0,
            decoder_read_rows=tokens if runs_decoder else 0,
        )

    def step(self, batches: Sequence) -> tuple[float, float]:
        """One optimizer step; its loss, and the gradient's norm before clipping."""
        self.steps += 1
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.steps)
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)
        loss = self._contrastive(batches) if self.stage == "contrastive" else self._reconstruction(batches)
        grad_norm = nn.utils.clip_grad_norm_(self.parameters, self.optimizer_settings.clip_grad)
        self.optimizer.step()
        return float(loss), float(grad_norm)

    def learning_rate(self, step: int) -> float:
        """Linear warm-up; the benchmark takes fewer steps than it lasts."""
        return self.settings.lr * min(1.0, step / self.settings.lr_warmup_steps)

    def _hidden(self, batch: PaddedBatch) -> Tensor:
        # A dictionary of ready masks is passed through; a plain None would make Hugging Face build one.
        return self.model.model(
            input_ids=batch.ids,
            position_ids=batch.positions,
            attention_mask={"full_attention": batch.mask},
            pixel_values=batch.pixels,
            image_grid_thw=batch.grids,
            use_cache=False,
        ).last_hidden_state

    def _reconstruction(self, batches: Sequence[PaddedBatch]) -> Tensor:
        total = 0.0
        text = sum(int((b.labels != IGNORED).sum()) for b in batches)
        units = sum(b.num_masked_units for b in batches)
        for batch in batches:
            hidden = self._hidden(batch)
            logits = self.model.lm_head(hidden).float()
            loss = F.cross_entropy(
                logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            loss = loss / text
            if self.decoder is not None:
                loss = loss + self.settings.mae_weight * self._pixels(hidden, batch) / units
            loss.backward()
            total = total + loss.detach()
        return total

    def _pixels(self, hidden: Tensor, batch: PaddedBatch) -> Tensor:
        rotary = self.model.model.language_model.rotary_emb(hidden, batch.positions)
        decoded = self.decoder.layer(hidden, attention_mask=batch.mask, position_embeddings=rotary)
        decoded = decoded[0] if isinstance(decoded, tuple) else decoded
        predicted = self.decoder.pixel_head(decoded[batch.units])
        return (predicted.float() - batch.unit_targets.float()).square().mean(dim=-1).sum()

    def _contrastive(self, batches: Sequence[tuple[PaddedBatch, PaddedBatch]]) -> Tensor:
        """Gradient caching (arXiv 2101.06983) where there is more than one batch."""
        embed = lambda side: F.normalize(  # noqa: E731
            self._hidden(side)[torch.arange(len(side.bridges)), side.bridges].float(), dim=-1
        )
        if len(batches) == 1:
            loss = self._info_nce(*(embed(side) for side in batches[0]))
            loss.backward()
            return loss.detach()
        with torch.no_grad():
            cached = [[embed(side) for side in pair] for pair in batches]
        leaves = [[vectors.requires_grad_() for vectors in pair] for pair in cached]
        loss = self._info_nce(*(torch.cat([pair[i] for pair in leaves]) for i in (0, 1)))
        loss.backward()
        for pair, kept in zip(batches, leaves):
            for side, vectors in zip(pair, kept):
                (embed(side) * vectors.grad).sum().backward()
        return loss.detach()

    def _info_nce(self, queries: Tensor, targets: Tensor) -> Tensor:
        logits = queries @ targets.T / self.settings.temperature
        return F.cross_entropy(logits, torch.arange(len(queries), device=logits.device))
