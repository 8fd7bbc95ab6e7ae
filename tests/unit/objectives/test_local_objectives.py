"""MNTP, MAE, their weighted sum and the EOS-bridged loss: values, gradients, and freedom from how a batch is cut."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_cocoa.batch import MaskKind, ModelOutput, PackedBatch
from megatron_cocoa.objectives.eos_bridged import EosBridgedObjective
from megatron_cocoa.objectives.mae import MaeObjective
from megatron_cocoa.objectives.mntp import MntpObjective
from megatron_cocoa.objectives.warmup import WarmupObjective

UNIT_DIM = 6


def make_batch(texts: int | None, units: int | None, kind: MaskKind = MaskKind.BIDIRECTIONAL) -> PackedBatch:
    """A batch that holds ``texts`` text labels and ``units`` masked units; only the counts matter to a loss."""
    tokens = 1 + (texts or 0) + (units or 0)
    return PackedBatch(
        input_ids=torch.zeros(tokens, dtype=torch.int64),
        position_ids=torch.zeros(3, tokens, dtype=torch.int64),
        sample_lengths=(tokens,),
        mask_kind=kind,
        text_positions=None if texts is None else torch.zeros(texts, dtype=torch.int64),
        text_labels=None if texts is None else torch.zeros(texts, dtype=torch.int64),
        unit_positions=None if units is None else torch.zeros(units, dtype=torch.int64),
        unit_targets=None if units is None else torch.zeros(units, UNIT_DIM),
    )


def test_mntp_is_the_mean_cross_entropy_with_its_analytic_gradient():
    """Claim: the backpropagated scalar is torch's mean cross-entropy, gradient (softmax - one hot) / count."""
    torch.manual_seed(0)
    logits = torch.randn(5, 11, requires_grad=True)
    labels = torch.randint(11, (5,))
    output = ModelOutput(token_nll=F.cross_entropy(logits, labels, reduction="none"))
    loss, metrics = MntpObjective().loss(output, make_batch(5, None), {"mntp": 5})
    loss.backward()
    # One float32 softmax against another: a few units in the last place.
    torch.testing.assert_close(loss, F.cross_entropy(logits.detach(), labels), rtol=1e-6, atol=0)
    analytic = (logits.detach().softmax(-1) - F.one_hot(labels, 11)) / 5
    torch.testing.assert_close(logits.grad, analytic, rtol=0, atol=1e-7)
    assert not metrics["mntp"].requires_grad
    torch.testing.assert_close(metrics["mntp"] / 5, loss.detach())


def test_mae_is_the_mean_squared_error_with_its_analytic_gradient():
    """Claim: the pixel loss is the mean over all masked values, gradient 2 (p - t) / (units x values)."""
    torch.manual_seed(1)
    predicted = torch.randn(4, UNIT_DIM, requires_grad=True)
    targets = torch.randn(4, UNIT_DIM)
    output = ModelOutput(predicted_units=predicted, unit_targets=targets)
    loss, metrics = MaeObjective().loss(output, make_batch(None, 4), {"mae": 4})
    loss.backward()
    assert not metrics["mae"].requires_grad
    # The order of a float32 sum of 24 terms.
    torch.testing.assert_close(loss, F.mse_loss(predicted.detach(), targets), rtol=1e-6, atol=0)
    analytic = 2 * (predicted.detach() - targets) / (4 * UNIT_DIM)
    torch.testing.assert_close(predicted.grad, analytic, rtol=1e-6, atol=1e-8)


