"""The interface between a training stage and its loss, which makes a loss independent of how a batch is divided.

A step's batch is divided over data-parallel ranks, micro-batches and context-parallel ranks, and the pieces hold
different numbers of masked tokens. Averages over pieces would weigh a token by the piece that it happens to lie in.
So a local objective returns *sums* over the rows that it sees, divided by the count of the whole step, and the
trainer adds (never averages) losses and gradients. Objectives hold no parameters and know neither process groups nor
layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Protocol, runtime_checkable

from torch import Tensor

from megatron_cocoa.batch import MaskKind, ModelOutput, PackedBatch


@runtime_checkable
class LocalObjective(Protocol):
    """A loss that is a sum over independent units: each micro-batch can be differentiated by itself.

    name:      of the objective, for messages.
    mask_kind: the attention that the objective is defined for.
    weights:   coefficient of each term in the scalar that is backpropagated.
    """

    name: str
    mask_kind: MaskKind
    weights: Mapping[str, float]

    def counts(self, batch: PackedBatch) -> dict[str, int]:
        """Units of each term in the whole micro-batch: the same on every tensor-, pipeline- and context-parallel rank.

        Their sum over micro-batches and over data-parallel ranks (*without* context parallel) is ``totals``.
        """
        ...

    def loss(
        self, output: ModelOutput, batch: PackedBatch, totals: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This micro-batch's share of the step's loss.

        Args:
            output: head outputs for the rows on this context-parallel rank.
            batch: the whole micro-batch that they come from.
            totals: units of each term in the whole step, the summed ``counts``.

        Returns:
            ``(loss, metrics)``: the scalar to backpropagate, ``sum_t weight_t * local_sum_t / totals_t``, and
            the detached unweighted ``local_sum_t`` by term. Summed over micro-batches, data- and
            context-parallel ranks, ``loss`` is the step's loss and ``metric / totals`` the term's mean.
        """
        ...


@dataclass(frozen=True)
class PairEmbeddings:
    """The embeddings of a whole step, over *all* ranks and micro-batches; row i of each belongs to pair i.

    queries, targets: float ``(pairs, hidden)``, not normalised.
    target_keys:      int64 ``(pairs,)``, equal for equal targets; None if the batches have none.
    negatives:        float ``(pairs, hard_negatives, hidden)``; zeros where a pair has fewer. None without any.
    negative_mask:    bool ``(pairs, hard_negatives)``, True where there is a negative; given with ``negatives``.
    negative_keys:    int64 ``(pairs, hard_negatives)``, comparable with ``target_keys``.
    logit_scale:      float32 scalar, log(1 / temperature); None if the model does not learn it.
    """

    queries: Tensor
    targets: Tensor
    target_keys: Tensor | None = None
    negatives: Tensor | None = None
    negative_mask: Tensor | None = None
    negative_keys: Tensor | None = None
    logit_scale: Tensor | None = None


@runtime_checkable
class GlobalObjective(Protocol):
    """A loss that couples all samples of a step: it needs every rank's embeddings at once.

    name, mask_kind: as in ``LocalObjective``.
    """

    name: str
    mask_kind: MaskKind

    def embedding_loss(self, pairs: PairEmbeddings, *, detailed: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over the step's pairs.

        Args:
            pairs: of the whole step.
            detailed: also compute the metrics that cost too much for every step.

        Returns:
            ``(loss, metrics)``: a scalar, differentiable in the embeddings and the scale, and detached scalars over
            the whole step.
        """
        ...


def require_mask_kind(objective: LocalObjective, batch: PackedBatch) -> None:
    """Refuse a batch laid out for another objective.

    Raises:
        ValueError: because a loss under the wrong attention would train without any visible sign of it.
    """
    if batch.mask_kind != objective.mask_kind:
        raise ValueError(
            f"objective {objective.name} is defined for {objective.mask_kind.value} attention, but the batch asks "
            f"for {MaskKind(batch.mask_kind).value}: collate it for this objective's stage"
        )


def graph_zero(output: ModelOutput) -> Tensor:
    """Float32 scalar zero that is connected to the model's graph and gives it gradients of exactly zero.

    A rank without a single masked unit must still run its backward pass, or the others wait for it. The sum of
    an empty slice stays zero where ``0 * x`` would turn an infinity into NaN.

    Raises:
        ValueError: if ``output`` is empty, so that there is no graph to keep alive.
    """
    present = [v for v in (getattr(output, f.name) for f in fields(output)) if isinstance(v, Tensor)]
    if not present:
        raise ValueError(
            "the model returned no tensor, so this micro-batch has no graph to backpropagate through: the last "
            "pipeline stage must return at least one head's output, empty if need be"
        )
    source = next((v for v in present if v.requires_grad), present[0])
    return source.reshape(-1)[:0].float().sum()


def share_of_total(local_sum: Tensor, *, term: str, local_count: int, totals: Mapping[str, float]) -> Tensor:
    """``local_sum / totals[term]``; zero, with its graph, where the whole step has no unit of this term.

    Args:
        local_sum: float32 scalar over ``local_count`` units.

    Raises:
        ValueError: if ``totals`` lacks the term, or is smaller than this rank's own count.
    """
    if term not in totals:
        raise ValueError(f"totals has no entry for {term!r} (found {sorted(totals)}): pass the sums of counts()")
    total = totals[term]
    if local_count > total:
        raise ValueError(
            f"{local_count} units of {term!r} in this micro-batch, but a total of {total} over the whole step: "
            f"totals must be the sum of counts() over all micro-batches and data-parallel ranks"
        )
    return local_sum / total if total else local_sum


def require_rows(term: str, *, found: int | None, labelled: int) -> None:
    """Refuse head outputs that cannot belong to a batch with ``labelled`` units of ``term``.

    Fewer rows than labels are allowed: under context parallelism the others lie on other ranks.

    Raises:
        ValueError: if the head did not run although there are labels, or returned more rows than labels.
    """
    if found is None and labelled:
        raise ValueError(
            f"the batch has {labelled} units of {term!r}, but the model returned none: its head did not run "
            f"(return an empty tensor where a context-parallel rank holds no such row)"
        )
    if found is not None and found > labelled:
        raise ValueError(f"the model returned {found} units of {term!r} for {labelled} labels in the batch")
