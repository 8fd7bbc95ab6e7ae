"""Gradient caching on real ranks: the same dropout in both passes, and one exchange a step."""

import pytest

from tests.distributed.caching import DROPOUT
from tests.distributed.launch import result_of, some_slow

SLOW = {"dropout-dp2-recompute", "dropout-pp2", "dropout-cp2"}
"""What the interleaved pipeline with recompute and tensor parallelism show, too."""


@pytest.mark.parametrize("check", some_slow(DROPOUT, SLOW))
def test_both_passes_draw_the_same_dropout(request, check):
    """Claim: every stage and virtual chunk replays its own random states, those of tensor parallelism included.

    The second pass computes the first one's embeddings to the last bit, whatever order its schedule runs the chunks
    in; without replay they are far from it, so that the comparison sees every mask. The last of the four micro-batches
    runs once, with its graph kept while the loss is computed; but where chunks are interleaved, which keep several
    graphs in the second pass, all run twice, and the loss is computed while none is kept.
    """
    found, is_interleaved = result_of(request, check), "vpp" in check
    assert found["with_replay_compared"] == (4 if is_interleaved else 3) and found["with_replay"] == 0.0, found
    assert found["loss_in_pass"] == (1 if is_interleaved else 2), found
    assert found["without_replay"] > 0.1, found


@pytest.mark.parametrize("check", ["dropout-gradients", "dropout-gradients-recompute"])
def test_cached_gradients_under_dropout_equal_one_graph(request, check):
    """Claim: with the same masks, caching gives the gradient of one graph over all micro-batches.

    Both sides run the same packs, so only sums over micro-batches are ordered differently: float32 rounding of 1e-7
    over a temperature of 0.02. With recompute the masks are drawn a third time.
    """
    found = result_of(request, check)
    assert found["gradient"] < 5e-6 and found["loss"] < 1e-6, found
    assert found["dropout_matters"] > 1e-2 and found["same_states"] == 1.0, found


@pytest.mark.parametrize("check", ["collectives-of-a-step"])
def test_the_number_of_exchanges_does_not_grow_with_micro_batches(request, check):
    """Claim: embeddings are exchanged once a step, and gradients reduced once, however many micro-batches there are.

    Two all-gathers carry vectors and keys; what else there is, is the reduction of gradients.
    """
    found = result_of(request, check)
    counts = [found[f"{packs} a rank"] for packs in (1, 2, 4)]
    assert counts[0] == counts[1] == counts[2], counts
    assert counts[0].pop("allgather_") == 2 and sum(counts[0].values()) >= 1, counts
