"""One rank of a host makes what all of its ranks hold, on real ranks (gloo on CPU)."""

import socket

import pytest

from tests.distributed.hosts import CASES
from tests.distributed.launch import result_of

MAKERS = {
    "host-all": [0, 0, 0, 0],
    "host-two": [0, 1, 1, 0],
    "host-lone": [0, 1],
    "host-some-want": [None, 1, None, 1],
    "host-blind": [0, 0, 2, 0],
    "host-old": [0, 0, 0],
    "host-full": [0, 1, 2],
}

SHARING = {"host-all": [[0, 1, 2, 3]], "host-two": [[0, 3], [1, 2]], "host-lone": [], "host-old": [[0, 1, 2]]}
"""Ranks that map the same memory; the others map none."""


@pytest.mark.parametrize("check", MAKERS)
def test_one_rank_of_a_host_makes_what_all_get(request, check):
    """Claim: every rank that wants it gets the value, of the first of its host's, or its own where it sees no other or
    the host gives no memory for it."""
    found, makers = result_of(request, check), MAKERS[check]
    assert found["of"] == makers and all(found["equal"]) and not any(found["said"])
    assert found["calls"] == [int(rank in makers) for rank in range(len(makers))]


@pytest.mark.parametrize("check", SHARING)
def test_the_ranks_of_a_host_map_the_same_memory(request, check):
    """Claim: arrays are shared and not copied, and cannot be changed under another rank's eyes."""
    found = result_of(request, check)
    mapped = [tuple(names) for names in found["shared"]]
    groups = [{mapped[rank] for rank in ranks} for ranks in SHARING[check]]
    assert all(len(group) == 1 and () not in group for group in groups), mapped
    assert len(set().union(*groups)) == len(groups)
    assert not any(found["writeable"][rank] for ranks in SHARING[check] for rank in ranks)
    alone = set(range(len(mapped))).difference(*SHARING[check])
    assert all(mapped[rank] == () for rank in alone)


@pytest.mark.parametrize("check", CASES)
def test_nothing_is_left(request, check):
    """Claim: once the value is gone no rank maps the memory or holds its file, after an error too."""
    assert not any(result_of(request, check)["left"])


@pytest.mark.parametrize("check, rank", [("host-fails", 2), ("host-blind-fails", 2)])
def test_what_goes_wrong_on_one_host_is_raised_on_all(request, check, rank):
    """Claim: an error of a rank that makes the value is the same error on every rank of every host, named where there
    are several; nobody waits."""
    found = result_of(request, check)
    where = f" (on host {socket.gethostname()})" if check == "host-fails" else ""
    assert found["said"] == [f"rank {rank} finds no rows{where}"] * 4
    assert found["of"] == [None] * 4
