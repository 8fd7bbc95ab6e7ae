"""Adapters in a stage: put on its initial weights, and handed over with its checkpoint."""

from __future__ import annotations

from pathlib import Path

from megatron_cocoa.checkpoint.adapter_export import export_adapters
from megatron_cocoa.checkpoint.adapter_mapping import adapter_mappings
from megatron_cocoa.checkpoint.adapter_weights import draw_adapters, gather_adapters, num_parameters
from megatron_cocoa.model.adapters import attach_adapters, merge_adapters
from megatron_cocoa.model.build import Model
from megatron_cocoa.parallel import topology
from megatron_cocoa.parallel.collectives import on_first_rank
from megatron_cocoa.recipes.context import RunContext
from megatron_cocoa.recipes.output_folder import ADAPTER_FOLDER


def add_adapters(context: RunContext, model: Model, stage: str) -> tuple[int, int]:
    """Put freshly drawn adapters on a bare model whose weights are loaded; does nothing under ``adapter.kind none``.

    Returns:
        Number of trainable values of the adapters on the language model and on the tower, over all ranks. The image
        decoder and the mask token's row train as well and are not counted.

    Raises:
        ValueError: if the targets do not fit the model.
    """
    settings = context.settings
    if not settings.adapter.is_used:
        return 0, 0
    attach_adapters(model, settings, mask_token_id=context.bundle.mask_token_id)
    mappings = adapter_mappings(context.table, settings.adapter)
    draw_adapters(model.bare_chunks, mappings, settings.adapter, seed=settings.seed)
    language = num_parameters(tuple(m for m in mappings if m.megatron_name.startswith("language_model.")))
    count = num_parameters(mappings)
    if topology.is_first_rank():
        share = count / num_parameters(tuple(context.table))
        modules = len({name.rpartition(".lora_")[0] for mapping in mappings for name in mapping.hf_names})
        what = f"{settings.adapter.kind} adapters of rank {settings.adapter.rank} on {modules} modules"
        print(f"Stage {stage}: {what} train {count:,} values, {share:.2%} of the model's", flush=True)
    return language, count - language


def hand_over_adapters(context: RunContext, model: Model, folder: Path, *, checkpoint: Path | None) -> None:
    """Export a stage's adapters to ``folder/adapter`` and merge them, so that its checkpoint is an ordinary one.

    Args:
        context: of the run.
        model: trained; without adapters nothing happens. Every rank calls this.
        folder: of the stage.
        checkpoint: the weights that the stage started from; None where the run started.

    Raises:
        ValueError: on every rank, if the folder cannot be written.
    """
    settings = context.settings.adapter
    if not settings.is_used:
        return
    if settings.export:
        tensors = gather_adapters(model.bare_chunks, adapter_mappings(context.table, settings))
        source = context.weight_source(checkpoint)
        base = source.folder if source.checkpoint is None else source.checkpoint

        def export() -> None:
            context.owner.check()
            export_adapters(folder / ADAPTER_FOLDER, tensors, settings, base_model=str(base))

        on_first_rank(export, f"the adapters could not be written to {folder / ADAPTER_FOLDER}")
    merge_adapters(model)
