"""The learned temperature stays within its bounds and can come back from them."""

import math

import pytest
import torch

from megatron_cocoa.model.logit_scale import bounded_logit_scale, new_logit_scale

COLDEST = math.log(100)


def test_it_starts_at_the_log_of_the_inverse_temperature():
    """Claim: float32 whatever the model's dtype, and a vector, which weight decay leaves alone."""
    parameter = new_logit_scale(0.02)
    assert parameter.shape == (1,) and parameter.dtype == torch.float32
    assert (-bounded_logit_scale(parameter)).exp().item() == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("start", "gradient", "value", "passes"),
    [
        (2.0, 1.0, 2.0, True),
        (2.0, -1.0, 2.0, True),
        (5.0, -1.0, COLDEST, False),
        (5.0, 1.0, COLDEST, True),
        (0.0, 1.0, 0.0, False),
        (-1.0, 1.0, 0.0, False),
        (-1.0, -1.0, 0.0, True),
    ],
)
def test_a_bound_stops_what_leads_outwards_alone(start, gradient, value, passes):
    """Claim: the value read is CLIP's clipped one; descent may bring a parameter back, but not push it further out."""
    parameter = torch.nn.Parameter(torch.tensor([start]))
    scale = bounded_logit_scale(parameter)
    assert scale.item() == pytest.approx(value) and scale.dim() == 0
    scale.backward(torch.tensor(gradient))
    assert parameter.grad.item() == (gradient if passes else 0.0)


def test_descent_settles_at_the_bound():
    """Claim: a loss that wants ever colder temperatures ends within one step of the bound, and turns round at once."""
    parameter = new_logit_scale(0.0105)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    values = []
    for sign in [-1.0] * 5 + [1.0] * 3:
        optimizer.zero_grad()
        scale = bounded_logit_scale(parameter)
        values.append(scale.item())
        (sign * scale).backward()
        optimizer.step()
    assert max(values) <= COLDEST + 1e-6 and parameter.item() < COLDEST
