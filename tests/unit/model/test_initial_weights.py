"""A run starts from the same weights whether they come from a folder or from its converted checkpoint."""

from dataclasses import replace

import torch

from megatron_cocoa.checkpoint.initial import WeightSource, load_initial_weights
from megatron_cocoa.conversion.hf_to_mcore import convert_hf_to_mcore
from megatron_cocoa.model.build import build_model
from tests.parity import compare
from tests.parity.cases import Case

MASK_TOKEN, USED_ROWS = 155, 156


def start(chunk, table, source: WeightSource) -> dict[str, torch.Tensor]:
    settings = compare.settings_of(Case("unit"))
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
