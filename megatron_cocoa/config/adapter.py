"""LoRA and DoRA adapters."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from megatron_cocoa.config.checks import require

LANGUAGE_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear modules of a language layer that adapters can sit on, as Hugging Face names them."""

VISION_TARGETS = ("qkv", "proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2", "mlp.0", "mlp.2")
"""The same for the tower (``visual``). Qwen2.5-VL's MLP has gate, up and down, Qwen2-VL's has fc1 and fc2; ``mlp.0``
and ``mlp.2`` are the merger's."""


@dataclass(frozen=True)
class AdapterSettings:
    """LoRA or DoRA adapters in place of full-parameter training.

    With adapters all pretrained weights are frozen, whatever ``freeze`` says; what trains is the adapters, the image
    decoder and the mask token's row. At the end of a stage they are merged into its checkpoint.

    Args:
        kind: ``none`` trains the weights themselves, ``lora`` adds ``alpha / rank * B A`` to each target (arXiv
            2106.09685), ``dora`` also trains the length of each row of that sum (arXiv 2402.09353; published).
        rank: rows of A and columns of B, ``r`` in peft (published: 8).
        alpha: numerator of the scale, ``lora_alpha`` in peft (published: 64).
        dropout: on the adapter's input, ``lora_dropout`` in peft (published: 0.1). Targets that are fused into one
            projection share the mask of their common input.
        init: of A, peft's ``init_lora_weights``: ``gaussian`` is normal with standard deviation 1 / rank (published),
            ``kaiming`` is uniform within 1 / sqrt(input width), which peft calls true. B starts at zero.
        rslora: scale by ``alpha / sqrt(rank)`` (arXiv 2312.03732), ``use_rslora`` in peft.
        language_targets: modules of the language model's layers, by Hugging Face's names.
        vision_targets: modules of the tower, by Hugging Face's names; names that only the other family has are ignored.
        export: also write the adapters alone, in peft's format, to ``output_dir/<stage>/adapter``.
    """

    kind: Literal["none", "lora", "dora"] = "none"
    rank: int = 8
    alpha: float = 64.0
    dropout: float = 0.1
    init: Literal["gaussian", "kaiming"] = "gaussian"
    rslora: bool = False
    language_targets: tuple[str, ...] = LANGUAGE_TARGETS
    vision_targets: tuple[str, ...] = ("qkv", "proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")
    export: bool = True

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"adapter.rank is {self.rank}, needs 1 or more")
        require(self.alpha > 0, f"adapter.alpha is {self.alpha}, must be positive")
        require(0.0 <= self.dropout < 1.0, f"adapter.dropout is {self.dropout}, must lie in [0, 1)")
        for name, known in (("language_targets", LANGUAGE_TARGETS), ("vision_targets", VISION_TARGETS)):
            targets = getattr(self, name)
            unknown = [target for target in targets if target not in known]
            require(not unknown, f"adapter.{name} has {unknown}: choose from {', '.join(known)}")
            require(len(set(targets)) == len(targets), f"adapter.{name} names a target twice: {list(targets)}")
        if self.is_used:
            require(
                bool(self.language_targets or self.vision_targets),
                f"adapter.kind is {self.kind}, and neither language_targets nor vision_targets names a module",
            )
        else:
            changed = [f.name for f in fields(self) if getattr(self, f.name) != f.default]
            require(
                not changed,
                f"adapter.{' and adapter.'.join(changed)} would have no effect: adapter.kind is none, set lora or dora",
            )

    @property
    def is_used(self) -> bool:
        """Whether there are adapters at all."""
        return self.kind != "none"

    @property
    def scaling(self) -> float:
        """Factor of ``B A``."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
