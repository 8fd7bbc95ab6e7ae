"""Peak dense matrix throughput of known GPUs: the denominator of FLOP/s utilisation.

Figures are NVIDIA's data sheets' without sparsity (sheets that print sparse numbers are halved). A device that is
not listed has no peak here, and then no utilisation is reported: a guessed one would look like a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cocoa.config import ModelSettings


@dataclass(frozen=True)
class Peak:
    """Dense operations per second; None where the chip has no such format.

    words: all must occur in the driver's name of the device.
    """

    words: tuple[str, ...]
    bf16: float
    fp8: float | None = None


PEAKS = (
    Peak(("H100", "PCIe"), 756e12, 1513e12),
    Peak(("H100", "NVL"), 835e12, 1671e12),
    Peak(("H100",), 989e12, 1979e12),
    Peak(("H200", "NVL"), 835e12, 1671e12),
    Peak(("GH200",), 989e12, 1979e12),
    Peak(("H200",), 989e12, 1979e12),
    Peak(("H800", "PCIe"), 756e12, 1513e12),
    Peak(("H800",), 989e12, 1979e12),
    Peak(("A100",), 312e12),
    Peak(("A800",), 312e12),
    Peak(("L40S",), 362e12, 733e12),
)
"""The first whose words all occur in the name counts."""


def peak_flops(name: str | None, model: ModelSettings) -> float | None:
    """Peak dense FLOP/s of a device in a run's precision, or None where it is not known.

    Args:
        name: from ``device.device_name()``.
        model: under ``fp8`` the FP8 peak counts, although tower and attention stay in BF16: utilisation is then
            understated, never overstated. FP32 has none: whether products run in TF32 is torch's setting.
    """
    if name is None or model.dtype != "bf16":
        return None
    for peak in PEAKS:
        if all(word.lower() in name.lower() for word in peak.words):
            return peak.fp8 if model.fp8 else peak.bf16
    return None
