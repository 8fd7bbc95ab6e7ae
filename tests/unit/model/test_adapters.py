"""LoRA and DoRA on Megatron's fused projections equal peft's on Hugging Face's separate ones."""

import pytest

from megatron_cocoa.config import VISION_TARGETS, AdapterSettings
from tests.parity import adapters
from tests.parity.compare import relative

EVERYWHERE = dict(rank=4, alpha=6.0, dropout=0.0, vision_targets=VISION_TARGETS)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_outputs_and_gradients_equal_pefts(tiny, kind):
    """Claim: hidden states and the gradient of every A, B and magnitude are peft's, on every target of both families.

    Four layers in float32 differ from Hugging Face's by 1e-6 relative without adapters (tests/parity); adapters add
    products of the same kind, and DoRA a quotient. A swapped part or scale would show at 1e-1.
    """
    case = adapters.adapted(tiny, AdapterSettings(kind=kind, **EVERYWHERE))
    wanted, found = adapters.run_peft(case), adapters.run_ours(case)
    assert relative(found, wanted) < 1e-5
    theirs = {name: p.grad for name, p in adapters.peft_parameters(case.peft).items()}
    ours = adapters.our_parts(case, lambda parameter: parameter.grad)
    assert theirs.keys() == ours.keys() and len(ours) > 50
    errors = {name: relative(ours[name], gradient) for name, gradient in theirs.items()}
    worst = max(errors, key=errors.get)
    assert errors[worst] < 1e-4, (worst, errors[worst])
    assert all(bool(gradient.any()) for gradient in theirs.values()), "a gradient of zero compares nothing"
