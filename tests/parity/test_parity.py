"""Every layout against Hugging Face: outputs of all heads and the gradient of every parameter."""

import pytest

from tests.distributed.launch import result_of
from tests.parity.cases import CASES

# The project promises 1e-4 and 1e-3. What is measured is float32 rounding through tower and language model with weights
# 1.5 times the usual size, in another order of sums: 1.6e-5 and 4.6e-5 at worst. Bounds at three and six times that
# leave room for another BLAS and none for a mistake: the mildest one tried (the norms' gradients not summed under
# sequence parallelism) is off by more than 1e-1.
OUTPUT_TOLERANCE = 5e-5
GRADIENT_TOLERANCE = 3e-4


@pytest.mark.parametrize("check", CASES)
def test_layout_equals_hugging_face(request, check):
    """Claim: at this layout, for these inputs, hidden states, logits, losses, decoded pixels and all gradients are
    those of Hugging Face's model run sample by sample in one process (relative to the largest entry)."""
    errors = result_of(request, check)
    for measure in ("hidden", "logits", "loss", "pixels"):
        assert errors[measure] <= OUTPUT_TOLERANCE, (measure, errors)
    assert errors["gradient"] <= GRADIENT_TOLERANCE, errors
