"""The name table: every tensor of Qwen2-VL and Qwen2.5-VL under its Hugging Face names and its Megatron name.

One declarative table serves both directions, so that import and export cannot disagree. Megatron names follow the
*sharded dialect*, in which the tower is built from Megatron layers and cut over tensor-parallel ranks like the
language model. Hugging Face names are kept in the flat spelling (``model.layers.*``, ``visual.*``, ``lm_head.weight``);
``flat_spelling`` turns the nested one (``model.language_model.*``, ``model.visual.*``) into it, and that of a model
saved without its head (``language_model.*``).

A dialect is a function that yields the mappings of a model, like ``_sharded_dialect``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.checkpoint.layouts import (
    FlatKernel,
    Gated,
    GroupedQkv,
    InterleavedQkv,
    Layout,
    Padded,
    Same,
    VocabularyRows,
)
from megatron_cocoa.checkpoint.sharding import Sharding
from megatron_cocoa.checkpoint.tensor_mapping import Mapping

EMBEDDING = "language_model.embedding.word_embeddings.weight"
OUTPUT_LAYER = "language_model.output_layer.weight"
LOGIT_SCALE = "logit_scale"
"""The learned temperature, which is float32 in a model of any dtype."""
OWN_PREFIXES = ("image_decoder.", LOGIT_SCALE)
"""Tensors of this project's own heads and temperature: they have no Hugging Face counterpart."""

_SPELLINGS = (("model.language_model.", "model."), ("model.visual.", "visual."), ("language_model.", "model."))

_LOCAL_NORMS = (
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_"),
)


class _Row(NamedTuple):
    """Megatron name, layout by its name in ``_layouts``, sharding, and ``(Hugging Face name, *dimensions)`` each."""

    megatron: str
    layout: str
    sharding: Sharding
    hf: tuple[tuple[str, ...], ...]


def _row(megatron: str, layout: str, sharding: Sharding, *hf: str) -> _Row:
    return _Row(megatron, layout, sharding, tuple(tuple(name.split()) for name in hf))


_REPLICATED, _COLUMN, _GATED, _ROW = Sharding.REPLICATED, Sharding.COLUMN, Sharding.GATED_COLUMN, Sharding.ROW

