"""InfoNCE: values and gradients against plain definitions, its variants, and what its metrics say of collapse."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_cocoa.objectives.contrastive import ContrastiveObjective, effective_rank


def pairs(count: int = 6, hidden: int = 5, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return tuple(torch.randn(2, count, hidden, generator=generator, dtype=dtype))


def naive_loss(queries, targets, *, temperature, symmetric, keys=None) -> torch.Tensor:
    """InfoNCE written out pair by pair from its definition."""

    def one_way(left: list[torch.Tensor], right: list[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros((), dtype=queries.dtype)
        for i, own in enumerate(left):
            terms = []
            for j, other in enumerate(right):
                if keys is not None and j != i and keys[j] == keys[i]:
                    continue
                cosine = (own * other).sum() / (own.norm() * other.norm())
                terms.append((j, (cosine / temperature).exp()))
            total = total - (dict(terms)[i] / sum(value for _, value in terms)).log()
        return total / len(left)

    forward = one_way(list(queries), list(targets))
    return (forward + one_way(list(targets), list(queries))) / 2 if symmetric else forward


def test_plain_loss_equals_cross_entropy_over_cosines():
    """Claim: the default is torch's cross-entropy of cosine / temperature against the diagonal."""
    queries, targets = pairs(dtype=torch.float32)
    loss, grad_queries, grad_targets, _ = ContrastiveObjective(temperature=0.05).embedding_gradients(queries, targets)
    q, t = queries.clone().requires_grad_(), targets.clone().requires_grad_()
    reference = F.cross_entropy(F.cosine_similarity(q[:, None], t[None], dim=-1) / 0.05, torch.arange(len(q)))
    reference.backward()
    # Float32; dividing by the temperature multiplies rounding by 20.
    torch.testing.assert_close(loss, reference.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_queries, q.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_targets, t.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("keys", [None, [3, 7, 3, 1, 7, 3]])
def test_variants_equal_a_naive_loop(symmetric, keys):
    """Claim: symmetric and equal-target variants follow their definition, gradients included."""
    queries, targets = pairs()
    objective = ContrastiveObjective(temperature=0.3, symmetric=symmetric, mask_equal_targets=keys is not None)
    key_tensor = None if keys is None else torch.tensor(keys)
    loss, grad_queries, grad_targets, _ = objective.embedding_gradients(queries, targets, key_tensor)
    q, t = queries.clone().requires_grad_(), targets.clone().requires_grad_()
    reference = naive_loss(q, t, temperature=0.3, symmetric=symmetric, keys=keys)
    reference.backward()
    # Both sides in float64.
    torch.testing.assert_close(loss, reference.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(grad_queries, q.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(grad_targets, t.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients_equal_finite_differences(symmetric):
    """Claim: the gradients handed to gradient caching are the loss's, through the normalisation."""
    queries, targets = (x.requires_grad_() for x in pairs(4, 3))
    objective = ContrastiveObjective(temperature=0.5, symmetric=symmetric, mask_equal_targets=True)
    keys = torch.tensor([0, 1, 0, 2])
    assert torch.autograd.gradcheck(lambda q, t: objective.embedding_loss(q, t, keys)[0], (queries, targets))


def test_cached_gradients_equal_backpropagation_through_the_encoder():
    """Claim: feeding the returned gradients back piece by piece gives the encoder the gradient of one big batch."""
    queries, targets = pairs(8, 6)
    encoder = torch.nn.Linear(6, 4).double()
    objective = ContrastiveObjective(temperature=0.1)
    objective.embedding_loss(encoder(queries), encoder(targets))[0].backward()
    whole = encoder.weight.grad.clone()
    encoder.zero_grad()
    with torch.no_grad():
        cached = encoder(queries), encoder(targets)
    _, grad_queries, grad_targets, _ = objective.embedding_gradients(*cached)
    for start, stop in ((0, 3), (3, 4), (4, 8)):
        encoder(queries[start:stop]).backward(grad_queries[start:stop])
        encoder(targets[start:stop]).backward(grad_targets[start:stop])
    # Float64; only the order of summation differs.
    torch.testing.assert_close(encoder.weight.grad, whole, rtol=1e-10, atol=1e-12)


def test_low_precision_embeddings_are_widened_first():
    """Claim: BF16 embeddings are normalised and compared in float32, and so are their gradients."""
    queries, targets = (x.bfloat16() for x in pairs())
    objective = ContrastiveObjective()
    loss, grad_queries, _, _ = objective.embedding_gradients(queries, targets)
    wide, *_ = objective.embedding_gradients(queries.float(), targets.float())
    assert loss.dtype == grad_queries.dtype == torch.float32 and torch.equal(loss, wide)


def test_sharp_temperature_does_not_overflow():
    """Claim: opposite embeddings at a temperature of 0.001 (logits of 1000) stay finite."""
    queries = torch.eye(2).repeat(2, 1) * torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None]
    loss, grad_queries, grad_targets, _ = ContrastiveObjective(temperature=1e-3).embedding_gradients(queries, -queries)
    assert loss.item() == pytest.approx(2000.0)
    assert torch.isfinite(grad_queries).all() and torch.isfinite(grad_targets).all()


def test_metrics_tell_separation_from_collapse():
    """Claim: a perfect embedder shows accuracy 1 and full rank, an all-equal one 1 / pairs and rank 1."""
    perfect = ContrastiveObjective().embedding_loss(torch.eye(6), torch.eye(6))[1]
    assert perfect["accuracy"].item() == 1.0
    assert perfect["positive_cosine"].item() == 1.0 and perfect["negative_cosine"].item() == 0.0
    assert perfect["effective_rank"].item() == pytest.approx(6.0, rel=1e-6)
    collapsed = ContrastiveObjective().embedding_loss(torch.ones(6, 6), torch.ones(6, 6))[1]
    assert collapsed["accuracy"].item() == pytest.approx(1 / 6)
    assert collapsed["contrastive"].item() == pytest.approx(math.log(6), rel=1e-6)
    # Rounding of the Gram matrix leaves singular values of about 1e-8 beside the one that counts.
    assert collapsed["effective_rank"].item() == pytest.approx(1.0, abs=1e-5)
    assert not any(value.requires_grad for value in collapsed.values())


def test_effective_rank_equals_its_definition_on_a_plain_decomposition():
    """Claim: either Gram matrix gives the entropy of the singular values; NaN passes through unharmed."""
    for shape in ((9, 4), (4, 9)):
        embeddings = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        shares = torch.linalg.svdvals(embeddings)
        shares = shares / shares.sum()
        expected = math.exp(-(shares * shares.log()).sum())
        # The result is cast to float32.
        assert effective_rank(embeddings).item() == pytest.approx(expected, rel=1e-6)
    assert math.isnan(effective_rank(torch.tensor([[float("nan"), 1.0], [0.0, 1.0]])).item())


def test_all_negatives_masked_leaves_a_zero_loss():
    """Claim: where every target is the same, no row has a negative, and nothing becomes NaN."""
    queries, targets = pairs(3, 4)
    objective = ContrastiveObjective(mask_equal_targets=True)
    loss, grad_queries, _, metrics = objective.embedding_gradients(queries, targets, torch.zeros(3, dtype=torch.int64))
    assert loss.item() == 0.0 and metrics["negative_cosine"].item() == 0.0
    assert torch.equal(grad_queries, torch.zeros_like(grad_queries))


def test_wrong_inputs_are_refused_with_their_numbers():
    """Claim: shapes, a batch without negatives and missing keys are errors that say what to change."""
    queries, targets = pairs()
    with pytest.raises(ValueError, match=r"\(6, 5\), targets \(5, 5\)"):
        ContrastiveObjective().embedding_loss(queries, targets[:5])
    with pytest.raises(ValueError, match="1 pair.*raise contrastive.global_batch_size"):
        ContrastiveObjective().embedding_loss(queries[:1], targets[:1])
    with pytest.raises(ValueError, match=r"needs target_keys of shape \(6,\), found None"):
        ContrastiveObjective(mask_equal_targets=True).embedding_loss(queries, targets)
    with pytest.raises(ValueError, match="temperature is 0"):
        ContrastiveObjective(temperature=0)
