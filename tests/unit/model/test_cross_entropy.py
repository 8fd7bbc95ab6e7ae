"""Cross-entropy against torch's in float64. ``tests/parity`` has its sum over ranks, with the model's layouts."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from megatron_cocoa.model import cross_entropy
from megatron_cocoa.model.cross_entropy import vocab_parallel_nll

ALONE = SimpleNamespace(rank=lambda: 0, size=lambda: 1)


def made(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    # As far apart as logits of a trained model, so that a sum without the largest taken off would overflow.
    logits = 30 * torch.randn(rows, columns, generator=generator) + 80
    return logits.to(dtype), torch.randint(0, columns - 3, (rows,), generator=generator)


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("rows, block", [(1, 2**20), (7, 100), (7, 250), (0, 2**20)])
def test_losses_and_gradients_are_those_of_the_real_columns(rows, block, dtype, bound, monkeypatch):
    """Claim: whatever the padding columns hold, and by whatever blocks; the gradient is rounded once."""
    monkeypatch.setattr(cross_entropy, "BLOCK_ELEMENTS", block)
    logits, labels = made(rows, 100, dtype)
    exact = logits.double().requires_grad_()
    wanted = F.cross_entropy(exact[:, :97], labels, reduction="none")
    grad = torch.arange(1.0, rows + 1)
    wanted.backward(grad.double())
    leaf = logits.clone().requires_grad_()
    found = vocab_parallel_nll(leaf * 1, labels, vocab_size=97, group=ALONE)
    found.backward(grad)
    assert found.dtype == torch.float32 and leaf.grad.dtype == dtype
    assert_close(found.double(), wanted.detach(), rtol=1e-6, atol=1e-5)
    assert_close(leaf.grad.double(), exact.grad, rtol=bound, atol=bound * 1e-2)
    assert not leaf.grad[:, 97:].any()


def test_a_second_backward_pass_is_refused():
    """Claim: by then the logits are their gradient, which must not pass for logits."""
    logits, labels = made(3, 20)
    loss = vocab_parallel_nll(logits.requires_grad_() * 1, labels, vocab_size=20, group=ALONE).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_logits_that_are_no_numbers_give_such_a_loss():
    """Claim: one of them is enough, so that the step is skipped and not trained on."""
    logits, labels = made(2, 20)
    logits[1, 5] = torch.nan
    found = vocab_parallel_nll(logits, labels, vocab_size=20, group=ALONE)
    assert found[0].isfinite() and found[1].isnan()
