"""What reads the weights of the last update outside of a training step."""

from types import SimpleNamespace

import torch
from torch import nn

from megatron_cocoa.model.build import Model
from megatron_cocoa.parallel import fp8_parameters
from megatron_cocoa.training.data_parallel import gather_parameters, whole_parameters


class Chunk(nn.Module):
    """What is used here of Megatron's DDP with ``overlap_param_gather``, and what was asked of it in order."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.remove_forward_pre_hook_handles = {self: None}
        self.done: list[str] = []

    def disable_forward_pre_hook(self, param_sync: bool) -> None:
        assert param_sync
        self.remove_forward_pre_hook_handles = {}
        self.done.append("gathered")

    def enable_forward_pre_hook(self) -> None:
        self.remove_forward_pre_hook_handles = {self: None}
        self.done.append("hooked")


def test_copies_by_columns_follow_fp8_weights_that_are_gathered_for_reading(monkeypatch):
    """Claim: after a checkpoint or a validation the backward pass multiplies by the weights of the last update.

    Megatron-Core 0.16 makes those copies in its hooks alone, and only where these gather themselves. The frozen weights
    have not changed, and may need no such copy.
    """
    chunk = Chunk()

    def post_all_gather_processing(parameters):
        assert len(parameters) == 1 and parameters[0] is chunk.trained
        chunk.done.append("copied")

    monkeypatch.setattr(fp8_parameters, "is_float8tensor", lambda parameter: True)
    monkeypatch.setattr(fp8_parameters, "post_all_gather_processing", post_all_gather_processing)
    model = Model([chunk], SimpleNamespace(param_sync_func=None), architecture=None)
    with whole_parameters(model):
        assert chunk.done == ["gathered", "copied"]
    gather_parameters(model)
    assert chunk.done == ["gathered", "copied", "hooked", "gathered", "copied"]
