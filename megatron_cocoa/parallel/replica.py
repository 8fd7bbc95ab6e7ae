"""From the one rank of a data-parallel replica that reads data to the others that compute with it.

Tensor-, context- and pipeline-parallel ranks of a replica work on the same micro-batches. The first of them reads and
decodes, and sends index tensors to all of them and pictures to those that hold the tower or the image decoder. It uses
gloo groups that nothing else uses, so that a thread can do this during the training step.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cocoa.parallel import device, topology

Audience = Literal["tower", "ends"]


class ReplicaLink:
    """This rank's end of the link. Every rank of the world must build one at the same time.

    A rank that waits for the reader gives up only after ``topology.FILE_TIMEOUT``, because the first thing that it
    waits for is the reading of all rows.

    Attributes:
        is_reader: whether this rank reads for its replica.
    """

    def __init__(self) -> None:
        rosters = _rosters()
        own = topology.data_parallel_rank()
        self._reader = rosters[own]["all"][0]
        self.is_reader = dist.get_rank() == self._reader
        self._members = rosters[own]
        groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        for roster in rosters.values():
            for ranks in roster.values():
                # Every rank takes part in the making of every group, in the same order.
                if ranks not in groups:
                    groups[ranks] = None if len(ranks) == 1 else _new_group(ranks)
        self._groups = {name: groups[ranks] for name, ranks in self._members.items()}

    def share(self, value: Any) -> Any:
        """The reader's picklable ``value`` on every rank of the replica; what the others pass is ignored."""
        if self._groups["all"] is None:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=self._reader, group=self._groups["all"], device=torch.device("cpu"))
        return holder[0]

    def share_tensor(
        self, value: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, *, to: Audience
    ) -> Tensor | None:
        """The reader's tensor on the ranks that need it and on the reader itself; None on the others.

        Args:
            value: on the reader: on the CPU.
            shape, dtype: of ``value``, known to all ranks.
            to: ``tower``: ranks of the first pipeline stage; ``ends``: of the first and of the last.
        """
        if dist.get_rank() not in self._members[to]:
            return None
        value = value.contiguous() if self.is_reader else torch.empty(shape, dtype=dtype)
        if self._groups[to] is not None and value.numel():
            dist.broadcast(value, src=self._reader, group=self._groups[to])
        return value


def _new_group(ranks: tuple[int, ...]) -> dist.ProcessGroup:
    return dist.new_group(list(ranks), timeout=topology.FILE_TIMEOUT, backend="gloo")


def _rosters() -> dict[int, dict[str, tuple[int, ...]]]:
    """By data-parallel rank: all ranks of the replica, those of its first stage, and those of its first and last
    stages, each with the reader in front.
    """
    place = [topology.data_parallel_rank(), topology.is_pipeline_first_stage(), topology.is_pipeline_last_stage()]
    own = torch.tensor(place, dtype=torch.int64, device=device.device())
    places = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(places, own)
    rosters: dict[int, dict[str, tuple[int, ...]]] = {}
    table = [tuple(found.tolist()) for found in places]
    for replica in sorted({place[0] for place in table}):
        ranks = [rank for rank, place in enumerate(table) if place[0] == replica]
        rosters[replica] = {
            "all": tuple(ranks),
            "tower": tuple(sorted({ranks[0], *(rank for rank in ranks if table[rank][1])})),
            "ends": tuple(sorted({ranks[0], *(rank for rank in ranks if table[rank][1] or table[rank][2])})),
        }
    return rosters
