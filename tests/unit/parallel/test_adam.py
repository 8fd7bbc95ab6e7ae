"""The CPU route's AdamW against torch's."""

import pytest
import torch

from megatron_cocoa.parallel.adam import GroupStepAdamW

SETTINGS = [
    dict(lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0),
    dict(lr=3e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1),
]


def groups():
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in [(5, 3), (7,), (2, 2)]]
    return params, [{"params": params[:2]}, {"params": params[2:], "lr": 5e-3}]


@pytest.mark.parametrize("settings", SETTINGS)
def test_twenty_steps_equal_torchs_adamw(settings):
    """Claim: the same maths as ``torch.optim.AdamW`` over groups, with gradients that are absent at times."""
    ours, our_groups = groups()
    theirs, their_groups = groups()
    optimizers = GroupStepAdamW(our_groups, **settings), torch.optim.AdamW(their_groups, **settings)
    generator = torch.Generator().manual_seed(1)
    for step in range(20):
        gradients = [torch.randn(p.shape, generator=generator) for p in ours]
        for params in (ours, theirs):
            for index, (p, gradient) in enumerate(zip(params, gradients)):
                # The second group has no gradient in every fourth step, and does not count that step.
                p.grad = None if index == 2 and step % 4 == 3 else gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other in zip(ours, theirs):
        # Two float32 kernels of one formula: a few units in the last place over twenty steps.
        assert torch.allclose(mine, other, rtol=1e-6, atol=1e-7)
    assert [group["step"] for group in optimizers[0].param_groups] == [20, 15]


def test_step_is_in_the_group_and_survives_a_reload():
    """Claim: the state that Megatron's checkpoints carry is enough to go on exactly."""
    straight, straight_groups = groups()
    resumed, resumed_groups = groups()
    first, before = GroupStepAdamW(straight_groups, lr=1e-2), GroupStepAdamW(resumed_groups, lr=1e-2)

    def advance(optimizer, params, seed):
        for index, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + index))
        optimizer.step()

    for seed in (10, 20):
        advance(first, straight, seed)
        advance(before, resumed, seed)
    state = before.state_dict()
    assert all("step" not in entry for entry in state["state"].values())
    after = GroupStepAdamW([{"params": resumed[:2]}, {"params": resumed[2:]}], lr=0.0)
    after.load_state_dict(state)
    advance(first, straight, 30)
    advance(after, resumed, 30)
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed))


def test_a_group_counts_its_steps_where_all_of_it_lies_on_other_ranks():
    """Claim: of whatever rank a checkpoint keeps the counts, a resumed group goes on from its own.

    Megatron's distributed optimizer cuts one long buffer: a rank may get a part of one large matrix and no norm.
    """
    params, split = groups()
    optimizer = GroupStepAdamW(split, lr=1e-2)
    optimizer.param_groups[1]["params"] = []
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert [group["step"] for group in optimizer.state_dict()["param_groups"]] == [3, 3]


def test_coupled_decay_is_refused():
    """Claim: L2 regularisation is not passed off as weight decay."""
    with pytest.raises(ValueError, match="adam_w_mode=True"):
        GroupStepAdamW([torch.nn.Parameter(torch.ones(1))], adam_w_mode=False)


def test_closures_are_called_with_gradients():
    """Claim: torch's optimizer protocol is kept: a closure runs with gradients on and its loss is returned."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = GroupStepAdamW([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2.0 and (p < 1.0).all()
