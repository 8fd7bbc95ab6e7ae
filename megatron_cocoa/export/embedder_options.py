"""How an exported embedding model takes its inputs: what a user may ask for, and what a format cannot express."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_cocoa.checkpoint.info import IMPORT_STAGE, INFO_FILE, read_info
from megatron_cocoa.config import NATIVE, ImageSize
from megatron_cocoa.conversion.picture_sizes import PictureSizes


@dataclass(frozen=True)
class EmbedderOptions:
    """How an exported embedding model takes its inputs.

    Args:
        format: ``hf``, or ``sentence-transformers`` for the same folder with that library's modules.
        bridge_token: token that carries the embedding; None for the run's, else ``<|im_end|>``.
        image_size: side in pixels of the square that pictures are resized to, or ``native``, which keeps their shape;
            None for what the checkpoint's training did, where ``format`` can express it and no limits are given.
        min_image_tokens, max_image_tokens: merged units of a picture that keeps its shape, written as pixel limits
            where every library reads them (``write_image_limits``); None for those of the training, and where it had
            none, for those of the model's own folder.
        golden: compute ``golden.json``, in fp32 by this project's model, which takes the memory of one such model.

    Raises:
        ValueError: for an unknown format, a fixed picture size in one that cannot express it, or limits beside it.
    """

    format: Literal["hf", "sentence-transformers"] = "hf"
    bridge_token: str | None = None
    image_size: ImageSize | None = None
    golden: bool = True
    min_image_tokens: int | None = None
    max_image_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.format not in ("hf", "sentence-transformers"):
            raise ValueError(f"format is {self.format!r}, needs hf or sentence-transformers")
        is_square = self.image_size not in (None, NATIVE)
        if is_square and self.format == "sentence-transformers":
            raise ValueError(
                f"image_size {self.image_size} cannot be exported for sentence-transformers: it prepares pictures with "
                f"transformers' Qwen2VLImageProcessor, which keeps a picture's shape under every setting "
                f"(shortest_edge and longest_edge bound the area), and a folder may carry no code. Leave the size out "
                f"and resize pictures before encode, or export with --format hf"
            )
        limits = self.min_image_tokens, self.max_image_tokens
        if is_square and limits != (None, None):
            raise ValueError(
                f"image_size {self.image_size} fixes the size of every picture: min_image_tokens and max_image_tokens "
                f"{limits} would have no effect; leave out the one or the others"
            )

    def sizes(self, own: PictureSizes) -> PictureSizes:
        """How the exported model sizes pictures, for a checkpoint with sizes of its own."""
        asked = self.image_size
        # Refused above where it is asked for; where the training did it, the export says what it cannot do.
        if asked is None and self.format == "sentence-transformers":
            asked = NATIVE
        return own.overridden_by(
            image_size=asked, min_image_tokens=self.min_image_tokens, max_image_tokens=self.max_image_tokens
        )


def default_format(mcore_path: str | Path) -> Literal["plain", "hf"]:
    """``hf``, the embedding model, for a checkpoint that a stage has trained; ``plain`` for converted weights."""
    source = Path(mcore_path)
    trained = (source / INFO_FILE).is_file() and read_info(source).stage != IMPORT_STAGE
    return "hf" if trained else "plain"