def test_mae_by_patch_is_the_mean_over_hidden_patches_with_its_analytic_gradient():
    """Claim: only pixels of hidden patches count, each once; a prediction of a patch that was seen gets no gradient."""
    torch.manual_seed(2)
    predicted = torch.randn(4, UNIT_DIM, requires_grad=True)
    targets = torch.randn(4, UNIT_DIM)
    masked = torch.tensor([[True, False, False], [True, True, True], [False, False, True], [False, True, True]])
    batch = replace(make_batch(None, 4), unit_patches=masked)
    objective = MaeObjective()
    assert objective.counts(batch) == {"mae": 7}
    output = ModelOutput(predicted_units=predicted, unit_targets=targets, unit_patches=masked)
    loss, metrics = objective.loss(output, batch, {"mae": 7})
    loss.backward()
    chosen = masked.repeat_interleave(2, dim=1)
    # The order of a float32 sum of 14 terms.
    torch.testing.assert_close(loss, F.mse_loss(predicted.detach()[chosen], targets[chosen]), rtol=1e-6, atol=0)
    analytic = torch.where(chosen, 2 * (predicted.detach() - targets) / 14, 0.0)
    torch.testing.assert_close(predicted.grad, analytic, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(metrics["mae"] / 7, loss.detach())
    # Two micro-batches, or context-parallel ranks, of one step: their shares add up.
    outputs = [
        ModelOutput(predicted_units=predicted[rows], unit_targets=targets[rows], unit_patches=masked[rows])
        for rows in (slice(0, 1), slice(1, 4))
    ]
    parts = [objective.loss(output, batch, {"mae": 7})[0] for output in outputs]
    torch.testing.assert_close(sum(parts), loss, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="unit_patches of 4 predicted units has shape None"):
        objective.loss(ModelOutput(predicted_units=predicted, unit_targets=targets), batch, {"mae": 7})
    whole = replace(batch, unit_patches=torch.ones(4, 3, dtype=torch.bool))
    same, _ = objective.loss(replace(output, unit_patches=whole.unit_patches), whole, {"mae": 12})
    torch.testing.assert_close(same, F.mse_loss(predicted, targets), rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_mae_by_patch_ignores_what_overflowed_where_nothing_was_hidden(value):
    """Claim: whatever is predicted of a patch that was seen, loss and gradient of the hidden ones stay as they are."""
    predicted = torch.zeros(1, UNIT_DIM)
    predicted[0, 0] = value
    predicted.requires_grad_()
    masked = torch.tensor([[False, True, False]])
    output = ModelOutput(predicted_units=predicted, unit_targets=torch.ones(1, UNIT_DIM), unit_patches=masked)
    loss, _ = MaeObjective().loss(output, replace(make_batch(None, 1), unit_patches=masked), {"mae": 1})
    loss.backward()
    # A norm and its square.
    torch.testing.assert_close(loss.item(), 1.0, rtol=1e-6, atol=0)
    assert predicted.grad.tolist() == [[0.0, 0.0, -1.0, -1.0, 0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_mae_takes_the_error_in_float32(dtype):
    """Claim: BF16 predictions, and targets, are widened before the difference, not after."""
    predicted = torch.full((1, UNIT_DIM), 1.0, dtype=torch.bfloat16)
    targets = torch.full((1, UNIT_DIM), -(2.0**-9), dtype=dtype)  # a BF16 difference would be exactly 1
    output = ModelOutput(predicted_units=predicted, unit_targets=targets)
    loss, _ = MaeObjective().loss(output, make_batch(None, 1), {"mae": 1})
    assert loss.dtype == torch.float32
    # A norm and its square.
    torch.testing.assert_close(loss.item(), (1 + 2.0**-9) ** 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weight", [0.0, 0.3, 2.0])
def test_the_warm_up_weighs_pixels_and_not_metrics(weight):
    """Claim: the scalar and its gradients are torch's mean losses, the pixels' times ``mae_weight``."""
    torch.manual_seed(4)
    logits, labels = torch.randn(5, 11, requires_grad=True), torch.randint(11, (5,))
    predicted, targets = torch.randn(3, UNIT_DIM, requires_grad=True), torch.randn(3, UNIT_DIM)
    nll = F.cross_entropy(logits, labels, reduction="none")
    output = ModelOutput(token_nll=nll, predicted_units=predicted, unit_targets=targets)
    loss, metrics = WarmupObjective(mae_weight=weight).loss(output, make_batch(5, 3), {"mntp": 5, "mae": 3})
    text, pixels = F.cross_entropy(logits, labels), F.mse_loss(predicted, targets)
    wanted = text + weight * pixels
    # The order of float32 sums of a few terms.
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    torch.testing.assert_close(metrics["mntp"] / 5, text.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(metrics["mae"] / 3, pixels.detach(), rtol=1e-6, atol=0)
    leaves = (logits, predicted)
    gradients = (torch.autograd.grad(x, leaves, retain_graph=True) for x in (loss, wanted))
    for found, expected in zip(*gradients):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def cuts(total: int) -> st.SearchStrategy[list[int]]:
    """Places to cut ``total`` units into consecutive pieces, empty pieces included."""
    return st.lists(st.integers(0, total), min_size=1, max_size=4).map(sorted)


@settings(max_examples=40, deadline=None)
@given(texts=cuts(9), units=cuts(7), weight=st.sampled_from([0.0, 0.1, 0.5, 2.0]))
def test_any_cut_into_micro_batches_gives_the_same_loss_and_gradient(texts, units, weight):
    """Claim: pieces with any counts, empty ones included, add up to one big batch's loss and gradient."""
    generator = torch.Generator().manual_seed(2)
    nll = torch.rand(9, generator=generator, dtype=torch.float32)
    predicted, targets = torch.randn(2, 7, UNIT_DIM, generator=generator)
    objective = WarmupObjective(mae_weight=weight)

    def run(text_bounds: list[int], unit_bounds: list[int]) -> tuple[torch.Tensor, ...]:
        text, image = nll.clone().requires_grad_(), predicted.clone().requires_grad_()
        pieces = list(zip(zip(text_bounds, text_bounds[1:]), zip(unit_bounds, unit_bounds[1:])))
        batches = [make_batch(b - a, d - c) for (a, b), (c, d) in pieces]
        counted = [objective.counts(batch) for batch in batches]
        totals = {term: sum(c[term] for c in counted) for term in ("mntp", "mae")}
        value = torch.zeros(())
        sums = {"mntp": torch.zeros(()), "mae": torch.zeros(())}
        for batch, ((a, b), (c, d)) in zip(batches, pieces):
            output = ModelOutput(token_nll=text[a:b], predicted_units=image[c:d], unit_targets=targets[c:d])
            loss, metrics = objective.loss(output, batch, totals)
            loss.backward()
            value = value + loss.detach()
            sums = {term: sums[term] + metrics[term] for term in sums}
        return value, sums["mntp"] / totals["mntp"], sums["mae"] / totals["mae"], text.grad, image.grad

    length = max(len(texts), len(units))
    texts = texts + [9] * (length - len(texts))
    units = units + [7] * (length - len(units))
    cut = run([0, *texts, 9], [0, *units, 7])
    whole = run([0, 9], [0, 7])
    for found, expected in zip(cut, whole):
        # Only the order of at most 9 float32 additions differs.
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_context_parallel_ranks_hold_fewer_rows_than_the_batch_has_labels():
    """Claim: shares of two context-parallel ranks of one micro-batch, one of them without rows, add up to the mean."""
    nll = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    batch = make_batch(3, None)
    ranks = [ModelOutput(token_nll=nll[:3]), ModelOutput(token_nll=nll[3:])]
    losses = [MntpObjective().loss(output, batch, {"mntp": 3})[0] for output in ranks]
    assert [loss.item() for loss in losses] == [3.0, 0.0]
    sum(losses).backward()
    assert nll.grad.tolist() == [pytest.approx(1 / 3)] * 3


@pytest.mark.parametrize("texts, units", [(0, 0), (None, None), (3, None), (None, 2)])
def test_missing_terms_are_exact_zeros_with_a_live_graph(texts, units):
    """Claim: where a term has no unit, locally or in the whole step, backward still runs and adds nothing."""
    hidden = torch.randn(8, UNIT_DIM, requires_grad=True)
    output = ModelOutput(
        token_nll=None if texts is None else hidden[:texts].square().sum(-1),
        predicted_units=None if units is None else hidden[4 : 4 + units],
        unit_targets=None if units is None else torch.zeros(units, UNIT_DIM),
        embeddings=hidden if texts is None and units is None else None,
    )
    totals = {"mntp": texts or 0, "mae": units or 0}
    loss, metrics = WarmupObjective(mae_weight=0.5).loss(output, make_batch(texts, units), totals)
    loss.backward()
    assert torch.isfinite(loss) and set(metrics) == {"mntp", "mae"}
    if not texts and not units:
        assert loss.item() == 0.0 and metrics["mntp"].item() == 0.0 and metrics["mae"].item() == 0.0
        assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    else:
        assert loss.item() > 0.0


def test_the_zero_stays_zero_where_the_output_is_not_finite():
    """Claim: a zero term neither hides in NaN nor sends NaN gradients."""
    embeddings = torch.tensor([[float("inf"), float("nan")]], dtype=torch.bfloat16, requires_grad=True)
    output = ModelOutput(hidden_states=torch.ones(3, 2), embeddings=embeddings)
    loss, _ = MntpObjective().loss(output, make_batch(None, None), {"mntp": 4})
    loss.backward()
    assert loss.item() == 0.0 and loss.dtype == torch.float32
    assert torch.equal(embeddings.grad, torch.zeros(1, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", [MaskKind.EOS_BRIDGED, MaskKind.EOS_BRIDGED_STRICT])
def test_eos_bridged_is_mntp_under_its_own_mask(kind):
    """Claim: stage 2's loss is MNTP over the labels given, bound to the bridged mask that was chosen."""
    objective = EosBridgedObjective(kind)
    nll = torch.tensor([0.5, 1.5], requires_grad=True)
    loss, metrics = objective.loss(ModelOutput(token_nll=nll), make_batch(2, None, kind), {"mntp": 4})
    assert objective.mask_kind is kind and loss.item() == 0.5 and metrics["mntp"].item() == 2.0


def test_wrong_inputs_are_refused_with_their_numbers():
    """Claim: what would silently change the loss is an error that names what was found and needed."""
    nll = ModelOutput(token_nll=torch.ones(3))
    pixels = ModelOutput(predicted_units=torch.ones(3, UNIT_DIM), unit_targets=torch.ones(3, UNIT_DIM))
    causal = make_batch(3, 3, MaskKind.CAUSAL)
    for objective, output in ((MntpObjective(), nll), (MaeObjective(), pixels)):
        with pytest.raises(ValueError, match="bidirectional attention, but the batch asks for causal"):
            objective.counts(causal)
        with pytest.raises(ValueError, match="bidirectional attention, but the batch asks for causal"):
            objective.loss(output, causal, {"mntp": 3, "mae": 3})
    with pytest.raises(ValueError, match="bidirectional has no bridge"):
        EosBridgedObjective(MaskKind.BIDIRECTIONAL)
    with pytest.raises(ValueError, match="3 units of 'mntp' in this micro-batch, but a total of 2"):
        MntpObjective().loss(nll, make_batch(3, None), {"mntp": 2})
    with pytest.raises(ValueError, match="totals has no entry for 'mntp'"):
        MntpObjective().loss(nll, make_batch(3, None), {})
    with pytest.raises(ValueError, match="returned 3 units of 'mntp' for 2 labels"):
        MntpObjective().loss(nll, make_batch(2, None), {"mntp": 9})
    with pytest.raises(ValueError, match="3 units of 'mae' in this micro-batch, but a total of 2"):
        MaeObjective().loss(pixels, make_batch(None, 3), {"mae": 2})
    with pytest.raises(ValueError, match="returned 3 units of 'mae' for 2 labels"):
        MaeObjective().loss(pixels, make_batch(None, 2), {"mae": 9})
    by_patch = replace(make_batch(None, 3), unit_patches=torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"unit_patches of 3 predicted units has shape \(1, 2\)"):
        MaeObjective().loss(replace(pixels, unit_patches=torch.ones(1, 2, dtype=torch.bool)), by_patch, {"mae": 6})
    with pytest.raises(ValueError, match="has 2 units of 'mae', but the model returned none"):
        WarmupObjective().loss(nll, make_batch(3, 2), {"mntp": 3, "mae": 2})
    with pytest.raises(ValueError, match="returned no tensor"):
        MntpObjective().loss(ModelOutput(), make_batch(None, None), {"mntp": 0})
    broadcast = ModelOutput(predicted_units=torch.ones(2, UNIT_DIM), unit_targets=torch.ones(1, UNIT_DIM))
    with pytest.raises(ValueError, match=r"unit_targets \(1, 6\)"):
        MaeObjective().loss(broadcast, make_batch(None, 2), {"mae": 2})
    with pytest.raises(ValueError, match="mae_weight is -1"):
        WarmupObjective(mae_weight=-1)
