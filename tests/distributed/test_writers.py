"""A background writer that the kernel kills, or that writes what is another run's by now, ends all ranks."""

import re
import socket

import pytest

from tests.distributed.launch import result_of
from tests.distributed.writers import KILLED, RECYCLED, ROUNDED, TAKEN_OVER, VALIDATED, WITHOUT_MEMORY


@pytest.mark.parametrize("check", KILLED)
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


@pytest.mark.parametrize("check", TAKEN_OVER)
def test_a_checkpoint_of_a_run_that_was_taken_over_is_not_written(request, check):
    """Claim: every rank raises the same message, which names the other run and no disk; earlier checkpoints stay."""
    found = result_of(request, check)
    (message,) = set(found["messages"])
    begun = "cannot complete the checkpoint .*: " if check.endswith("after") else ""
    assert re.match(f"{begun}another run has started in output_dir", message), message
    assert found["left"] == [["kept"], ["kept"]]


@pytest.mark.parametrize("check", RECYCLED)
def test_a_background_write_keeps_the_memory_that_it_writes_from(request, check):
    """Claim: what a checkpoint holds is the state when it was begun, wherever training takes memory in the meantime."""
    assert result_of(request, check)["written"] == [1.0] * 4 + [2.0] * 4


@pytest.mark.parametrize("check", WITHOUT_MEMORY)
def test_a_rank_without_memory_for_its_copy_ends_all_ranks(request, check):
    """Claim: every rank raises the same message with the cause, none waits for the one that failed; nothing is left."""
    found = result_of(request, check)
    (message,) = set(found["messages"])
    assert "could not be written, nothing was kept of it" in message and "CUDA error: out of memory" in message
    assert found["left"] == [[], []]


@pytest.mark.parametrize("check", ROUNDED)
def test_weights_in_fp8_are_written_as_plain_tensors(request, check):
    """Claim: whoever reads a checkpoint needs no Transformer Engine, whatever form it keeps on the host."""
    found = result_of(request, check)
    assert found["written"] == [1.0] * 8 and set(found["classes"]) == {"Tensor"}


@pytest.mark.parametrize("check", VALIDATED)
def test_how_states_are_cut_is_compared_over_ranks_once(request, check):
    """Claim: of checkpoints with the same parts, the first alone makes each rank hear of every other rank's pieces."""
    found = result_of(request, check)
    assert found["counts"] == [1, 1, 2, 2] and found["written"] == [0.5] * 4 + [1.5] * 4
