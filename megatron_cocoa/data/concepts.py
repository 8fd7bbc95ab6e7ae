"""Which pictures may be trained on: the one split that everything shares.

A split by picture leaks, and so does one by caption: a "man astronaut" with a dark skin tone is nearly the
"astronaut" picture (correlation 0.999). So the split is drawn by the hash of the *base concept*, the caption without
words for persons, skin tones and facing, and concepts that share a picture, or almost, go the same way together.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

import numpy as np

HELD_OUT_PERCENT = 10
TWIN_CORRELATION = 0.94
THUMBNAIL_SIDE = 16
"""Twins are pictures that correlate above 0.95. The split is drawn a little lower and on coarser thumbnails, where
more pairs correlate, so that measuring at 24 pixels or more, with whichever filter, finds none on both sides."""

_SKIN_TONE = re.compile(r"\b(?:(?:medium[- ])?(?:light|dark)|medium) skin tone\b|\bskin tone\b")
_PERSON = re.compile(r"\b(?:man|men|woman|women|person|people|boy|boys|girl|girls|male|female)\b")
_FACING = re.compile(r"\bfacing (?:right|left)\b")
_SAME_FIGURE = ((re.compile(r"\bmer(?:man|maid|person)\b"), "merperson"), (re.compile(r"\bolder\b"), "old"))
_DANGLING = re.compile(r"^(?:(?:and|of|with|in) )+")


def base_concept(caption: str) -> str:
    """What a caption names once words for persons, skin tones and facing are gone.

    >>> base_concept("man astronaut: medium-dark skin tone"), base_concept("woman: light skin tone")
    ('astronaut', 'woman')
    """
    text = _words(caption)
    without_tone = _words(_SKIN_TONE.sub(" ", text))
    for pattern, name in _SAME_FIGURE:
        without_tone = pattern.sub(name, without_tone)
    concept = _words(_FACING.sub(" ", _PERSON.sub(" ", without_tone)))
    concept = _DANGLING.sub("", concept)
    # A caption that is nothing but such words ("woman") is a concept of its own.
    return concept or without_tone or text or caption.strip()


def split_of(concept: str) -> str:
    """``"train"`` or ``"heldout"`` (about one concept in ten) by the hash of ``concept``."""
    digest = hashlib.sha256(concept.encode("utf-8")).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % 100 < HELD_OUT_PERCENT else "train"


def assign_splits(captions: Sequence[str], thumbnails: np.ndarray) -> tuple[list[str], list[str]]:
    """Split pictures so that no variant and no twin of a held-out one is trained on.

    Concepts with a pair of pictures that correlate above ``TWIN_CORRELATION`` form one group, transitively; a group
    goes where its alphabetically first concept hashes to.

    Args:
        captions: one a picture, its name first.
        thumbnails: uint8 ``(pictures, ...)``, small pictures of one size, in the order of ``captions``.

    Returns:
        The base concept of each picture, and its split (``"train"`` or ``"heldout"``).

    Raises:
        ValueError: if there are not as many thumbnails as captions.
    """
    if len(captions) != len(thumbnails):
        raise ValueError(f"found {len(captions)} captions for {len(thumbnails)} thumbnails: need one each")
    concepts = [base_concept(caption) for caption in captions]
    parent = {concept: concept for concept in concepts}
    for i, j in picture_twins(thumbnails):
        a, b = sorted((_root(parent, concepts[i]), _root(parent, concepts[j])))
        parent[b] = a
    return concepts, [split_of(_root(parent, concept)) for concept in concepts]


def picture_twins(thumbnails: np.ndarray, *, threshold: float = TWIN_CORRELATION, rows: int = 1024) -> np.ndarray:
    """Pairs ``i < j`` of pictures whose pixels correlate above ``threshold``.

    Args:
        thumbnails: uint8 ``(pictures, ...)``.
        threshold: Pearson correlation over all pixels and channels.
        rows: pictures compared at a time; bounds memory to ``rows * pictures`` numbers.

    Returns:
        int64 ``(pairs, 2)``. A picture of one flat colour has no correlation and no twin.
    """
    flat = np.asarray(thumbnails, dtype=np.float32).reshape(len(thumbnails), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    found = [np.zeros((0, 2), dtype=np.int64)]
    for start in range(0, len(flat), rows):
        pairs = np.argwhere(flat[start : start + rows] @ flat.T > threshold)
        pairs[:, 0] += start
        found.append(pairs[pairs[:, 0] < pairs[:, 1]])
    return np.concatenate(found)


def _words(text: str) -> str:
    return re.sub(r"[\W_]+", " ", text.lower()).strip()


def _root(parent: dict[str, str], concept: str) -> str:
    while parent[concept] != concept:
        parent[concept] = parent[parent[concept]]
        concept = parent[concept]
    return concept
