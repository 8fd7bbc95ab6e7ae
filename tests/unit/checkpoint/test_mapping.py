"""The name table against Hugging Face's own models: every tensor exactly once, every value unchanged."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from megatron_cocoa.checkpoint.bits import same_bits
from megatron_cocoa.checkpoint.mapping import (
    EMBEDDING,
    OUTPUT_LAYER,
    NameTable,
    flat_spelling,
    nested_spelling,
)

PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text())


def merge_all(table: NameTable, state: dict) -> dict[str, torch.Tensor]:
    return {m.megatron_name: m.merge([state[name] for name in m.hf_names]) for m in table}


def test_every_tensor_is_covered_exactly_once(model_type, tied, tiny):
    """Names and shapes in the table are those of transformers' state_dict, no more and no fewer."""
    state = tiny.state(tiny.model(model_type, tied=tied))
    table = NameTable.from_config(tiny.config(model_type, tied=tied))
    counts = Counter(name for mapping in table for name in mapping.hf_names)
    assert set(counts.values()) == {1} and set(counts) == set(state)
    assert table.hf_shapes == {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert len({m.megatron_name for m in table}) == len(table)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", [{}, {"padded_vocab_size": 64, "vision_ffn_multiple": 16}], ids=["plain", "padded"])
def test_round_trip_is_bit_exact(model_type, tied, dtype, padding, tiny):
    """HF -> Megatron -> HF changes no bit, with padding or without; shapes are the ones announced."""
    state = tiny.state(tiny.model(model_type, tied=tied, dtype=dtype))
    table = NameTable.from_config(tiny.config(model_type, tied=tied), **padding)
    megatron = merge_all(table, state)
    assert (OUTPUT_LAYER in megatron) == (not tied)
    for mapping in table:
        tensor = megatron[mapping.megatron_name]
        assert tuple(tensor.shape) == mapping.megatron_shape
        for name, part in zip(mapping.hf_names, mapping.split(tensor), strict=True):
            assert same_bits(part, state[name]), name


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_tensor_parallel_shards_reassemble(model_type, tp_size, tiny):
    """At TP 1, 2 and 4 (above the two KV heads) all parts are equal in shape and together the whole tensor."""
    table = NameTable.from_config(
        tiny.config(model_type, tied=False), padded_vocab_size=52 + 4, vision_ffn_multiple=4
    )
    megatron = merge_all(table, tiny.state(tiny.model(model_type, tied=False)))
    for mapping in table:
        whole = megatron[mapping.megatron_name]
        shards = [mapping.shard(whole, tp_rank=r, tp_size=tp_size) for r in range(tp_size)]
        local = list(whole.shape)
        if mapping.sharding.dim is not None:
            local[mapping.sharding.dim] //= tp_size
        assert all(list(s.shape) == local for s in shards), mapping.megatron_name
        assert same_bits(mapping.unshard(shards), whole)


def test_indivisible_tower_names_the_tensor(tiny):
    """A tower width that TP does not divide is refused by name; padding it is the way out."""
    config = tiny.config("qwen2_5_vl", tied=True)
    for multiple, fits in ((1, False), (4, True)):
        table = NameTable.from_config(config, vision_ffn_multiple=multiple)
        mapping = table.megatron_to_hf("vision_model.decoder.layers.0.mlp.linear_fc1.weight")
        tensor = torch.zeros(mapping.megatron_shape)
        if fits:
            assert mapping.shard(tensor, tp_rank=3, tp_size=4).shape == (2 * 68 // 4, 24)
        else:
            with pytest.raises(ValueError, match="layers.0.mlp.linear_fc1.weight: 66 halves.*4 ranks"):
                mapping.shard(tensor, tp_rank=3, tp_size=4)


def test_local_and_fused_norm_names_resolve_alike(model_type, tied, tiny):
    """The table finds the norms of both layer specs, and a tied output layer is the embedding."""
    table = NameTable.from_config(tiny.config(model_type, tied=tied))
    norms = {"language_model": "model.layers.1.input_layernorm", "vision_model": "visual.blocks.1.norm1"}
    for decoder, hf in norms.items():
        layer = f"{decoder}.decoder.layers.1."
        local = table.megatron_to_hf(layer + "input_layernorm.weight")
        assert local is table.megatron_to_hf(layer + "self_attention.linear_qkv.layer_norm_weight")
        assert local.hf_names == (hf + ".weight",)
        after = table.megatron_to_hf(layer + "pre_mlp_layernorm.weight")
        assert after is table.megatron_to_hf(layer + "mlp.linear_fc1.layer_norm_weight")
    assert table.megatron_to_hf(OUTPUT_LAYER).megatron_name == (EMBEDDING if tied else OUTPUT_LAYER)
    if model_type == "qwen2_vl":
        bias = table.megatron_to_hf("vision_model.decoder.layers.0.pre_mlp_layernorm.bias")
        assert bias.hf_names == ("visual.blocks.0.norm2.bias",)
    assert table.resolve("image_decoder.layer.input_layernorm.weight") == "image_decoder.layer.input_layernorm.weight"
    with pytest.raises(ValueError, match="language_model.rotary is not a tensor"):
        table.megatron_to_hf("language_model.rotary")


def test_stacked_names_lead_back_to_layers(tiny):
    """A distributed checkpoint's key and a layer number identify a tensor; the layers of a stack agree in shape."""
    table = NameTable.from_config(tiny.config("qwen2_5_vl", tied=True))
    stacks: dict[str, list] = {}
    for mapping in table:
        stacks.setdefault(mapping.stacked_name, []).append(mapping)
    weights = stacks["language_model.decoder.layers.self_attention.linear_qkv.weight"]
    assert [m.layer for m in weights] == [0, 1, 2] and len({m.megatron_shape for m in weights}) == 1
    assert [m.layer for m in stacks[EMBEDDING]] == [None]


def test_spellings_are_inverse(model_type, tiny):
    """transformers' names in memory are the nested spelling; both directions agree on all of them."""
    for name in tiny.model(model_type, tied=False).state_dict():
        assert nested_spelling(flat_spelling(name)) == name
        assert flat_spelling(flat_spelling(name)) == flat_spelling(name)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_parameter_counts_of_published_models(name, tiny):
    """For each published size the table holds as many parameters as transformers' model and as the published count."""
    published = PUBLISHED[name]
    config_class, model_class = tiny.classes[published["model_type"]]
    config = config_class(
        text_config=published["text_config"],
        vision_config=published["vision_config"],
        tie_word_embeddings=published["tie_word_embeddings"],
    )
    with torch.device("meta"):
        model = model_class(config)
    model.tie_weights()
    table = NameTable.from_config(config)
    needed = sum(parameter.numel() for parameter in model.parameters())
    assert sum(torch.Size(shape).numel() for shape in table.hf_shapes.values()) == needed
    assert sum(torch.Size(m.megatron_shape).numel() for m in table) == needed
    assert needed == published["num_parameters"]


def test_merge_refuses_wrong_parts(tiny):
    """A wrong count, shape or mixture of dtypes is named with what was found and needed."""
    table = NameTable.from_config(tiny.config("qwen2_5_vl", tied=True))
    mapping = table.megatron_to_hf("language_model.decoder.layers.0.self_attention.linear_qkv.bias")
    parts = [torch.zeros(shape) for shape in mapping.hf_shapes]
    with pytest.raises(ValueError, match="made of 3 tensors, found 2"):
        mapping.merge(parts[:2])
    with pytest.raises(ValueError, match=r"k_proj.bias has shape \(9,\), needed \(8,\)"):
        mapping.merge([parts[0], torch.zeros(9), parts[2]])
    with pytest.raises(ValueError, match="need one dtype.*v_proj.bias torch.bfloat16"):
        mapping.merge([*parts[:2], parts[2].bfloat16()])
    with pytest.raises(ValueError, match=r"linear_qkv.bias has shape \(49,\), needed \(48,\)"):
        mapping.split(torch.zeros(49))


def test_wrong_configurations_are_refused(tiny):
    """Other architectures and a padding below the vocabulary never give a table."""
    config = tiny.config("qwen2_5_vl", tied=True)
    with pytest.raises(ValueError, match="padded_vocab_size 51 is below the vocabulary's 52"):
        NameTable.from_config(config, padded_vocab_size=51)
    with pytest.raises(ValueError, match="vision_ffn_multiple is 0"):
        NameTable.from_config(config, vision_ffn_multiple=0)
    with pytest.raises(ValueError, match="model_type is 'qwen2_5_vl_text'"):
        NameTable.from_config(config.text_config)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_flat_published_configuration_gives_the_same_table(name, tiny):
    """Published config.json files keep text sizes, and the tie of the embeddings, at their top level: same tensors."""
    published = PUBLISHED[name]
    config_class = tiny.classes[published["model_type"]][0]
    tie = {"tie_word_embeddings": published["tie_word_embeddings"]}
    nested = config_class(text_config=published["text_config"], vision_config=published["vision_config"], **tie)
    # Published vision_config sections of Qwen2-VL carry the model_type of the whole model.
    vision = published["vision_config"] | {"model_type": published["model_type"], "in_chans": 3}
    flat = config_class.from_dict(
        published["text_config"] | tie | {"model_type": published["model_type"], "vision_config": vision}
    )
    ours, needed = NameTable.from_config(flat), NameTable.from_config(nested)
    assert ours.mappings == needed.mappings and ours.tied == needed.tied


# Read off Megatron-Bridge's mapping table (NVIDIA-NeMo/Megatron-Bridge, models/qwen_vl/qwen25_vl_bridge.py), written
# down by hand; L is a layer. Its tower is one rule: visual.** is visual.**, replicated.
BRIDGE_NAMES = {
    "language_model.embedding.word_embeddings.weight": ("model.embed_tokens.weight",),
    "language_model.output_layer.weight": ("lm_head.weight",),
    "language_model.decoder.final_layernorm.weight": ("model.norm.weight",),
    "language_model.decoder.layers.L.self_attention.linear_qkv.layer_norm_weight":
        ("model.layers.L.input_layernorm.weight",),
    "language_model.decoder.layers.L.self_attention.linear_qkv.weight": (
        "model.layers.L.self_attn.q_proj.weight",
        "model.layers.L.self_attn.k_proj.weight",
        "model.layers.L.self_attn.v_proj.weight",
    ),
    "language_model.decoder.layers.L.self_attention.linear_qkv.bias": (
        "model.layers.L.self_attn.q_proj.bias",
        "model.layers.L.self_attn.k_proj.bias",
        "model.layers.L.self_attn.v_proj.bias",
    ),
    "language_model.decoder.layers.L.self_attention.linear_proj.weight": ("model.layers.L.self_attn.o_proj.weight",),
    "language_model.decoder.layers.L.mlp.linear_fc1.layer_norm_weight":
        ("model.layers.L.post_attention_layernorm.weight",),
    "language_model.decoder.layers.L.mlp.linear_fc1.weight": (
        "model.layers.L.mlp.gate_proj.weight",
        "model.layers.L.mlp.up_proj.weight",
    ),
    "language_model.decoder.layers.L.mlp.linear_fc2.weight": ("model.layers.L.mlp.down_proj.weight",),
}  # fmt: skip


def test_megatron_bridge_pairs_the_same_names(tied, tiny):
    """Claim: in NVIDIA's dialect each Megatron name stands for the Hugging Face names, in the order, that
    Megatron-Bridge's own table gives it, the tower's names are Hugging Face's, and nothing else is there."""
    config = tiny.config("qwen2_5_vl", tied=tied)
    found = {m.megatron_name: m for m in NameTable.from_config(config, dialect="megatron-bridge")}
    wanted = {}
    for megatron, names in BRIDGE_NAMES.items():
        if tied and "output_layer" in megatron:
            continue
        for layer in range(config.text_config.num_hidden_layers if ".L." in megatron else 1):
            wanted[megatron.replace(".L.", f".{layer}.")] = tuple(n.replace(".L.", f".{layer}.") for n in names)
    tower = {name for name in tiny.state(tiny.model("qwen2_5_vl", tied=tied)) if name.startswith("visual.")}
    wanted |= {name: (name,) for name in tower}
    assert {name: mapping.hf_names for name, mapping in found.items()} == wanted
    assert all(found[name].sharding.name == "REPLICATED" for name in tower)
