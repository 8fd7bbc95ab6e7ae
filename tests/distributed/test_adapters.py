"""Adapters at every layout: gradients equal peft's, training follows one process, stages hand merged weights over."""

import numpy as np
import pytest

from tests.distributed.adapters import HAND_OVERS, LAYOUTS, PEFT, SLOW
from tests.distributed.launch import result_of


def tiers(names) -> list:
    """Names for ``parametrize``, the slow ones marked."""
    return [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in names]


@pytest.mark.parametrize("check", tiers(PEFT))
def test_gradients_equal_pefts_at_every_layout(request, check):
    """Claim: outputs, and each rank's part of the gradient of every A, B and magnitude, are peft's, which runs in one
    process; nothing but adapters has a gradient; and the tensors come back whole from their shards, bit for bit.

    Tolerances as in one process (tests/unit/model/test_adapters.py): twice peft's own float32 error.
    """
    errors = result_of(request, check)
    assert errors["same"]
    assert np.max([errors["hidden"], errors["loss"]]) < 2e-5 and errors["gradient"] < 1e-4, errors


@pytest.mark.parametrize("check", tiers(name for name in LAYOUTS if name != "adapters-single"))
def test_training_follows_the_single_process(request, check):
    """Claim: losses, gradient norms, and the merged weights that are handed over do not depend on the layout.

    Three AdamW steps of up to 1e-3; bounds on losses and norms as in test_training.py. Weights agree to about 5e-7 of
    the largest one here; an early AdamW update is a gradient over its own size, so that rounding may show more where a
    gradient is small. A lost or wrongly reduced adapter would show as much as they move, 1e-2.
    """
    wanted, found = result_of(request, "adapters-single"), result_of(request, check)
    assert len(wanted["losses"]) == 3 and wanted["losses"][-1] != wanted["losses"][0]
    assert np.max([abs(a - b) / a for a, b in zip(wanted["losses"], found["losses"])]) < 1e-4
    assert np.max([abs(a - b) / a for a, b in zip(wanted["norms"], found["norms"])]) < 1e-3
    # A model without adapters would leave them out and go on from the weights before the training.
    assert "30 adapter tensors that are not merged" in found["refused"]
    assert wanted["weights"].keys() == found["weights"].keys()
    for name, values in wanted["weights"].items():
        scale = max(map(abs, values)) or 1.0
        worst = np.max([abs(a - b) for a, b in zip(values, found["weights"][name], strict=True)]) / scale
        assert worst < 1e-5, (name, worst)


@pytest.mark.parametrize("check", HAND_OVERS)
def test_a_stage_hands_over_merged_weights_and_its_adapters(request, check):
    """Claim: a stage's checkpoint is its initial weights with the exported adapters merged into them, by DoRA's plain
    definition; what has no adapter is unchanged; and there is an export of every adapter.

    The same FP32 sums in another order; BF16 rounds weights to 2^-9, and the products behind a row's length too.
    """
    found = result_of(request, check)
    assert found["worst"] < (2**-8 if "bf16" in check else 1e-6), found
    # 4 layers of 7 modules, 2 tower blocks of 5, and the merger's 2; A, B and magnitude of each.
    assert found["least"] > 0.01 and found["tensors"] == 3 * (4 * 7 + 2 * 5 + 2), found
