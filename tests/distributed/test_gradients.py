"""The gradient of every objective at every kind of layout is that of one process with one big batch."""

import pytest

from tests.distributed.gradients import LAYOUTS
from tests.distributed.launch import result_of, some_slow
from tests.distributed.uneven import OBJECTIVES

SLOW = {"gradients-dp2-pp2"}
"""Mixtures of layouts that the default tests check one by one."""


@pytest.mark.parametrize("check", some_slow(LAYOUTS, SLOW))
def test_every_objectives_gradient_equals_one_process_with_one_big_batch(request, check):
    """Claim: spreading a batch over ranks, stages and micro-batches changes no parameter's gradient.

    Also where one rank has no masked token at all and another none of the images. The reference is one forward and one
    backward by plain autograd; contrastive steps of several packs a rank take the cached path, others the direct one.
    Float32: packs of other lengths round their matrix products differently by 1e-7, which InfoNCE multiplies by
    1 / temperature = 50 at most; a gradient counted twice or divided wrongly is off by a factor.
    """
    size, packs, _ = LAYOUTS[check]
    found = result_of(request, check)
    for objective in OBJECTIVES:
        for number in packs:
            case = found[f"{objective}, {number} packs"]
            assert case["gradient"] < 1e-5 and case["loss"] < 1e-6, (objective, number, case)


@pytest.mark.parametrize("check", ["gradients-single"])
def test_cached_gradients_equal_direct_ones(request, check):
    """Claim: in one process, caching over four micro-batches gives the gradient of the graph as a whole.

    The direct path is the reference's own computation and agrees to the last bit. The cached one differs by the
    rounding of packs of other lengths, 1e-7, over the temperature of 0.02: 5e-6 would be the worst case.
    """
    found = result_of(request, check)
    for objective, (stage, _) in OBJECTIVES.items():
        if stage == "contrastive":
            assert found[f"{objective}, 1 packs"]["gradient"] == 0.0, found[f"{objective}, 1 packs"]
            assert found[f"{objective}, 4 packs"]["gradient"] < 5e-6, found[f"{objective}, 4 packs"]
