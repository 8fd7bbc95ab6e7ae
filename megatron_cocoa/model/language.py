"""The language model on Megatron-Core: vocabulary-parallel embedding, decoder, and a sparse token head."""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.transformer_block import TransformerBlock, get_num_layers_to_build
from torch import Tensor

from megatron_cocoa.architecture import TextArchitecture
from megatron_cocoa.model.attention import SequenceContext
from megatron_cocoa.model.cross_entropy import vocab_parallel_nll
from megatron_cocoa.model.specs import BackendSpecProvider, block_spec
from megatron_cocoa.model.transformer_configs import ModelConfigs, without_sequence_parallel


def padded_vocab_size(vocab_size: int, multiple: int, tensor_parallel: int) -> int:
    """Rows of the embedding after padding to ``multiple * tensor_parallel``, as in Megatron-LM."""
    step = multiple * tensor_parallel
    return -(-vocab_size // step) * step


class LanguageModel(LanguageModule):
    """One pipeline stage (and virtual chunk) of the language model.

    Args:
        architecture: the language model's numbers.
        configs: Megatron configs; ``language`` is used.
        provider: local or Transformer Engine modules.
        tied: whether the output layer is the embedding matrix.
        vocab_multiple: see ``padded_vocab_size``.
        pre_process: this chunk holds the embedding.
        post_process: this chunk holds the final norm and the output layer.
        vp_stage: virtual chunk of this pipeline rank, None without interleaving.
    """

    def __init__(
        self,
        architecture: TextArchitecture,
        configs: ModelConfigs,
        provider: BackendSpecProvider,
        *,
        tied: bool,
        vocab_multiple: int,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
    ):
        config = configs.language
        groups = ProcessGroupCollection.use_mpu_process_groups()
        super().__init__(config=config, pg_collection=groups)
        self.vp_stage = vp_stage
        self.pre_process, self.post_process = pre_process, post_process
        self.share_embeddings_and_output_weights = tied
        self.vocab_size = architecture.vocab_size
        padded = padded_vocab_size(architecture.vocab_size, vocab_multiple, groups.tp.size())
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=padded,
                max_sequence_length=architecture.max_position_embeddings,
                position_embedding_type="none",
                scatter_to_sequence_parallel=False,
                tp_group=groups.tp,
            )
        num_layers = get_num_layers_to_build(config, vp_stage, groups.pp.rank())
        self.decoder = TransformerBlock(
            config=config,
            spec=block_spec(provider, config, num_layers),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = ColumnParallelLinear(
                config.hidden_size,
                padded,
                config=without_sequence_parallel(config),
                init_method=config.init_method,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process and tied,
                tp_group=groups.tp,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def embed(self, input_ids: Tensor) -> Tensor:
        """Word embeddings ``(tokens, 1, hidden)`` of ``(tokens,)`` ids: full rows on every tensor-parallel rank."""
        return self.embedding(input_ids=input_ids.unsqueeze(0), position_ids=None)

    def forward(self, hidden_states: Tensor | None, context: SequenceContext) -> Tensor:
        """Run this stage's layers (and the final norm on the last one).

        Args:
            hidden_states: ``(tokens_local, 1, hidden)`` on the first stage; later stages take theirs from
                ``decoder.set_input_tensor``, as Megatron's schedules do.
            context: segments and rotary tables of the whole pack.
        """
        return self.decoder(hidden_states=hidden_states, attention_mask=None, packed_seq_params=context)

    def logits(self, hidden_rows: Tensor) -> Tensor:
        """Scores over the vocabulary.

        Args:
            hidden_rows: ``(rows, hidden)`` after the final norm, whole rows on every tensor-parallel rank.

        Returns:
            ``(rows, padded_vocab / tensor_parallel)``: this rank's slice. Padding columns hold whatever the padding
            rows of the matrix give.
        """
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if weight is not None and self.pre_process:
            weight = _WithoutWaiting.apply(weight)
        logits, _ = self.output_layer(hidden_rows.unsqueeze(1), weight=weight)
        return logits.squeeze(1)

    def token_nll(self, hidden_rows: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of the supervised positions alone.

        Args:
            hidden_rows: ``(supervised, hidden)``.
            labels: int64 ``(supervised,)``.

        Returns:
            float32 ``(supervised,)`` in nats, the same on every tensor-parallel rank.
        """
        logits = self.logits(hidden_rows)
        return vocab_parallel_nll(logits, labels, vocab_size=self.vocab_size, group=self.tp_group)


class _WithoutWaiting(torch.autograd.Function):
    """The embedding matrix as output layer, whose gradient is added to DDP's FP32 buffer as soon as it is known.

    Autograd hands a parameter the sum over its uses. The matrix is the first and the last to be read, so that the
    output layer's gradient, as large as the matrix, would lie there through the backward pass of all layers. Without
    DDP, or where a hook changes the gradient (frozen rows), it takes autograd's way.
    """

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor | None:
        if not hasattr(ctx.weight, "main_grad") or ctx.weight._backward_hooks:
            return gradient
        ctx.weight.main_grad.add_(gradient)
        return None
