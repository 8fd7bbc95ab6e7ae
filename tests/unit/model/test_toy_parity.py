"""The embedded preset's own model, fed by the real data layer, against Hugging Face's implementation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.batch import MaskKind
from megatron_cocoa.checkpoint.initial import WeightSource, load_initial_weights
from megatron_cocoa.checkpoint.mapping import NameTable
from megatron_cocoa.checkpoint.random_weights import RandomWeights
from megatron_cocoa.conversion.hf_to_mcore import read_architecture
from megatron_cocoa.data.collate import collate_embedding
from megatron_cocoa.data.evaluation_batches import evaluation_builder
from megatron_cocoa.data.rows import Content
from megatron_cocoa.data.tokenizer import load_tokenizer
from megatron_cocoa.data.toy_model import ToyModelSizes, train_tokenizer, write_model_folder
from megatron_cocoa.model.build import build_model
from tests.distributed.tiny_run import WORDS, write_folders
from tests.parity import compare
from tests.parity.cases import Case

CONTENTS = [
    Content("red cat sol luna"),
    Content("<|image_1|>", "images/0.png"),
    Content("<|image_1|> small dog", "images/1.png"),
    Content("house"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The toy preset's sizes, with a tokenizer of a few hundred pieces and random pictures."""
    root = tmp_path_factory.mktemp("toy")
    write_folders(root)
    texts = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]
    write_model_folder(root / "toy", train_tokenizer(texts, num_pieces=320)[0], ToyModelSizes())
    return root


@pytest.mark.parametrize("kind", [MaskKind.CAUSAL, MaskKind.BIDIRECTIONAL])
def test_embedded_model_equals_hugging_face(single_rank, folder, kind):
    """Claim: logits and hidden states of the quick start's model, with its own initial weights, are Hugging Face's.

    Pictures go through the same processor; each sample runs by itself there, packed here. Float32 through eight
    layers, so 1e-4 relative leaves a factor of ten.
    """
    model_folder = folder / "toy"
    config = AutoConfig.from_pretrained(model_folder)
    config._attn_implementation = "eager"
    config.text_config.is_causal = kind is MaskKind.CAUSAL
    table = NameTable.from_config(config)
    huggingface = Qwen2_5_VLForConditionalGeneration(config).eval()
    weights = RandomWeights(seed=7, initializer_range=0.05)
    state = {
        name: tensor
        for mapping in table
        for name, tensor in zip(mapping.hf_names, mapping.split(weights.read(mapping)))
    }
    nested = {name: state[compare.flat_spelling(name)] for name, _ in huggingface.named_parameters()}
    huggingface.load_state_dict(nested, strict=False)

    architecture, settings = QwenVLArchitecture.from_huggingface(config), compare.settings_of(Case("unit"))
    ours = build_model(architecture, settings, with_image_decoder=False)
    mask_row = config.text_config.vocab_size - 1
    used = config.text_config.vocab_size - 1
    source = WeightSource(model_folder, None, 7, mask_row, used, may_be_random=True, initializer_range=0.05)
    load_initial_weights(ours.chunks, table, source)
    chunk = ours.chunks[0].eval()

    batch, samples = pack(model_folder, folder / "pairs", config)
    with torch.no_grad():
        hidden = chunk(replace(batch, mask_kind=kind), return_hidden_states=True).hidden_states
        logits = chunk.full_logits(hidden)
        start = 0
        for sample in samples:
            length = sample.num_tokens
            grids = torch.tensor(sample.grid_thw) if sample.grid_thw else None
            out = huggingface.model(
                input_ids=sample.input_ids[None],
                position_ids=sample.position_ids[:, None],
                pixel_values=sample.pixel_values,
                image_grid_thw=grids,
                use_cache=False,
            ).last_hidden_state[0]
            rows = slice(start, start + length)
            assert compare.relative(hidden[rows], out) < 1e-4
            # The mask token's row is ours alone: it starts as the mean of the others.
            assert compare.relative(logits[rows, :mask_row], huggingface.lm_head(out)[:, :mask_row]) < 1e-4
            start += length
        assert start == batch.num_tokens


def pack(model_folder, data_folder, config):
    """All contents in one pack, and each in a pack of its own."""
    bundle = load_tokenizer(model_folder, vocab_size=config.text_config.vocab_size)
    builder, options = evaluation_builder(
        data_folder,
        model_path=model_folder,
        bundle=bundle,
        vision=read_architecture(model_folder).vision,
        max_length=256,
        image_size=56,
    )
    prepared = [builder.embedding(str(i), content) for i, content in enumerate(CONTENTS)]
    return collate_embedding(prepared, options), [collate_embedding([sample], options) for sample in prepared]
