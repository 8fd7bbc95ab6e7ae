"""Qwen2-VL / Qwen2.5-VL as one pipeline stage: tower and embeddings first, layers, heads last."""

from __future__ import annotations

from dataclasses import replace

from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.batch import ModelOutput, PackedBatch
from megatron_cocoa.model.attention import SequenceContext
from megatron_cocoa.model.heads import (
    HeadRows,
    ImageDecoder,
    LocalRows,
    gather_embeddings,
    local_rows,
    padded_rows,
    whole_rows,
)
from megatron_cocoa.model.language import LanguageModel
from megatron_cocoa.model.logit_scale import bounded_logit_scale, new_logit_scale
from megatron_cocoa.model.recompute import input_of_layers
from megatron_cocoa.model.rope import mrope_tables
from megatron_cocoa.model.segments import compile_segments
from megatron_cocoa.model.specs import BackendSpecProvider
from megatron_cocoa.model.transformer_configs import ModelConfigs
from megatron_cocoa.model.vision import VisionModel
from megatron_cocoa.parallel.collectives import gather_rows


class QwenVL(MegatronModule):
    """One pipeline stage (and virtual chunk) of the model.

    Args:
        architecture: shapes of tower and language model.
        configs: Megatron configs at this layout.
        provider: local or Transformer Engine modules.
        vocab_multiple: padding of the vocabulary, see ``padded_vocab_size``.
        pre_process: this chunk holds tower and embedding.
        post_process: this chunk holds final norm and heads.
        with_image_decoder: build the MAE decoder on the last stage (stage ``warmup`` only).
        learned_temperature: initial value of a temperature that trains, held by the last stage; None trains none.
        vp_stage: virtual chunk, None without interleaving.
        tower_provider: the tower's modules; None takes ``provider``. Its attention may run on another backend.
        row_multiple: the number of rows that are read from the last layer is padded to a multiple of this: under
            sequence parallelism tensor-parallel ranks hold equal parts, and FP8 kernels take whole blocks.
    """

    def __init__(
        self,
        architecture: QwenVLArchitecture,
        configs: ModelConfigs,
        provider: BackendSpecProvider,
        *,
        vocab_multiple: int,
        pre_process: bool = True,
        post_process: bool = True,
        with_image_decoder: bool = False,
        learned_temperature: float | None = None,
        vp_stage: int | None = None,
        tower_provider: BackendSpecProvider | None = None,
        row_multiple: int = 1,
    ):
        super().__init__(config=configs.language)
        self.model_type = ModelType.encoder_or_decoder
        self.architecture = architecture
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = architecture.tie_word_embeddings
        self.row_multiple = row_multiple
        self.context_group = ProcessGroupCollection.use_mpu_process_groups().cp
        if pre_process:
            self.vision_model = VisionModel(architecture.vision, configs, tower_provider or provider)
        self.language_model = LanguageModel(
            architecture.text,
            configs,
            provider,
            tied=architecture.tie_word_embeddings,
            vocab_multiple=vocab_multiple,
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=vp_stage,
        )
        self.image_decoder = None
        if post_process and with_image_decoder:
            self.image_decoder = ImageDecoder(architecture, configs, provider, row_multiple=row_multiple)
        self.logit_scale = None
        if post_process and learned_temperature is not None:
            self.logit_scale = new_logit_scale(learned_temperature)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Megatron's schedules hand the previous stage's hidden states over through here."""
        single = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.language_model.decoder.set_input_tensor(single)

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The tied matrix, where Megatron's gradient all-reduce between first and last stage looks for it."""
        return self.language_model.shared_embedding_or_output_weight()

    def forward(self, batch: PackedBatch, *, return_hidden_states: bool = False) -> Tensor | ModelOutput:
        """Run this stage on one micro-batch.

        Args:
            batch: the whole micro-batch, on the device; the same on every rank of a data-parallel replica
                (``pixel_values`` are needed on the first stage only, ``unit_targets`` on the last).
            return_hidden_states: also gather all final hidden states (tests, inspection).

        Returns:
            Hidden states for the next stage, ``(tokens_local, 1, hidden)``, or on the last stage a ``ModelOutput``.
        """
        rows = local_rows(batch.num_tokens, self.context_group)
        context = self._context(batch)
        hidden_states = self._embed(batch, rows) if self.pre_process else None
        if not self.post_process:
            return self.language_model(hidden_states, context)
        reads = HeadRows.of(batch, rows)
        reads_all = return_hidden_states or (reads.units is not None and self.image_decoder is not None)
        if not reads_all:
            read = padded_rows(reads.language, self.row_multiple)
            context = replace(context, read_rows=read, last_layer=self.config.num_layers)
        hidden_states = self.language_model(hidden_states, context)
        hidden_rows = whole_rows(hidden_states, self.config.sequence_parallel)
        read_rows = hidden_rows.index_select(0, reads.language) if reads_all else hidden_rows
        output = self._heads(batch, reads, context, hidden_states, read_rows)
        if return_hidden_states:
            shares = (hidden_rows.shape[0],) * self.context_group.size()
            output.hidden_states = gather_rows(hidden_rows, shares, self.context_group)
        return output

    def _context(self, batch: PackedBatch) -> SequenceContext:
        table = compile_segments(
            batch.mask_kind, batch.sample_lengths, batch.bridge_positions, tail_length=batch.tail_length
        )
        cos, sin = mrope_tables(batch.position_ids, self.architecture.text, self.config.params_dtype)
        return SequenceContext(segments=table, cos=cos, sin=sin)

    def _embed(self, batch: PackedBatch, rows: LocalRows) -> Tensor:
        """Word embeddings with image features in their places, sharded as the layers want them.

        The merge happens before any sharding, so that features may lie anywhere in the pack; the tower's
        gradient then arrives whole on every tensor-parallel rank and in parts over context parallel.
        """
        embeddings = self.language_model.embed(batch.input_ids)
        features = self.vision_model(batch.pixel_values, batch.grid_thw).to(embeddings.dtype)
        positions = batch.input_ids.new_zeros(0) if batch.feature_positions is None else batch.feature_positions
        if positions.shape[0] != features.shape[0]:
            raise ValueError(f"{positions.shape[0]} image placeholder tokens for {features.shape[0]} image features")
        embeddings = embeddings.index_copy(0, positions, features.unsqueeze(1))
        if not rows.is_whole:
            embeddings = embeddings[rows.first : rows.last]
        if self.config.sequence_parallel:
            self._check_sequence_parallel(embeddings.shape[0])
            embeddings = scatter_to_sequence_parallel_region(embeddings)
        return input_of_layers(embeddings.contiguous(), self.language_model.decoder)

    def _check_sequence_parallel(self, tokens: int) -> None:
        size = self.config.tensor_model_parallel_size
        if tokens % size:
            raise ValueError(
                f"{tokens} tokens per context-parallel rank are not divisible by tensor parallel size {size}, which "
                f"sequence parallelism needs: pad packs with a tail segment"
            )

    def _heads(
        self, batch: PackedBatch, reads: HeadRows, context: SequenceContext, hidden_states: Tensor, read_rows: Tensor
    ) -> ModelOutput:
        """Run the heads that the batch has positions for.

        Args:
            reads: of this batch.
            context: of the whole pack.
            hidden_states: what the last layer returned, which the image decoder goes on from.
            read_rows: ``(rows_read + padding, hidden)``, whole on every tensor-parallel rank: the rows of
                ``reads.language`` in order, then padding.
        """
        output = ModelOutput()
        text_rows, embedding_rows, _ = read_rows.tensor_split(reads.ends)
        if reads.text is not None:
            labels = reads.text.of(batch.text_labels)
            output.token_nll = self.language_model.token_nll(text_rows, labels)
        if reads.units is not None and self.image_decoder is not None:
            output.predicted_units = self.image_decoder(hidden_states, context, reads.units.rows)
            output.unit_targets = reads.units.of(batch.unit_targets)
            if batch.unit_patches is not None:
                output.unit_patches = reads.units.of(batch.unit_patches)
        if reads.embeddings is not None:
            total = batch.embedding_positions.shape[0]
            output.embeddings = gather_embeddings(embedding_rows, reads.embeddings.entries, total, self.context_group)
            if reads.text is None and self.language_model.output_layer.weight is not None:
                output.embeddings = output.embeddings + self._no_logits(embedding_rows)
            if self.logit_scale is not None:
                output.logit_scale = bounded_logit_scale(self.logit_scale)
        return output

    def _no_logits(self, hidden_rows: Tensor) -> Tensor:
        """Scalar zero that has read the token head's own matrix, and gives it a gradient of zeros.

        With ``overlap_grad_reduce`` Megatron's DDP expects a gradient of every parameter, and with
        ``overlap_param_gather`` it cannot gather one again whose last gathering no module has waited for.
        """
        return self.language_model.logits(hidden_rows[:0].detach()).sum()

    def full_logits(self, hidden_rows: Tensor) -> Tensor:
        """Logits over the whole vocabulary ``(rows, vocab_size)`` on the last stage; for tests and inspection."""
        logits = gather_from_tensor_model_parallel_region(self.language_model.logits(hidden_rows))
        return logits[:, : self.architecture.text.vocab_size]
