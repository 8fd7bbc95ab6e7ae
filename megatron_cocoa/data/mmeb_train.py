"""What MMEB-train's texts say besides their content, by the published files (TIGER-Lab/MMEB-train, split ``original``).

Seven subsets have image targets, whose text is a constant prompt or starts with one; a caption behind an instruction
("Find me an everyday image that matches the given caption: ...") is still a caption.
"""

from __future__ import annotations

SUBSETS = (
    "ImageNet_1K N24News HatefulMemes VOC2007 SUN397 OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W VisDial "
    "CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA MSCOCO"
).split()
"""The published 20, as MMEB-train spells them."""

SPLITS = ("original", "diverse_instruction", "train")
"""File prefixes: prompts as in evaluation, prompts in other words, and the subsets that have one form only."""

_CONSTANT_TARGETS = frozenset(
    {
        "",
        "represent the given image",
        "represent the given image and the related text",
        "represent the given cropped image of the object",
        "represent the given wikipedia image",
        "represent the given wikipedia image with related text information:",
    }
)

_TEXT_TO_IMAGE_INSTRUCTIONS = (
    "Find me an everyday image that matches the given caption:",
    "Retrieve an image of this news caption.",
    "Represent the given dialogue about an image, which is used for image retrieval:",
    "Find a Wikipedia image that answers this question:",
)


def is_constant_target(text: str) -> bool:
    """Whether ``text``, free of pictures' marks, says nothing of its own picture, in whatever case and punctuation."""
    return " ".join(text.lower().split()).rstrip(". ") in _CONSTANT_TARGETS


def without_instruction(text: str) -> str:
    """``text`` without the instruction of a published text-to-image subset; any other text as it is."""
    for instruction in _TEXT_TO_IMAGE_INSTRUCTIONS:
        if text.startswith(instruction):
            return text[len(instruction) :].strip()
    return text
