"""A run in which every row of the method's decision table takes the other reading, measured in the forms it trained."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from megatron_cocoa import CocoaEmbedder
from megatron_cocoa.checkpoint.info import read_info
from megatron_cocoa.checkpoint.torch_dist_reader import TorchDistReader
from megatron_cocoa.evaluation.metrics import evaluate_pairs
from tests.distributed.tiny_run import write_folders
from tests.e2e.test_survival import finish, start

STEPS = 6
OTHERS = [
    "--warmup.masked_unit=patch", "--warmup.eligible_tokens=words", "--warmup.decoder_layers=2",
    "--warmup.decoder_init=random", "--bridge.eligible_tokens=words", "--contrastive.attention=causal",
    "--contrastive.image_placeholder=bare",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, Path]:
    """The folders, and the output of a run on two data-parallel ranks."""
    folder = tmp_path_factory.mktemp("others")
    write_folders(folder)
    output = folder / "output"
    sizes = [f"--{stage}.steps={STEPS}" for stage in ("warmup", "bridge", "contrastive")]
    sizes += ["--warmup.lr_warmup_steps=1", "--warmup.global_batch_size=8", "--warmup.micro_batch_size=2"]
    options = [*sizes, *OTHERS, "--stages=[warmup,bridge,contrastive]", "--evaluate=true", "--validation.interval=3"]
    assert finish(start(folder, output, *options, ranks=2)) == 0, output.with_suffix(".log").read_text()[-3000:]
    return folder, output


def test_every_other_reading_trains(run):
    """Claim: the run ends, says what a bare picture means, and its decoder has the layers that were asked for."""
    _, output = run
    assert "Warning: contrastive.image_placeholder is bare" in output.with_suffix(".log").read_text()
    with TorchDistReader(output / "warmup" / "checkpoint") as reader:
        shapes = [reader.shape(key) for key in reader.keys() if key.startswith("image_decoder.decoder.")]
    assert shapes and all(shape[0] == 2 for shape in shapes)


@pytest.mark.parametrize(
    ("stage", "form"), [("warmup", ("bidirectional", "full")), ("contrastive", ("causal", "bare"))]
)
def test_what_the_run_measured_is_what_the_embedder_computes(run, stage, form):
    """Claim: checkpoints name their form, and the run's recall after a stage is that of vectors in this form."""
    folder, output = run
    info = read_info(output / stage / "checkpoint")
    assert (info.attention, info.image_placeholder) == form
    rows = [json.loads(line) for line in (folder / "pairs" / "eval_heldout.jsonl").read_text().splitlines()]
    # The run measures with the picture size of stage 3, whichever stage it has trained.
    saved = yaml.safe_load((output / "settings.yaml").read_text())
    sizes = {name: saved["contrastive"][name] for name in ("image_size", "min_image_tokens", "max_image_tokens")}
    sizes["image_size"] = sizes["image_size"] or "native"
    embedder = CocoaEmbedder.from_pretrained(output / stage / "checkpoint", dtype=saved["model"]["dtype"], **sizes)
    assert (embedder.form.attention, embedder.form.image_placeholder) == form
    texts = embedder.encode([row["caption"] for row in rows])
    pictures = embedder.encode([folder / "pairs" / row["image_path"] for row in rows])
    found = evaluate_pairs(torch.from_numpy(texts), torch.from_numpy(pictures), keys=[row["caption"] for row in rows])
    results = json.loads((output / "results.json").read_text())
    measured = {row["direction"]: row["recall"] for row in results if row["model"] == f"after {stage}"}
    assert measured == {d: {str(k): e.value for k, e in result.recall.items()} for d, result in found.items()}
