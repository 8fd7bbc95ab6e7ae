"""Counted operations equal what torch's own counter sees run, in Hugging Face's model and in ours, part by part."""

import time
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.batch import MaskKind
from megatron_cocoa.config import FreezeSettings, RecomputeSettings
from megatron_cocoa.model import sdpa_plan
from megatron_cocoa.model.flops import step_flops
from megatron_cocoa.model.vision_layout import build_layout
from megatron_cocoa.model.workload import Workload, grid_pairs
from tests.parity import reference
from tests.unit.published import published_architecture

PICTURES = [
    reference.Sample((2, (1, 4, 6), 3)),
    reference.Sample(((1, 10, 6), 1, (1, 2, 4), 7)),
    reference.Sample((9,)),
]
VIDEO = [reference.Sample((2, (3, 4, 6), 5), video_seconds=1.5)]


def _attention(query, key, value, *args, out_shape=None, **kwargs) -> int:
    """Two matrix products; torch registers this formula for the GPU kernels only."""
    batch, heads, queries, dim = query
    return 4 * batch * heads * queries * key[2] * dim


def _attention_backward(grad, query, *args, out_shape=None, **kwargs) -> int:
    """Four matrix products. The kernel repeats the scores, a fifth: that is its choice, and no useful work."""
    return 2 * _attention(query, *args)


ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def counted(run) -> int:
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("samples", [PICTURES, VIDEO], ids=["pictures", "video"])
def test_hugging_faces_model_runs_what_is_counted(family, samples):
    """Claim: forward and backward operations are those of Hugging Face's own model, to the last one.

    Eager attention runs as matrix products, which torch counts exactly.
    """
    config = reference.tiny_config(family)
    model, architecture = reference.tiny_huggingface(config), QwenVLArchitecture.from_huggingface(config)
    for kind in (MaskKind.BIDIRECTIONAL, MaskKind.EOS_BRIDGED):
        generator = torch.Generator().manual_seed(0)
        encoded = [reference.encode(s, config, generator, index=0, kind=kind) for s in samples]

        def forward(encoded=encoded, kind=kind):
            outputs = []
            for sample in encoded:
                hidden, _ = reference.run_huggingface(model, sample, kind=kind)
                outputs.append(model.lm_head(hidden[sample.text_rows]).sum())
            return sum(outputs)

        positions = [reference.huggingface_positions(model, s) for s in encoded]
        batch = reference.pack(encoded, positions, MaskKind.BIDIRECTIONAL)
        # Hugging Face computes masked pairs too, so its bridged run equals a bidirectional one.
        workload = Workload.of(batch, architecture.vision)
        expected = step_flops(architecture, replace(workload, read_rows=workload.tokens))
        with torch.no_grad():
            assert counted(forward) == expected.forward
        assert counted(lambda: forward().backward()) == expected.useful


@pytest.mark.parametrize("kind", MaskKind)
@pytest.mark.parametrize("with_units", [True, False], ids=["image-decoder", "no-units"])
def test_our_model_runs_what_is_counted(tiny_with_decoder, monkeypatch, kind, with_units):
    """Claim: every mask kind costs its segments and not a pair more, and heads and last layers what is read of them."""
    monkeypatch.setattr(sdpa_plan, "CALL_COST", 0)  # no segment is padded to another's size
    batch, architecture = _pack(tiny_with_decoder, kind, with_units), tiny_with_decoder.chunk.architecture
    workload = Workload.of(batch, architecture.vision)
    if kind is MaskKind.CAUSAL:
        # torch's kernel formula takes a causal square as a whole one.
        square = sum(n * n for n in batch.sample_lengths)
        workload = replace(workload, pairs=square, decoder_pairs=square if with_units else 0)
    expected = step_flops(architecture, workload)
    chunk = tiny_with_decoder.chunk
    with torch.no_grad():
        assert _ours(chunk, batch) == expected.forward + _vocabulary_padding(batch, architecture)
    found = _ours(chunk, batch, backward=True)
    assert found == expected.useful + 3 * _vocabulary_padding(batch, architecture)


