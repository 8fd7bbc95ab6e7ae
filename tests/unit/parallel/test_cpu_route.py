"""The CPU route: it never hides a GPU, and never runs half-redirected."""

import subprocess
import sys

import pytest
import torch

from megatron_cocoa.parallel import cpu_route, device


def test_the_route_refuses_where_cuda_is_available(monkeypatch):
    """Claim: on a machine with a GPU nothing can send the model to the CPU unnoticed."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="must not be activated where CUDA is available"):
        cpu_route.activate_cpu_route()


def test_a_name_that_has_moved_is_named(monkeypatch):
    """Claim: a Megatron release that moves a redirected name ends in an error that lists what is missing, and nothing
    has been touched by then."""
    from megatron.core.optimizer import clip_grads

    if device.has_gpu():
        pytest.skip("the CPU route does not exist where CUDA is available")
    monkeypatch.delattr(clip_grads, "l2_norm_impl")
    monkeypatch.setitem(cpu_route.REQUIRED_NAMES, "megatron.core.no_such_module", ["x"])
    monkeypatch.setattr(cpu_route, "_active_mode", None)
    monkeypatch.setattr(cpu_route, "_redirect_torch", lambda: pytest.fail("torch was redirected"))
    monkeypatch.setattr(cpu_route, "_redirect_megatron", lambda: pytest.fail("Megatron was redirected"))
    missing = ["megatron.core.optimizer.clip_grads.l2_norm_impl", "megatron.core.no_such_module"]
    assert cpu_route.missing_names() == missing
    with pytest.raises(RuntimeError, match=r"missing: megatron.core.optimizer.clip_grads.l2_norm_impl, megatron.*"):
        cpu_route.activate_cpu_route()


def test_the_installed_releases_have_every_name():
    """Claim: the route fits the torch and the Megatron-Core that are installed."""
    assert cpu_route.missing_names() == []


ROUTE = """
import torch
from megatron_cocoa.parallel import cpu_route
cpu_route.activate_cpu_route()
first = cpu_route._active_mode
cpu_route.activate_cpu_route()
assert cpu_route._active_mode is first
assert torch.zeros(2, device="cuda").device.type == "cpu"
assert torch.zeros(2).to("cuda:0").cuda().device.type == "cpu"
assert torch.zeros(2).to(device=torch.device("cuda", 1)).device.type == "cpu"
assert torch.zeros(2).type() == "torch.cuda.FloatTensor"
assert isinstance(torch.cuda.Stream, type)
with torch.cuda.stream(torch.cuda.Stream()):
    torch.cuda.synchronize()
torch.cuda.manual_seed(5)
state = torch.cuda.get_rng_state()
drawn = torch.rand(3)
torch.cuda.set_rng_state(state)
assert torch.equal(torch.rand(3), drawn)
print("done")
"""


def test_the_route_sends_cuda_to_the_cpu():
    """Claim: factories, moves, streams and random states that name CUDA work on the CPU; a second call is nothing."""
    if device.has_gpu():
        pytest.skip("the CPU route does not exist where CUDA is available")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ROUTE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip().endswith("done"), done.stderr[-3000:]
