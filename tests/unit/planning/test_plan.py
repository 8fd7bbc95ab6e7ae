"""Suggested layouts: they fit, they are possible, and the document shows what is computed today."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cocoa.config import ParallelSettings
from megatron_cocoa.model.layout_checks import check_layout
from megatron_cocoa.planning.activations import CPU_KERNELS, GPU_KERNELS, layer_memory
from megatron_cocoa.planning.memory import HEADROOM, stage_memory
from megatron_cocoa.planning.packs import expected_microbatches, expected_pack
from megatron_cocoa.planning.published import published_architecture
from megatron_cocoa.planning.schedule import in_flight
from megatron_cocoa.planning.shapes import language_shape
from megatron_cocoa.planning.suggest import suggest
from megatron_cocoa.planning.tables import GIB, as_options, document_tables
from megatron_cocoa.settings.parse import parse_settings

ROOT = Path(__file__).resolve().parents[3]
H100 = 79.6 * GIB


def settings_of(preset: str, *options: str):
    return parse_settings([f"--preset={preset}", "--model.path=not-read", "--data.path=not-read", *options])


def test_the_document_shows_what_is_computed():
    """Claim: the tables of docs/layouts.md are those that the code computes now.

    After a change: paste what ``python tools/plan_layout.py --table`` prints between the markers.
    """
    text = (ROOT / "docs" / "layouts.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- tables: begin -->\n")[2].partition("<!-- tables: end -->")[0]
    assert shown.strip() == "\n".join(document_tables(settings_of, gpu_bytes=H100)).strip()


@pytest.mark.parametrize("stage", ["warmup", "bridge", "contrastive"])
@pytest.mark.parametrize("gpus", [8, 64, 512])
def test_suggestions_fit_and_are_possible(gpus, stage):
    """Claim: a suggestion passes every check that a run starts with, and leaves the headroom."""
    architecture = published_architecture("qwen2.5-vl-7b")
    found = suggest(architecture, settings_of("qwen2.5-vl-7b"), stage, world_size=gpus, gpu_bytes=H100)
    check_layout(architecture, model=found.settings.model, parallel=found.settings.parallel)
    assert found.settings.parallel.tensor_model_parallel_size in (1, 2, 4), "28 heads"
    assert found.settings.stage(stage).num_microbatches(found.data_parallel_size) >= 1
    pack = expected_pack(architecture, found.settings, stage, data_parallel_size=found.data_parallel_size)
    again = stage_memory(architecture, found.settings, stage, world_size=gpus, pack=pack)
    assert tuple(again) == found.memory
    assert max(rank.total for rank in again) <= (1 - HEADROOM) * H100


@pytest.mark.parametrize(
    ("preset", "gpus", "stage", "options"),
    [
        # A preset's first pipeline stage, and a suggestion without a pipeline.
        ("qwen2.5-vl-72b", 64, "warmup", []),
        ("qwen2.5-vl-7b", 8, "bridge", ["--recompute.language=mlp", "--recompute.language_num_layers=3"]),
        ("qwen2.5-vl-7b", 8, "bridge", ["--parallel.context_parallel_size=2"]),
        ("qwen2.5-vl-7b", 8, "bridge", ["--parallel.overlap_grad_reduce", "--parallel.overlap_param_gather"]),
        (
            "qwen2.5-vl-7b",
            8,
            "contrastive",
            [f"--parallel.{kind}pipeline_model_parallel_size=2" for kind in ("", "virtual_")],
        ),
        ("qwen2.5-vl-3b", 8, "bridge", ["--model.fp8=delayed", "--model.fp8_vision"]),
    ],
    ids=["first-stage", "mlp", "context", "overlap", "interleaved", "fp8"],
)
def test_the_printed_options_are_the_suggestion(preset, gpus, stage, options):
    """Claim: what is copied behind the command that was planned gives the suggested layout, and is not refused."""
    architecture, given = published_architecture(preset), settings_of(preset, *options)
    found = suggest(architecture, given, stage, world_size=gpus, gpu_bytes=H100)
    printed = " ".join(as_options(found, given)).split()
    again = settings_of(preset, *options, *printed)
    check_layout(architecture, model=again.model, parallel=again.parallel)
    changed = replace(found.settings.stage(stage), micro_batch_size=found.micro_batch_size)
    assert again == replace(found.settings, **{stage: changed})
    overlaps = ("overlap_grad_reduce", "overlap_param_gather")
    assert all(getattr(again.parallel, name) == getattr(given.parallel, name) for name in overlaps)


def test_what_cannot_fit_is_not_suggested():
    """Claim: 72 billion parameters, with gradients alone 6 bytes each, do not fit on 4 GPUs, and nothing says so."""
    architecture = published_architecture("qwen2.5-vl-72b")
    assert suggest(architecture, settings_of("qwen2.5-vl-72b"), "bridge", world_size=4, gpu_bytes=H100) is None


def test_in_flight_micro_batches():
    """Claim: 1F1B holds one more than the stages behind; two virtual chunks fill the first rank with more passes.

    The interleaved figures are Megatron's warm-up count, 2 (p - rank - 1) + (v - 1) p, and the pass that follows.
    """
    plain = ParallelSettings(pipeline_model_parallel_size=4)
    assert [in_flight(plain, pipeline_rank=r, num_microbatches=8) for r in range(4)] == [[(4,)], [(3,)], [(2,)], [(1,)]]
    assert in_flight(plain, pipeline_rank=0, num_microbatches=2) == [(2,)]
    virtual = ParallelSettings(pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=2)
    passes = [max(sum(m) for m in in_flight(virtual, pipeline_rank=r, num_microbatches=8)) for r in range(4)]
    assert passes == [2 * 3 + 4 + 1, 2 * 2 + 4 + 1, 2 * 1 + 4 + 1, 4 + 1]


@pytest.mark.parametrize("chunks, is_freed", [(None, True), (2, False)])
def test_what_a_stage_has_sent_on_is_freed_unless_stages_are_interleaved(chunks, is_freed):
    """Claim: an output counts until its backward pass where its sending may still be under way."""
    architecture = published_architecture("qwen2.5-vl-7b")
    parallel = ParallelSettings(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=chunks)
    settings = replace(settings_of("qwen2.5-vl-7b"), parallel=parallel)
    pack = expected_pack(architecture, settings, "bridge", data_parallel_size=1)
    freeing, keeping = (
        stage_memory(architecture, settings, "bridge", world_size=2, pack=pack, kernels=kernels)[0].activations
        for kernels in (GPU_KERNELS, replace(GPU_KERNELS, releases_outputs=False))
    )
    assert (freeing < keeping) == is_freed and freeing <= keeping


@pytest.mark.parametrize("chunks, is_beside", [(None, True), (2, False)])
def test_the_contrastive_loss_is_computed_beside_one_graph_unless_stages_are_interleaved(chunks, is_beside):
    """Claim: where the loss of a large global batch decides, the last stage holds it beside a micro-batch's graph."""
    architecture = published_architecture("qwen2.5-vl-7b")
    parallel = ParallelSettings(pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=chunks)
    given = settings_of("qwen2.5-vl-7b", "--contrastive.global_batch_size=131072", "--contrastive.micro_batch_size=8")
    settings = replace(given, parallel=parallel)
    pack = expected_pack(architecture, settings, "contrastive", data_parallel_size=1)
    last = stage_memory(architecture, settings, "contrastive", world_size=2, pack=pack)[-1]
    embeddings = 2 * 131072 * architecture.text.hidden_size * 4
    assert last.activations > 0 and last.activations + last.transient > 4 * embeddings
    assert (last.transient > 4 * embeddings) == is_beside


