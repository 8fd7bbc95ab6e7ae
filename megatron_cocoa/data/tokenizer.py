"""The tokenizer of a model folder, and a way to encode user text that can never produce a control token.

A caption that contains the characters ``<|image_pad|>`` must stay a caption: were it read as a placeholder, the
batch would announce more image features than the tower emits. So text is encoded by a copy of the tokenizer that
knows no added tokens at all, and control tokens enter by id only.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

_CACHED_BYTES = 32 * 2**20
"""Of texts and ids, in each process that encodes: there are as many as ranks times workers."""

_CONTROL_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


@dataclass(frozen=True)
class TokenizerBundle:
    """A tokenizer and the ids that the data layer places by hand.

    Args:
        tokenizer: as loaded; used for decoding and for its special tokens.
        vocab_size: rows of the model's embedding table (``config.json``).
        vocab_size_used: rows that are in use, the mask token's included.
        image_token_id, video_token_id, vision_start_token_id, vision_end_token_id: Qwen's vision tokens.
        bridge_token_id: carries the embedding.
        mask_token_id: replaces hidden text.
        pad_token_id: fills the tail of a pack.
        special_ids: never masked, and never produced from text.
    """

    tokenizer: PreTrainedTokenizerFast
    vocab_size: int
    vocab_size_used: int
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    bridge_token_id: int
    mask_token_id: int
    pad_token_id: int
    special_ids: frozenset[int]
    _text_encoder: Tokenizer = field(repr=False)
    _is_special: np.ndarray = field(repr=False)
    _is_word: list[np.ndarray] = field(default_factory=list, repr=False)
    _cache: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    _cached_bytes: list[int] = field(default_factory=lambda: [0], repr=False)

    def encode_text(self, text: str) -> np.ndarray:
        """Token ids of ``text``, int64 ``(tokens,)``, read-only. No control token, whatever the text says."""
        ids = self._cache.get(text)
        if ids is None:
            ids = np.asarray(self._text_encoder.encode(text, add_special_tokens=False).ids, dtype=np.int64)
            ids.setflags(write=False)
            size = sys.getsizeof(text) + sys.getsizeof(ids)
            if self._cached_bytes[0] + size <= _CACHED_BYTES:
                self._cached_bytes[0] += size
                self._cache[text] = ids
        return ids

    def is_special(self, ids: np.ndarray) -> np.ndarray:
        """Bool, shaped as ``ids``: which of them are in ``special_ids``."""
        return self._is_special[ids]

    def is_word(self, ids: np.ndarray) -> np.ndarray:
        """Bool, shaped as ``ids``: which are no control tokens and hold a letter, a digit, or a part of a character.

        Byte-level tokens may hold a part of a character alone: whatever is written with several bytes counts.
        """
        if not self._is_word:
            table = np.zeros(self.vocab_size, dtype=bool)
            for token, index in self.tokenizer.get_vocab().items():
                text = self.tokenizer.convert_tokens_to_string([token])
                table[index] = any(c.isalnum() or c == "\ufffd" for c in text)
            self._is_word.append(table & ~self._is_special)
        return self._is_word[0][ids]


def load_tokenizer(
    path: str | Path, *, mask_token: str = "<|mask|>", bridge_token: str = "<|im_end|>", vocab_size: int
) -> TokenizerBundle:
    """Load the fast tokenizer of a Hugging Face folder and settle the mask and bridge tokens.

    Args:
        path: folder with ``tokenizer.json`` (``vocab.json`` and ``merges.txt`` alone would silently shift the
            special ids) and ``tokenizer_config.json``.
        mask_token: its id is the tokenizer's if it has one, else the first row after the tokenizer's last.
        bridge_token: must be in the tokenizer.
        vocab_size: rows of the embedding table, from ``config.json``.

    Raises:
        ValueError: if the folder has no ``tokenizer.json``, lacks one of Qwen's vision tokens or the bridge token,
            disagrees with the ids in its own ``config.json``, or if the mask token has no row in the table.
    """
    folder = Path(path)
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder} has no tokenizer.json: the fast tokenizer is needed, not only its vocabulary")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    ids = {name: _single_id(tokenizer, token, folder) for name, token in _CONTROL_TOKENS.items()}
    bridge_token_id = _single_id(tokenizer, bridge_token, folder)
    _check_config_ids(folder, ids)
    used = max(tokenizer.get_vocab().values()) + 1
    mask_token_id = tokenizer.get_vocab().get(mask_token, used)
    used = max(used, mask_token_id + 1)
    if used > vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} with the mask token {mask_token!r} (id {mask_token_id}) needs {used} rows, the "
            f"model's embedding table has {vocab_size}: use a model with unused rows, or name an existing token as "
            f"model.mask_token"
        )
    special_ids = frozenset(tokenizer.added_tokens_decoder) | frozenset(tokenizer.all_special_ids) | {mask_token_id}
    if mask_token_id == bridge_token_id or mask_token_id in ids.values():
        raise ValueError(f"model.mask_token {mask_token!r} is also the bridge or a vision token: name another")
    is_special = np.zeros(vocab_size, dtype=bool)
    is_special[sorted(special_ids | {bridge_token_id, *ids.values()})] = True
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else bridge_token_id
    return TokenizerBundle(
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        vocab_size_used=used,
        **ids,
        bridge_token_id=bridge_token_id,
        mask_token_id=mask_token_id,
        pad_token_id=pad,
        special_ids=special_ids | {bridge_token_id, *ids.values()},
        _text_encoder=_without_added_tokens(tokenizer),
        _is_special=is_special,
    )


def _single_id(tokenizer: PreTrainedTokenizerFast, token: str, folder: Path) -> int:
    token_id = tokenizer.get_vocab().get(token)
    if token_id is None:
        raise ValueError(f"the tokenizer in {folder} has no token {token!r}: a Qwen2-VL tokenizer is needed")
    return token_id


def _check_config_ids(folder: Path, ids: dict[str, int]) -> None:
    file = folder / "config.json"
    if not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    for name, token_id in ids.items():
        if config.get(name, token_id) != token_id:
            raise ValueError(f"{file} says {name} is {config[name]}, its tokenizer says {token_id}: they must agree")


def _without_added_tokens(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    # `split_special_tokens=True` would not do: it leaves added tokens that are not flagged as special in place.
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["added_tokens"] = []
    description["post_processor"] = None
    description["truncation"] = description["padding"] = None
    return Tokenizer.from_str(json.dumps(description))
