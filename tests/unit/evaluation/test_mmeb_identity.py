"""The size of pictures from the command line to the score file, for models that have a size of their own."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megatron_cocoa import CocoaEmbedder
from megatron_cocoa.batch import MaskKind
from megatron_cocoa.config import EvaluationSettings
from megatron_cocoa.data.samples import SampleBuilder
from megatron_cocoa.embedder import start_alone
from megatron_cocoa.evaluation.mmeb_identity import identity_of
from megatron_cocoa.evaluation.mmeb_tasks import Benchmark
from megatron_cocoa.export.embedder_options import EmbedderOptions
from megatron_cocoa.recipes.embedding_model import load_embedding_model
from tests.unit.exported_folders import Folders, write_exported
from tools.evaluate_mmeb import parse

SIDE = 70
WIDE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 140, 3), dtype=np.uint8))
LIMITS = [56 * 56, 56 * 56]
"""Of the model folder's ``preprocessor_config.json``."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    """A model that is exported with square pictures."""
    options = EmbedderOptions("hf", image_size=SIDE, golden=False)
    return write_exported(tmp_path_factory.mktemp("identity"), options=options)


def sized(folder, *arguments: str) -> tuple[dict, tuple[int, ...]]:
    """What the evaluation's score files say of the pictures' size, and the size that a wide picture has."""
    needed = ("--model-path", str(folder), "--data-path", "x", "--image-root", "x", "--output-path", "x")
    args = parse([*needed, *arguments])
    names = ("image_size", "min_image_tokens", "max_image_tokens")
    settings = EvaluationSettings(**{name: getattr(args, name) for name in names})
    start_alone()
    found = load_embedding_model(folder, settings)
    identity = identity_of(settings, model_path=folder)(found.builder, found.options, Benchmark("tiny", ()))
    recorded = {name: identity.settings[name] for name in ("image_size", "pixel_limits")}
    return recorded, found.builder.pictures.prepare(WIDE).shape[1:]


def test_native_is_native_also_for_an_export_of_squares(folders):
    """Claim: pictures are sized as asked, or as the export says where nothing is asked, and the score file has the size
    that they had."""
    square = {"image_size": SIDE, "pixel_limits": None}
    assert sized(folders.exported) == (square, (SIDE, SIDE))
    native, (height, width) = sized(folders.exported, "--image-size", "native")
    assert native == {"image_size": "native", "pixel_limits": LIMITS} and height < width
    assert sized(folders.exported, "--image-size", "56") == ({"image_size": 56, "pixel_limits": None}, (56, 56))
    bounded, (height, width) = sized(folders.exported, "--max-image-tokens", "36")
    assert bounded == {"image_size": "native", "pixel_limits": [LIMITS[0], 36 * 14**2]} and height < width


def test_a_checkpoint_is_evaluated_at_the_size_of_its_training(folders, tmp_path):
    """Claim: a checkpoint that was trained on squares has them in its score file as its export has; `native` is asked
    for."""
    checkpoint = shutil.copytree(folders.checkpoint, tmp_path / "checkpoint")
    info = json.loads((checkpoint / "cocoa.json").read_text()) | {"stage": "contrastive"}
    (checkpoint / "cocoa.json").write_text(json.dumps(info | {"pictures": {"image_size": SIDE}}))
    assert sized(checkpoint) == sized(folders.exported) == ({"image_size": SIDE, "pixel_limits": None}, (SIDE, SIDE))
    native = sized(checkpoint, "--image-size", "native")
    assert native == sized(folders.exported, "--image-size", "native") and native[0]["image_size"] == "native"


def test_a_model_without_a_size_of_its_own_is_recorded_as_before(folders):
    """Claim: score files of models that keep pictures' shapes say the same whether that was asked for or not."""
    wanted = {"image_size": "native", "pixel_limits": LIMITS}
    assert sized(folders.hf)[0] == sized(folders.hf, "--image-size", "native")[0] == wanted


def test_every_setting_that_moves_vectors_is_recorded(folders):
    """Claim: another length, form, precision or set of baselines makes another score, which is not kept in place."""
    start_alone()
    model = load_embedding_model(folders.hf, EvaluationSettings())

    def changed_builder(**changes):
        names = ("bundle", "vision", "pictures", "max_length", "image_placeholder")
        return SampleBuilder(**{name: getattr(model.builder, name) for name in names} | changes)

    def recorded(*, builder=model.builder, options=model.options, **settings):
        complete = identity_of(EvaluationSettings(**settings), model_path=folders.hf)
        return complete(builder, options, Benchmark("tiny", ())).settings

    changes = {
        "max_length": dict(builder=changed_builder(max_length=77)),
        "image_placeholder": dict(builder=changed_builder(image_placeholder="bare")),
        "attention": dict(options=replace(model.options, embedding_mask=MaskKind.CAUSAL)),
        "dtype": dict(dtype="bf16" if EvaluationSettings().dtype == "fp32" else "fp32"),
        "baselines": dict(baselines=not EvaluationSettings().baselines),
    }
    before = recorded()
    for name, change in changes.items():
        after = recorded(**change)
        assert [key for key in before if after[key] != before[key]] == [name] and after.keys() == before.keys()


def test_sizes_that_are_none_are_refused(folders, capsys):
    """Claim: a mistyped size is named with what is needed, on the command line and in Python."""
    for text in ("nativ", "0", "6.5"):
        with pytest.raises(SystemExit):
            parse(["--image-size", text])
        assert f"{text!r} is no picture size: needed native, or a side in pixels" in capsys.readouterr().err
    with pytest.raises(ValueError, match="image_size is 'square', needs a side in pixels, native"):
        CocoaEmbedder.from_pretrained(folders.exported, image_size="square")
    with pytest.raises(ValueError, match="image_size is 0"):
        EvaluationSettings(image_size=0)
