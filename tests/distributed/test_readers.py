"""One rank of a replica reads for all of it, on real ranks (gloo on CPU)."""

import pytest

from megatron_cocoa.config import STAGES
from tests.distributed.launch import result_of
from tests.distributed.readers import ERRORS, LAYOUTS, SHARED


@pytest.mark.parametrize("check", LAYOUTS)
def test_every_rank_gets_what_it_would_have_read_itself(request, check):
    """Claim: the hand-over changes no bit of any batch in any stage, before and after resuming."""
    assert result_of(request, check)["differing"] == []


@pytest.mark.parametrize("check", LAYOUTS)
def test_pictures_are_decoded_once_a_replica(request, check):
    """Claim: of the ranks of a replica one decodes, and the others nothing."""
    size, _, degrees = LAYOUTS[check]
    replicas = size // (
        degrees["tensor_model_parallel_size"]
        * degrees["pipeline_model_parallel_size"]
        * degrees["context_parallel_size"]
    )
    assert sum(count > 0 for count in result_of(request, check)["decoded"]) == replicas


@pytest.mark.parametrize("check", ERRORS)
def test_what_goes_wrong_in_the_reader_is_raised_on_every_rank(request, check):
    """Claim: nobody is left waiting for a reader that has failed, at the start or later."""
    said = result_of(request, check)["said"]
    assert all(len(messages) == 2 for messages in said), said
    for later, start in said:
        assert "unusable pictures" in later or "could not be used" in later
        assert "bridge.jsonl cannot be read" in start


@pytest.mark.parametrize("check", SHARED)
def test_rows_are_read_once_a_host(request, check):
    """Claim: of the readers of a host one reads the rows of each stage, and all of them map these and say the same."""
    found, readers = result_of(request, check), SHARED[check][1]
    assert sorted(found["read"]) == [0, 0, 0, len(STAGES)]
    assert all(state == found["states"][0] for state in found["states"])
    assert [rank for rank, mapped in enumerate(found["mapped"]) if mapped] == readers
