"""From argv to settings: the order of sources, every shipped YAML, and messages a user can act on."""

import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_cocoa.config import STAGES, ContrastiveSettings, TrainSettings, WarmupSettings
from megatron_cocoa.settings.errors import SettingsError
from megatron_cocoa.settings.parse import parse_settings
from megatron_cocoa.settings.presets import PRESETS_DIR, available_presets
from megatron_cocoa.settings.saved import save_settings, settings_to_dict

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ["--model.path", "model", "--data.path", "data"]
PUBLISHED = [name for name in available_presets() if name != "toy"]


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def refusal(*argv: str) -> str:
    with pytest.raises(SettingsError) as error:
        parse_settings(argv)
    message = str(error.value)
    assert "\n" not in message, "a message must be one line"
    return message


def test_no_arguments_give_the_toy_preset():
    """Claim: the launch command without arguments is the toy, and leaves its folders to the entry point."""
    settings = parse_settings([])
    toy = yaml.safe_load((PRESETS_DIR / "toy.yaml").read_text())
    assert settings.warmup.steps == toy["warmup"]["steps"]
    assert settings.model.path is None and settings.data.path is None


def test_preset_none_is_the_dataclass_defaults():
    """Claim: nothing stands between ``--preset none`` and the config package."""
    assert parse_settings(["--preset", "none"]) == TrainSettings()


def test_later_sources_win(tmp_path):
    """Claim: preset < first config < second config < command line, whatever the order on the command line."""
    first = write(tmp_path / "a.yaml", "warmup: {steps: 11, lr: 3e-4, lr_warmup_steps: 1}\nseed: 5\n")
    second = write(tmp_path / "b.yaml", "warmup: {steps: 12, min_lr: 1e-6}\n")
    settings = parse_settings(["--seed", "7", "--config", first, "--preset", "toy", "--config", second])
    assert (settings.warmup.steps, settings.warmup.lr, settings.warmup.min_lr) == (12, 3e-4, 1e-6)
    assert settings.seed == 7
    assert settings.warmup.image_size == parse_settings([]).warmup.image_size


@pytest.mark.parametrize(
    "argv", [["--stages", "bridge,contrastive"], ["--stages=bridge,contrastive"], ["--stages", "[bridge, contrastive]"]]
)
def test_stages_as_a_comma_list(argv):
    """Claim: stages are written as people write lists, on the command line and in YAML."""
    assert parse_settings(argv).stages == ("bridge", "contrastive")


def test_single_stage_and_yaml_list(tmp_path):
    assert parse_settings(["--stages", "warmup"]).stages == ("warmup",)
    config = write(tmp_path / "c.yaml", "stages: [warmup, bridge]\n")
    assert parse_settings(["--config", config]).stages == ("warmup", "bridge")


def test_values_take_their_types():
    """Claim: booleans, null, exponents and numbers arrive as Python values."""
    settings = parse_settings(
        ["--evaluate", "true", "--model.load", "null", "--warmup.lr", "1e-4", "--output_dir", "12", "--seed=3"]
    )
    assert (settings.evaluate, settings.model.load, settings.warmup.lr) == (True, None, 1e-4)
    assert (settings.output_dir, settings.seed) == ("12", 3)


@pytest.mark.parametrize("preset", available_presets())
def test_every_preset_parses(preset):
    """Claim: no shipped preset holds a key or a value that the parser refuses."""
    parse_settings(["--preset", preset, *FOLDERS])


