"""A run is only resumed as the run that it was."""

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_cocoa.checkpoint.info import INFO_FILE
from megatron_cocoa.checkpoint.torch_dist_reader import BACKEND_FILE
from megatron_cocoa.config import (
    BridgeSettings,
    ContrastiveSettings,
    DataSettings,
    ModelSettings,
    OptimizerSettings,
    ParallelSettings,
    SourceSettings,
    TrainSettings,
)
from megatron_cocoa.parallel.topology import LaunchInfo
from megatron_cocoa.recipes import resume
from megatron_cocoa.recipes.output_folder import JOB_FILE
from megatron_cocoa.recipes.resume import MAY_CHANGE, StagePlace, check_same_run, clear_unfinished, find_places
from megatron_cocoa.recipes.run import announce_places
from megatron_cocoa.settings.saved import save_settings, settings_to_dict

BEFORE = TrainSettings(stages=("warmup", "bridge"), data=DataSettings(sources=(SourceSettings("a", "/data/a"),)))


@pytest.fixture
def output(tmp_path):
    save_settings(BEFORE, tmp_path / "settings.yaml")
    (tmp_path / "contrastive" / "checkpoint").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize(
    "now",
    [
        BEFORE,
        replace(BEFORE, resume=True, log_interval=3),
        replace(BEFORE, parallel=ParallelSettings(tensor_model_parallel_size=4, use_distributed_optimizer=True)),
        replace(BEFORE, data=replace(BEFORE.data, path="/elsewhere", num_workers=4)),
        replace(BEFORE, stages=("warmup", "bridge", "contrastive")),
        replace(BEFORE, bridge=BridgeSettings(lr=1e-3)),
        replace(BEFORE, optimizer=OptimizerSettings(max_norm_ratio=10.0, max_skipped_steps=3)),
        replace(BEFORE, model=ModelSettings(load="/elsewhere", random_weights=True)),
        replace(BEFORE, data=DataSettings(sources=(SourceSettings("a", "/elsewhere", image_root="/pictures"),))),
    ],
)
def test_what_changes_how_but_not_what_is_allowed(output, now):
    """Claim: layout, paths, logging, further stages and those that nothing is kept of may change within one run."""
    check_same_run(now, output)


@pytest.mark.parametrize(
    "now, message",
    [
        (replace(BEFORE, seed=7), "seed was 1234, is 7"),
        (
            replace(BEFORE, contrastive=ContrastiveSettings(lr=1e-3, temperature=0.05)),
            "contrastive.lr was 2e-05, is 0.001; contrastive.temperature was 0.02, is 0.05",
        ),
        (replace(BEFORE, data=replace(BEFORE.data, max_length=77)), "data.max_length was 4096, is 77"),
        (
            replace(BEFORE, data=DataSettings(sources=(SourceSettings("a", "/data/a", weight=2.0),))),
            r"data.sources was .*'weight': None.*, is .*'weight': 2.0",
        ),
        (replace(BEFORE, stages=("bridge",)), "stages can only be added at the end"),
        (replace(BEFORE, stages=("warmup", "contrastive")), "stages can only be added at the end"),
    ],
)
def test_what_would_train_something_else_is_named(output, now, message):
    """Claim: each difference is told with both values, and what to do about it."""
    with pytest.raises(ValueError, match=message):
        check_same_run(now, output)


def test_a_run_that_has_begun_nothing_keeps_its_first_weights(tmp_path):
    """Claim: once a stage has weights of its own, where they came from matters no more; before, it is what trains."""
    save_settings(BEFORE, tmp_path / "settings.yaml")
    elsewhere = replace(BEFORE, model=ModelSettings(load="/elsewhere"))
    with pytest.raises(ValueError, match="model.load was None, is /elsewhere"):
        check_same_run(elsewhere, tmp_path)
    _complete(tmp_path / "warmup" / "checkpoints" / "step-00000020")
    check_same_run(elsewhere, tmp_path)
    with pytest.raises(ValueError, match="warmup.lr was"):
        check_same_run(replace(BEFORE, warmup=replace(BEFORE.warmup, lr=1.0)), tmp_path)


@pytest.mark.parametrize("folder", ["warmup", "baseline"])
def test_within_a_stage_the_kind_of_optimizer_stays(output, folder):
    """Claim: no kind reads the state that the other has saved, which a resume is told before rows are read; a stage
    that is complete has left none."""
    sharded = replace(BEFORE, parallel=ParallelSettings(use_distributed_optimizer=True))
    _complete(output / folder / "checkpoints" / "step-00000004")
    check_same_run(replace(BEFORE, parallel=ParallelSettings(tensor_model_parallel_size=2)), output)
    with pytest.raises(ValueError, match="parallel.use_distributed_optimizer was False, is True. Set them back"):
        check_same_run(sharded, output)
    _complete(output / folder / "checkpoint")
    check_same_run(sharded, output)


