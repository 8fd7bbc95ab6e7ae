"""A run starts from the same weights whether they come from a folder or from its converted checkpoint."""

from dataclasses import replace

import pytest
import torch

from megatron_cocoa.checkpoint.initial import WeightSource, load_initial_weights
from megatron_cocoa.conversion.hf_to_mcore import convert_hf_to_mcore
from megatron_cocoa.model.build import build_model
from tests.parity import compare
from tests.parity.cases import Case

MASK_TOKEN, USED_ROWS = 155, 156


def start(chunk, table, source: WeightSource, *, decoder_layers: int = 1) -> dict[str, torch.Tensor]:
    settings = compare.settings_of(Case("unit", decoder_layers=decoder_layers))
    model = build_model(chunk.architecture, settings, with_image_decoder=True)
    with torch.no_grad():
        for parameter in model.chunks[0].parameters():
            parameter.fill_(torch.nan)
    load_initial_weights(model.chunks, table, source)
    return dict(model.chunks[0].named_parameters())


def test_folder_and_converted_checkpoint_give_the_same_start(tiny, tmp_path):
    """Claim: every weight is equal, the mask token's row and the image decoder included, and none is left unset."""
    tiny.huggingface.save_pretrained(tmp_path / "hf")
    convert_hf_to_mcore(tmp_path / "hf", tmp_path / "mcore")
    table = compare.name_table(tiny.huggingface.config, compare.settings_of(Case("unit")))
    folder = WeightSource(tmp_path / "hf", None, seed=3, mask_token_id=MASK_TOKEN, used_rows=USED_ROWS)
    wanted = start(tiny.chunk, table, folder)
    found = start(tiny.chunk, table, replace(folder, checkpoint=tmp_path / "mcore"))
    assert wanted.keys() == found.keys()
    for name, weight in wanted.items():
        assert not weight.isnan().any(), name
        torch.testing.assert_close(found[name], weight, rtol=1e-6, atol=1e-7, msg=name)
    row = found["language_model.embedding.word_embeddings.weight"][MASK_TOKEN]
    embedding = tiny.huggingface.get_input_embeddings().weight
    # The mean of 155 float32 numbers, summed in another order.
    torch.testing.assert_close(row, embedding[:MASK_TOKEN].mean(0), rtol=1e-5, atol=1e-6)
    middle = found["language_model.decoder.layers.2.mlp.linear_fc2.weight"]
    assert torch.equal(found["image_decoder.decoder.layers.0.mlp.linear_fc2.weight"], middle)


def decoder_starts(tiny, folder, **changed) -> list[torch.Tensor]:
    """A weight of each of the image decoder's layers, and the language model's layers' beside them."""
    table = compare.name_table(tiny.huggingface.config, compare.settings_of(Case("unit")))
    source = WeightSource(folder, None, seed=3, mask_token_id=MASK_TOKEN, used_rows=USED_ROWS)
    number = changed.pop("decoder_layers")
    found = start(tiny.chunk, table, replace(source, **changed), decoder_layers=number)
    assert not any(weight.isnan().any() for weight in found.values())
    name = "decoder.layers.{}.mlp.linear_fc1.weight"
    decoder = [found[f"image_decoder.{name.format(i)}"] for i in range(number)]
    return [decoder, [found[f"language_model.{name.format(i)}"] for i in range(4)], found]


def test_layers_of_the_image_decoder_start_from_consecutive_ones(tiny, tmp_path):
    """Claim: two layers start from the middle and the next, three from as far up as there are, five are refused."""
    tiny.huggingface.save_pretrained(tmp_path)
    for number, first in ((2, 2), (3, 1)):
        decoder, language, _ = decoder_starts(tiny, tmp_path, decoder_layers=number)
        for index, weight in enumerate(decoder):
            assert torch.equal(weight, language[first + index])
    with pytest.raises(ValueError, match="warmup.decoder_layers is 5, and the language model has 4 layers"):
        decoder_starts(tiny, tmp_path, decoder_layers=5)


def test_a_random_image_decoder_is_fresh_and_follows_the_seed(tiny, tmp_path):
    """Claim: random layers differ from each other, from the model's, and by seed; their norms are one; more may stand
    than the model has; and a model that is random itself does not hand its values down."""
    tiny.huggingface.save_pretrained(tmp_path / "hf")
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "hf", tmp_path / "empty"):
        decoder, language, found = decoder_starts(tiny, folder, decoder_layers=5, decoder_init="random")
        for index, weight in enumerate(decoder):
            assert not any(torch.equal(weight, other) for other in decoder[:index] + language)
            # 4,000 and more draws of N(0, 0.02).
            assert abs(float(weight.std()) - 0.02) < 0.002
        assert all((w == 1).all() for n, w in found.items() if n.startswith("image_decoder.decoder") and "norm" in n)
        again, _, _ = decoder_starts(tiny, folder, decoder_layers=5, decoder_init="random")
        other, _, _ = decoder_starts(tiny, folder, decoder_layers=5, decoder_init="random", seed=4)
        assert all(map(torch.equal, decoder, again)) and not any(map(torch.equal, decoder, other))