_VISION = (
    _row("patch_embed.proj.weight", "kernel", _REPLICATED,
         "patch_embed.proj.weight v_hidden channels temporal patch patch"),
    _row("decoder.final_layernorm.weight", "same", _REPLICATED, "merger.ln_q.weight v_hidden"),
    _row("projection.encoder.linear_fc1.weight", "same", _COLUMN, "merger.mlp.0.weight v_merged v_merged"),
    _row("projection.encoder.linear_fc1.bias", "same", _COLUMN, "merger.mlp.0.bias v_merged"),
    _row("projection.encoder.linear_fc2.weight", "same", _ROW, "merger.mlp.2.weight v_out v_merged"),
    _row("projection.encoder.linear_fc2.bias", "same", _REPLICATED, "merger.mlp.2.bias v_out"),
)
_VISION_LAYER = (
    _row("self_attention.linear_qkv.layer_norm_weight", "same", _REPLICATED, "norm1.weight v_hidden"),
    _row("self_attention.linear_qkv.weight", "vision_qkv", _COLUMN, "attn.qkv.weight v_qkv v_hidden"),
    _row("self_attention.linear_qkv.bias", "vision_qkv", _COLUMN, "attn.qkv.bias v_qkv"),
    _row("self_attention.linear_proj.weight", "same", _ROW, "attn.proj.weight v_hidden v_hidden"),
    _row("self_attention.linear_proj.bias", "same", _REPLICATED, "attn.proj.bias v_hidden"),
    _row("mlp.linear_fc1.layer_norm_weight", "same", _REPLICATED, "norm2.weight v_hidden"),
)
_GATED_VISION_LAYER = (
    _row("mlp.linear_fc1.weight", "vision_gated", _GATED,
         "mlp.gate_proj.weight v_ffn v_hidden", "mlp.up_proj.weight v_ffn v_hidden"),
    _row("mlp.linear_fc1.bias", "vision_gated", _GATED, "mlp.gate_proj.bias v_ffn", "mlp.up_proj.bias v_ffn"),
    _row("mlp.linear_fc2.weight", "vision_ffn_columns", _ROW, "mlp.down_proj.weight v_hidden v_ffn"),
    _row("mlp.linear_fc2.bias", "same", _REPLICATED, "mlp.down_proj.bias v_hidden"),
)
_PLAIN_VISION = (_row("decoder.final_layernorm.bias", "same", _REPLICATED, "merger.ln_q.bias v_hidden"),)
_PLAIN_VISION_LAYER = (
    _row("self_attention.linear_qkv.layer_norm_bias", "same", _REPLICATED, "norm1.bias v_hidden"),
    _row("mlp.linear_fc1.layer_norm_bias", "same", _REPLICATED, "norm2.bias v_hidden"),
    _row("mlp.linear_fc1.weight", "vision_ffn_rows", _COLUMN, "mlp.fc1.weight v_ffn v_hidden"),
    _row("mlp.linear_fc1.bias", "vision_ffn_rows", _COLUMN, "mlp.fc1.bias v_ffn"),
    _row("mlp.linear_fc2.weight", "vision_ffn_columns", _ROW, "mlp.fc2.weight v_hidden v_ffn"),
    _row("mlp.linear_fc2.bias", "same", _REPLICATED, "mlp.fc2.bias v_hidden"),
)
_LANGUAGE = (
    _row("embedding.word_embeddings.weight", "vocabulary", _COLUMN, "model.embed_tokens.weight vocab hidden"),
    _row("decoder.final_layernorm.weight", "same", _REPLICATED, "model.norm.weight hidden"),
)
_UNTIED = (_row("output_layer.weight", "vocabulary", _COLUMN, "lm_head.weight vocab hidden"),)
_LANGUAGE_LAYER = (
    _row("self_attention.linear_qkv.layer_norm_weight", "same", _REPLICATED, "input_layernorm.weight hidden"),
    _row("self_attention.linear_qkv.weight", "qkv", _COLUMN,
         "self_attn.q_proj.weight q hidden", "self_attn.k_proj.weight kv hidden", "self_attn.v_proj.weight kv hidden"),
    _row("self_attention.linear_qkv.bias", "qkv", _COLUMN,
         "self_attn.q_proj.bias q", "self_attn.k_proj.bias kv", "self_attn.v_proj.bias kv"),
    _row("self_attention.linear_proj.weight", "same", _ROW, "self_attn.o_proj.weight hidden q"),
    _row("mlp.linear_fc1.layer_norm_weight", "same", _REPLICATED, "post_attention_layernorm.weight hidden"),
    _row("mlp.linear_fc1.weight", "gated", _GATED, "mlp.gate_proj.weight ffn hidden", "mlp.up_proj.weight ffn hidden"),
    _row("mlp.linear_fc2.weight", "same", _ROW, "mlp.down_proj.weight hidden ffn"),
)


def _sizes(architecture: QwenVLArchitecture) -> dict[str, int]:
    """Row and column counts by the words that the rows above use. All are unsharded and without padding."""
    text, vision = architecture.text, architecture.vision
    return {
        "vocab": text.vocab_size,
        "hidden": text.hidden_size,
        "q": text.num_attention_heads * text.head_dim,
        "kv": text.num_key_value_heads * text.head_dim,
        "ffn": text.intermediate_size,
        "v_hidden": vision.hidden_size,
        "v_qkv": 3 * vision.hidden_size,
        "v_ffn": vision.intermediate_size,
        "v_merged": vision.hidden_size * vision.patches_per_unit,
        "v_out": vision.out_hidden_size,
        "channels": vision.in_channels,
        "temporal": vision.temporal_patch_size,
        "patch": vision.patch_size,
    }


