"""Which checkpoints of a stage count as complete."""

from megatron_cocoa.training.stage_checkpoints import complete_steps, remove_leftovers


def make(folder, name, *files):
    (folder / name).mkdir(parents=True)
    for file in files:
        (folder / name / file).write_text("{}")


def test_only_folders_with_index_and_description_are_complete(tmp_path):
    """Claim: whatever a killed run leaves beside them is not taken for a checkpoint, in the order of steps."""
    make(tmp_path, "step-00000100", "metadata.json", "cocoa.json")
    make(tmp_path, "step-00000020", "metadata.json", "cocoa.json")
    make(tmp_path, "step-00000120.incomplete", "metadata.json", "cocoa.json")
    make(tmp_path, "step-00000010.removed", "metadata.json", "cocoa.json")
    make(tmp_path, "step-00000110", "metadata.json")
    make(tmp_path, "step-130", "metadata.json", "cocoa.json")
    assert complete_steps(tmp_path) == [20, 100]
    assert complete_steps(tmp_path / "absent") == []


def test_leftovers_go_and_checkpoints_stay(tmp_path):
    make(tmp_path, "step-00000100", "metadata.json", "cocoa.json")
    make(tmp_path, "step-00000120.incomplete", "half")
    make(tmp_path, "step-00000120.0a1b2c3d.incomplete", "half")
    make(tmp_path, "step-00000010.removed", "half")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000100"]