@pytest.mark.parametrize("config", sorted((ROOT / "examples" / "configs").glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("preset", [*available_presets(), "none"])
def test_every_example_config_parses_over_every_preset(preset, config):
    """Claim: stage files combine with the preset of any size."""
    parse_settings(["--preset", preset, "--config", str(config), *FOLDERS])


def test_adapter_targets_as_a_comma_list_and_in_yaml(tmp_path):
    """Claim: targets are written as people write lists, and an empty list is one."""
    argv = ["--adapter.kind", "dora", "--adapter.language_targets", "q_proj,v_proj", "--adapter.vision_targets", "[]"]
    adapter = parse_settings(argv).adapter
    assert (adapter.language_targets, adapter.vision_targets) == (("q_proj", "v_proj"), ())
    settings = parse_settings(argv)
    save_settings(settings, tmp_path / "settings.yaml")
    assert parse_settings(["--config", str(tmp_path / "settings.yaml")]) == settings


def test_published_adapters_are_what_was_published():
    """Claim: the shipped recipe is DoRA of rank 8, alpha 64, dropout 0.1, gaussian (shared by all three stages)."""
    config = str(ROOT / "examples" / "configs" / "published_adapters.yaml")
    adapter = parse_settings(["--preset", "none", "--config", config]).adapter
    found = (adapter.kind, adapter.rank, adapter.alpha, adapter.dropout, adapter.init)
    assert found == ("dora", 8, 64, 0.1, "gaussian")
    assert adapter.scaling == 8 and replace(adapter, rslora=True).scaling == pytest.approx(64 / 8**0.5)


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--adapter.rank", "16"], "adapter.rank would have no effect: adapter.kind is none, set lora or dora"),
        (["--adapter.kind", "lora", "--adapter.rank", "0"], "adapter.rank is 0, needs 1 or more"),
        (["--adapter.kind", "lora", "--adapter.dropout", "1"], "adapter.dropout is 1.0, must lie in [0, 1)"),
        (["--adapter.kind", "lora", "--adapter.alpha", "-1"], "adapter.alpha is -1.0, must be positive"),
        (["--adapter.kind", "lora", "--adapter.vision_targets", "q_proj"], "has ['q_proj']: choose from qkv, proj"),
        (["--adapter.kind", "lora", "--adapter.language_targets", "q_proj,q_proj"], "names a target twice"),
        (
            ["--adapter.kind", "lora", "--adapter.language_targets", "[]", "--adapter.vision_targets", "[]"],
            "neither language_targets nor vision_targets names a module",
        ),
        (["--adapter.kind", "dora", "--freeze.vision"], "freeze.vision and adapter.vision_targets"),
        (["--adapter.kind", "dora", "--optimizer.weight_decay", "0.1"], "set weight_decay to 0"),
        (["--adapter.knid", "dora"], "did you mean --adapter.kind?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_adapter_settings_are_refused(argv, part):
    """Claim: settings that contradict each other, or would do nothing, are told before anything starts."""
    assert part in refusal(*argv)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_carry_the_published_recipe(preset):
    """Claim: arXiv 2603.01471's numbers are what a size's preset trains with."""
    s = parse_settings(["--preset", preset, *FOLDERS])
    assert (s.warmup.steps, s.warmup.global_batch_size, s.warmup.image_size) == (3000, 128, 336)
    assert (s.warmup.text_mask_ratio, s.warmup.unit_mask_ratio, s.warmup.mae_weight) == (0.2, 0.5, 0.5)
    assert (s.bridge.global_batch_size, s.bridge.image_size, s.bridge.target_mask_ratio) == (64, 448, 0.7)
    assert (s.contrastive.steps, s.contrastive.global_batch_size, s.contrastive.temperature) == (2000, 1024, 0.02)
    assert {s.stage(name).lr for name in s.stages} == {2e-5}
    assert [s.stage(name).lr_warmup_steps for name in s.stages] == [100, 100, 200]


@pytest.mark.parametrize("preset", available_presets())
def test_presets_prepare_data_ahead(preset):
    """Claim: a run by a preset does not leave its GPU idle while its own process decodes pictures."""
    assert parse_settings(["--preset", preset, *FOLDERS]).data.num_workers > 0


HEADS_KV_LAYERS_GPUS = {
    "qwen2-vl-2b": (12, 2, 28, 8),
    "qwen2-vl-7b": (28, 4, 28, 8),
    "qwen2-vl-72b": (64, 8, 80, 32),
    "qwen2.5-vl-3b": (16, 2, 36, 8),
    "qwen2.5-vl-7b": (28, 4, 28, 8),
    "qwen2.5-vl-32b": (40, 8, 64, 16),
    "qwen2.5-vl-72b": (64, 8, 80, 32),
}
"""From each size's published config.json, and the number of GPUs that its preset's first lines name."""


@pytest.mark.parametrize("preset", PUBLISHED)
def test_preset_layouts_divide(preset):
    """Claim: a preset's degrees divide heads, layers, GPUs and batches, so that it starts at all."""
    settings = parse_settings(["--preset", preset, *FOLDERS])
    heads, _, layers, gpus = HEADS_KV_LAYERS_GPUS[preset]
    parallel = settings.parallel
    assert heads % (parallel.tensor_model_parallel_size * parallel.context_parallel_size) == 0
    first = parallel.num_layers_in_first_pipeline_stage
    stages = parallel.pipeline_model_parallel_size - (first is not None)
    assert (layers - (first or 0)) % stages == 0
    for name in settings.stages:
        settings.stage(name).num_microbatches(parallel.data_parallel_size(gpus))


def test_saved_settings_parse_back(tmp_path):
    """Claim: the configuration saved with a run reproduces it, without naming its preset again."""
    settings = parse_settings(["--preset", "qwen2.5-vl-7b", *FOLDERS, "--stages", "bridge", "--warmup.lr", "1.5e-5"])
    save_settings(settings, tmp_path / "settings.yaml")
    assert parse_settings(["--config", str(tmp_path / "settings.yaml")]) == settings


@given(
    temperature=st.floats(1e-6, 10, allow_nan=False),
    image_size=st.none() | st.integers(1, 4096),
    output_dir=st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1).filter(
        lambda text: not text.startswith("~")
    ),
)
def test_any_value_survives_saving(tmp_path_factory, temperature, image_size, output_dir):
    """Claim: floats and odd texts are written so that they read back equal."""
    contrastive = ContrastiveSettings(temperature=temperature, image_size=image_size)
    settings = replace(TrainSettings(), contrastive=contrastive, output_dir=output_dir)
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    save_settings(settings, path)
    assert parse_settings(["--preset", "none", "--config", str(path)]) == settings


def test_settings_to_dict_is_plain():
    """Claim: what is saved holds no Python object, so that YAML's safe loader reads it."""
    tree = settings_to_dict(TrainSettings())
    assert yaml.safe_load(yaml.safe_dump(tree)) == tree
    assert list(tree) == [field.name for field in fields(TrainSettings)]


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("warmpu.lr", "warmup.lr"),
        ("warmup.learning_steps", "warmup.lr_warmup_steps"),
        ("contrastive.temprature", "contrastive.temperature"),
        ("optimizer.temperature", "contrastive.temperature"),
        ("tensor-model-parallel-size", "parallel.tensor_model_parallel_size"),
        ("output-dri", "output_dir"),
        ("presett", "preset"),
    ],
)
def test_unknown_option_names_the_nearest(key, near):
    """Claim: a mistyped option is an error that names the one meant."""
    message = refusal(f"--{key}", "1")
    assert f"unknown setting --{key}, did you mean --{near}?" in message