def _complete(checkpoint: Path) -> None:
    """Make ``checkpoint`` look as if every rank had written its part."""
    checkpoint.mkdir(parents=True)
    for name in (BACKEND_FILE, INFO_FILE):
        (checkpoint / name).write_text("{}", encoding="utf-8")


@pytest.mark.parametrize("given", [dict(overwrite=True), dict(resume=False), dict(resume=True)])
def test_a_job_that_is_started_again_goes_on_with_its_own_run(tmp_path, monkeypatch, given):
    """Claim: the same command with --overwrite removes an earlier run once, not what its own starts have trained.

    Also where the node of another rank alone counts the restart.
    """
    settings = replace(BEFORE, output_dir=str(tmp_path), **given)
    monkeypatch.setattr(resume.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(resume, "on_first_rank", lambda action: action())

    def after(*restarted: tuple[str, ...]) -> TrainSettings:
        monkeypatch.setattr(resume.dist, "all_gather_object", lambda found, mine: found.extend(restarted))
        return resume.after_restart(settings, LaunchInfo(0, 2, 0, jobs=("torchelastic a",)))

    again = (), ("torchelastic a",)
    assert after(*again) == settings, "nobody has begun a run there"
    (tmp_path / JOB_FILE).write_text("torchelastic b\nslurm 7")
    assert after(*again) == settings, "it is another job's"
    (tmp_path / JOB_FILE).write_text("torchelastic a\nslurm 7")
    assert after((), ()) == settings, "the user has started it, as it says"
    assert after(*again) == replace(settings, overwrite=False, resume=True)


def test_what_is_half_written_goes_once_the_folder_is_claimed(tmp_path):
    """Claim: to look how far a run has come changes nothing, it may live; then each kind of unfinished checkpoint goes,
    and one that was just being replaced has its name again."""
    half = [f"warmup/{name}.0a1b2c3d.incomplete" for name in ("checkpoint", "best", "checkpoints/step-00000020")]
    for name in (*half, "warmup/checkpoint.replaced", "warmup/best.replaced", "bridge/best"):
        (tmp_path / name).mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    find_places(tmp_path, ["warmup", "bridge"])
    assert sorted(tmp_path.rglob("*")) == before
    clear_unfinished(tmp_path, ["warmup", "bridge", "contrastive"])
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == ["bridge", "bridge/best", "warmup", "warmup/best", "warmup/checkpoint", "warmup/checkpoints"]


def test_a_checkpoint_that_was_copied_in_part_is_named(tmp_path, capsys):
    """Claim: a resume that passes over a checkpoint under its final name says so, also where an older one serves."""
    steps = tmp_path / "warmup" / "checkpoints"
    for folder in (steps / "step-00000010", steps / "step-00000020", tmp_path / "bridge" / "checkpoint"):
        _complete(folder)
    for folder in (steps / "step-00000040", tmp_path / "contrastive" / "checkpoint"):
        folder.mkdir(parents=True)
        (folder / BACKEND_FILE).write_text("{}")
    places = find_places(tmp_path, ["warmup", "bridge", "contrastive"])
    assert places["warmup"] == StagePlace(step=20, damaged=(str(steps / "step-00000040"),))
    assert places["bridge"] == StagePlace(is_complete=True)
    assert places["contrastive"] == StagePlace(damaged=(str(tmp_path / "contrastive" / "checkpoint"),))
    announce_places(places)
    told = capsys.readouterr().out
    assert "Resumed: warmup goes on after step 20; bridge is complete" in told
    for path in (steps / "step-00000040", tmp_path / "contrastive" / "checkpoint"):
        assert f"Passed over: {path} is incomplete" in told


def test_settings_that_cannot_be_read_stop_a_resume(tmp_path):
    (tmp_path / "settings.yaml").write_text("stages: [warmup\n")
    with pytest.raises(ValueError, match="cannot be resumed"):
        check_same_run(BEFORE, tmp_path)


def test_every_name_that_may_change_exists():
    """Claim: a setting that is renamed does not silently become one that stops a resume."""
    tree = settings_to_dict(BEFORE)
    for name in MAY_CHANGE:
        group, _, leaf = name.partition(".")
        assert group in tree and (not leaf or leaf in tree[group]), name


def test_a_run_of_an_earlier_version_goes_on_under_the_defaults(output):
    """Claim: a setting that the run's version did not have is taken to have had its default, and no other value."""
    path = output / "settings.yaml"
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("  attention:")]
    path.write_text("\n".join(kept), encoding="utf-8")
    check_same_run(BEFORE, output)
    causal = replace(BEFORE, contrastive=replace(BEFORE.contrastive, attention="causal"))
    with pytest.raises(ValueError, match="contrastive.attention was bidirectional, is causal"):
        check_same_run(causal, output)