@pytest.mark.parametrize("frozen", [("vision",), ("merger",), ("vision", "merger"), ("language",)])
def test_frozen_parts_run_what_is_counted(tiny_with_decoder, monkeypatch, frozen):
    """Claim: a frozen part has no weight gradient, and below the lowest trainable part there is no backward."""
    monkeypatch.setattr(sdpa_plan, "CALL_COST", 0)
    chunk, kind = tiny_with_decoder.chunk, MaskKind.BIDIRECTIONAL
    batch = _pack(tiny_with_decoder, kind, True)
    tower = chunk.vision_model
    parts = {
        "vision": [tower.patch_embed, tower.decoder.layers],
        "merger": [tower.decoder.final_layernorm, tower.projection],
        "language": [chunk.language_model],
    }
    expected = step_flops(
        chunk.architecture,
        Workload.of(batch, chunk.architecture.vision),
        freeze=FreezeSettings(**dict.fromkeys(frozen, True)),
    )
    padding = 3 * _vocabulary_padding(batch, chunk.architecture)
    extra = 0
    try:
        for name in frozen:
            for part in parts[name]:
                part.requires_grad_(False)
        if "language" in frozen:
            # The mask token's row trains, and with it the tied matrix, whose gradient torch computes as a whole.
            chunk.shared_embedding_or_output_weight().requires_grad_(True)
            extra = 2 * len(batch.text_positions) * chunk.architecture.text.hidden_size * 157
        assert _ours(chunk, batch, backward=True) == expected.useful + padding + extra
    finally:
        chunk.requires_grad_(True)


def _pack(tiny, kind, with_units):
    """Samples and bridges such that every block is non-empty; all text rows are supervised, no row is embedded."""
    samples = tiny.encode(PICTURES, kind)
    return replace(tiny.pack(samples, kind, with_units=with_units), embedding_positions=None)


def _ours(chunk, batch, *, backward: bool = False) -> int:
    def run():
        output = chunk(batch)
        if backward:
            units = output.predicted_units
            (output.token_nll.sum() + (0 if units is None else units.sum())).backward()

    found = counted(run)
    chunk.zero_grad()
    return found


def _vocabulary_padding(batch, architecture) -> int:
    """The tiny vocabulary of 157 is padded to 160 rows: work, but no useful work."""
    return 2 * len(batch.text_positions) * architecture.text.hidden_size * (160 - 157)


def test_pairs_of_windows_and_frames_are_those_of_the_layout():
    """Claim: the closed form gives the tower's own segments, where windows do not divide a picture, and for videos."""
    for name in ("Qwen2.5-VL-3B", "Qwen2-VL-2B"):
        vision = published_architecture(name).vision
        for grid in [(1, 4, 6), (1, 8, 8), (1, 48, 34), (3, 22, 10), (1, 2, 300)]:
            layout = build_layout([grid], vision)
            assert grid_pairs(grid, vision) == (
                layout.frames.num_score_entries(), layout.windows.num_score_entries()
            )  # fmt: skip


def test_bridged_attention_costs_its_definition():
    """Claim: block A costs a (a + 1) pairs, the bridge n, block B b (b + 1): a^2 + b^2 + n and the bridge's columns."""
    lengths, bridges = (10, 7), (6, 10)
    pairs = {}
    for kind in MaskKind:
        batch = _layout_only(lengths, kind, bridges)
        pairs[kind] = Workload.of(batch, published_architecture("Qwen2.5-VL-3B").vision).pairs
    assert pairs[MaskKind.EOS_BRIDGED] == (6 * 7 + 10 + 3 * 4) + (0 + 7 + 6 * 7)
    assert pairs[MaskKind.EOS_BRIDGED_STRICT] == (7 * 7 + 3 * 4) + (1 + 6 * 7)
    assert pairs[MaskKind.BIDIRECTIONAL] == 149 and pairs[MaskKind.CAUSAL] == 55 + 28


