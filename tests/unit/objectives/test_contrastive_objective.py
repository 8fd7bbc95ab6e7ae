"""InfoNCE: values and gradients against plain definitions, its variants, and what its metrics say of collapse."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from megatron_cocoa.objectives import PairEmbeddings, contrastive
from megatron_cocoa.objectives.contrastive import ContrastiveObjective
from megatron_cocoa.objectives.embedding_metrics import effective_rank


def pairs(count: int = 6, hidden: int = 5, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return tuple(torch.randn(2, count, hidden, generator=generator, dtype=dtype))


def loss_of(objective, queries, targets, keys=None, **more):
    return objective.embedding_loss(PairEmbeddings(queries, targets, keys), **more)


def gradients_of(objective, queries, targets, keys=None):
    """``(loss, d loss / d queries, d loss / d targets, metrics)``."""
    leaves = [x.detach().clone().requires_grad_() for x in (queries, targets)]
    loss, metrics = loss_of(objective, *leaves, keys)
    return loss.detach(), *torch.autograd.grad(loss, leaves), metrics


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
    loss, grad_queries, grad_targets, _ = gradients_of(ContrastiveObjective(temperature=0.05), queries, targets)
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
    loss, grad_queries, grad_targets, _ = gradients_of(objective, queries, targets, key_tensor)
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
    assert torch.autograd.gradcheck(lambda q, t: loss_of(objective, q, t, keys)[0], (queries, targets))


def test_low_precision_embeddings_are_widened_first():
    """Claim: BF16 embeddings are normalised and compared in float32."""
    queries, targets = (x.bfloat16() for x in pairs())
    objective = ContrastiveObjective()
    loss, grad_queries, _, _ = gradients_of(objective, queries, targets)
    wide, *_ = gradients_of(objective, queries.float(), targets.float())
    assert loss.dtype == torch.float32 and torch.equal(loss, wide) and grad_queries.dtype == torch.bfloat16
    rounded = replace(hard_pairs(), **{name: getattr(hard_pairs(), name).bfloat16() for name in EMBEDDINGS})
    widened = replace(rounded, **{name: getattr(rounded, name).float() for name in EMBEDDINGS})
    assert torch.equal(objective.embedding_loss(rounded)[0], objective.embedding_loss(widened)[0])


def test_sharp_temperature_does_not_overflow():
    """Claim: opposite embeddings at a temperature of 0.001 (logits of 1000) stay finite."""
    queries = torch.eye(2).repeat(2, 1) * torch.tensor([1.0, 1.0, -1.0, -1.0])[:, None]
    loss, grad_queries, grad_targets, _ = gradients_of(ContrastiveObjective(temperature=1e-3), queries, -queries)
    assert loss.item() == pytest.approx(2000.0)
    assert torch.isfinite(grad_queries).all() and torch.isfinite(grad_targets).all()


def test_metrics_tell_separation_from_collapse():
    """Claim: a perfect embedder shows accuracy 1 and full rank, an all-equal one 1 / pairs and rank 1."""
    perfect = loss_of(ContrastiveObjective(), torch.eye(6), torch.eye(6), detailed=True)[1]
    assert perfect["accuracy"].item() == 1.0
    assert perfect["positive_cosine"].item() == 1.0 and perfect["negative_cosine"].item() == 0.0
    assert perfect["effective_rank"].item() == pytest.approx(6.0, rel=1e-6)
    collapsed = loss_of(ContrastiveObjective(), torch.ones(6, 6), torch.ones(6, 6), detailed=True)[1]
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
    loss, grad_queries, _, metrics = gradients_of(objective, queries, targets, torch.zeros(3, dtype=torch.int64))
    assert loss.item() == 0.0 and metrics["negative_cosine"].item() == 0.0
    assert torch.equal(grad_queries, torch.zeros_like(grad_queries))


def test_wrong_inputs_are_refused_with_their_numbers():
    """Claim: shapes, a batch without negatives and missing keys are errors that say what to change."""
    queries, targets = pairs()
    with pytest.raises(ValueError, match=r"\(6, 5\), targets \(5, 5\)"):
        loss_of(ContrastiveObjective(), queries, targets[:5])
    with pytest.raises(ValueError, match="1 pair.*raise contrastive.global_batch_size"):
        loss_of(ContrastiveObjective(), queries[:1], targets[:1])
    with pytest.raises(ValueError, match=r"needs target_keys of shape \(6,\), found None"):
        loss_of(ContrastiveObjective(mask_equal_targets=True), queries, targets)
    with pytest.raises(ValueError, match=r"matryoshka_dims are \[2, 6\], the model's embeddings have 5"):
        loss_of(ContrastiveObjective(matryoshka_dims=(2, 6)), queries, targets)
    with pytest.raises(ValueError, match=r"hard negatives need negative_mask of shape \(6, 2\), found None"):
        pairs_without_mask = PairEmbeddings(queries, targets, negatives=torch.zeros(6, 2, 5))
        ContrastiveObjective().embedding_loss(pairs_without_mask)
    with pytest.raises(ValueError, match=r"mask_equal_targets needs negative_keys of shape \(5, 3\), found None"):
        ContrastiveObjective(mask_equal_targets=True).embedding_loss(replace(hard_pairs(), negative_keys=None))
    for temperature in (0, math.nan):
        with pytest.raises(ValueError, match=f"temperature is {temperature}"):
            ContrastiveObjective(temperature=temperature)


def test_the_effective_rank_is_taken_on_request_only():
    """Claim: no step pays for an eigendecomposition that nobody asked for, which takes queries and targets together."""
    assert "effective_rank" not in loss_of(ContrastiveObjective(), *pairs())[1]
    apart = torch.eye(6)[:3], torch.eye(6)[3:]
    assert loss_of(ContrastiveObjective(), *apart, detailed=True)[1]["effective_rank"] == pytest.approx(6.0, rel=1e-6)


EMBEDDINGS = ("queries", "targets", "negatives")


def hard_pairs(pairs_count: int = 5, negatives: int = 3, hidden: int = 4) -> PairEmbeddings:
    """Random pairs in float64; pair 1 has one negative and pair 4 none; some keys are equal."""
    generator = torch.Generator().manual_seed(11)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()  # noqa: E731
    mask = torch.ones(pairs_count, negatives, dtype=torch.bool)
    mask[1, 1:] = False
    mask[4] = False
    keys = torch.arange(pairs_count * negatives).reshape(pairs_count, negatives) + 100
    keys[0, 1], keys[2, 0], keys[3, 2] = 7, 9, 7
    return PairEmbeddings(
        queries=draw(pairs_count, hidden),
        targets=draw(pairs_count, hidden),
        target_keys=torch.tensor([7, 8, 9, 9, 10]),
        negatives=draw(pairs_count, negatives, hidden),
        negative_mask=mask,
        negative_keys=keys,
    )


def plain_hard_loss(p: PairEmbeddings, *, temperature: float, shared: bool, masked: bool, symmetric: bool):
    """InfoNCE with hard negatives, candidate by candidate."""

    def score(a, b):
        return ((a * b).sum() / (a.norm() * b.norm()) / temperature).exp()

    total = 0.0
    for i in range(len(p.queries)):
        terms = [score(p.queries[i], p.targets[i])]
        for j in range(len(p.queries)):
            if j != i and not (masked and p.target_keys[j] == p.target_keys[i]):
                terms.append(score(p.queries[i], p.targets[j]))
            for k in range(p.negative_mask.shape[1]):
                wanted = p.negative_mask[j, k] and (shared or j == i)
                if wanted and not (masked and p.negative_keys[j, k] == p.target_keys[i]):
                    terms.append(score(p.queries[i], p.negatives[j, k]))
        total = total - (terms[0] / sum(terms)).log()
    forward = total / len(p.queries)
    if not symmetric:
        return forward
    keys = p.target_keys.tolist() if masked else None
    backward = naive_loss(p.targets, p.queries, temperature=temperature, symmetric=False, keys=keys)
    return (forward + backward) / 2


@pytest.mark.parametrize("rows_per_block", [256, 2])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_hard_negatives_equal_a_plain_loop(monkeypatch, shared, masked, symmetric, rows_per_block):
    """Claim: each query's candidates are exactly those that its definition names, in one block of rows or several."""
    monkeypatch.setattr(contrastive, "ROWS_PER_BLOCK", rows_per_block)
    p = hard_pairs()
    objective = ContrastiveObjective(
        temperature=0.4, symmetric=symmetric, mask_equal_targets=masked, hard_negatives_shared=shared
    )
    loss, metrics = objective.embedding_loss(p)
    wanted = plain_hard_loss(p, temperature=0.4, shared=shared, masked=masked, symmetric=symmetric)
    leaves = [p.queries, p.targets, p.negatives]
    # Both sides in float64.
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    for found, expected in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves)):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert torch.isfinite(metrics["accuracy"]) and metrics["contrastive"] == loss.detach()


