"""A background writer that the kernel kills ends the run, instead of holding it."""

import socket

import pytest

from tests.distributed.launch import result_of
from tests.distributed.writers import CHECKS


@pytest.mark.parametrize("check", CHECKS)
def test_a_killed_writer_ends_all_ranks_at_once(request, check):
    """Claim: every rank raises the same message, which names rank, host, signal and what to change; nothing is left, in
    the folder or for the index of a later checkpoint.

    Megatron-Core 0.16 would wait for the process for ever, and the other ranks for two hours.
    """
    found = result_of(request, check)
    (message,) = set(found["messages"])
    assert f"part of rank 1 on host {socket.gethostname()} was ended by SIGKILL" in message
    assert "runs out of memory: give it more, set data.num_workers lower" in message
    assert max(found["waited"]) < 60 and found["left"] == [[], []]
    assert found["indexed"] == [4, 4]
