"""The Triton kernels against plain expressions in float64, at widths with and without a power of two.

In a rehearsal on a CPU they run in Triton's interpreter, if ``pip install --no-deps triton`` has brought it.
"""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from megatron_cocoa.model import activations, cross_entropy, rope
from megatron_cocoa.model.activations import SWIGLU, _Lean, quick_gelu
from megatron_cocoa.model.cross_entropy import vocab_parallel_nll
from megatron_cocoa.model.rope import rotate, split_and_rotate
from megatron_cocoa.parallel import device

pytestmark = pytest.mark.gpu

ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
"""Of one rounding, relative to the largest value."""


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    if not device.has_gpu():
        pytest.importorskip("triton", reason="Triton's interpreter is not installed")
        for module in (activations, cross_entropy, rope):
            monkeypatch.setattr(module, "is_on_gpu", lambda x: True)


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.shape == wanted.shape
    error = (found.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    # Triton's interpreter cuts BF16 off where a GPU rounds.
    assert error <= ROUNDING[found.dtype] * (1 if device.has_gpu() else 2)


def values(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda().to(dtype)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("width", [48, 1100, 3456])
def test_activations(width, dtype):
    """Claim: outputs and gradients of SwiGLU and quick GELU are the formula's, rounded once."""
    x, grad = values(7, 1, 2 * width, dtype=dtype, seed=0), values(7, 1, width, dtype=dtype, seed=1)
    exact = x.double().requires_grad_()
    gate, up = exact.chunk(2, dim=-1)
    check((lambda t: _Lean.apply(t, SWIGLU, None)), x, F.silu(gate) * up, exact, grad)
    exact = grad.double().requires_grad_()
    check(quick_gelu, grad, exact * torch.sigmoid(1.702 * exact), exact, x[..., :width])


def check(function, x, wanted, exact, grad) -> None:
    mine = x.clone().requires_grad_()
    out = function(mine)
    out.backward(grad)
    wanted.backward(grad.double())
    assert_near(out.detach(), wanted.detach())
    assert_near(mine.grad, exact.grad)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("heads, dim", [(28, 128), (4, 128), (16, 80), (3, 8)])
def test_rotation(heads, dim, transposed, dtype):
    """Claim: a view of a fused projection is rotated as the formula says, and its gradient turned back, whatever the
    order of the tables in memory."""
    fused, grad = values(50, heads + 2, dim, dtype=dtype, seed=0), values(50, heads, dim, dtype=dtype, seed=1)
    angles = values(50, dim // 2, dtype=torch.float32, seed=2)
    if transposed:
        angles = angles.t().contiguous().t()
    cos, sin = angles.cos(), angles.sin()
    mine, exact = fused.clone().requires_grad_(), fused.double().requires_grad_()
    out = rotate(mine[:, 1:-1], cos, sin)
    first, second = exact[:, 1:-1].chunk(2, dim=-1)
    c, s = cos.double()[:, None], sin.double()[:, None]
    wanted = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    out.backward(grad)
    wanted.backward(grad.double())
    assert_near(out.detach(), wanted.detach())
    assert_near(mine.grad, exact.grad)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("groups, per_group, dim", [(4, 7, 128), (2, 8, 128), (16, 1, 80), (1, 3, 8)])
def test_split_and_rotation(groups, per_group, dim, dtype):
    """Claim: a fused projection comes apart as Megatron splits it, rotated; its gradient comes together again."""
    fused = values(50, groups, per_group + 2, dim, dtype=dtype, seed=0)
    angles = values(50, dim // 2, dtype=torch.float32, seed=2)
    cos, sin = angles.cos(), angles.sin()
    mine, exact = fused.clone().requires_grad_(), fused.double().requires_grad_()
    c, s = cos.double()[:, None, None], sin.double()[:, None, None]
    first, second = exact.chunk(2, dim=-1)
    turned = torch.cat([first * c - second * s, second * c + first * s], dim=-1)
    wanted = turned[:, :, :-2].flatten(1, 2), turned[:, :, -2], exact[:, :, -1]
    found = split_and_rotate(mine, cos, sin)
    # Kernels of attention choose the order of what they return.
    gradients = [values(*x.shape[::-1], dtype=dtype, seed=3 + i).permute(2, 1, 0) for i, x in enumerate(wanted)]
    torch.autograd.backward(found, gradients)
    torch.autograd.backward(wanted, [x.double() for x in gradients])
    for x, y in zip(found, wanted):
        assert x.is_contiguous()
        assert_near(x.detach(), y.detach())
    assert_near(mine.grad, exact.grad)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("columns, width", [(9728, 9728), (5000, 4999), (100, 37)])
def test_cross_entropy(columns, width, dtype):
    """Claim: losses and gradients are the formula's over the real columns, the gradient rounded once."""
    logits, grad = values(9, columns, dtype=dtype, seed=0), values(9, dtype=torch.float32, seed=1)
    labels = torch.arange(9, device=logits.device) * (width // 9)
    mine, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    alone = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
    found = vocab_parallel_nll(mine * 1, labels, vocab_size=width, group=alone)
    wanted = F.cross_entropy(exact[:, :width], labels, reduction="none")
    found.backward(grad)
    wanted.backward(grad.double())
    assert_near(found.detach(), wanted.detach())
    assert_near(mine.grad, exact.grad)
    assert not mine.grad[:, width:].any()


def test_cross_entropy_of_a_rank_without_columns_or_labels():
    """Claim: a rank that has padding alone adds nothing to a sum over ranks; labels that are elsewhere count as 0."""
    logits = values(2, 40, dtype=torch.bfloat16, seed=0)
    labels = torch.tensor([-1, 40], device=logits.device)
    largest, total, own = cross_entropy._statistics(logits, labels, 0)
    assert (largest == torch.finfo(torch.float32).min).all() and not total.any() and not own.any()
    largest, total, own = cross_entropy._statistics(logits, labels, 40)
    assert torch.equal(largest, logits.float().amax(1)) and not own.any()
    assert_near(total, (logits.float() - largest[:, None]).exp().sum(1))
