"""Shapes of the models that the training benchmark runs, as Hugging Face configs."""

from __future__ import annotations

from transformers import Qwen2_5_VLConfig

from benchmarks.train.examples import CONTROL_TOKENS

SHAPES = {
    # Widths and depths are a quarter of the 3B's, ffns in its ratio; eight query heads share one key-value head, one
    # tower block in eight sees whole frames, and the vocabulary gives the token head a ninth of the layers'
    # operations, all as there.
    "small": dict(
        hidden=512, ffn=2752, layers=9, heads=8, groups=1, section=[8, 12, 12], vocab=9728,
        vision=dict(hidden_size=320, intermediate_size=856, depth=8, num_heads=4, fullatt_block_indexes=[7]),
    ),
    "3b": dict(
        hidden=2048, ffn=11008, layers=36, heads=16, groups=2, section=[16, 24, 24], vocab=151936,
        vision=dict(
            hidden_size=1280, intermediate_size=3420, depth=32, num_heads=16, fullatt_block_indexes=[7, 15, 23, 31]
        ),
    ),
    "7b": dict(
        hidden=3584, ffn=18944, layers=28, heads=28, groups=4, section=[16, 24, 24], vocab=152064, tied=False,
        vision=dict(
            hidden_size=1280, intermediate_size=3420, depth=32, num_heads=16, fullatt_block_indexes=[7, 15, 23, 31]
        ),
    ),
}  # fmt: skip
"""``small`` is for CPUs. Patches of 14 and windows of 112 pixels everywhere, as published."""


def model_config(
    shape: str, *, layers: int | None = None, vision_layers: int | None = None, narrow: bool = False
) -> Qwen2_5_VLConfig:
    """The config of a shape, with fewer layers where that is asked for (their blocks with whole frames stay as dense).

    ``narrow`` has the shape's layers and heads, but eight columns for each head, and as little of all else: a model
    that runs the same operators on next to nothing.
    The last ``CONTROL_TOKENS`` ids of the vocabulary are the control tokens, see ``examples``.
    """
    sizes = SHAPES[shape]
    vision = dict(sizes["vision"])
    if narrow:
        sizes = sizes | dict(hidden=8 * sizes["heads"], ffn=64, section=[1, 1, 2], vocab=256)
        vision |= dict(hidden_size=8 * vision["num_heads"], intermediate_size=64)
    if vision_layers is not None:
        vision["depth"] = vision_layers
        vision["fullatt_block_indexes"] = list(range(7, vision_layers, 8)) or [vision_layers - 1]
    start, end, image, bridge, unused = range(sizes["vocab"] - CONTROL_TOKENS, sizes["vocab"])
    tied = sizes.get("tied", True)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=sizes["vocab"],
            hidden_size=sizes["hidden"],
            intermediate_size=sizes["ffn"],
            num_hidden_layers=layers or sizes["layers"],
            num_attention_heads=sizes["heads"],
            num_key_value_heads=sizes["groups"],
            rms_norm_eps=1e-6,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=sizes["section"]),
            max_position_embeddings=32768,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=bridge,
        ),
        vision_config=dict(
            vision,
            out_hidden_size=sizes["hidden"],
            patch_size=14,
            window_size=112,
            spatial_merge_size=2,
            temporal_patch_size=2,
            tokens_per_second=2,
        ),
        image_token_id=image,
        video_token_id=unused,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=tied,
    )
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.text_config.is_causal = False
    return config