def test_unknown_key_in_yaml_names_file_and_nearest(tmp_path):
    """Claim: a mistyped key in a file is an error too, and says which file."""
    config = write(tmp_path / "mine.yaml", "bridge:\n  target_mask_ration: 0.5\n")
    message = refusal("--config", config)
    assert "mine.yaml" in message
    assert "unknown setting bridge.target_mask_ration, did you mean bridge.target_mask_ratio?" in message


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--warmup.lr", "fast"], "--warmup.lr is 'fast', needed a number"),
        (["--warmup.steps", "2.5"], "--warmup.steps is '2.5', needed a whole number"),
        (["--warmup.steps", "null"], "--warmup.steps is 'null', needed a whole number"),
        (["--warmup.lr", "1e400"], "--warmup.lr is '1e400', needed a number"),
        (["--data.path", ""], "--data.path is '', needed text or null"),
        (["--output_dir="], "--output_dir is '', needed text"),
        (["--warmup.image_size", "big"], "needed a whole number or null"),
        (["--model.dtype", "fp16"], "needed one of fp32, bf16"),
        (["--evaluate", "1"], "needed true or false"),
        (["--seed"], "--seed has no value"),
        (["--seed", "--evaluate", "true"], "--seed has no value"),
        (["--warmup", "3"], "--warmup is a group of settings, such as --warmup.steps"),
        (["bridge"], "unexpected 'bridge'"),
        (["--preset", "qwen2.5-vl-7"], "did you mean qwen2.5-vl-7b?"),
        (["--config", "absent.yaml"], "absent.yaml cannot be read"),
        (["--stages", "contrastive,bridge"], "in this order, each once"),
        (["--stages", "warm"], "unknown stage(s) ['warm']"),
        (["--warmup.steps", "10"], "warmup: lr_warmup_steps is 30, must lie in [0, steps = 10]"),
        (["--parallel.num_layers_in_first_pipeline_stage", "0"], "first_pipeline_stage is 0, needs 1 or more"),
        (["--recompute.vision", "all"], "needed one of none, mlp, selective, full"),
        (["--recompute.vision", "mlp", "--recompute.vision_num_layers", "0"], "vision_num_layers is 0, needs 1"),
        (["--recompute.language_num_layers", "2"], "it counts layers under mlp and full alone"),
        (["--optimizer.weight_decay", "-0.1"], "optimizer.weight_decay is -0.1, must not be negative"),
        (["--optimizer.clip_grad", "-1"], "optimizer.clip_grad is -1.0, must not be negative"),
        (["--optimizer.adam_beta1", "1.5"], "optimizer.adam_beta1 is 1.5, must lie in [0, 1)"),
        (["--optimizer.adam_beta2", "1"], "optimizer.adam_beta2 is 1.0, must lie in [0, 1)"),
        (["--optimizer.adam_eps", "0"], "optimizer.adam_eps is 0.0, must be positive"),
        (["--bridge.image_size", "0"], "bridge: image_size is 0, needs 1 or more"),
        (["--bridge.lr_decay_style", "constant", "--bridge.min_lr", "1e-6"], "constant never falls to it"),
        (["--data.max_length", "0"], "data.max_length is 0, needs 1 or more"),
        (["--parallel.distributed_timeout_minutes", "0"], "distributed_timeout_minutes is 0.0, must be positive"),
        (["--output_dir=~/runs"], "output_dir is ~/runs, which would be a folder of that name"),
        (["--seed", "-3"], "seed is -3, must not be negative"),
        (["--freeze.language", "--optimizer.weight_decay", "0.1"], "weight_decay 0.1 would shrink the frozen rows"),
        (["--validation.metric", "recall@5"], "metric recall@5 would have no effect: validation.interval is null"),
        (["--validation.interval", "341"], "interval 341 would have no effect: no stage of the run has more than 340"),
        (["--with_baseline", "--stages", "contrastive"], "with_baseline trains stage contrastive alone, and so does"),
        (
            ["--model.fp8", "mxfp8", "--model.fp8_param", "--model.transformer_impl", "auto", "--model.dtype", "bf16"],
            "model.fp8_param has no form for model.fp8 mxfp8: set it to false",
        ),
        (["--model.path", "x"], "no preset was chosen"),
        (["--preset", "qwen2.5-vl-3b"], "needs --model.path"),
        (["--preset", "qwen2.5-vl-3b", "--model.path", "x"], "needs --data.path"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_values_are_refused_in_one_line(argv, part):
    """Claim: each mistake says what was found and what was needed."""
    assert part in refusal(*argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--validation.interval", "340", "--validation.metric", "recall@5"],
        ["--validation.interval", "300", "--stages", "warmup", "--with_baseline"],
        ["--preset", "qwen2.5-vl-7b", *FOLDERS, "--parallel.tensor_model_parallel_size", "1"],
        ["--preset", "qwen2.5-vl-3b", *FOLDERS, "--stages", "warmup", "--warmup.steps", "150"],
        ["--warmup.mae_weight", "0", "--warmup.decoder_layers", "2", "--warmup.decoder_init", "random"],
    ],
    ids=" ".join,
)
def test_settings_that_serve_some_layout_or_stage_are_not_refused(argv):
    """Claim: an interval that one stage reaches is not refused, the baseline's stage included; nor what a preset sets,
    where a layout or a shorter stage leaves it idle; nor the shape of an image decoder that is saved, and whose loss is
    recorded, whatever it weighs."""
    parse_settings(argv)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("warmup: {lr: fast}", "warmup.lr is 'fast', needed a number"),
        ("warmup: {lr: null}", "warmup.lr is None, needed a number"),
        ("warmup: 3", "warmup is a group of settings"),
        ("stages: bridge", "needed a list of names"),
        ("- warmup", "needed a mapping"),
        ("a: [", "not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("warmup: {lr: 1e-4}\nseed: 3\nwarmup: {min_lr: 1e-6}", "warmup stands twice"),
        ("warmup:\n  min_lr: 1e-6\n  min_lr: 1e-7", "min_lr stands twice"),
        ("warmup: {lr: .inf}", "warmup.lr is inf, needed a number"),
        ("contrastive: {matryoshka_dims: [8], matryoshka_weights: [.nan]}", "is [nan], needed a list of numbers"),
        ("output_dir: ''", "output_dir is '', needed text"),
        ("data: {sources: [{name: a, path: p, weight: .inf}]}", "data.sources[0].weight is inf, needed a number"),
        ("data: {sources: [{name: a, path: ''}]}", "data.sources[0].path is '', needed text"),
    ],
)
def test_wrong_files_are_refused_in_one_line(tmp_path, text, part):
    """Claim: the same holds for files, which cannot run code either."""
    assert part in refusal("--config", write(tmp_path / "mine.yaml", text))


