"""Optimizer state is put where Megatron will look for it."""

import queue

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.optimizer import Float16OptimizerWithFloat16Params, OptimizerConfig
from torch import nn

from megatron_cocoa.checkpoint.optimizer_state import load_optimizer_state, optimizer_sharded_state, spread_buckets
from megatron_cocoa.config import ParallelSettings
from megatron_cocoa.parallel import device, topology
from megatron_cocoa.parallel.adam import GroupStepAdamW


@pytest.fixture
def one_rank():
    topology.initialize(ParallelSettings(), topology.LaunchInfo(0, 1, 0), seed=0)
    yield
    topology.shutdown()


def test_buckets_stand_at_their_own_offsets():
    """Claim: what was gathered without gaps is found at the offsets that count the padding between buckets."""
    spread = spread_buckets(torch.arange(1.0, 8.0), [(0, 3), (4, 2), (8, 2)], size=12)
    assert spread.tolist() == [1, 2, 3, 0, 4, 5, 0, 0, 6, 7, 0, 0]


def test_one_bucket_stays_as_it_is():
    assert spread_buckets(torch.arange(5.0), [(0, 5)], size=8).tolist() == [0, 1, 2, 3, 4, 0, 0, 0]


@pytest.mark.parametrize("place", [0, 1], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_group_without_parameters_here_is_no_hindrance(one_rank, tmp_path, monkeypatch, place, dtype):
    """Claim: a pipeline stage resumes where only other stages have a bias, or only they have none."""
    # Megatron would start a process for it, which other tests find among this one's children.
    monkeypatch.setattr(filesystem_async, "_results_queue", queue.Queue(), raising=False)
    saved, loaded = (plain_optimizer(torch.full((4,), value, dtype=dtype), place) for value in (0.3, 0.7))
    (master,) = saved.param_groups[place]["params"]
    master.grad = torch.ones_like(master)
    saved.optimizer.step()
    # As Transformer Engine's Adam, which passes over a group without parameters.
    del saved.param_groups[1 - place]["step"]
    dist_checkpointing.save(described(saved, is_loading=False), str(tmp_path))
    state = dist_checkpointing.load(described(loaded, is_loading=True), str(tmp_path))
    load_optimizer_state(loaded, state["optimizer"])
    (found,) = loaded.param_groups[place]["params"]
    assert torch.equal(found, master)
    for name, moment in saved.optimizer.state[master].items():
        assert torch.equal(loaded.optimizer.state[found][name], moment), name
    assert [group["step"] for group in loaded.param_groups] == [1, 1], "another stage's parameters go by them"


def plain_optimizer(values: torch.Tensor, place: int) -> Float16OptimizerWithFloat16Params:
    """Of one parameter in one of two groups, as Megatron builds them on each rank."""
    keys = dict(lr_mult=1.0, is_expert_parallel=False, is_decoupled_lr=False)
    groups = [dict(params=[], wd_mult=wd_mult, **keys) for wd_mult in (1.0, 0.0)]
    groups[place]["params"] = [nn.Parameter(values.to(device.device()))]

    def fill(adam: GroupStepAdamW, config: OptimizerConfig) -> None:
        for master in adam.param_groups[place]["params"]:
            adam.state[master] = {name: torch.zeros_like(master) for name in ("exp_avg", "exp_avg_sq")}

    return Float16OptimizerWithFloat16Params(GroupStepAdamW(groups), OptimizerConfig(bf16=True), None, fill)


def described(optimizer: Float16OptimizerWithFloat16Params, *, is_loading: bool) -> dict:
    groups = optimizer.float16_groups + optimizer.fp32_from_fp32_groups
    model = {"w": ShardedTensor.from_rank_offsets("w", *sum(groups, []))}
    return {"optimizer": optimizer_sharded_state(optimizer, model, is_loading=is_loading, metadata={})}
