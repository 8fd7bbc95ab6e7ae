"""BF16 at the width of Qwen2.5-VL-3B: rounding as in Hugging Face's BF16 run, measured against its FP32 run."""

from dataclasses import replace

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.batch import MaskKind
from megatron_cocoa.model.build import build_model
from tests.parity import compare, reference
from tests.parity.cases import Case

TEXT = dict(
    vocab_size=151936,
    hidden_size=2048,
    intermediate_size=11008,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=2,
    rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
)
VISION = dict(
    depth=2,
    hidden_size=1280,
    intermediate_size=3420,
    num_heads=16,
    out_hidden_size=2048,
    window_size=112,
    fullatt_block_indexes=[1],
)
FACTOR = 1.1
"""The two runs round at other places: over 10^5 entries their root mean squares agree to a percent (0.996 measured).
Rotary tables or norms in the wrong precision, the mistakes that this test is for, cost more."""
LARGEST_FACTOR = 1.5
"""Of the largest single error, which is an extreme of as many draws and varies more (1.06 measured)."""


def real_width_config():
    ids = dict(
        image_token_id=reference.IMAGE,
        video_token_id=reference.VIDEO,
        vision_start_token_id=reference.VISION_START,
        vision_end_token_id=reference.VISION_END,
    )
    config = Qwen2_5_VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True, **ids)
    config._attn_implementation = "sdpa"
    return config


def root_mean_square(x: torch.Tensor) -> float:
    return float(x.float().square().mean().sqrt())


def encoded(config, kind: MaskKind) -> list[reference.Encoded]:
    generator = torch.Generator().manual_seed(1)
    layouts = [reference.Sample((3, (1, 16, 20), 12)), reference.Sample((40,))]
    return [reference.encode(s, config, generator, index=i, kind=kind) for i, s in enumerate(layouts)]


@torch.no_grad()
def hidden_of_huggingface(model, samples, kind) -> tuple[torch.Tensor, list[torch.Tensor]]:
    runs = [reference.run_huggingface(model, sample, kind=kind) for sample in samples]
    return torch.cat([hidden for hidden, _ in runs]).float(), [positions for _, positions in runs]


@torch.no_grad()
def our_hidden(huggingface, samples, positions, kind) -> torch.Tensor:
    """Our BF16 hidden states with the weights of ``huggingface``."""
    settings = compare.settings_of(Case("unit"))
    settings = replace(settings, model=replace(settings.model, dtype="bf16", make_vocab_size_divisible_by=128))
    config = huggingface.config
    model = build_model(QwenVLArchitecture.from_huggingface(config), settings, with_image_decoder=False)
    tensors = {compare.flat_spelling(name): p for name, p in huggingface.named_parameters()}
    compare.copy_weights(model, compare.name_table(config, settings), tensors)
    batch = reference.pack(samples, positions, kind).to("cpu", dtype=torch.bfloat16)
    return model.bare_chunks[0](batch, return_hidden_states=True).hidden_states.float()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [MaskKind.CAUSAL, MaskKind.BIDIRECTIONAL])
def test_bf16_hidden_states_are_as_near_to_fp32_as_hugging_faces(single_rank, kind):
    """Claim: at real width our BF16 hidden states are no farther from FP32 than Hugging Face's own BF16 ones.

    Weights are BF16 numbers in all three runs, so that only arithmetic differs. 20 to 40 seconds and 3 GB.
    """
    config = real_width_config()
    torch.manual_seed(0)
    theirs = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    samples = encoded(config, kind)
    rounded, positions = hidden_of_huggingface(theirs, samples, kind)
    ours = our_hidden(theirs, samples, positions, kind)
    exact, _ = hidden_of_huggingface(theirs.float(), samples, kind)
    for measure, factor in ((root_mean_square, FACTOR), (lambda x: float(x.abs().max()), LARGEST_FACTOR)):
        mine, limit = measure(ours - exact), factor * measure(rounded - exact)
        assert mine <= limit, f"our error {mine:.3e} is above {factor} times Hugging Face's, {limit:.3e}"
