"""CocoaEmbedder and the exported folder, against transformers run as the model card says."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file

from megatron_cocoa import CocoaEmbedder
from megatron_cocoa.conversion.hf_to_mcore import convert_hf_to_mcore
from megatron_cocoa.export.check_golden import check_golden, main
from megatron_cocoa.export.embedder_options import EmbedderOptions
from megatron_cocoa.export.export_info import read_export_info
from megatron_cocoa.export.folder import export_embedder
from megatron_cocoa.export.golden import compare_golden
from megatron_cocoa.parallel import device
from tests.unit.exported_folders import Folders, write_exported

BATCH_BOUND = 1e-5
"""The same sums in packs of another length: kernels may add in another order, by about 1e-6 in FP32."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Folders:
    return write_exported(tmp_path_factory.mktemp("embedder"))


@pytest.fixture(scope="module")
def embedder(folders) -> CocoaEmbedder:
    return CocoaEmbedder.from_pretrained(folders.exported)


def picture(width: int, height: int, *, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def items() -> list:
    """Texts, pictures of several shapes, and both, of very different lengths."""
    return [
        "a",
        "a red house beside two small trees " * 8,
        {"text": "Grüße, 3 €"},
        picture(56, 56),
        {"image": picture(140, 60, seed=1)},
        {"text": "the moon", "image": picture(70, 154, seed=2)},
        {"text": "sol y luna " * 12, "image": picture(30, 31, seed=3)},
        {"text": "un gato", "image": picture(400, 300, seed=4)},
    ]


def card_embedder(folder: Path):
    """The object that the code block of the model card makes, run in the folder as a reader would."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    code = code.replace('PlainEmbedder(".")', f"PlainEmbedder({str(folder)!r})")
    names: dict = {}
    exec(code, names)
    return names["embedder"]


def parts(item) -> dict:
    if isinstance(item, dict):
        return item
    return {"text": item} if isinstance(item, str) else {"image": item}


def test_equals_transformers_run_as_the_model_card_says(folders, embedder, items):
    """Claim: for text, pictures and both, of several sizes, transformers alone gives the same vectors."""
    plain = card_embedder(folders.exported)
    wanted = np.stack([plain.embed(**parts(item)).numpy() for item in items]).astype(np.float64)
    found = embedder.encode(items)
    assert found.dtype == np.float32 and found.shape == (len(items), embedder.hidden_size)
    assert np.linalg.norm(found, axis=1) == pytest.approx(1, abs=1e-6)
    # Promised is 0.9999. Two FP32 programs differ by about 1e-6 of a vector, the cosine by its square.
    assert (1 - (found * wanted).sum(axis=1)).max() < 1e-6


def test_the_export_is_bidirectional(folders, items):
    """Claim: transformers reads the export as bidirectional; made causal, it gives other vectors."""
    plain, causal = card_embedder(folders.exported), card_embedder(folders.exported)
    assert plain.model.config.text_config.is_causal is False
    causal.model.config.text_config.is_causal = True
    text = items[1]
    assert float(plain.embed(text) @ causal.embed(text)) < 0.999


FORMS = [("causal", "full"), ("bidirectional", "bare"), ("causal", "bare")]


@pytest.fixture(scope="module", params=FORMS, ids="-".join)
def trained(request, folders, tmp_path_factory) -> tuple[Path, Path, tuple[str, str]]:
    """A checkpoint that says in which form stage 3 trained it, its export, and the form."""
    root = tmp_path_factory.mktemp("form")
    checkpoint = shutil.copytree(folders.checkpoint, root / "checkpoint")
    form = dict(zip(("attention", "image_placeholder"), request.param))
    info = json.loads((checkpoint / "cocoa.json").read_text()) | {"stage": "contrastive", "step": 7} | form
    (checkpoint / "cocoa.json").write_text(json.dumps(info))
    export_embedder(checkpoint, root / "exported", options=EmbedderOptions("hf"))
    return checkpoint, root / "exported", request.param


def test_embeddings_are_computed_in_the_form_of_the_training(trained, folders, embedder, items):
    """Claim: checkpoint, export, transformers as the card says, golden vectors and the export converted back embed with
    the attention and the placeholder that the checkpoint names, and those give other vectors than the default."""
    checkpoint, exported, (attention, placeholder) = trained
    found = CocoaEmbedder.from_pretrained(checkpoint)
    assert (found.form.attention, found.form.image_placeholder) == (attention, placeholder)
    vectors = found.encode(items)
    assert np.array_equal(vectors, CocoaEmbedder.from_pretrained(exported).encode(items))
    config = json.loads((exported / "config.json").read_text())
    assert config["text_config"]["is_causal"] is (attention == "causal")
    assert f"whose attention is {attention}" in (exported / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(encoding="utf-8"), re.DOTALL)[1]
    names: dict = {}
    exec(code.replace('PlainEmbedder("."', f"PlainEmbedder({str(exported)!r}"), names)
    wanted = np.stack([names["embedder"].embed(**parts(item)).numpy() for item in items]).astype(np.float64)
    # As for the default form, above.
    assert (1 - (vectors * wanted).sum(axis=1)).max() < 1e-6
    for library in ("transformers", "megatron_cocoa"):
        assert all(result.passed for result in check_golden(exported, library=library))
    default = embedder.encode(items)
    is_changed = (vectors * default).sum(axis=1) < 0.999
    has_picture = ["image" in parts(item) for item in items]
    assert is_changed.any() and all(is_changed[i] for i in range(len(items)) if has_picture[i])
    assert attention == "causal" or not any(is_changed[i] for i in range(len(items)) if not has_picture[i])
    convert_hf_to_mcore(exported, exported.parent / "back", overwrite=True)
    assert np.array_equal(CocoaEmbedder.from_pretrained(exported.parent / "back").encode(items), vectors)


def test_bare_pictures_are_refused_where_they_cannot_be_expressed(trained, tmp_path):
    """Claim: sentence-transformers would give a bare picture other positions: no such folder is written."""
    checkpoint, _, (_, placeholder) = trained
    options = EmbedderOptions("sentence-transformers", golden=False)
    if placeholder == "full":
        export_embedder(checkpoint, tmp_path / "st", options=options)
        return
    with pytest.raises(ValueError, match="image_placeholder bare, which cannot be exported for sentence-transformers"):
        export_embedder(checkpoint, tmp_path / "st", options=options)
    assert not (tmp_path / "st").exists()


def test_batch_size_and_order_change_nothing(embedder, items):
    """Claim: a vector does not depend on what it is embedded with."""
    wanted = embedder.encode(items, batch_size=1)
    order = np.random.default_rng(5).permutation(len(items))
    for batch_size in (2, 3, 32):
        assert embedder.encode(items, batch_size=batch_size) == pytest.approx(wanted, abs=BATCH_BOUND)
    mixed = embedder.encode([items[i] for i in order], batch_size=3)
    assert mixed == pytest.approx(wanted[order], abs=BATCH_BOUND)


def test_packs_keep_to_the_token_limit(embedder, items, monkeypatch):
    """Claim: batch_tokens bounds a pack, and changes no vector."""
    wanted = embedder.encode(items)
    monkeypatch.setattr(embedder, "batch_tokens", 40)
    sizes = [[sample.input_ids.size for sample in pack] for pack in embedder._packs(items, "", 32)]
    assert all(sum(pack) <= 40 or len(pack) == 1 for pack in sizes) and any(len(pack) > 1 for pack in sizes)
    assert embedder.encode(items) == pytest.approx(wanted, abs=BATCH_BOUND)


@pytest.mark.skipif(device.has_gpu(), reason="a GPU takes larger packs")
def test_packs_are_small_where_the_cpu_computes(folders, embedder):
    """Claim: on a CPU a pack has 1024 tokens at most, unless the caller says otherwise."""
    texts = ["a red house beside two small trees " * 6] * 32
    sizes = [sum(sample.input_ids.size for sample in pack) for pack in embedder._packs(texts, "", 32)]
    assert len(sizes) > 1 and max(sizes) <= 1024 < sum(sizes)
    roomy = CocoaEmbedder.from_pretrained(folders.exported, batch_tokens=sum(sizes))
    assert len(list(roomy._packs(texts, "", 32))) == 1


def test_threads_change_nothing(embedder, items, tmp_path, monkeypatch):
    """Claim: vectors, messages and the process's warning filters are the same whether items are prepared ahead or not,
    also where items share a picture that is not decoded yet, and turned by its EXIF data."""
    file = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    picture(300, 200, seed=7).save(file, exif=exif)

    def everything() -> list:
        shared = Image.open(file)
        return [*items, *({"text": text, "image": shared} for text in "abcdef"), *[file] * 6]

    monkeypatch.setattr(embedder, "num_workers", 0)
    wanted, filters = embedder.encode(everything()), list(warnings.filters)
    for num_workers in (1, 4):
        monkeypatch.setattr(embedder, "num_workers", num_workers)
        assert np.array_equal(embedder.encode(everything()), wanted)
        assert warnings.filters == filters
        with pytest.raises(ValueError, match=f"item {len(items)}: neither text nor a picture"):
            embedder.encode([*items, {"text": ""}])


def test_checkpoint_and_folders_give_the_same_vectors(folders, embedder, items):
    """Claim: a Megatron checkpoint, the folder it came from and the export are one model."""
    wanted = embedder.encode(items)
    for made in (
        CocoaEmbedder.from_pretrained(folders.checkpoint),
        CocoaEmbedder.from_pretrained(folders.checkpoint, model_path=folders.hf),
        CocoaEmbedder.from_pretrained(folders.hf),
    ):
        # The weights are the same bits and so is the program.
        assert np.array_equal(made.encode(items), wanted)


def test_forms_of_an_item_agree(embedder, tmp_path):
    """Claim: a picture is the same by path and in memory, and an instruction is text in front of the text."""
    image = picture(60, 80)
    image.save(tmp_path / "x.png")
    same = [image, {"image": image}, tmp_path / "x.png", {"image": str(tmp_path / "x.png")}]
    assert np.ptp(embedder.encode(same, batch_size=1), axis=0).max() == 0
    written = embedder.encode(["find: dog", {"text": "<|image_1|>find: dog", "image": image}])
    assert np.array_equal(embedder.encode(["dog", {"text": "dog", "image": image}], instruction="find: "), written)
    after = embedder.encode([{"text": "find: dog <|image_1|>", "image": image}])
    assert float(after[0] @ written[1]) < 0.9999, "a marked place is where the picture goes"
    marked = {"text": "dog <|image_1|>", "image": image}
    assert np.array_equal(embedder.encode([marked], instruction="find: "), after)
    assert embedder.encode([]).shape == (0, embedder.hidden_size)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (3, "item 1: found a int"),
        ({}, "item 1: neither text nor a picture"),
        ({"text": " "}, "item 1: neither text nor a picture"),
        ({"texts": "a"}, r"item 1: found the key\(s\) texts"),
        ({"text": 5}, "item 1: text is a int"),
        ("half \ud83d", "item 1: character 5 of the text is half of a surrogate pair"),
        ({"image": b""}, "item 1: image is a bytes"),
        ({"image": np.zeros((4, 4, 3))}, "item 1: image is a ndarray"),
        ({"text": "<|image_1|>"}, r"item 1: the text marks 1 place\(s\)"),
        ({"text": "<|image_1|>" * 2, "image": Image.new("RGB", (56, 56))}, r"item 1: the text marks 2 place\(s\)"),
        (Path("nowhere.png"), "item 1: nowhere.png is not a file"),
        (Image.new("RGB", (2, 900)), "item 1: the picture in memory is 2 x 900"),
    ],
)
def test_bad_items_are_named(embedder, item, message):
    """Claim: an item that cannot be embedded is named by its index, with what was found."""
    with pytest.raises(ValueError, match=message):
        embedder.encode(["fine", item])


@pytest.mark.parametrize("broken", [0.0, np.nan, np.inf])
def test_vectors_without_a_direction_are_refused(embedder, monkeypatch, broken):
    """Claim: a vector that is zero or not finite is no result, and its item is named."""

    packs = []

    def embed_pack(model, pack, *, rows):
        packs.append(pack)
        found = torch.ones(rows, embedder.hidden_size)
        found[1:] = broken if len(packs) == 2 else 1
        return found

    monkeypatch.setattr("megatron_cocoa.embedder.embed_pack", embed_pack)
    with pytest.raises(ValueError, match="item 3: its vector is zero or not finite .1 of 2"):
        embedder.encode(list("abcd"), batch_size=2)


def test_a_picture_is_not_placed_by_the_instruction(embedder):
    """Claim: an instruction that marks a picture's place is refused: items without a picture have it, too."""
    for item in ("dog", {"text": "dog", "image": picture(56, 56)}):
        with pytest.raises(ValueError, match=r"the instruction holds <\|image_1\|>"):
            embedder.encode([item], instruction="<|image_1|>\nRepresent: ")


def test_bad_folders_are_refused(folders, tmp_path):
    """Claim: what is no model, or lacks its tokenizer, is refused with what is needed."""
    with pytest.raises(ValueError, match="neither a Hugging Face folder"):
        CocoaEmbedder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="neither a Hugging Face folder"):
        CocoaEmbedder.from_pretrained(folders.root / "model")
    with pytest.raises(ValueError, match="put it in a list"):
        CocoaEmbedder.from_pretrained(folders.hf).encode("text")
    bare = shutil.copytree(folders.checkpoint, tmp_path / "bare")
    shutil.rmtree(bare / "huggingface")
    with pytest.raises(ValueError, match="carries no tokenizer.*model_path"):
        CocoaEmbedder.from_pretrained(bare)
    (tmp_path / "settings.yaml").write_text(f"model:\n  path: {folders.hf}\n")
    assert CocoaEmbedder.from_pretrained(bare).hidden_size == 64


