"""What compares at every layout passes over neither what is no number, as ``max`` does, nor what alone is frozen."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.distributed import gradients
from tests.parity.compare import relative


def test_a_value_that_is_no_number_is_infinitely_wrong():
    """Claim: wherever it stands among others."""
    wanted = torch.tensor([1.0, 2.0])
    for found in ([torch.nan, 2.0], [1.0, torch.nan], [torch.inf, 2.0]):
        assert max(0.0, relative(torch.tensor(found), wanted)) == torch.inf
    assert relative(torch.tensor([1.0, 1.0]), wanted) == 0.5


@pytest.fixture
def model(monkeypatch) -> SimpleNamespace:
    chunk = nn.Linear(2, 2)
    for parameter in chunk.parameters():
        parameter.main_grad = torch.ones_like(parameter.data)
    monkeypatch.setattr(gradients, "global_name", lambda chunk, name: name)
    monkeypatch.setattr(gradients, "shard_of", lambda table, name, whole, *_: whole)
    return SimpleNamespace(bare_chunks=[chunk])


def test_the_worst_gradient_is_one_that_is_no_number(model):
    """Claim: though one after it is right."""
    wanted = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    assert gradients.worst_gradient(model, None, wanted) == (0.0, "")
    model.bare_chunks[0].weight.main_grad[0, 0] = torch.nan
    assert gradients.worst_gradient(model, None, wanted) == (torch.inf, "weight")


def test_a_parameter_that_trains_in_the_reference_alone_is_a_failure(model):
    """Claim: one that is frozen in both is none."""
    model.bare_chunks[0].bias.requires_grad_(False)
    assert gradients.worst_gradient(model, None, {"weight": torch.ones(2, 2)}) == (0.0, "")
    with pytest.raises(AssertionError, match="bias trains in the reference"):
        gradients.worst_gradient(model, None, {"weight": torch.ones(2, 2), "bias": torch.ones(2)})
