"""The layouts and inputs whose outputs and gradients must equal Hugging Face's."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_cocoa.batch import MaskKind


@dataclass(frozen=True)
class Case:
    """One comparison. ``parallel`` and ``recompute`` are fields of the settings of the same name."""

    name: str
    world_size: int = 1
    family: str = "qwen2_5_vl"
    samples: str = "mixed"
    kind: MaskKind = MaskKind.BIDIRECTIONAL
    num_microbatches: int = 1
    tied: bool = True
    key_value_heads: int = 2
    parallel: dict = field(default_factory=dict)
    recompute: dict = field(default_factory=dict)
    freeze: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)


def _layout(tp=1, pp=1, cp=1, vpp=None, sp=False, **more) -> dict:
    return dict(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        virtual_pipeline_model_parallel_size=vpp,
        sequence_parallel=sp,
        **more,
    )


BOTH = ("qwen2_vl", "qwen2_5_vl")
INPUTS = ("text_only", "one_image", "several_images", "video", "mixed")

SINGLE = [
    Case(f"{family}-{samples}-{kind.value}", family=family, samples=samples, kind=kind)
    for family in BOTH
    for samples in INPUTS
    for kind in (MaskKind.CAUSAL, MaskKind.BIDIRECTIONAL)
] + [
    Case("untied", tied=False),
    Case("untied-qwen2_vl", tied=False, family="qwen2_vl"),
    Case("microbatches-5", num_microbatches=5),
    Case("recompute-full", recompute=dict(vision="full", language="full")),
    Case("recompute-selective", recompute=dict(vision="selective", language="selective")),
    Case("recompute-vision-only", recompute=dict(vision="full")),
    Case("frozen-vision", freeze=dict(vision=True)),
    Case("frozen-merger", freeze=dict(merger=True)),
    Case("frozen-language", freeze=dict(language=True)),
    Case("vision-ffn-padded", model=dict(vision_ffn_multiple=16)),
]

TWO = [
    *(Case(f"tp2-{family}", 2, family, parallel=_layout(tp=2)) for family in BOTH),
    Case("tp2-causal", 2, kind=MaskKind.CAUSAL, parallel=_layout(tp=2)),
    Case("tp2-sp", 2, parallel=_layout(tp=2, sp=True)),
    Case("tp2-sp-qwen2_vl", 2, "qwen2_vl", parallel=_layout(tp=2, sp=True)),
    Case("tp2-above-kv-heads", 2, key_value_heads=1, parallel=_layout(tp=2)),
    Case("tp2-untied", 2, tied=False, parallel=_layout(tp=2)),
    Case("tp2-recompute-full", 2, parallel=_layout(tp=2), recompute=dict(vision="full", language="full")),
    Case("tp2-sp-recompute-full", 2, parallel=_layout(tp=2, sp=True), recompute=dict(language="full")),
    Case("tp2-vision-ffn-padded", 2, parallel=_layout(tp=2), model=dict(vision_ffn_multiple=16)),
    *(Case(f"pp2-{family}", 2, family, num_microbatches=5, parallel=_layout(pp=2)) for family in BOTH),
    Case("pp2-one-microbatch", 2, parallel=_layout(pp=2)),
    Case("pp2-untied", 2, tied=False, num_microbatches=5, parallel=_layout(pp=2)),
    Case("pp2-uneven", 2, num_microbatches=5, parallel=_layout(pp=2, num_layers_in_first_pipeline_stage=1)),
    Case("pp2-vpp2", 2, num_microbatches=4, parallel=_layout(pp=2, vpp=2)),
    Case("pp2-frozen-vision", 2, num_microbatches=5, parallel=_layout(pp=2), freeze=dict(vision=True, merger=True)),
    *(Case(f"cp2-{family}", 2, family, parallel=_layout(cp=2)) for family in BOTH),
    Case("cp2-causal", 2, kind=MaskKind.CAUSAL, parallel=_layout(cp=2)),
    Case("cp2-one-kv-head", 2, key_value_heads=1, parallel=_layout(cp=2)),
    Case("cp2-microbatches-5", 2, num_microbatches=5, parallel=_layout(cp=2)),
    Case("cp2-recompute-selective", 2, parallel=_layout(cp=2), recompute=dict(language="selective")),
    *(Case(f"dp2-{family}", 2, family, parallel=_layout()) for family in BOTH),
    Case("dp2-overlap", 2, num_microbatches=2, parallel=_layout(overlap_grad_reduce=True)),
]

FOUR = [
    *(Case(f"tp4-{family}", 4, family, parallel=_layout(tp=4)) for family in BOTH),
    Case("tp4-sp-above-kv-heads", 4, parallel=_layout(tp=4, sp=True)),
    *(Case(f"tp2-pp2-{family}", 4, family, num_microbatches=5, parallel=_layout(tp=2, pp=2)) for family in BOTH),
    Case("tp2-sp-pp2-vpp2", 4, num_microbatches=4, parallel=_layout(tp=2, pp=2, vpp=2, sp=True)),
    Case("pp4", 4, num_microbatches=5, parallel=_layout(pp=4)),
    Case("pp4-untied", 4, tied=False, num_microbatches=5, parallel=_layout(pp=4)),
    Case("tp2-cp2", 4, parallel=_layout(tp=2, cp=2)),
    Case("tp2-sp-cp2", 4, parallel=_layout(tp=2, cp=2, sp=True)),
    Case("pp2-cp2", 4, num_microbatches=5, parallel=_layout(pp=2, cp=2)),
    Case("pp2-dp2", 4, num_microbatches=2, parallel=_layout(pp=2)),
    Case("tp2-dp2-overlap", 4, num_microbatches=2, parallel=_layout(tp=2, overlap_grad_reduce=True)),
    Case("cp2-dp2", 4, num_microbatches=2, parallel=_layout(cp=2)),
    Case("cp4", 4, parallel=_layout(cp=4)),
    Case("dp4", 4, parallel=_layout()),
]

CASES = {case.name: case for case in [*SINGLE, *TWO, *FOUR]}