@pytest.mark.parametrize("shared", [False, True])
def test_accuracy_counts_hard_negatives(shared):
    """Claim: a query that prefers a hard negative to its own target is wrong, unless there is no such negative."""
    queries = torch.eye(3)
    mask = torch.tensor([[True], [False], [True]])
    p = PairEmbeddings(queries, queries + 0.1, negatives=queries.unsqueeze(1), negative_mask=mask)
    _, metrics = ContrastiveObjective(hard_negatives_shared=shared).embedding_loss(p)
    assert metrics["accuracy"] == pytest.approx(1 / 3)


def test_a_place_without_a_negative_changes_nothing():
    """Claim: what stands in the place of a missing negative is not read: neither loss nor gradient see it."""
    p = hard_pairs()
    loss, _ = ContrastiveObjective(temperature=0.4).embedding_loss(p)
    gradient = torch.autograd.grad(loss, p.negatives)[0]
    assert (gradient[~p.negative_mask] == 0).all() and (gradient[p.negative_mask] != 0).any()
    zeros = replace(p, negatives=p.negatives.detach() * p.negative_mask.unsqueeze(-1))
    leaf = zeros.negatives.requires_grad_()
    again, _ = ContrastiveObjective(temperature=0.4).embedding_loss(zeros)
    assert torch.equal(again, loss) and torch.isfinite(torch.autograd.grad(again, leaf)[0]).all()


