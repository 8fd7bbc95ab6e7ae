"""The ratio that every benchmark prints is what it says it is."""

import time

import torch

from benchmarks import side_by_side


def test_ratio_is_the_references_time_over_ours_in_alternating_order(monkeypatch):
    """Claim: pairs alternate, warm-up does not count, set-up is outside of the timing, calls are divided out."""
    now, order = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def side(name, seconds):
        def run():
            order.append(name)
            now[0] += seconds

        return run

    def setup():
        now[0] += 100.0

    found = side_by_side.measure_pairs(
        side("ours", 2.0), side("reference", 3.0), repeats=2, warmup=1, setup=setup, calls=2
    )
    assert order == ["reference"] * 2 + ["ours"] * 4 + ["reference"] * 4 + ["ours"] * 2
    assert (found["ratio"], found["spread"]) == (1.5, [1.5, 1.5])
    assert (found["ours_seconds"], found["reference_seconds"], found["pairs"]) == (2.0, 3.0, 2)


def test_ratio_is_the_median_over_pairs(monkeypatch):
    """Claim: one disturbed pair moves neither the ratio nor the medians."""
    now, taken = [0.0], iter([1.0, 2.0, 2.0, 1.0, 50.0, 2.0])
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def run():
        now[0] += next(taken)

    found = side_by_side.measure_pairs(run, run, repeats=3, warmup=0)
    assert (found["ratio"], found["spread"]) == (2.0, [0.04, 2.0])
    assert (found["ours_seconds"], found["reference_seconds"]) == (1.0, 2.0)


def test_peak_counts_what_is_freed_again_and_not_what_stays():
    """Claim: a gradient that stands after the first call is no part of the peak; a temporary tensor is."""
    weight = torch.zeros(1000, requires_grad=True)

    def call():
        weight.grad = torch.zeros(1000) if weight.grad is None else weight.grad
        temporary = torch.zeros(5000)
        temporary.add_(1)

    assert side_by_side.peak_bytes(call) == 20000


def test_versions_and_hardware_say_where_a_number_comes_from():
    """Claim: the line names torch's version, the cores and the threads."""
    # PyPI's packages of torch say to Python only which CUDA they are built for.
    assert side_by_side.versions()["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    found = side_by_side.hardware()
    assert found["cores"] >= 1 and found["threads"] == torch.get_num_threads() and found["processor"]
