"""Each converted tensor plays its part: plain Megatron formulas on it give what Hugging Face's modules compute.

A round trip cannot see two tensors exchanged in both directions (gate and up, key and value); this can.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from megatron_cocoa.checkpoint.mapping import EMBEDDING, OUTPUT_LAYER, NameTable

# Outputs are sums of at most 96 products of numbers of order 1, at most four such layers deep, with entries up to some
# hundreds: float32 keeps 1e-5 of the largest entry, while an exchanged tensor changes the output by its own size.
RELATIVE = 1e-5


class Plain:
    """Megatron's pieces of a layer in plain operations, reading global tensors under one prefix."""

    def __init__(self, tensors: dict, prefix: str, *, rms: bool, eps: float) -> None:
        self.tensors, self.prefix, self.rms, self.eps = tensors, prefix, rms, eps

    def get(self, name: str):
        return self.tensors.get(self.prefix + name)

    def norm(self, x, name: str):
        weight = self.get(name + "weight")
        if self.rms:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * weight
        return F.layer_norm(x, x.shape[-1:], weight, self.get(name + "bias"), self.eps)

    def linear(self, x, name: str):
        return F.linear(x, self.get(name + ".weight"), self.get(name + ".bias"))

    def qkv(self, x, groups: int, per_group: int):
        """q, k, v of ``(tokens, heads * head_dim)`` as Megatron-Core's SelfAttention cuts the fused output."""
        mixed = self.linear(self.norm(x, "self_attention.linear_qkv.layer_norm_"), "self_attention.linear_qkv")
        mixed = mixed.view(len(x), groups, -1)
        dim = mixed.shape[2] // (per_group + 2)
        return [part.reshape(len(x), -1) for part in mixed.split([per_group * dim, dim, dim], dim=2)]

    def mlp(self, x, activation, *, gated: bool):
        y = self.linear(self.norm(x, "mlp.linear_fc1.layer_norm_"), "mlp.linear_fc1")
        if gated:
            gate, up = y.chunk(2, dim=-1)
            return self.linear(activation(gate) * up, "mlp.linear_fc2")
        return self.linear(activation(y), "mlp.linear_fc2")


def assert_equal(found, needed):
    assert found.shape == needed.shape
    assert (found - needed).abs().max() <= RELATIVE * needed.abs().max()


@pytest.fixture
def both(model_type, tiny):
    """Hugging Face's model and its Megatron tensors, with every padding in use."""
    model = tiny.model(model_type, tied=False)
    table = NameTable.from_config(model.config, padded_vocab_size=56, vision_ffn_multiple=16)
    state = tiny.state(model)
    return model, {m.megatron_name: m.merge([state[name] for name in m.hf_names]) for m in table}


@torch.no_grad()
def test_language_layers_compute_the_same(both):
    """Norms, q, k, v, output projection and gated MLP of every language layer."""
    model, tensors = both
    x = torch.randn(5, 32)
    for n, layer in enumerate(model.model.language_model.layers):
        eps = model.config.text_config.rms_norm_eps
        plain = Plain(tensors, f"language_model.decoder.layers.{n}.", rms=True, eps=eps)
        normed, attention = layer.input_layernorm(x), layer.self_attn
        needed = [attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)]
        for part, theirs in zip(plain.qkv(x, groups=2, per_group=4), needed, strict=True):
            assert_equal(part, theirs)
        assert_equal(plain.linear(x, "self_attention.linear_proj"), attention.o_proj(x))
        assert_equal(plain.mlp(x, F.silu, gated=True), layer.mlp(layer.post_attention_layernorm(x)))


@torch.no_grad()
def test_language_ends_compute_the_same(both):
    """Embedding, final norm and output layer are not exchanged; padded rows give logits of zero."""
    model, tensors = both
    ids = torch.tensor([0, 7, 51])
    assert torch.equal(tensors[EMBEDDING][ids], model.get_input_embeddings()(ids))
    plain = Plain(tensors, "language_model.decoder.", rms=True, eps=model.config.text_config.rms_norm_eps)
    x = torch.randn(5, 32)
    assert_equal(plain.norm(x, "final_layernorm."), model.model.language_model.norm(x))
    logits = x @ tensors[OUTPUT_LAYER].T
    assert_equal(logits[:, :52], model.lm_head(x))
    assert not logits[:, 52:].any()


@torch.no_grad()
def test_tower_computes_the_same(both, model_type):
    """Patch embedding, norms, fused qkv, projection and MLP of every block, and the merger."""
    model, tensors = both
    tower, gated = model.model.visual, model_type == "qwen2_5_vl"
    # Qwen2-VL's tower MLP uses the sigmoid approximation x * sigmoid(1.702 x).
    activation = F.silu if gated else lambda x: x * torch.sigmoid(1.702 * x)
    top = Plain(tensors, "vision_model.", rms=gated, eps=1e-6)
    pixels, x = torch.randn(8, 3 * 2 * 4 * 4), torch.randn(8, 24)
    assert_equal(top.linear(pixels, "patch_embed.proj"), tower.patch_embed(pixels))
    for n, block in enumerate(tower.blocks):
        plain = Plain(tensors, f"vision_model.decoder.layers.{n}.", rms=gated, eps=1e-6)
        needed = block.attn.qkv(block.norm1(x)).reshape(8, 3, 24).unbind(1)
        for part, theirs in zip(plain.qkv(x, groups=4, per_group=1), needed, strict=True):
            assert_equal(part, theirs)
        assert_equal(plain.linear(x, "self_attention.linear_proj"), block.attn.proj(x))
        assert_equal(plain.mlp(x, activation, gated=gated), block.mlp(block.norm2(x)))
    merged = F.gelu(top.linear(top.norm(x, "decoder.final_layernorm.").view(2, 96), "projection.encoder.linear_fc1"))
    assert_equal(top.linear(merged, "projection.encoder.linear_fc2"), tower.merger(x))