def test_three_ranks_for_tensor_parallel_two():
    """Claim: a world size that the degrees do not divide is refused with both numbers and what to change."""
    parallel = parse_settings(["--parallel.tensor_model_parallel_size", "2"]).parallel
    with pytest.raises(ValueError, match=r"3 rank\(s\) cannot be divided into replicas of 2.*--nproc-per-node"):
        parallel.data_parallel_size(3)


def test_help_shows_the_chosen_presets_defaults(capsys):
    """Claim: --help lists every setting with its documentation and the value it has now."""
    for preset, temperature in (("toy", "0.001"), ("none", "2e-05")):
        with pytest.raises(SystemExit) as leaving:
            parse_settings(["--preset", preset, "--help"])
        assert leaving.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        assert f"default: {temperature})" in text
        assert "--contrastive.temperature TEMPERATURE divides the cosine similarities" in text
        assert all(name in text for name in available_presets())


def test_parsing_does_not_import_torch():
    """Claim: a mistyped key fails at once, because nothing heavy is loaded to find it."""
    code = (
        "import sys; from megatron_cocoa.settings.parse import parse_settings; parse_settings([]); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_switches_may_be_written_with_dashes_and_without_a_value():
    """Claim: ``--with-baseline`` is what a user types first, and it works."""
    settings = parse_settings(["--with-baseline", "--evaluate", "--output-dir", "elsewhere"])
    assert settings.with_baseline and settings.evaluate and settings.output_dir == "elsewhere"
    with pytest.raises(SettingsError, match="--warmup.lr has no value"):
        parse_settings(["--warmup.lr", "--evaluate"])


def test_a_pack_never_holds_more_than_a_ranks_share():
    """Claim: the toy preset starts at any number of ranks that divides its batch, without another setting."""
    stage = ContrastiveSettings(global_batch_size=128, micro_batch_size=128)
    assert [(stage.samples_per_microbatch(n), stage.num_microbatches(n)) for n in (1, 2, 4)] == [
        (128, 1), (64, 1), (32, 1),
    ]  # fmt: skip
    small = ContrastiveSettings(global_batch_size=128, micro_batch_size=16)
    assert (small.samples_per_microbatch(2), small.num_microbatches(2)) == (16, 4)


def test_batches_that_do_not_divide_are_told_with_their_stage_and_what_does():
    """Claim: a message names the stage's setting as it is written, and the nearest values that divide."""
    stage = WarmupSettings(global_batch_size=128, micro_batch_size=24)
    with pytest.raises(ValueError, match="^warmup.global_batch_size 128 is not .* 6: 126 or 132 would be$"):
        stage.num_microbatches(6)
    with pytest.raises(ValueError, match="^warmup.global_batch_size 128 .* 200: 200 would be$"):
        stage.num_microbatches(200)
    with pytest.raises(ValueError, match="gives 64 .* by warmup.micro_batch_size 24: they are by 16 or 32$"):
        stage.num_microbatches(2)


SOURCES = """
data:
  sources:
  - {name: COCO, path: MMEB-train/MSCOCO_i2t, format: mmeb-train, split: original, weight: 2.0, max_rows: 100000}
  - {name: own, path: shards, format: webdataset, weight: 1, stages: [warmup], columns: {caption: text}}
"""


def test_sources_are_a_list_in_yaml_and_survive_saving(tmp_path):
    """Claim: a mixture is written once, read with types and defaults, and saved with the run."""
    (tmp_path / "a.yaml").write_text(SOURCES)
    settings = parse_settings(["--preset", "none", "--config", str(tmp_path / "a.yaml")])
    first, second = settings.data.sources
    assert (first.name, first.weight, first.max_rows, first.image_root) == ("COCO", 2.0, 100000, None)
    assert first.stages == STAGES and second.stages == ("warmup",) and second.columns == {"caption": "text"}
    save_settings(settings, tmp_path / "b.yaml")
    assert parse_settings(["--preset", "none", "--config", str(tmp_path / "b.yaml")]) == settings


def test_sources_stand_for_a_data_folder_but_not_for_its_pools(tmp_path):
    (tmp_path / "a.yaml").write_text(SOURCES)
    published = ["--preset", PUBLISHED[0], "--model.path", "model", "--config", str(tmp_path / "a.yaml")]
    assert len(parse_settings(published).data.sources) == 2
    assert "set data.path, too" in refusal(*published, "--evaluate", "true")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("weight: 1,", "wieght: 1,"), r"data.sources\[1\]: unknown setting wieght, did you mean weight"),
        (("format: webdataset", "format: tar"), r"data.sources\[1\].format is 'tar', needed one of jsonl, mmeb-train"),
        (("columns: {caption: text}", "columns: text"), r"\[1\].columns is 'text', needed a mapping of names to names"),
        (("max_rows: 100000", "max_rows: many"), r"\[0\].max_rows is 'many', needed a whole number or null"),
        (("path: shards, ", ""), r"data.sources\[1\] has no path: each record needs name and path"),
        (("\n  - {name: COCO", "\n  - COCO\n  - {name: COCO"), "needed a list of records with the keys name, path"),
        (("weight: 2.0, ", ""), "give each a positive one, or none"),
        (("name: own", "name: COCO"), "each must occur once"),
        (("stages: [warmup]", "stages: []"), "no stage reads own"),
        (("{caption: text}", "{text: caption}"), r"columns of own maps \['text'\]: keys are our names of columns, id,"),
        (("{caption: text}", "{caption: text, qry: text}"), "takes one column of the source twice"),
    ],
)
def test_a_wrong_source_says_what_is_wrong(tmp_path, change, message):
    (tmp_path / "a.yaml").write_text(SOURCES.replace(*change))
    with pytest.raises(SettingsError, match=message):
        parse_settings(["--preset", "none", "--config", str(tmp_path / "a.yaml")])


