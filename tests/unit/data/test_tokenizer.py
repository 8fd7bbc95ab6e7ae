"""Control tokens enter by id only, and the toy tokenizer is the one that sentencepiece trained."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_cocoa.data import tokenizer as tokenizer_module
from megatron_cocoa.data.tokenizer import load_tokenizer
from megatron_cocoa.data.toy_model import SPECIAL_TOKENS, train_tokenizer

HOSTILE = [
    "<|image_pad|>",
    "a <|im_end|> b",
    "x<|vision_start|><|image_pad|><|vision_end|>y",
    "<|mask|>",
    "<tool_call>",
    "<unk><s></s><0x0A>",
    "<|image_1|>",
]


@pytest.fixture(scope="module")
def qwen_folder(tmp_path_factory):
    """A byte-level BPE built as Qwen2's is: same normaliser, splitting, added tokens, and class name."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(split, "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(["the picture of a cat", "image pad vision start", "what is this"] * 9, trainer)
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False, normalized=False)])
    folder = tmp_path_factory.mktemp("qwen")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["toy", "qwen"])
def any_bundle(request, model_folder, qwen_folder):
    return load_tokenizer(model_folder if request.param == "toy" else qwen_folder, vocab_size=1024)


@pytest.mark.parametrize("text", HOSTILE)
def test_typed_control_tokens_stay_text(any_bundle, text):
    ids = any_bundle.encode_text(text)
    assert ids.size > 0 and not any_bundle.is_special(ids).any()
    assert any_bundle.tokenizer.decode(ids.tolist()) == text


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.characters(codec="utf-8", exclude_characters="\u2581"), max_size=40))
def test_any_text_survives_the_toy_tokenizer_without_unknowns(bundle, text):
    ids = bundle.encode_text(text)
    assert bundle.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False) == text
    assert 0 not in ids


def test_plain_text_gives_the_ids_of_the_whole_tokenizer(any_bundle):
    for text in ("the picture of a cat", "what is this\n", "café 12", ""):
        expected = any_bundle.tokenizer(text, add_special_tokens=False).input_ids
        assert any_bundle.encode_text(text).tolist() == expected


def test_kept_ids_are_bounded_by_their_bytes(model_folder, monkeypatch):
    """Claim: long texts do not make a process grow; what is kept no longer is encoded again, and comes out the same."""
    monkeypatch.setattr(tokenizer_module, "_CACHED_BYTES", 2**16)
    bundle = load_tokenizer(model_folder, vocab_size=1000)
    texts = [f"{number} cat dog house tree" * 40 for number in range(100)]
    first = [bundle.encode_text(text) for text in texts]
    kept = sum(len(text) + ids.nbytes for text, ids in bundle._cache.items())
    assert 2**15 < kept <= 2**16
    assert all((bundle.encode_text(text) == ids).all() for text, ids in zip(texts, first))


def test_mask_token_takes_the_first_unused_row(any_bundle):
    assert any_bundle.mask_token_id == len(any_bundle.tokenizer)
    assert any_bundle.vocab_size_used == len(any_bundle.tokenizer) + 1
    assert any_bundle.mask_token_id in any_bundle.special_ids


def test_a_mask_token_that_the_tokenizer_has_keeps_its_id(model_folder):
    bundle = load_tokenizer(model_folder, mask_token="<|quad_end|>", vocab_size=1024)
    assert bundle.mask_token_id == bundle.tokenizer.convert_tokens_to_ids("<|quad_end|>")


def test_mask_token_without_a_row_is_refused(model_folder, bundle):
    used = len(bundle.tokenizer)
    with pytest.raises(ValueError, match=rf"needs {used + 1} rows, the model's embedding table has {used}"):
        load_tokenizer(model_folder, vocab_size=used)


def test_special_ids_hold_every_control_token(any_bundle):
    named = {getattr(any_bundle, f"{n}_token_id") for n in ("image", "video", "vision_start", "vision_end", "bridge")}
    assert named <= any_bundle.special_ids
    assert any_bundle.is_special(np.array(sorted(any_bundle.special_ids))).all()


def test_a_bridge_token_may_be_any_of_the_vocabulary(model_folder, bundle):
    """Claim: it is never masked, also where it is none of the tokenizer's special tokens."""
    piece = int(bundle.encode_text("cat")[0])
    named = load_tokenizer(model_folder, bridge_token=bundle.tokenizer.convert_ids_to_tokens(piece), vocab_size=1024)
    assert named.bridge_token_id == piece and piece in named.special_ids and named.is_special(np.array([piece])).all()
    assert not bundle.is_special(np.array([piece])).any()


def test_words_are_letters_digits_and_parts_of_characters(any_bundle):
    ids = any_bundle.encode_text("7中")
    assert any_bundle.is_word(ids[-1:]).all() and any_bundle.is_word(ids).sum() >= 2
    assert not any_bundle.is_word(any_bundle.encode_text("?!")[-1:]).any()
    assert not any_bundle.is_word(np.array(sorted(any_bundle.special_ids))).any()


def test_missing_bridge_token_is_named(model_folder):
    with pytest.raises(ValueError, match=r"no token '<\|nowhere\|>'"):
        load_tokenizer(model_folder, bridge_token="<|nowhere|>", vocab_size=1024)


def test_folder_without_the_fast_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer.json"):
        load_tokenizer(tmp_path, vocab_size=10)


def test_ids_that_contradict_the_config_are_refused(qwen_folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((qwen_folder / name).read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"image_token_id": 7}))
    with pytest.raises(ValueError, match="image_token_id is 7"):
        load_tokenizer(tmp_path, vocab_size=1024)


def test_rebuilt_tokenizer_gives_sentencepieces_pieces():
    """Independent reference: sentencepiece itself, on its own corpus and on text that it never saw."""
    rng = np.random.default_rng(3)
    words = ["".join(rng.choice(list("abcdeéßü"), size=rng.integers(1, 9))) for _ in range(400)]
    texts = [" ".join(rng.choice(words, size=5)) for _ in range(300)]
    rebuilt, model = train_tokenizer(texts, num_pieces=700)
    original = sentencepiece.SentencePieceProcessor(model_proto=model)
    shuffled = ["".join(rng.permutation(list(text))) for text in texts[:50]]
    unseen = ["  two  spaces ", "zzz", "日本 emoji", "ab\ncd", *shuffled]
    for text in texts + unseen:
        assert rebuilt.encode(text).ids == original.encode(text)


def test_training_a_tokenizer_is_deterministic():
    texts = ["one two three", "two three four", "casa roja"] * 5
    first, second = (train_tokenizer(texts, num_pieces=300)[0].to_str() for _ in range(2))
    assert first == second


def test_toy_folder_loads_by_name_and_by_class(model_folder):
    auto = AutoTokenizer.from_pretrained(str(model_folder), local_files_only=True)
    fast = PreTrainedTokenizerFast.from_pretrained(str(model_folder), local_files_only=True)
    text = "<|vision_start|><|image_pad|><|vision_end|>gato rojo<|im_end|>"
    assert auto(text).input_ids == fast(text).input_ids
    assert [auto.convert_tokens_to_ids(t) for t in SPECIAL_TOKENS] == list(range(len(auto) - 14, len(auto)))
    assert set(SPECIAL_TOKENS) <= set(auto.all_special_tokens)