def _layouts(architecture: QwenVLArchitecture, padded_vocab: int, padded_vision_ffn: int) -> dict[str, Layout]:
    text, vision = architecture.text, architecture.vision
    groups, patch, v_ffn = text.num_key_value_heads, vision.patch_size, vision.intermediate_size
    return {
        "same": Same(),
        "kernel": FlatKernel((vision.hidden_size, vision.in_channels, vision.temporal_patch_size, patch, patch)),
        "qkv": GroupedQkv(groups, text.num_attention_heads // groups, text.head_dim),
        "vision_qkv": InterleavedQkv(vision.num_heads),
        "gated": Gated(text.intermediate_size, text.intermediate_size),
        "vision_gated": Gated(v_ffn, padded_vision_ffn),
        "vision_ffn_rows": Padded(0, v_ffn, padded_vision_ffn),
        "vision_ffn_columns": Padded(1, v_ffn, padded_vision_ffn),
        "vocabulary": VocabularyRows(text.vocab_size, padded_vocab),
    }


def _sharded_dialect(architecture: QwenVLArchitecture, layouts: dict[str, Layout]) -> Iterator[Mapping]:
    """All mappings of one model: prefixes on both sides and the rows between them."""
    sizes, gated = _sizes(architecture), architecture.vision.gated
    vision = _VISION if gated else _VISION + _PLAIN_VISION
    vision_layer = _VISION_LAYER + (_GATED_VISION_LAYER if gated else _PLAIN_VISION_LAYER)
    parts = [("vision_model.", "visual.", vision)]
    for n in range(architecture.vision.depth):
        parts.append((f"vision_model.decoder.layers.{n}.", f"visual.blocks.{n}.", vision_layer))
    parts.append(("language_model.", "", _LANGUAGE))
    for n in range(architecture.text.num_hidden_layers):
        parts.append((f"language_model.decoder.layers.{n}.", f"model.layers.{n}.", _LANGUAGE_LAYER))
    if not architecture.tie_word_embeddings:
        parts.append(("language_model.", "", _UNTIED))
    for megatron_prefix, hf_prefix, rows in parts:
        for row in rows:
            yield Mapping(
                megatron_name=megatron_prefix + row.megatron,
                hf_names=tuple(hf_prefix + name for name, *_ in row.hf),
                hf_shapes=tuple(tuple(sizes[word] for word in words) for _, *words in row.hf),
                layout=layouts[row.layout],
                sharding=row.sharding,
            )


def _bridge_dialect(architecture: QwenVLArchitecture, layouts: dict[str, Layout]) -> Iterator[Mapping]:
    """NVIDIA's Megatron-Bridge: the tower is Hugging Face's own module, whole on every rank, under its own names.

    Its language model has the sharded dialect's names (src/megatron/bridge/models/qwen_vl/qwen25_vl_bridge.py).

    Raises:
        ValueError: for Qwen2-VL, which Megatron-Bridge does not map.
    """
    if architecture.model_type != "qwen2_5_vl":
        raise ValueError(f"Megatron-Bridge has no names for {architecture.model_type}, only for qwen2_5_vl")
    for mapping in _sharded_dialect(architecture, layouts):
        if not mapping.megatron_name.startswith("vision_model."):
            yield mapping
            continue
        for name, shape in zip(mapping.hf_names, mapping.hf_shapes):
            yield Mapping(name, (name,), (shape,), layouts["same"], Sharding.REPLICATED)


DIALECTS = {"sharded": _sharded_dialect, "megatron-bridge": _bridge_dialect}


class NameTable:
    """All mappings of one model, tower first. Iterating yields ``Mapping``.

    Args:
        architecture: the model's sizes.
        padded_vocab_size: rows of the unsharded Megatron embedding; None pads nothing.
        vision_ffn_multiple: the tower's ffn is zero-padded to a multiple of this.
        dialect: whose Megatron names, one of ``DIALECTS``.

    Raises:
        ValueError: for a padding below the vocabulary or a multiple below 1, or a model that the dialect lacks.
    """

    def __init__(
        self,
        architecture: QwenVLArchitecture,
        *,
        padded_vocab_size: int | None = None,
        vision_ffn_multiple: int = 1,
        dialect: str = "sharded",
    ) -> None:
        self.tied = architecture.tie_word_embeddings
        self.vocab_size = architecture.text.vocab_size
        self.padded_vocab_size = self.vocab_size if padded_vocab_size is None else padded_vocab_size
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(
                f"padded_vocab_size {padded_vocab_size} is below the vocabulary's {self.vocab_size} rows"
            )
        if vision_ffn_multiple < 1:
            raise ValueError(f"vision_ffn_multiple is {vision_ffn_multiple}, needed 1 or more")
        padded_ffn = -(-architecture.vision.intermediate_size // vision_ffn_multiple) * vision_ffn_multiple
        layouts = _layouts(architecture, self.padded_vocab_size, padded_ffn)
        self.mappings = tuple(DIALECTS[dialect](architecture, layouts))

    @classmethod
    def from_config(
        cls,
        hf_config: Any,
        *,
        padded_vocab_size: int | None = None,
        vision_ffn_multiple: int = 1,
        dialect: str = "sharded",
    ) -> NameTable:
        """The table of a ``Qwen2VLConfig`` or ``Qwen2_5_VLConfig``; padding and dialect as above.

        Raises:
            ValueError: for an architecture that the project does not implement.
        """
        return cls(
            QwenVLArchitecture.from_huggingface(hf_config),
            padded_vocab_size=padded_vocab_size,
            vision_ffn_multiple=vision_ffn_multiple,
            dialect=dialect,
        )

    def __iter__(self) -> Iterator[Mapping]:
        return iter(self.mappings)

    def __len__(self) -> int:
        return len(self.mappings)

    @cached_property
    def _by_megatron_name(self) -> dict[str, Mapping]:
        return {mapping.megatron_name: mapping for mapping in self.mappings}

    @cached_property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every Hugging Face tensor, by its name in the flat spelling."""
        return {
            name: shape for mapping in self.mappings for name, shape in zip(mapping.hf_names, mapping.hf_shapes)
        }

    def megatron_to_hf(self, name: str) -> Mapping:
        """The mapping of a Megatron name; names of the local spec's norms and a tied output layer are resolved.

        Raises:
            ValueError: if the model has no such tensor.
        """
        mapping = self._by_megatron_name.get(self.resolve(name))
        if mapping is None:
            raise ValueError(f"{name} is not a tensor of this model: the name table has no such Megatron name")
        return mapping

    def resolve(self, name: str) -> str:
        """The table's name for a name that a live module or a checkpoint uses.

        The local layer spec keeps norms beside the projections, Transformer Engine fuses them into the projection
        and renames them. A tied output layer, which only the last of several pipeline stages holds, is the embedding.
        """
        if self.is_own(name):
            return name
        for local, fused in _LOCAL_NORMS:
            name = name.replace(local, fused)
        return EMBEDDING if self.tied and name == OUTPUT_LAYER else name

    def is_own(self, name: str) -> bool:
        """Whether a Megatron name belongs to a head of this project, without a Hugging Face counterpart."""
        return name.startswith(OWN_PREFIXES)


def flat_spelling(hf_name: str) -> str:
    """``model.language_model.*`` as ``model.*``, ``model.visual.*`` as ``visual.*``; other names as they are.

    transformers' ``AutoModel``, and sentence-transformers with it, saves the model below the head: the nested names
    without their ``model.``.
    """
    for other, flat in _SPELLINGS:
        if hf_name.startswith(other):
            return flat + hf_name.removeprefix(other)
    return hf_name


def nested_spelling(hf_name: str) -> str:
    """Flat names as nested ones."""
    if hf_name.startswith("model."):
        return "model.language_model." + hf_name.removeprefix("model.")
    return "model." + hf_name if hf_name.startswith("visual.") else hf_name