def test_limits_of_image_tokens_are_refused_where_they_would_have_no_effect():
    for limits in ({"min_image_tokens": 4}, {"max_image_tokens": 1024}):
        with pytest.raises(ValueError, match="fixes the size of every picture"):
            WarmupSettings(image_size=336, **limits)
        WarmupSettings(image_size=None, **limits)
    with pytest.raises(ValueError, match="need 1 <= min_image_tokens <= max_image_tokens"):
        WarmupSettings(image_size=None, min_image_tokens=9, max_image_tokens=4)


def test_lists_of_numbers_are_written_as_people_write_them(tmp_path):
    """Claim: nested widths come from the command line, from YAML and back from what was saved."""
    dims = ["--contrastive.matryoshka_dims", "64,32", "--contrastive.matryoshka_weights=[1.0, 0.5]"]
    settings = parse_settings(dims)
    assert settings.contrastive.matryoshka_dims == (64, 32) and settings.contrastive.matryoshka_weights == (1.0, 0.5)
    save_settings(settings, tmp_path / "s.yaml")
    assert parse_settings(["--preset", "none", "--config", str(tmp_path / "s.yaml")]) == settings
    assert "a list of numbers" in refusal("--contrastive.matryoshka_dims", "wide")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--contrastive.matryoshka_weights", "1,2"], "2 entries for 0 matryoshka_dims"),
        (["--contrastive.matryoshka_dims", "8,8"], "each must be 1 or more and occur once"),
        (["--contrastive.matryoshka_dims", "8", "--contrastive.matryoshka_weights", "0"], "each must be positive"),
        (["--contrastive.hard_negatives_shared", "false"], "no effect without hard negatives"),
        (["--contrastive.num_hard_negatives", "-1"], "must not be negative"),
        (["--contrastive.learnable_temperature", "true", "--contrastive.temperature", "0.001"], "within [0.01, 1.0]"),
    ],
)
def test_contrastive_options_that_contradict_each_other_are_refused(argv, message):
    """Claim: an option without effect, or outside of its range, ends before the run starts."""
    assert message in refusal(*argv)
