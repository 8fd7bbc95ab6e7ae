"""Filling live models: each rank of any layout receives exactly its part of the right layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from megatron_cocoa.checkpoint.bits import same_bits
from megatron_cocoa.checkpoint.live import global_name, load_huggingface_weights
from megatron_cocoa.checkpoint.mapping import EMBEDDING, OUTPUT_LAYER, NameTable

LOCAL_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
PADDING = {"padded_vocab_size": 56, "vision_ffn_multiple": 4}


class Layer(nn.Module):
    """Stands for Megatron's TransformerLayer, which knows its global number, counted from 1."""

    def __init__(self, layer_number: int) -> None:
        super().__init__()
        self.layer_number = layer_number


class Wrapper(nn.Module):
    """Stands for DDP and Float16Module, which keep what they wrap as ``module``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def add_parameter(root: nn.Module, name: str, shape: tuple[int, ...], layer_number: int | None, dtype) -> None:
    *path, last = name.split(".")
    for i, part in enumerate(path):
        if not hasattr(root, part):
            root.add_module(part, Layer(layer_number) if path[i - 1] == "layers" else nn.Module())
        root = getattr(root, part)
    root.register_parameter(last, nn.Parameter(torch.full(shape, float("nan"), dtype=dtype)))


def build_stage(table, *, layers: range, tp_size: int, first: bool, last: bool, local_names: bool, dtype=torch.float32):
    """A pipeline stage with Megatron's parameter names: language layers ``layers``, numbered from 0 locally."""
    root = nn.Module()
    for mapping in table:
        name, number = mapping.megatron_name, mapping.layer
        if name.startswith("language_model.decoder.layers."):
            if number not in layers:
                continue
            name = name.replace(f".layers.{number}.", f".layers.{number - layers.start}.")
        elif name in (OUTPUT_LAYER, "language_model.decoder.final_layernorm.weight"):
            if not last:
                continue
        elif not first:
            continue
        for fused, local in LOCAL_NORMS.items():
            name = name.replace(fused, local) if local_names else name
        shape = list(mapping.megatron_shape)
        if mapping.sharding.dim is not None:
            shape[mapping.sharding.dim] //= tp_size
        add_parameter(root, name, tuple(shape), None if number is None else number + 1, dtype)
    if last:
        add_parameter(root, "image_decoder.layers.0.mlp.weight", (3,), None, dtype)
        if table.tied and not first:
            add_parameter(root, OUTPUT_LAYER, (table.padded_vocab_size // tp_size, 32), None, dtype)
    return root


def gather(table, ranks: list[nn.Module]) -> dict[str, torch.Tensor]:
    """Unsharded tensors by resolved global name, from one module per tensor-parallel rank."""
    parts: dict[str, list] = {}
    for module in ranks:
        for name, parameter in module.named_parameters():
            name = global_name(module, name)
            if not table.is_own(name):
                parts.setdefault(name, []).append(parameter.data)
    return {table.resolve(name): table.megatron_to_hf(name).unshard(shards) for name, shards in parts.items()}


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("local_names", [True, False], ids=["local", "fused"])
def test_all_ranks_together_hold_the_checkpoint(tmp_path, tiny, model_type, tied, tp_size, local_names):
    """TP 1 to 4 x two uneven pipeline stages, wrapped, both specs' names: gathered and split, it is the folder."""
    state = tiny.state(tiny.model(model_type, tied=tied))
    path = tiny.write(tmp_path / "model", state, spelling="nested", num_files=2)
    table = NameTable.from_config(tiny.config(model_type, tied=tied), **PADDING)
    gathered, read = {}, set()
    for layers, first in ((range(0, 1), True), (range(1, 3), False)):
        stages = []
        for tp_rank in range(tp_size):
            arguments = dict(layers=layers, tp_size=tp_size, first=first, last=not first, local_names=local_names)
            stage = Wrapper(Wrapper(build_stage(table, **arguments)))
            report = load_huggingface_weights([stage], path, table, tp_rank=tp_rank, tp_size=tp_size)
            assert report.left == (() if first else ("image_decoder.layers.0.mlp.weight",))
            assert len(report.loaded) + len(report.left) == len(list(stage.parameters()))
            read |= report.hf_names
            stages.append(stage)
        whole = gather(table, stages)
        if tied and not first:
            # The last stage's own copy of a tied matrix equals the first stage's.
            assert same_bits(whole[EMBEDDING], gathered[EMBEDDING])
        gathered.update(whole)
    assert read == set(state) and set(gathered) == {m.megatron_name for m in table}
    for mapping in table:
        for name, part in zip(mapping.hf_names, mapping.split(gathered[mapping.megatron_name])):
            assert same_bits(part, state[name]), name


def test_virtual_stages_load_their_own_layers(tmp_path, tiny):
    """Two chunks of one rank, each numbering its layers from 0, receive different global layers."""
    state = tiny.state(tiny.model("qwen2_5_vl", tied=False))
    table = NameTable.from_config(tiny.config("qwen2_5_vl", tied=False))
    chunks = [
        build_stage(table, layers=layers, tp_size=1, first=False, last=False, local_names=True)
        for layers in (range(0, 1), range(2, 3))
    ]
    path = tiny.write(tmp_path / "model", state)
    report = load_huggingface_weights(chunks, path, table, tp_rank=0, tp_size=1)
    for chunk, number in zip(chunks, (0, 2)):
        weight = chunk.get_parameter("language_model.decoder.layers.0.mlp.linear_fc2.weight")
        assert same_bits(weight.data, state[f"model.layers.{number}.mlp.down_proj.weight"])
    assert "language_model.decoder.layers.2.mlp.linear_fc2.weight" in report.loaded
    assert (len(report.loaded), len(report.hf_names), report.left) == (14, 24, ())


def test_weights_are_cast_to_the_parameters_dtype(tmp_path, tiny):
    """FP32 on disk into a BF16 model rounds once, as torch does."""
    state = tiny.state(tiny.model("qwen2_vl", tied=True))
    table = NameTable.from_config(tiny.config("qwen2_vl", tied=True))
    model = build_stage(
        table, layers=range(3), tp_size=1, first=True, last=True, local_names=True, dtype=torch.bfloat16
    )
    load_huggingface_weights([model], tiny.write(tmp_path / "m", state), table, tp_rank=0, tp_size=1)
    found = model.get_parameter("language_model.decoder.final_layernorm.weight")
    assert same_bits(found.data, state["model.norm.weight"].bfloat16())


@pytest.mark.parametrize("row", [40, 54], ids=["inside", "in the padding"])
def test_mask_row_starts_as_the_mean(tmp_path, tiny, row):
    """The mask token's row is the mean of the used rows on whichever rank holds it; no other row moves."""
    state = tiny.state(tiny.model("qwen2_5_vl", tied=False))
    table = NameTable.from_config(tiny.config("qwen2_5_vl", tied=False), **PADDING)
    path = tiny.write(tmp_path / "m", state)
    stages = []
    for tp_rank in range(2):
        stage = build_stage(table, layers=range(3), tp_size=2, first=True, last=True, local_names=True)
        load_huggingface_weights([stage], path, table, tp_rank=tp_rank, tp_size=2, mean_row=row, used_rows=40)
        stages.append(stage)
    whole = gather(table, stages)
    needed = torch.zeros(56, 32)
    needed[:52] = state["model.embed_tokens.weight"]
    # The mean of 40 float32 numbers of order 1, summed in another order.
    torch.testing.assert_close(whole[EMBEDDING][row], needed[:40].mean(0), rtol=1e-5, atol=1e-6)
    whole[EMBEDDING][row] = needed[row]
    assert same_bits(whole[EMBEDDING], needed)
    assert same_bits(whole[OUTPUT_LAYER][:52], state["lm_head.weight"])


def test_misfits_are_refused_by_name(tmp_path, tiny):
    """A model that the table does not describe is refused with the parameter's name and both shapes."""
    state = tiny.state(tiny.model("qwen2_5_vl", tied=True))
    path = tiny.write(tmp_path / "m", state)
    table = NameTable.from_config(tiny.config("qwen2_5_vl", tied=True))
    arguments = dict(layers=range(3), first=True, last=True, local_names=True)
    wide = build_stage(table, tp_size=1, **arguments)
    with pytest.raises(ValueError, match=r"shape .* degree 2 \(unsharded"):
        load_huggingface_weights([wide], path, table, tp_rank=0, tp_size=2)
    add_parameter(wide, "language_model.adapter.weight", (2,), None, torch.float32)
    with pytest.raises(ValueError, match="language_model.adapter.weight is not a tensor of this model"):
        load_huggingface_weights([wide], path, table, tp_rank=0, tp_size=1)
    del wide.language_model.decoder.layers.get_submodule("1").layer_number
    with pytest.raises(ValueError, match="layers.1 has no layer_number"):
        load_huggingface_weights([wide], path, table, tp_rank=0, tp_size=1)


def test_nothing_is_touched_when_the_folder_does_not_fit(tmp_path, tiny):
    """The whole folder is checked before the first copy."""
    state = tiny.state(tiny.model("qwen2_5_vl", tied=True))
    del state["model.layers.2.mlp.down_proj.weight"]
    table = NameTable.from_config(tiny.config("qwen2_5_vl", tied=True))
    model = build_stage(table, layers=range(3), tp_size=1, first=True, last=True, local_names=True)
    with pytest.raises(ValueError, match="1 missing key"):
        load_huggingface_weights([model], tiny.write(tmp_path / "m", state), table, tp_rank=0, tp_size=1)
    assert all(parameter.isnan().all() for parameter in model.parameters())