def _layout_only(lengths, kind, bridges=(), grids=(), tail=0):
    """A batch of zeros: only its host-side layout counts."""
    tokens = sum(lengths) + tail
    return reference.PackedBatch(
        input_ids=torch.zeros(tokens, dtype=torch.long),
        position_ids=torch.zeros(3, tokens, dtype=torch.long),
        sample_lengths=tuple(lengths),
        mask_kind=kind,
        bridge_positions=tuple(bridges[: len(lengths)]) or (None,) * len(lengths),
        tail_length=tail,
        grid_thw=tuple(grids),
    )


def test_a_3b_and_a_7b_picture_by_hand():
    """Claim: one 672 x 672 picture and 64 text tokens through the published shapes, computed from the papers' numbers.

    48 x 48 patches: 36 windows of 8 x 8 patches in 28 blocks, one frame of 2304 in 4 blocks; 576 merged units and so
    640 tokens.
    """
    patches, tokens = 2304, 640
    batch = _layout_only([tokens], MaskKind.BIDIRECTIONAL, grids=[(1, 48, 48)])
    tower = (
        2 * patches * (3 * 2 * 14 * 14) * 1280
        + 32 * 2 * patches * (1280 * 3 * 1280 + 1280 * 1280 + 3 * 1280 * 3420)
        + 4 * 1280 * (28 * 36 * 64**2 + 4 * 2304**2)
    )
    shapes = {"Qwen2.5-VL-3B": (2048, 11008, 36, 256), "Qwen2.5-VL-7B": (3584, 18944, 28, 512)}
    for name, (hidden, ffn, layers, key_value) in shapes.items():
        architecture = published_architecture(name)
        merger = 2 * (patches // 4) * (5120 * 5120 + 5120 * hidden)
        weights = hidden * (hidden + 2 * key_value) + hidden * hidden + 3 * hidden * ffn
        language = layers * (2 * tokens * weights + 4 * tokens**2 * hidden)
        found = step_flops(architecture, replace(Workload.of(batch, architecture.vision), read_rows=tokens))
        assert found.forward == tower + merger + language
        # Everything trains: backward is twice forward, but pixels need no gradient.
        assert found.useful == 3 * found.forward - 2 * patches * 1176 * 1280


def test_hardware_operations_count_what_is_repeated_and_padded():
    """Claim: recompute, gradient caching and the tail raise HFU's numerator and leave MFU's as it is."""
    architecture = published_architecture("Qwen2.5-VL-3B")
    plain = Workload.of(_layout_only([500], MaskKind.BIDIRECTIONAL, grids=[(1, 8, 8)]), architecture.vision)
    padded = Workload.of(_layout_only([500], MaskKind.BIDIRECTIONAL, grids=[(1, 8, 8)], tail=12), architecture.vision)
    base = step_flops(architecture, plain)
    assert base.useful == base.hardware == step_flops(architecture, padded).useful
    before, after = 2048 * (2048 + 512), 2048 * (2048 + 3 * 11008)
    tail = 3 * (2 * 12 * (36 * before + 35 * after) + 36 * 4 * 12**2 * 2048)
    assert step_flops(architecture, padded).hardware == base.hardware + tail
    read = replace(padded, tail_read_rows=12)
    assert step_flops(architecture, read).hardware == base.hardware + tail + 3 * 2 * 12 * after
    cached = step_flops(architecture, plain, extra_forward_passes=1)
    assert (cached.useful, cached.hardware) == (base.useful, base.hardware + base.forward)
    cached = step_flops(architecture, padded, extra_forward_passes=1)
    assert cached.hardware == base.hardware + tail + base.forward + tail // 3, "a tail runs again, too"
    parts = {part.name: part for part in base.parts}
    full = step_flops(architecture, plain, recompute=RecomputeSettings(vision="full", language="selective"))
    assert full.useful == base.useful
    assert full.hardware == base.hardware + parts["vision_layers"].forward + parts["language_layers"].attention
    rows, patches = plain.tokens, plain.patches
    maps = 2 * patches * 1280 * 3420, 2 * rows * 2048 * 11008
    for whole, number in ((False, 2), (True, 3)):
        some = RecomputeSettings(vision="mlp", vision_num_layers=5, language="mlp", language_num_layers=7)
        found = step_flops(architecture, plain, recompute=some, repeats_whole_mlps=whole, pipeline_stages=2)
        assert found.hardware == base.hardware + number * (5 * maps[0] + 2 * 7 * maps[1])
    every = step_flops(architecture, plain, recompute=RecomputeSettings(language="mlp"), pipeline_stages=8)
    assert every.hardware == base.hardware + 2 * 35 * maps[1], "nothing is read of the last layer, so nothing repeated"
    frozen = FreezeSettings(vision=True)
    both = [
        step_flops(architecture, plain, freeze=frozen, recompute=RecomputeSettings(vision=v)) for v in ("none", "full")
    ]
    assert both[0].hardware == both[1].hardware, "a tower without a backward pass has nothing to recompute"


def test_adapters_cost_two_operations_a_parameter_and_row():
    """Claim: a frozen model with adapters pays for gradients of activations, and for the adapters thrice."""
    architecture = published_architecture("Qwen2.5-VL-3B")
    workload = Workload.of(_layout_only([100], MaskKind.BIDIRECTIONAL), architecture.vision)
    frozen = FreezeSettings(vision=True, merger=True, language=True)
    without = step_flops(architecture, workload, freeze=frozen)
    adapted = step_flops(architecture, workload, freeze=frozen, language_adapter_parameters=1000)
    layers = next(part for part in without.parts if part.name == "language_layers")
    assert layers.backward == layers.linear + 2 * layers.attention
    assert adapted.useful == without.useful + 3 * 2 * 100 * 1000
    full = RecomputeSettings(language="full")
    both = [
        step_flops(architecture, workload, freeze=frozen, recompute=full, language_adapter_parameters=number)
        for number in (0, 1000)
    ]
    assert both[1].hardware == both[0].hardware + 4 * 2 * 100 * 1000, "recomputed layers run their adapters again"


def test_adapters_of_a_frozen_tower_send_gradients_through_it():
    """Claim: it costs the linears of its layers and of the merger once more, their attention twice more."""
    architecture = published_architecture("Qwen2.5-VL-3B")
    workload = Workload.of(_layout_only([100], MaskKind.BIDIRECTIONAL, grids=[(1, 8, 8)]), architecture.vision)
    frozen = FreezeSettings(vision=True, merger=True, language=True)
    without = step_flops(architecture, workload, freeze=frozen)
    adapted = step_flops(architecture, workload, freeze=frozen, vision_adapter_parameters=1000)
    parts = {part.name: part for part in without.parts}
    layers, merger = parts["vision_layers"], parts["merger"]
    through = layers.linear + 2 * layers.attention + merger.linear
    assert adapted.useful == without.useful + 3 * 2 * 64 * 1000 + through


def test_workloads_add_up_and_survive_a_reduction():
    """Claim: counting the sum of packs equals summing the counts of packs, so ranks need to add integers alone."""
    architecture = published_architecture("Qwen2.5-VL-7B")
    packs = [
        Workload.of(_layout_only([70, 30], MaskKind.EOS_BRIDGED, (40, 80), [(1, 8, 8)]), architecture.vision),
        Workload.of(_layout_only([50], MaskKind.BIDIRECTIONAL), architecture.vision),
    ]
    total = packs[0] + packs[1]
    assert step_flops(architecture, total).useful == sum(step_flops(architecture, pack).useful for pack in packs)
    assert Workload.from_counts({name: float(value) for name, value in total.counts().items()}) == total


@pytest.mark.slow
def test_counting_costs_less_than_a_millisecond():
    """Claim: a pack of 100 samples with a picture each is counted in under a millisecond; the best of 20 is taken."""
    architecture = published_architecture("Qwen2.5-VL-7B")
    batch = _layout_only([300] * 100, MaskKind.EOS_BRIDGED, [300 * i + 280 for i in range(100)], [(1, 24, 24)] * 100)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        step_flops(architecture, Workload.of(batch, architecture.vision))
        times.append(time.perf_counter() - started)
    assert min(times) < 1e-3, min(times)
