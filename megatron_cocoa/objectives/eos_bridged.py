"""Stage 2, EOS-bridged reconstruction: block B's masked tokens, predicted with block A visible only in the bridge.

The attention does the work (``MaskKind``), the loss is MNTP on block B alone: block A carries no label, and the
first token of B is predicted from the bridge's own hidden state. Source: CoCoA (arXiv 2603.01471), stage 2. The
strict variant, in which the bridge does not see B, is a deliberate departure (``BridgeSettings.bridge_sees_target``).
"""

from __future__ import annotations

from megatron_cocoa.batch import MaskKind
from megatron_cocoa.objectives.mntp import MntpObjective


class EosBridgedObjective(MntpObjective):
    """MNTP on block B under the collaborative mask; its term is named ``mntp`` like the warm-up's.

    Args:
        mask_kind: ``EOS_BRIDGED`` (as published) or ``EOS_BRIDGED_STRICT``.

    Raises:
        ValueError: for any other mask kind: without the bridge, B would read A directly.
    """

    name = "eos_bridged"

    def __init__(self, mask_kind: MaskKind = MaskKind.EOS_BRIDGED) -> None:
        if not mask_kind.needs_bridge:
            raise ValueError(
                f"mask kind {mask_kind.value} has no bridge: choose {MaskKind.EOS_BRIDGED.value} or "
                f"{MaskKind.EOS_BRIDGED_STRICT.value}"
            )
        super().__init__(mask_kind)