def test_memory_moves_with_what_saves_it():
    """Claim: each means of saving memory saves it where it should: recompute, sharded optimizer, TP, SP.

    Recomputing core attention alone saves nothing beside a kernel that keeps no scores: its checkpoint holds the
    fused projection and a copy of the queries, where attention itself keeps rotated ones.
    """
    architecture, base = published_architecture("qwen2.5-vl-7b"), settings_of("qwen2.5-vl-7b")
    shape = language_shape(architecture, base.model, ParallelSettings())
    modes = ("none", "mlp", "selective", "full")
    saved = {mode: layer_memory(shape, 1000, GPU_KERNELS, recompute=mode).saved for mode in modes}
    assert saved["full"] == 1000 * 3584 * 2, "full recompute keeps a layer's input alone"
    assert saved["full"] < saved["mlp"] < saved["none"] <= saved["selective"]
    assert saved["none"] - saved["mlp"] == 1000 * 3 * 18944 * 2, "gate, up and what the second projection reads"
    memory = {}
    for name, degrees in {
        "plain": dict(tensor_model_parallel_size=2),
        "sharded": dict(tensor_model_parallel_size=2, use_distributed_optimizer=True),
        "sequence": dict(tensor_model_parallel_size=2, sequence_parallel=True),
        "wide": dict(tensor_model_parallel_size=4),
    }.items():
        settings = replace(base, parallel=ParallelSettings(**degrees))
        pack = expected_pack(architecture, settings, "bridge", data_parallel_size=4)
        memory[name] = stage_memory(architecture, settings, "bridge", world_size=8, pack=pack)[0]
    plain = memory["plain"]
    assert memory["sharded"].optimizer * 4 == pytest.approx(plain.optimizer, rel=1e-6)
    assert memory["sequence"].activations < plain.activations
    assert memory["wide"].gradients == pytest.approx(plain.gradients / 2, rel=0.01)


