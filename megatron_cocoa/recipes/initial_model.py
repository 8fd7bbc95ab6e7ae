"""The model of a run at its layout, with the weights that a stage or an evaluation starts from."""

from __future__ import annotations

from pathlib import Path

from megatron_cocoa.checkpoint.initial import load_initial_weights
from megatron_cocoa.model.build import Model, build_model
from megatron_cocoa.recipes.context import RunContext


def build_with_weights(
    context: RunContext,
    *,
    checkpoint: Path | None,
    with_image_decoder: bool,
    learned_temperature: float | None = None,
) -> Model:
    """The model at the run's layout with its initial weights, not yet wrapped for training.

    Args:
        context: of the run.
        checkpoint: weights of the previous stage; None takes those that the run starts from.
        with_image_decoder: stage ``warmup`` needs it.
        learned_temperature: see ``TrainSettings.learned_temperature``.

    Raises:
        ValueError: if the layout does not fit the model, or the weights are incomplete or of another model.
    """
    model = build_without_weights(
        context, with_image_decoder=with_image_decoder, learned_temperature=learned_temperature
    )
    load_initial_weights(model.chunks, context.table, context.weight_source(checkpoint))
    return model


def build_without_weights(
    context: RunContext, *, with_image_decoder: bool, learned_temperature: float | None = None
) -> Model:
    """The model at the run's layout, its weights not set and not yet wrapped for training."""
    return build_model(
        context.architecture,
        context.settings,
        with_image_decoder=with_image_decoder,
        mask_token_id=context.bundle.mask_token_id,
        learned_temperature=learned_temperature,
    )
