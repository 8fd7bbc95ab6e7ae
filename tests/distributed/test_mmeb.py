"""The benchmark evaluation on several ranks."""

import pytest

from tests.distributed.launch import result_of

KINDS = ("evidence.json", "pred.txt", "score.json")


@pytest.mark.parametrize("check", ["mmeb-2", "mmeb-4"])
def test_ranks_change_nothing(request, check):
    """Claim: score files, predictions and cosines of 2 and 4 ranks are those of one, to the last bit."""
    wanted, found = result_of(request, "mmeb-1"), result_of(request, check)
    assert found["files"] == wanted["files"]
    assert sorted(found["files"]) == sorted(f"{t}_{k}" for t in ("i2t", "t2i") for k in KINDS)
    assert found["kept"] == ["i2t: kept", "t2i: kept"], "started again it has nothing to do"
