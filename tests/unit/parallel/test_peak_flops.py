"""Peaks: known names give their data sheet's dense figure, unknown ones none."""

import pytest

from megatron_cocoa.config import ModelSettings
from megatron_cocoa.parallel.peak_flops import peak_flops

BF16, FP8, FP32 = ModelSettings(), ModelSettings(fp8="delayed"), ModelSettings(dtype="fp32")


@pytest.mark.parametrize(
    "name, bf16, fp8",
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 1979e12),
        ("NVIDIA H100 PCIe", 756e12, 1513e12),
        ("NVIDIA H100 NVL", 835e12, 1671e12),
        ("NVIDIA H200", 989e12, 1979e12),
        ("NVIDIA GH200 480GB", 989e12, 1979e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, None),
        ("Tesla T4", None, None),
        (None, None, None),
    ],
)
def test_names_of_devices_find_their_peak(name, bf16, fp8):
    """Claim: drivers' names are recognised, form factors told apart, and nothing is guessed."""
    assert peak_flops(name, BF16) == bf16
    assert peak_flops(name, FP8) == fp8
    assert peak_flops(name, FP32) is None
