"""Converted checkpoints at other layouts."""

import pytest

from tests.distributed.converting import CASES
from tests.distributed.launch import result_of


@pytest.mark.parametrize("check", [f"convert-{name}" for name in CASES])
def test_checkpoints_load_at_every_layout(request, check):
    """Claim: Megatron loads a converted checkpoint at any TP, PP, VPP and DP with every bit, padding rows zero.

    And HF -> mcore -> load and save at TP2 x PP2 -> HF gives back every tensor, bit for bit.
    """
    found = {name: wrong for name, wrong in result_of(request, check).items() if name != "seconds"}
    expected = {"tp2-pp2", "resaved", "layout", "back"}
    if check.startswith("convert-every"):
        expected |= {"dp4", "tp4", "pp4", "pp2-vpp2", "pp2-uneven"}
    if check == "convert-every-tied":
        # An image decoder that went through a Hugging Face folder and back, from one layout to another.
        expected |= {"decoder"}
    assert found == dict.fromkeys(expected, [])
