"""AdamW for machines without Transformer Engine and apex, in the form that Megatron-Core's optimizers expect.

Megatron's checkpoint code knows two optimizers: torch's, whose step count is a tensor per parameter, and the
fused ones of Transformer Engine and apex, whose step count lives in the parameter group. Only the second form
survives a change of layout (the distributed optimizer has no place for a scalar per parameter), so this class
keeps its step in the group and runs torch's fused kernel.
"""

from __future__ import annotations

import torch
from torch.optim.adamw import adamw


class GroupStepAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) with ``step`` in the parameter group.

    Args:
        params: parameters or groups; FP32.
        lr, betas, eps, weight_decay: as in ``torch.optim.AdamW``.
        adam_w_mode: must be True: decoupled weight decay only (apex's name for the switch).
        capturable: must be False: its step is no part of a captured graph (megatron-core 0.19 passes the switch).
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.01,
        adam_w_mode=True,
        capturable=False,
    ):
        if not adam_w_mode:
            raise ValueError("GroupStepAdamW decays weights decoupled from the gradient only (adam_w_mode=True)")
        if capturable:
            raise ValueError("GroupStepAdamW cannot be captured in a graph (capturable=False)")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        """Update every parameter that has a gradient; each group counts its own steps, those of other ranks if it has
        no parameter here.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["params"] and not params:
                continue
            done = int(group.get("step", 0))
            group["step"] = done + 1
            if not params:
                # The distributed optimizer gave them to other ranks, and a checkpoint keeps the count of the first.
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            adamw(
                params,
                [p.grad for p in params],
                [self.state[p]["exp_avg"] for p in params],
                [self.state[p]["exp_avg_sq"] for p in params],
                [],
                # One allocation and no copy from the host; the kernel counts up each entry.
                list(torch.full((len(params),), float(done), device=params[0].device).unbind()),
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=float(group["lr"]),
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
        return loss


def install() -> None:
    """Make Megatron-Core build ``GroupStepAdamW`` where it would build a fused Adam."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer

    optimizer.Adam = GroupStepAdamW
    optimizer.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.Adam = GroupStepAdamW
    distrib_optimizer.HAVE_APEX_OR_TE = True
