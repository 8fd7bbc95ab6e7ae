"""The layouts and inputs whose outputs and gradients must equal Hugging Face's."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_cocoa.batch import MaskKind


@dataclass(frozen=True)
class Case:
    """One comparison; ``parallel``, ``recompute``, ``freeze`` and ``model`` are fields of the settings of that name."""

    name: str
    world_size: int = 1
    family: str = "qwen2_5_vl"
    samples: str = "mixed"
    kind: MaskKind = MaskKind.BIDIRECTIONAL
    num_microbatches: int = 1
    tied: bool = True
    key_value_heads: int = 2
    layers: int = 4
    image_decoder: bool = False
    decoder_layers: int = 1
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

FULL, MLP, SELECTIVE = (dict(vision=how, language=how) for how in ("full", "mlp", "selective"))
BRIDGED = (MaskKind.EOS_BRIDGED, MaskKind.EOS_BRIDGED_STRICT)


def _bridged(layout: str, world_size: int, **more) -> list[Case]:
    """Both bridged kinds at a layout."""
    return [Case(f"{layout}-{kind.value}", world_size, kind=kind, **more) for kind in BRIDGED]


SINGLE = [
    *(
        Case(f"{family}-{samples}-{kind.value}", family=family, samples=samples, kind=kind)
        for family in BOTH
        for samples in INPUTS
        for kind in (MaskKind.CAUSAL, MaskKind.BIDIRECTIONAL)
    ),
    *(Case(f"{family}-mixed-{kind.value}", family=family, kind=kind) for family in BOTH for kind in BRIDGED),
    Case("untied", tied=False),
    Case("untied-qwen2_vl", tied=False, family="qwen2_vl"),
    Case("microbatches-5", num_microbatches=5),
    Case("recompute-full", recompute=FULL),
    Case("recompute-full-2-layers", recompute=dict(language="full", language_num_layers=2)),
    Case("recompute-selective", recompute=SELECTIVE),
    Case("recompute-mlp", recompute=MLP),
    Case("recompute-mlp-2-layers", recompute=dict(vision="mlp", vision_num_layers=2)),
    Case("recompute-mlp-qwen2_vl", family="qwen2_vl", recompute=MLP),
    Case("recompute-vision-only", recompute=dict(vision="full")),
    Case("frozen-vision", freeze=dict(vision=True)),
    Case("frozen-merger", freeze=dict(merger=True)),
    Case("frozen-language", freeze=dict(language=True)),
    Case("frozen-all-but-image-decoder", image_decoder=True, freeze=dict(vision=True, merger=True, language=True)),
    Case("vision-ffn-padded", model=dict(vision_ffn_multiple=16)),
    *(Case(f"image-decoder-{family}", family=family, image_decoder=True) for family in BOTH),
    Case("image-decoder-of-3-layers", image_decoder=True, decoder_layers=3),
]

TWO = [
    *(Case(f"tp2-{family}", 2, family, parallel=_layout(tp=2)) for family in BOTH),
    Case("tp2-causal", 2, kind=MaskKind.CAUSAL, parallel=_layout(tp=2)),
    Case("tp2-sp", 2, parallel=_layout(tp=2, sp=True)),
    Case("tp2-sp-qwen2_vl", 2, "qwen2_vl", parallel=_layout(tp=2, sp=True)),
    Case("tp2-above-kv-heads", 2, key_value_heads=1, parallel=_layout(tp=2)),
    Case("tp2-above-kv-heads-untied", 2, key_value_heads=1, tied=False, parallel=_layout(tp=2)),
    Case("tp2-untied", 2, tied=False, parallel=_layout(tp=2)),
    Case("tp2-recompute-full", 2, parallel=_layout(tp=2), recompute=FULL),
    Case("tp2-recompute-selective", 2, parallel=_layout(tp=2), recompute=SELECTIVE),
    Case("tp2-sp-recompute-mlp", 2, parallel=_layout(tp=2, sp=True), recompute=MLP),
    Case("tp2-sp-recompute-full", 2, parallel=_layout(tp=2, sp=True), recompute=dict(language="full")),
    Case("tp2-vision-ffn-padded", 2, parallel=_layout(tp=2), model=dict(vision_ffn_multiple=16)),
    Case("tp2-frozen-vision", 2, parallel=_layout(tp=2), freeze=dict(vision=True, merger=True)),
    Case("tp2-sp-frozen-language", 2, parallel=_layout(tp=2, sp=True), freeze=dict(language=True)),
    *_bridged("tp2", 2, parallel=_layout(tp=2)),
    Case("tp2-sp-eos_bridged", 2, kind=MaskKind.EOS_BRIDGED, parallel=_layout(tp=2, sp=True)),
    Case("tp2-image-decoder", 2, image_decoder=True, parallel=_layout(tp=2)),
    Case("tp2-sp-image-decoder", 2, image_decoder=True, parallel=_layout(tp=2, sp=True)),
    Case("tp2-sp-image-decoder-of-2-layers", 2, image_decoder=True, decoder_layers=2, parallel=_layout(tp=2, sp=True)),
]

TWO += [
    *(Case(f"pp2-{family}", 2, family, num_microbatches=5, parallel=_layout(pp=2)) for family in BOTH),
    Case("pp2-one-microbatch", 2, parallel=_layout(pp=2)),
    Case("pp2-untied", 2, tied=False, num_microbatches=5, parallel=_layout(pp=2)),
    Case("pp2-uneven-first", 2, num_microbatches=5, parallel=_layout(pp=2, num_layers_in_first_pipeline_stage=1)),
    Case("pp2-uneven-last", 2, num_microbatches=5, parallel=_layout(pp=2, num_layers_in_last_pipeline_stage=1)),
    Case("pp2-vpp2", 2, num_microbatches=4, parallel=_layout(pp=2, vpp=2)),
    Case("pp2-vpp2-untied", 2, tied=False, num_microbatches=4, parallel=_layout(pp=2, vpp=2)),
    Case("pp2-vpp2-recompute-full", 2, num_microbatches=4, parallel=_layout(pp=2, vpp=2), recompute=FULL),
    Case("pp2-vpp2-recompute-mlp", 2, num_microbatches=4, parallel=_layout(pp=2, vpp=2), recompute=MLP),
    Case("pp2-recompute-full", 2, num_microbatches=5, parallel=_layout(pp=2), recompute=FULL),
    Case("pp2-frozen-vision", 2, num_microbatches=5, parallel=_layout(pp=2), freeze=dict(vision=True, merger=True)),
    Case("pp2-frozen-language", 2, num_microbatches=5, parallel=_layout(pp=2), freeze=dict(language=True)),
    Case(
        "pp2-frozen-language-untied",
        2,
        tied=False,
        num_microbatches=5,
        parallel=_layout(pp=2),
        freeze=dict(language=True),
    ),
    Case(
        "pp2-frozen-all-but-image-decoder",
        2,
        num_microbatches=5,
        image_decoder=True,
        parallel=_layout(pp=2),
        freeze=dict(vision=True, merger=True, language=True),
    ),
    Case("pp2-pictures-in-every-second-batch", 2, samples="alternating", num_microbatches=4, parallel=_layout(pp=2)),
    Case("pp2-no-pictures", 2, samples="text_only", num_microbatches=3, parallel=_layout(pp=2)),
    *_bridged("pp2", 2, num_microbatches=5, parallel=_layout(pp=2)),
    Case("pp2-image-decoder-of-2-layers", 2, image_decoder=True, decoder_layers=2, parallel=_layout(pp=2)),
    Case("pp2-image-decoder", 2, image_decoder=True, num_microbatches=5, parallel=_layout(pp=2)),
    *(Case(f"cp2-{family}", 2, family, parallel=_layout(cp=2)) for family in BOTH),
    Case("cp2-causal", 2, kind=MaskKind.CAUSAL, parallel=_layout(cp=2)),
    Case("cp2-one-kv-head", 2, key_value_heads=1, parallel=_layout(cp=2)),
    Case("cp2-microbatches-5", 2, num_microbatches=5, parallel=_layout(cp=2)),
    Case("cp2-one-picture-on-two-ranks", 2, samples="one_image", parallel=_layout(cp=2)),
    Case("cp2-pictures-in-every-second-batch", 2, samples="alternating", num_microbatches=4, parallel=_layout(cp=2)),
    Case("cp2-no-pictures", 2, samples="text_only", parallel=_layout(cp=2)),
    Case("cp2-recompute-selective", 2, parallel=_layout(cp=2), recompute=dict(language="selective")),
    Case("cp2-recompute-full", 2, parallel=_layout(cp=2), recompute=FULL),
    Case("cp2-frozen-language", 2, parallel=_layout(cp=2), freeze=dict(language=True)),
    *_bridged("cp2", 2, parallel=_layout(cp=2)),
    Case("cp2-image-decoder-of-2-layers", 2, image_decoder=True, decoder_layers=2, parallel=_layout(cp=2)),
    Case("cp2-image-decoder", 2, image_decoder=True, parallel=_layout(cp=2)),
    *(Case(f"dp2-{family}", 2, family, parallel=_layout()) for family in BOTH),
    Case("dp2-overlap", 2, num_microbatches=2, parallel=_layout(overlap_grad_reduce=True)),
    Case("dp2-distributed-optimizer", 2, num_microbatches=2, parallel=_layout(use_distributed_optimizer=True)),
    Case(
        "dp2-distributed-optimizer-overlap",
        2,
        num_microbatches=2,
        parallel=_layout(use_distributed_optimizer=True, overlap_grad_reduce=True, overlap_param_gather=True),
    ),
    Case("dp2-pictures-on-one-rank", 2, samples="alternating", parallel=_layout()),
    Case(
        "dp2-pictures-on-one-rank-overlap",
        2,
        samples="halves",
        num_microbatches=2,
        parallel=_layout(overlap_grad_reduce=True),
    ),
    Case("dp2-image-decoder", 2, image_decoder=True, parallel=_layout()),
    Case("dp2-image-decoder-pictures-on-one-rank", 2, samples="alternating", image_decoder=True, parallel=_layout()),
]

FOUR = [
    *(Case(f"tp4-{family}", 4, family, parallel=_layout(tp=4)) for family in BOTH),
    Case("tp4-sp-above-kv-heads", 4, parallel=_layout(tp=4, sp=True)),
    Case("tp4-above-kv-heads-untied", 4, tied=False, parallel=_layout(tp=4)),
    *(Case(f"tp2-pp2-{family}", 4, family, num_microbatches=5, parallel=_layout(tp=2, pp=2)) for family in BOTH),
    Case("tp2-sp-pp2-vpp2", 4, num_microbatches=4, parallel=_layout(tp=2, pp=2, vpp=2, sp=True)),
    Case("tp2-pp2-frozen-language", 4, num_microbatches=5, parallel=_layout(tp=2, pp=2), freeze=dict(language=True)),
    Case("tp2-pp2-eos_bridged", 4, kind=MaskKind.EOS_BRIDGED, num_microbatches=5, parallel=_layout(tp=2, pp=2)),
    Case("tp2-pp2-image-decoder", 4, image_decoder=True, num_microbatches=5, parallel=_layout(tp=2, pp=2)),
    Case("tp2-sp-pp2-image-decoder", 4, image_decoder=True, num_microbatches=5, parallel=_layout(tp=2, pp=2, sp=True)),
    Case("pp4", 4, num_microbatches=5, parallel=_layout(pp=4)),
    Case("pp4-untied", 4, tied=False, num_microbatches=5, parallel=_layout(pp=4)),
    Case("pp4-vpp2", 4, layers=8, num_microbatches=4, parallel=_layout(pp=4, vpp=2)),
    Case("tp2-cp2", 4, parallel=_layout(tp=2, cp=2)),
    Case("tp2-sp-cp2", 4, parallel=_layout(tp=2, cp=2, sp=True)),
    Case("tp2-sp-cp2-image-decoder", 4, image_decoder=True, parallel=_layout(tp=2, cp=2, sp=True)),
    Case("pp2-cp2", 4, num_microbatches=5, parallel=_layout(pp=2, cp=2)),
    Case("pp2-cp2-recompute-full", 4, num_microbatches=5, parallel=_layout(pp=2, cp=2), recompute=FULL),
    *_bridged("pp2-cp2", 4, num_microbatches=5, parallel=_layout(pp=2, cp=2)),
    Case("pp2-dp2", 4, num_microbatches=2, parallel=_layout(pp=2)),
    Case(
        "pp2-dp2-pictures-on-one-rank-overlap",
        4,
        samples="halves",
        num_microbatches=2,
        parallel=_layout(pp=2, overlap_grad_reduce=True),
    ),
    Case("cp2-dp2-pictures-on-one-rank", 4, samples="halves", num_microbatches=2, parallel=_layout(cp=2)),
    Case("tp2-dp2-overlap", 4, num_microbatches=2, parallel=_layout(tp=2, overlap_grad_reduce=True)),
    Case("cp2-dp2", 4, num_microbatches=2, parallel=_layout(cp=2)),
    Case("cp4", 4, parallel=_layout(cp=4)),
    *_bridged("cp4", 4, parallel=_layout(cp=4)),
    Case("dp4", 4, parallel=_layout()),
]

CASES = {case.name: case for case in [*SINGLE, *TWO, *FOUR]}
assert len(CASES) == len(SINGLE) + len(TWO) + len(FOUR), "two cases have one name"
