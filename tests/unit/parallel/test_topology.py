"""What a launcher says about a process, and degrees that do not fit the world."""

import os
import resource
from contextlib import ExitStack

import pytest
import torch.distributed as dist

from megatron_cocoa.config import ParallelSettings
from megatron_cocoa.parallel import topology
from megatron_cocoa.parallel.topology import LaunchInfo


def test_launch_info_reads_torchruns_environment():
    """Claim: under torchrun a process knows its place; without it, it is alone."""
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert LaunchInfo.from_environment(environment) == LaunchInfo(rank=5, world_size=8, local_rank=1)
    torchrun = {"TORCHELASTIC_RUN_ID": "a1", "TORCHELASTIC_RESTART_COUNT": "2"}
    slurm = {"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "0"}
    launch = LaunchInfo.from_environment(torchrun | slurm)
    assert (launch.jobs, launch.restarted) == (("torchelastic a1", "slurm 77"), ("torchelastic a1",))
    # What all launches without a name are called tells none from another.
    launch = LaunchInfo.from_environment(torchrun | {"TORCHELASTIC_RUN_ID": "none"})
    assert (launch.jobs, launch.restarted) == ((), ())
    assert LaunchInfo.from_environment({}) == LaunchInfo(rank=0, world_size=1, local_rank=0)


@pytest.mark.parametrize(
    "ranks, restarts, shared, warned",
    [("2", "3", "True", True), ("2", "3", "False", False), ("2", "0", "True", False), ("1", "3", "True", False)],
)
def test_a_store_that_restarts_share_is_seen(ranks, restarts, shared, warned):
    """Claim: torchrun's store is a danger where several ranks may be restarted and find what others left there."""
    torchrun = {"TORCHELASTIC_MAX_RESTARTS": restarts, "TORCHELASTIC_USE_AGENT_STORE": shared}
    assert LaunchInfo.from_environment(torchrun | {"WORLD_SIZE": ranks}).shares_store == warned


def test_a_launcher_is_known_again_and_told_from_others(monkeypatch):
    """Claim: processes that one torchrun starts and restarts name it alike, those of another one otherwise."""
    torchrun = {"TORCHELASTIC_RUN_ID": "none"}
    launcher = LaunchInfo.from_environment(torchrun).launcher
    again = LaunchInfo.from_environment(torchrun | {"TORCHELASTIC_RESTART_COUNT": "1"}).launcher
    assert len(launcher) == 32 and again == launcher
    process = topology.os.getpid()
    monkeypatch.setattr(topology.os, "getppid", lambda: process)
    assert LaunchInfo.from_environment(torchrun).launcher != launcher
    monkeypatch.setattr(topology.os, "getppid", lambda: -1)
    assert LaunchInfo.from_environment(torchrun).launcher is None, "where Linux hides the process"


@pytest.mark.parametrize("world_size, wanted", [(8, 1), (16, 2), (64, 8)])
def test_data_parallel_size_is_what_remains(world_size, wanted):
    """Claim: replicas are the world over tensor x pipeline x context."""
    parallel = ParallelSettings(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, context_parallel_size=2
    )
    assert parallel.data_parallel_size(world_size) == wanted


def test_degrees_that_do_not_divide_the_world_are_refused_before_any_process_group():
    """Claim: a wrong number of ranks costs a message with all the numbers, not a hanging rendezvous."""
    parallel = ParallelSettings(tensor_model_parallel_size=4, pipeline_model_parallel_size=3)
    message = (
        r"8 rank\(s\) cannot be divided into replicas of 12 \(tensor 4 x pipeline 3 x context 1\): "
        r"start a multiple of 12 ranks"
    )
    before = dist.is_initialized()
    with pytest.raises(ValueError, match=message):
        topology.initialize(parallel, LaunchInfo(rank=0, world_size=8, local_rank=0), seed=0)
    assert dist.is_initialized() == before


def test_a_rank_may_hold_all_files_open_that_the_system_allows():
    """Claim: a shell's limit does not end a run of many ranks, each of which gloo connects with all others."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ExitStack() as opened:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(128, limits[1]), limits[1]))
            topology.initialize(ParallelSettings(), LaunchInfo(rank=0, world_size=1, local_rank=0), seed=0)
            for _ in range(256):
                opened.enter_context(open(os.devnull))
        finally:
            topology.shutdown()
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