def test_long_samples_are_refused():
    """Claim: pictures larger than a sample may be are an error with the numbers, not a wrong plan."""
    architecture = published_architecture("qwen2.5-vl-3b")
    settings = settings_of("qwen2.5-vl-3b", "--contrastive.image_size=1960")
    with pytest.raises(ValueError, match="4900 image and 128 text tokens, above data.max_length 4096"):
        expected_pack(architecture, settings, "contrastive", data_parallel_size=8)


def test_packs_are_expected_as_the_loader_fills_them():
    """Claim: hard negatives are samples like the pair's own; a budget holds as many samples as fit, whatever the
    micro-batch size says."""
    architecture = published_architecture("qwen2.5-vl-3b")
    plain = ["--contrastive.image_size=336", "--contrastive.micro_batch_size=4"]

    def pack(*more):
        return expected_pack(
            architecture, settings_of("qwen2.5-vl-3b", *plain, *more), "contrastive", data_parallel_size=8
        )

    # 336 pixels are 12 x 12 merged units; two tokens around them, and 128 of text.
    assert pack().tokens == 8 * (144 + 2 + 128) and pack().embeddings == 8
    assert pack("--contrastive.num_hard_negatives=3").tokens == 20 * (144 + 2 + 128)
    filled = pack("--data.tokens_per_microbatch=8192")
    assert filled.tokens == 8192 and filled.embeddings == 8192 // 274 and filled.patches == 4 * 144 * (8192 // 274)
    # A rank's two pairs are no more than these, whatever the budget: a pack is padded to the longest, not to it.
    small = pack("--data.tokens_per_microbatch=8192", "--contrastive.global_batch_size=16")
    assert small.tokens == 4 * 274 and small.embeddings == 4


def test_bare_pictures_have_no_marks():
    """Claim: a picture that stands bare takes its merged units alone, without the two tokens around it."""
    architecture = published_architecture("qwen2.5-vl-3b")
    options = ["--contrastive.image_size=336", "--contrastive.image_placeholder=bare"]
    settings = settings_of("qwen2.5-vl-3b", *options, "--contrastive.micro_batch_size=4")
    assert expected_pack(architecture, settings, "contrastive", data_parallel_size=8).tokens == 8 * (144 + 128)


def test_a_unit_is_predicted_where_any_of_its_patches_is_hidden():
    """Claim: patches hidden one by one make more units rows of the image decoder than units hidden whole do.

    By hand: of the 16 ways to hide some of four patches, equally likely at one half, one hides none.
    """
    architecture = published_architecture("qwen2.5-vl-3b")
    for masked, share in (("merged", 8 / 16), ("patch", 15 / 16)):
        options = [f"--warmup.masked_unit={masked}", "--warmup.unit_mask_ratio=0.5", "--warmup.micro_batch_size=4"]
        settings = settings_of("qwen2.5-vl-3b", "--warmup.image_size=336", *options)
        pack = expected_pack(architecture, settings, "warmup", data_parallel_size=8)
        assert pack.masked_units == 4 * 144 * share


