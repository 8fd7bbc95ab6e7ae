"""Process groups: which rank this is in tensor, pipeline, context and data parallel, and how it started."""

from __future__ import annotations

import contextlib
import datetime
import gc
import os
import resource
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cocoa.config import ParallelSettings
from megatron_cocoa.parallel import device
from megatron_cocoa.parallel.random_states import seed_everything

FILE_TIMEOUT = datetime.timedelta(hours=2)
"""How long ranks wait for one that reads or writes files. A rank that has ended is noticed sooner."""

_file_group: dist.ProcessGroup | None = None


@dataclass(frozen=True)
class LaunchInfo:
    """What the launcher says about this process (from torchrun's environment; without it, a single rank).

    jobs:      names of torchrun's run and of the batch system's job, which stay the same when they are restarted.
    restarted: those of ``jobs`` that this is a restart of, as far as this node knows: torchrun counts restarts on each
               node separately, without those that another node caused.
    launcher:  torchrun's process that started this one and may restart it, told from any other of any host; None
               without it.
    shares_store: torchrun may restart several ranks and shares its key-value store with them. With torch 2.13 a
               restarted rank can find addresses of before the restart there, and fail to connect.
    """

    rank: int
    world_size: int
    local_rank: int
    jobs: tuple[str, ...] = ()
    restarted: tuple[str, ...] = ()
    launcher: str | None = None
    shares_store: bool = False

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> LaunchInfo:
        # Without a name of its own each launch of torchrun is called none.
        run, job = env.get("TORCHELASTIC_RUN_ID", "none"), env.get("SLURM_JOB_ID")
        names = {"TORCHELASTIC_RESTART_COUNT": "" if run == "none" else run, "SLURM_RESTART_COUNT": job}
        named = {counter: f"{counter.partition('_')[0].lower()} {name}" for counter, name in names.items() if name}
        return cls(
            rank=int(env.get("RANK", "0")),
            world_size=int(env.get("WORLD_SIZE", "1")),
            local_rank=int(env.get("LOCAL_RANK", "0")),
            jobs=tuple(named.values()),
            restarted=tuple(name for counter, name in named.items() if int(env.get(counter, "0"))),
            launcher=_parent_process() if "TORCHELASTIC_RUN_ID" in env else None,
            shares_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            and int(env.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
            and int(env.get("WORLD_SIZE", "1")) > 1,
        )


def _parent_process() -> str | None:
    """32 digits that no other process has: by its number, its start and its host's; None where Linux hides them."""
    try:
        boot = uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        # After the name, which may hold anything, in brackets.
        started = Path(f"/proc/{os.getppid()}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, ValueError):
        return None
    return uuid.uuid5(boot, f"{os.getppid()} {started}").hex


def initialize(parallel: ParallelSettings, launch: LaunchInfo, *, seed: int) -> None:
    """Start torch.distributed, Megatron's process groups and its random states.

    Args:
        parallel: the degrees.
        launch: this process's place in the world.
        seed: base of all random states; tensor-parallel ranks draw apart where Megatron needs them to.

    Raises:
        ValueError: if the degrees do not divide the world size; before any process group exists.
    """
    parallel.data_parallel_size(launch.world_size)
    _allow_open_files()
    device.setup_device(launch.local_rank)
    if not dist.is_initialized():
        dist.init_process_group(
            device.distributed_backend(),
            # A lone process needs no meeting place, and a fixed port would keep two of them from running at once.
            store=dist.HashStore() if launch.world_size == 1 and "MASTER_ADDR" not in os.environ else None,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=datetime.timedelta(minutes=parallel.distributed_timeout_minutes),
            # No device_id: with one, every rank outside of a new group splits NCCL's world for it, members of a gloo
            # group do not, and groups of some ranks alone (``replica.py``) would leave the others waiting for them.
        )
    set_layout(parallel, seed=seed)


def _allow_open_files() -> None:
    """Let this process and those that it starts hold as many files open as the system allows.

    A gloo group holds a connection from each of its ranks to each other one: with 512 ranks, in the world's group and
    Megatron's over data parallel, these are up to 2,060 files of every rank, and shells often give 1,024.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    # The kernel may allow less than it says; then the shell's limit stays.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def initialize_alone() -> None:
    """``initialize`` a world of this process, whatever a launcher says."""
    if not dist.is_initialized():
        # A store in memory: no port that another process on this host may hold.
        dist.init_process_group(device.distributed_backend(), store=dist.HashStore(), rank=0, world_size=1)
    initialize(ParallelSettings(), LaunchInfo(rank=0, world_size=1, local_rank=0), seed=0)


def set_layout(parallel: ParallelSettings, *, seed: int) -> None:
    """Build Megatron's process groups over the running world, replacing earlier ones (tests change layouts)."""
    global _file_group
    if parallel_state.model_parallel_is_initialized():
        _forget_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=max(1, round(parallel.distributed_timeout_minutes)),
    )
    _file_group = dist.new_group(backend="gloo", timeout=FILE_TIMEOUT)
    seed_everything(seed)


def file_group() -> dist.ProcessGroup:
    """All ranks over gloo, for exchanges that wait for files: NCCL collectives would time out and end the run."""
    return _file_group


def _forget_groups() -> None:
    """Destroy all groups but the world's. Megatron only forgets its own, and each keeps threads that poll."""
    dist.barrier()
    parallel_state.destroy_model_parallel()
    gc.collect()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def shutdown() -> None:
    """Leave the process groups; the process may exit afterwards without a warning."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def tensor_parallel_place() -> dict[str, int]:
    """This rank's ``tp_rank`` and ``tp_size``, as what cuts whole tensors takes them."""
    return dict(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
    )


def data_parallel_rank() -> int:
    return parallel_state.get_data_parallel_rank()


def data_parallel_size() -> int:
    return parallel_state.get_data_parallel_world_size()


def is_pipeline_first_stage() -> bool:
    """Whether this rank holds the tower and the embeddings (whatever its virtual chunks)."""
    return parallel_state.is_pipeline_first_stage(ignore_virtual=True)


def is_pipeline_last_stage() -> bool:
    """Whether this rank holds the heads."""
    return parallel_state.is_pipeline_last_stage(ignore_virtual=True)
