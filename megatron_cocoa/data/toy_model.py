"""The toy preset's model folder: config and tokenizer of a Qwen2.5-VL small enough for two CPU cores.

Same kinds of layers as the 3B (windowed and full-attention vision blocks, 2 x 2 merger, M-RoPE sections, grouped KV
heads, tied embeddings), with patches of 7 pixels: a 70 x 70 picture makes 10 x 10 patches, 25 merged units in 4
windows. At the published patch size of 14 it would make one window, which equals full attention.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_SPACE = "\u2581"


@dataclass(frozen=True)
class ToyModelSizes:
    """Every size of the toy model, in one place.

    Args:
        image_size: side of a picture in pixels.
        patch_size, window_size: of the tower, in pixels.
        text_*, vision_*: widths and depths, named as in ``Qwen2_5_VLConfig``.
        mrope_section: halves of ``head_dim`` that turn with time, height and width.
        tokenizer_pieces: sentencepiece vocabulary, its 256 byte pieces included.
        vocab_multiple: the embedding table is padded to a multiple of this.
        initializer_range: spread of the random weights; the published 0.02 is for widths of thousands.
    """

    image_size: int = 56
    patch_size: int = 7
    window_size: int = 28
    text_hidden_size: int = 256
    text_num_hidden_layers: int = 4
    text_num_attention_heads: int = 4
    text_num_key_value_heads: int = 2
    text_intermediate_size: int = 512
    text_max_position_embeddings: int = 4096
    mrope_section: tuple[int, int, int] = (8, 12, 12)
    vision_depth: int = 4
    vision_hidden_size: int = 128
    vision_num_heads: int = 4
    vision_intermediate_size: int = 344
    vision_fullatt_block_indexes: tuple[int, ...] = (1, 3)
    tokenizer_pieces: int = 6000
    vocab_multiple: int = 256
    initializer_range: float = 0.05


def train_tokenizer(texts: Sequence[str], *, num_pieces: int) -> tuple[Tokenizer, bytes]:
    """Train byte-fallback BPE with sentencepiece and rebuild it in the ``tokenizers`` library.

    Args:
        texts: training captions only, in a fixed order; the result depends on nothing else.
        num_pieces: pieces to learn; fewer if the texts do not hold as many.

    Returns:
        The rebuilt tokenizer, without Qwen's special tokens yet, and sentencepiece's model, which gives the same
        pieces.
    """
    # Imported here: only the toy preset trains a tokenizer.
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=num_pieces,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        # No normalising: what goes in must come out, and the rebuilt tokenizer need not repeat it.
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return _rebuild(sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())), model.getvalue()


def _rebuild(processor) -> Tokenizer:
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    learned = [i for i, _ in enumerate(pieces) if not (processor.is_unknown(i) or processor.is_byte(i))]
    # sentencepiece merges the neighbours whose union has the best score; a merge list has the same order if it
    # names, best score first, each way to split each learned piece in two.
    merges = [
        (pieces[i][:cut], pieces[i][cut:])
        for i in sorted(learned, key=lambda i: (-processor.get_score(i), i))
        for cut in range(1, len(pieces[i]))
        if pieces[i][:cut] in vocab and pieces[i][cut:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=pieces[0], byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_SPACE), behavior="merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def write_model_folder(folder: Path, tokenizer: Tokenizer, sizes: ToyModelSizes) -> None:
    """Write ``config.json``, ``tokenizer.json``, ``tokenizer_config.json`` and ``preprocessor_config.json``.

    No weights: they are drawn from the seed of the run.
    """
    folder.mkdir(parents=True)
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[t for t in SPECIAL_TOKENS if t not in ("<|im_end|>", "<|endoftext|>")],
        model_max_length=sizes.text_max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(str(folder))
    ids = {token: wrapped.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = model_config(sizes, ids, num_tokens=len(wrapped))
    config.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    config.save_pretrained(str(folder))
    pixels = sizes.image_size**2
    processor = Qwen2VLImageProcessorPil(
        patch_size=sizes.patch_size,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": pixels, "longest_edge": pixels},
    )
    description = json.dumps(processor.to_dict(), indent=2, sort_keys=True)
    (folder / "preprocessor_config.json").write_text(description + "\n", encoding="utf-8")


def model_config(sizes: ToyModelSizes, ids: dict[str, int], *, num_tokens: int) -> Qwen2_5_VLConfig:
    """Of a model of these sizes, whose tokenizer has ``num_tokens`` tokens, the special ones with these ids."""
    # One row beyond the tokenizer's is needed for the mask token.
    vocab_size = -(-(num_tokens + 1) // sizes.vocab_multiple) * sizes.vocab_multiple
    text = {
        "vocab_size": vocab_size,
        "initializer_range": sizes.initializer_range,
        "hidden_size": sizes.text_hidden_size,
        "intermediate_size": sizes.text_intermediate_size,
        "num_hidden_layers": sizes.text_num_hidden_layers,
        "num_attention_heads": sizes.text_num_attention_heads,
        "num_key_value_heads": sizes.text_num_key_value_heads,
        "max_position_embeddings": sizes.text_max_position_embeddings,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sizes.mrope_section)},
        "tie_word_embeddings": True,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    vision = {
        "depth": sizes.vision_depth,
        "initializer_range": sizes.initializer_range,
        "hidden_size": sizes.vision_hidden_size,
        "num_heads": sizes.vision_num_heads,
        "intermediate_size": sizes.vision_intermediate_size,
        "out_hidden_size": sizes.text_hidden_size,
        "fullatt_block_indexes": list(sizes.vision_fullatt_block_indexes),
        "patch_size": sizes.patch_size,
        "window_size": sizes.window_size,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    return Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
