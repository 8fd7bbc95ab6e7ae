"""Megatron-Core's optimizer and learning-rate schedule from a stage's settings."""

from __future__ import annotations

import torch
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_cocoa.config import OptimizerSettings, ParallelSettings, StageSettings
from megatron_cocoa.model.build import Model


def build_optimizer(
    model: Model, stage: StageSettings, optimizer: OptimizerSettings, parallel: ParallelSettings
) -> tuple[MegatronOptimizer, OptimizerParamScheduler]:
    """AdamW over FP32 master weights, and its schedule.

    Args:
        model: chunks in Megatron's DDP.
        stage: learning rate, warm-up and length.
        optimizer: AdamW's constants, weight decay (norms and biases are exempt) and clipping.
        parallel: whether optimizer state is sharded over data-parallel ranks.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=stage.lr,
        min_lr=stage.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=model.config.bf16,
        params_dtype=model.config.params_dtype,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        overlap_param_gather=parallel.overlap_param_gather,
        fp8_recipe=model.config.fp8_recipe if model.config.fp8 else None,
    )
    built = get_megatron_optimizer(
        config,
        model.chunks,
        config_overrides=get_standard_config_overrides(config),
        use_gloo_process_groups=True,
    )
    schedule = OptimizerParamScheduler(
        built,
        init_lr=0.0,
        max_lr=stage.lr,
        min_lr=stage.min_lr,
        lr_warmup_steps=min(stage.lr_warmup_steps, stage.steps - 1),
        lr_decay_steps=stage.steps,
        lr_decay_style=stage.lr_decay_style,
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=stage.steps,
        wd_incr_style="constant",
    )
    return built, schedule


@torch.no_grad()
def round_from_master_weights(model: Model, optimizer: MegatronOptimizer) -> None:
    """Make parameters in FP8 of their master weights again; every rank calls it, after loading a checkpoint.

    A checkpoint keeps master weights whole, and parameters as they were rounded; loaded under delayed scaling before
    their scale is, they are rounded a second time by another.
    """
    for part in optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]:
        part._copy_main_params_to_model_params()
    for chunk in model.chunks:
        # With overlap, what the ranks hold is gathered by the next step, as after each update.
        if not chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync()