def test_cut_texts_are_counted(folders):
    """Claim: nothing is cut in silence."""
    short = CocoaEmbedder.from_pretrained(folders.hf, max_length=8)
    for batch_size in (1, 32):
        with pytest.warns(UserWarning, match="2 of 3 items were cut"):
            short.encode(["a red house " * 20, "a white house " * 20, "a"], batch_size=batch_size)


@pytest.mark.parametrize("library", ["transformers", "megatron_cocoa"])
def test_golden_passes(folders, library):
    """Claim: an untouched export agrees with its golden vectors in either library."""
    assert all(result.passed for result in check_golden(folders.exported, library=library))


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.norm.weight", "visual.merger.mlp.2.bias"])
def test_golden_fails_on_a_perturbed_weight(folders, tmp_path, name, capsys):
    """Claim: one tensor that is off by 5 % is found, and the command's status says so."""
    broken = shutil.copytree(folders.exported, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    state[name] = state[name] * (1 + 0.05 * torch.randn(state[name].shape, generator=torch.Generator().manual_seed(0)))
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    assert main([str(broken)]) == 1
    assert "FAIL" in capsys.readouterr().out


def test_golden_vectors_are_compared_by_direction(folders, embedder):
    """Claim: a shorter vector passes, one that is not finite does not, and one of another length is named."""

    def compared(change) -> list[bool]:
        found = compare_golden(
            folders.exported, lambda text, image: change(embedder.encode([{"text": text, "image": image}])[0])
        )
        return [result.passed for result in found]

    assert all(compared(lambda vector: vector / 2))
    assert not any(compared(lambda vector: vector * np.nan))
    with pytest.raises(ValueError, match=r"text 0: the vector has shape \(63,\), recorded is \(64,\)"):
        compared(lambda vector: vector[1:])


def test_golden_names_a_bad_folder(folders, tmp_path, capsys):
    """Claim: a missing or damaged golden.json is a message, not a pass."""
    copy = shutil.copytree(folders.exported, tmp_path / "copy")
    (copy / "golden.json").write_text("{}")
    assert main([str(copy)]) == 2
    (copy / "golden.json").unlink()
    assert main([str(copy)]) == 2
    assert "golden.json" in capsys.readouterr().err


def test_export_replaces_nothing_unasked(folders, tmp_path):
    """Claim: an existing folder stays, unless it may be overwritten, and no half is left beside it; the folder that the
    tokenizer is taken from may never be."""
    before = sorted(folders.root.iterdir())
    with pytest.raises(ValueError, match="exists"):
        export_embedder(folders.checkpoint, folders.exported)
    with pytest.raises(ValueError, match="lacks tokenizer.json"):
        export_embedder(folders.checkpoint, folders.root / "new", companions=folders.exported / "1_Pooling")
    assert sorted(folders.root.iterdir()) == before
    companions = shutil.copytree(folders.hf, tmp_path / "hf")
    with pytest.raises(ValueError, match="is the source folder itself"):
        export_embedder(folders.checkpoint, companions, companions=companions, overwrite=True)


def test_another_bridge_is_refused_or_remembered(folders, tmp_path):
    """Claim: a folder is exported with the token that it was trained with, which a run's settings name, and every
    library then uses that one."""
    arguments = dict(options=EmbedderOptions(bridge_token="<|im_start|>"))
    for golden in (True, False):
        options = EmbedderOptions(bridge_token="<|im_start|>", golden=golden)
        with pytest.raises(ValueError, match="trained with the bridge token's id"):
            export_embedder(folders.checkpoint, tmp_path / "refused", options=options)
    assert not any(tmp_path.iterdir())
    convert_hf_to_mcore(folders.hf, tmp_path / "other", bridge_token="<|im_start|>")
    export_embedder(tmp_path / "other", tmp_path / "exported", **arguments)
    (tmp_path / "settings.yaml").write_text(json.dumps({"model": {"bridge_token": "<|im_start|>"}}))
    export_embedder(tmp_path / "other", tmp_path / "unasked", options=EmbedderOptions(golden=False))
    assert read_export_info(tmp_path / "unasked").bridge_token == "<|im_start|>"
    for library in ("transformers", "megatron_cocoa"):
        assert all(result.passed for result in check_golden(tmp_path / "exported", library=library))
    usual, other, asked = (
        CocoaEmbedder.from_pretrained(folder, bridge_token=token).encode(["a"])
        for folder, token in (
            (folders.exported, None), (tmp_path / "exported", None), (folders.hf, "<|im_start|>"),
        )
    )  # fmt: skip
    assert float(usual[0] @ other[0]) < 0.999 and np.array_equal(asked, other)


def test_a_runs_checkpoint_embeds_with_the_token_that_the_run_names(folders, tmp_path):
    """Claim: the bridge token of a run's settings.yaml is taken unless another is asked for, which is then refused."""
    checkpoint = tmp_path / "run" / "bridge" / "checkpoint"
    convert_hf_to_mcore(folders.hf, checkpoint, bridge_token="<|im_start|>")
    (tmp_path / "run" / "settings.yaml").write_text("model: {bridge_token: <|im_start|>}\n")
    wanted = CocoaEmbedder.from_pretrained(folders.hf, bridge_token="<|im_start|>").encode(["a"])
    assert np.array_equal(CocoaEmbedder.from_pretrained(checkpoint).encode(["a"]), wanted)
    with pytest.raises(ValueError, match="trained with the bridge token's id"):
        CocoaEmbedder.from_pretrained(checkpoint, bridge_token="<|im_end|>")


def test_a_checkpoint_with_a_padded_tower_gives_the_same_vectors(folders, embedder, items, tmp_path):
    """Claim: the tower is built as wide as the checkpoint's, which tensor parallelism may need, and zeros change
    nothing."""
    convert_hf_to_mcore(folders.hf, tmp_path / "padded", vision_ffn_multiple=32)
    padded = CocoaEmbedder.from_pretrained(tmp_path / "padded")
    layers = padded.model.chunks[0].vision_model.decoder.layers
    # The published folder says 48.
    assert [layer.mlp.linear_fc2.weight.shape[-1] for layer in layers] == [64, 64]
    assert np.abs(padded.encode(items) - embedder.encode(items)).max() < BATCH_BOUND


def test_the_package_is_light_to_import():
    """Claim: the package and its settings parser do not wait for torch."""
    code = "import sys, megatron_cocoa, megatron_cocoa.settings.parse; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