@pytest.mark.parametrize("size", [4, 24])
def test_packs_under_a_budget_are_counted_by_what_fits(size):
    """Claim: with a budget the number of micro-batches, and the memory in flight, follow it and not micro_batch_size,
    which need not even divide; an interleaved pipeline gets a multiple of its stages."""
    architecture = published_architecture("qwen2.5-vl-3b")
    plain = ["--bridge.image_size=336", "--bridge.global_batch_size=1024", f"--bridge.micro_batch_size={size}"]

    def number(*more):
        settings = settings_of("qwen2.5-vl-3b", *plain, *more)
        return expected_microbatches(architecture, settings, "bridge", data_parallel_size=2)

    # 274 tokens a sample, 29 in a pack of 8,192, 512 samples a rank.
    assert number("--data.tokens_per_microbatch=8192") == -(-512 // 29) == 18
    interleaved = [
        "--parallel.pipeline_model_parallel_size=4", "--parallel.virtual_pipeline_model_parallel_size=3",
    ]  # fmt: skip
    assert number("--data.tokens_per_microbatch=8192", *interleaved) == 20
    if size == 4:
        assert number() == 128
    settings = settings_of("qwen2.5-vl-3b", *plain, "--data.tokens_per_microbatch=8192",
                           "--parallel.pipeline_model_parallel_size=4")  # fmt: skip
    pack = expected_pack(architecture, settings, "bridge", data_parallel_size=2)
    first = stage_memory(architecture, settings, "bridge", world_size=8, pack=pack)[0]
    one = replace(settings, bridge=replace(settings.bridge, global_batch_size=2 * 29))
    alone = stage_memory(architecture, one, "bridge", world_size=8, pack=pack)[0]
    assert first.activations == 4 * alone.activations


def test_a_gathered_reduction_is_counted_on_gloo_alone():
    """Claim: gloo's copy of the gradients counts under the distributed optimizer of several replicas, where it is more
    than the activations; a GPU's plan, and an optimizer of one replica, know none."""
    architecture = published_architecture("qwen2.5-vl-3b")
    settings = settings_of("qwen2.5-vl-3b", "--bridge.micro_batch_size=1", "--recompute.language=full",
                           "--recompute.vision=full", "--parallel.overlap_grad_reduce=false",
                           "--parallel.overlap_param_gather=false")  # fmt: skip
    assert settings.parallel.use_distributed_optimizer
    pack = expected_pack(architecture, settings, "bridge", data_parallel_size=2)

    def moment(kernels, world_size=2, **changed):
        layout = replace(settings, parallel=replace(settings.parallel, **changed))
        (found,) = stage_memory(architecture, layout, "bridge", world_size=world_size, pack=pack, kernels=kernels)
        return found.activations + found.transient, found.gradients

    copied, gradients = moment(CPU_KERNELS)
    assert copied == gradients > moment(CPU_KERNELS, use_distributed_optimizer=False)[0]
    assert moment(CPU_KERNELS, world_size=1)[0] == moment(CPU_KERNELS, use_distributed_optimizer=False)[0]
    assert moment(GPU_KERNELS)[0] < gradients


def test_adapters_move_memory_to_where_it_is():
    """Claim: adapters leave gradients and optimizer state to the embedding and themselves, and keep more activations,
    DoRA at the published recipe more than twice as much as full training.

    By hand, of one 3B replica: rank 8 on seven language and five tower modules, and DoRA's number for each of their
    rows.
    """
    architecture = published_architecture("qwen2.5-vl-3b")
    plain = ["--parallel.use_distributed_optimizer=false", "--recompute.language=none", "--recompute.vision=none"]

    def memory(*more):
        settings = settings_of("qwen2.5-vl-3b", *plain, *more)
        pack = expected_pack(architecture, settings, "bridge", data_parallel_size=1)
        return stage_memory(architecture, settings, "bridge", world_size=1, pack=pack)[0]

    full, lora, dora = memory(), memory("--adapter.kind=lora"), memory("--adapter.kind=dora")
    text = [(2048, 2048), (2048, 256), (2048, 256), (2048, 2048), (2048, 11008), (2048, 11008), (11008, 2048)]
    tower = [(1280, 3840), (1280, 1280), (1280, 3420), (1280, 3420), (3420, 1280)]
    pairs = 36 * text + 32 * tower
    matrices, rows = sum(8 * (i + o) for i, o in pairs), sum(o for _, o in pairs)
    embedding = 151936 * 2048
    assert lora.gradients == 4 * (embedding + matrices) and dora.gradients == lora.gradients + 4 * rows
    assert lora.optimizer == 12 * (embedding + matrices) and dora.optimizer == lora.optimizer + 8 * rows
    assert lora.parameters == full.parameters + 2 * matrices and dora.parameters == lora.parameters + 4 * rows
    assert full.activations < lora.activations and 2 * full.activations < dora.activations


def test_weights_in_fp8_are_counted():
    """Claim: products in FP8 read two copies of a byte an element, kept beside the weight in BF16 or instead of it.

    ``tests/gpu/test_fp8_memory.py`` compares with what Transformer Engine holds. By hand, of a 3B's 36 language layers
    and 32 of the tower, whose ffn is padded to 3456; blocks of 32 or of 128 x 128 share a scale of one or four bytes.
    """
    architecture = published_architecture("qwen2.5-vl-3b")
    language = 36 * (2048 * (2048 + 2 * 256 + 2048) + 3 * 2048 * 11008)
    tower = 32 * (1280 * 4 * 1280 + 3 * 1280 * 3456)

    def memory(*more):
        settings = settings_of("qwen2.5-vl-3b", "--model.vision_ffn_multiple=128", *more)
        pack = expected_pack(architecture, settings, "bridge", data_parallel_size=8)
        return stage_memory(architecture, settings, "bridge", world_size=8, pack=pack)[0]

    plain = memory()
    delayed = ["--model.fp8=delayed"]
    assert memory(*delayed).parameters == plain.parameters + 2 * language
    assert memory(*delayed, "--model.fp8_vision").parameters == plain.parameters + 2 * (language + tower)
    instead = memory(*delayed, "--model.fp8_vision", "--model.fp8_param")
    assert (instead.parameters, instead.optimizer) == (plain.parameters, plain.optimizer)
    for recipe, scale in (("mxfp8", 1 / 32), ("blockwise", 4 / 128**2)):
        assert memory(f"--model.fp8={recipe}").parameters == plain.parameters + round(2 * language * (1 + scale))


@pytest.fixture
def tool():
    """``tools/plan_layout.py`` as a module."""
    specification = importlib.util.spec_from_file_location("plan_layout", ROOT / "tools" / "plan_layout.py")
    tool = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(tool)
    return tool


def test_the_tool_plans_the_model_that_a_file_names(tool, monkeypatch, capsys, tmp_path):
    """Claim: a run's own settings.yaml is planned with its model, never with the preset's published shapes instead."""
    (tmp_path / "settings.yaml").write_text("model: {path: absent-model}\nstages: [bridge]\n")
    command = ["plan_layout.py", "--gpus", "8", "--config", str(tmp_path / "settings.yaml")]
    monkeypatch.setattr(sys, "argv", command)
    assert tool.main() == 2
    assert "absent-model does not exist" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*command, "--model.path", "null"])
    assert tool.main() == 0
    monkeypatch.setattr(sys, "argv", [*command, "--memory-gib", "0"])
    with pytest.raises(SystemExit):
        tool.main()
    assert "--memory-gib is 0.0, must be positive" in capsys.readouterr().err


def test_the_tool_refuses_28_heads_on_8_ranks(tool, monkeypatch, capsys):
    """Claim: the command says why a layout is impossible and exits with 2; one that fits exits with 0."""
    command = ["plan_layout.py", "--gpus", "8", "--preset", "qwen2.5-vl-7b", "--stages", "bridge"]
    monkeypatch.setattr(sys, "argv", [*command, "--parallel.tensor_model_parallel_size", "8"])
    assert tool.main() == 2
    message = capsys.readouterr().err
    assert "28 attention heads of the language model are not divisible by tensor parallel size 8" in message
    monkeypatch.setattr(sys, "argv", command)
    assert tool.main() == 0
    printed = capsys.readouterr().out
    assert "stage bridge: 4 replica(s)" in printed and "suggested: TP2" in printed
    monkeypatch.setattr(sys, "argv", [*command, "--memory-gib", "24"])
    assert tool.main() == 1
    assert "does not fit" in capsys.readouterr().out
