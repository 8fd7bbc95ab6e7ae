"""The real model of any rank of any layout, without memory and without other processes.

Megatron's process groups are built over torch's fake backend, whose collectives do nothing, and the parameters lie on
the meta device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.config import ParallelSettings, TrainSettings
from megatron_cocoa.model.build import Model, build_model
from megatron_cocoa.parallel import device, topology


@contextlib.contextmanager
def fake_world(parallel: ParallelSettings, *, pipeline_rank: int = 0) -> Iterator[None]:
    """One replica's process groups, seen from the first rank of a pipeline stage.

    It takes the place of whatever world an earlier test has left: an embedder starts one and keeps it.
    """
    topology.shutdown()
    size = parallel.model_parallel_size
    rank = pipeline_rank * size // parallel.pipeline_model_parallel_size
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def build_on_meta(
    architecture: QwenVLArchitecture, settings: TrainSettings, *, pipeline_rank: int, with_image_decoder: bool
) -> Model:
    """A pipeline rank's chunks as training builds them, on the meta device, with local layers."""
    with model_on_meta(
        architecture, settings, pipeline_rank=pipeline_rank, with_image_decoder=with_image_decoder
    ) as model:
        return model


@contextlib.contextmanager
def model_on_meta(
    architecture: QwenVLArchitecture, settings: TrainSettings, *, pipeline_rank: int = 0, with_image_decoder: bool
) -> Iterator[Model]:
    """``build_on_meta``'s model within its world, where it can run."""
    settings = replace(settings, model=replace(settings.model, transformer_impl="local", fp8=None))
    meta = torch.device("meta")
    with pytest.MonkeyPatch.context() as patch, fake_world(settings.parallel, pipeline_rank=pipeline_rank):
        # On a machine with a GPU Megatron would place its tensors there by name.
        patch.setattr(device, "has_gpu", lambda: False)
        # Megatron moves the copies of a tied matrix to the GPU before it makes them equal.
        patch.setattr(torch.Tensor, "cuda", lambda tensor, *args, **kwargs: tensor)
        with meta:
            model = build_model(
                architecture, settings, with_image_decoder=with_image_decoder, mask_token_id=7, target=meta
            )
        yield model