@pytest.mark.parametrize("weights", [(), (1.0, 3.0)])
def test_matryoshka_is_the_weighted_mean_over_renormalised_widths(weights):
    """Claim: each width is the plain loss of embeddings cut to it (arXiv 2205.13147), gradients included."""
    queries, targets = (x.requires_grad_() for x in pairs(6, 8))
    objective = ContrastiveObjective(temperature=0.3, matryoshka_dims=(8, 3), matryoshka_weights=weights)
    loss, metrics = loss_of(objective, queries, targets)
    plain = ContrastiveObjective(temperature=0.3)
    parts = [loss_of(plain, queries[:, :d], targets[:, :d])[0] for d in (8, 3)]
    first, second = weights or (1.0, 1.0)
    wanted = (first * parts[0] + second * parts[1]) / (first + second)
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=0)
    for leaf in (queries, targets):
        found, expected = (torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (loss, wanted))
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)
    assert metrics["contrastive_3"] == parts[1].detach() and metrics["contrastive_8"] == parts[0].detach()


@pytest.mark.parametrize("dims", [(6, 3), (3, 6), (6,)])
def test_other_metrics_are_those_of_the_largest_width(dims):
    """Claim: in whatever order widths stand, also below that of the embeddings."""
    queries, targets = pairs(6, 8)
    _, metrics = loss_of(ContrastiveObjective(matryoshka_dims=dims), queries, targets, detailed=True)
    _, wanted = loss_of(ContrastiveObjective(), queries[:, :6], targets[:, :6], detailed=True)
    for name in ("accuracy", "positive_cosine", "negative_cosine", "effective_rank"):
        assert metrics[name] == wanted[name], name


def test_a_learned_scale_replaces_the_temperature_and_gets_its_gradient():
    """Claim: at log(1 / 0.07) the loss is that of temperature 0.07, and its derivative is the finite difference."""
    queries, targets = pairs()

    def at(scale):
        return ContrastiveObjective(symmetric=True).embedding_loss(PairEmbeddings(queries, targets, logit_scale=scale))

    scale = torch.tensor(-math.log(0.07), dtype=torch.float64, requires_grad=True)
    loss, metrics = at(scale)
    fixed = ContrastiveObjective(temperature=0.07, symmetric=True)
    torch.testing.assert_close(loss, loss_of(fixed, queries, targets)[0])
    assert metrics["temperature"].item() == pytest.approx(0.07)
    assert torch.autograd.gradcheck(lambda s: at(s)[0], (scale,))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_order_of_pairs_does_not_matter(shared, symmetric):
    """Claim: pairs may be gathered in any order (ranks and packs are chosen by cost): the loss is the same, and each
    embedding keeps its own gradient."""
    p, order = hard_pairs(), torch.tensor([3, 0, 4, 2, 1])
    moved = {name: None if value is None else value.detach()[order] for name, value in vars(p).items()}
    q = PairEmbeddings(**moved | {name: moved[name].requires_grad_() for name in EMBEDDINGS})
    objective = ContrastiveObjective(
        temperature=0.3, symmetric=symmetric, mask_equal_targets=True, hard_negatives_shared=shared
    )
    losses = [objective.embedding_loss(x)[0] for x in (p, q)]
    # Float64: sums of five terms in another order.
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    own, other = (torch.autograd.grad(x, [getattr(y, n) for n in EMBEDDINGS]) for x, y in zip(losses, (p, q)))
    for a, b in zip(own, other):
        torch.testing.assert_close(a[order], b, rtol=1e-10, atol=1e-14)
