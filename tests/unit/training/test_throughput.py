"""Speed metrics: plain arithmetic over the whole run's work, and no utilisation without a known peak."""

from dataclasses import replace

import pytest

from megatron_cocoa.config import AdapterSettings, FreezeSettings, ModelSettings, RecomputeSettings, TrainSettings
from megatron_cocoa.model.flops import step_flops
from megatron_cocoa.model.workload import Workload
from megatron_cocoa.training.throughput import SpeedMeter
from tests.unit.published import published_architecture

WORKLOAD = Workload(samples=64, tokens=64_000, tail_tokens=128, pairs=64 * 1000**2, tail_pairs=128**2)


def meter(device_name, **settings) -> SpeedMeter:
    settings = TrainSettings(recompute=RecomputeSettings(language="full"), **settings)
    return SpeedMeter(published_architecture("Qwen2.5-VL-7B"), settings, num_gpus=8, device_name=device_name)


def test_speed_and_utilisation_of_a_step():
    """Claim: rates are per GPU over all of them; recompute and tail show in HFU alone."""
    found = meter("NVIDIA H100 80GB HBM3").metrics(WORKLOAD, samples=32, seconds=2.0, extra_forward_passes=1)
    flops = step_flops(
        published_architecture("Qwen2.5-VL-7B"),
        WORKLOAD,
        recompute=RecomputeSettings(language="full"),
        extra_forward_passes=1,
    )
    assert found["tokens_per_second_per_gpu"] == 4000 and found["samples_per_second_per_gpu"] == 2
    assert found["tflops_per_second_per_gpu"] == pytest.approx(flops.useful / 16 / 1e12)
    assert found["mfu"] == pytest.approx(flops.useful / (16 * 989e12))
    # Useful work is three forward passes; recompute and caching repeat one each, and the tail comes on top.
    assert found["hfu"] / found["mfu"] == pytest.approx(5 / 3, rel=0.01) and found["hfu"] > found["mfu"] * 5 / 3


def test_no_utilisation_without_a_peak():
    """Claim: an unknown device, the CPU route and FP32 report speed, but no utilisation."""
    for name, model in (
        (None, ModelSettings()),
        ("Tesla T4", ModelSettings()),
        ("NVIDIA H100", ModelSettings(dtype="fp32")),
    ):
        found = meter(name, model=model).metrics(WORKLOAD, samples=32, seconds=2.0)
        assert set(found) == {
            "tokens_per_second_per_gpu", "samples_per_second_per_gpu", "tflops_per_second_per_gpu",
        }  # fmt: skip
    with pytest.raises(ValueError, match="took 0 seconds"):
        meter(None).metrics(WORKLOAD, samples=32, seconds=0)


def test_adapters_freeze_what_they_stand_beside():
    """Claim: under LoRA no weight gradient of a pretrained matrix is counted, but the adapters' own work is."""
    plain = meter(None).metrics(WORKLOAD, samples=32, seconds=2.0)["tflops_per_second_per_gpu"]
    adapted = replace(meter(None, adapter=AdapterSettings(kind="lora")), language_adapter_parameters=20_000_000)
    found = adapted.metrics(WORKLOAD, samples=32, seconds=2.0)["tflops_per_second_per_gpu"]
    wanted = step_flops(
        published_architecture("Qwen2.5-VL-7B"),
        WORKLOAD,
        freeze=FreezeSettings(True, True, True),
        language_adapter_parameters=20_000_000,
    )
    assert found == pytest.approx(wanted.useful / 16 / 1e12) and found < 0.7 * plain
