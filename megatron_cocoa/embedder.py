"""``CocoaEmbedder``: a trained model as a function from texts and pictures to unit vectors.

It runs the project's own model, alone in its process or on each rank of a launch, on packs without padding: an
item's vector does not depend on what it is embedded with. The bridge token is appended here; no chat template is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from PIL import Image
from tqdm import tqdm

from megatron_cocoa.config import EmbeddingForm, EmbeddingSettings, ImageSize
from megatron_cocoa.data.collate import PackOptions, collate_embedding
from megatron_cocoa.data.decode import PictureError, read_picture
from megatron_cocoa.data.prepared import PreparedSample
from megatron_cocoa.data.row_parsing import half_surrogate
from megatron_cocoa.data.rows import IMAGE_TOKEN, Content
from megatron_cocoa.data.samples import SampleBuilder
from megatron_cocoa.evaluation.embed import embed_pack
from megatron_cocoa.model.build import Model
from megatron_cocoa.parallel import device, topology
from megatron_cocoa.parallel.threads import map_ahead
from megatron_cocoa.recipes.embedding_model import load_embedding_model

Item = dict[str, Any] | str | Path | Image.Image
"""A text, a picture (in memory or a ``Path``), or ``{"text": .., "image": ..}`` with either or both."""

BATCH_TOKENS = 16384
CPU_BATCH_TOKENS = 1024
"""Of a forward pass, where the caller names no bound. A GPU wants large products. On a CPU the C allocator returns
what is larger than 32 MB to the system each time, so that its pages are cleared again for the next operation: up to a
sixth of the time at the widths of ``benchmarks/embed.py``, a quarter of that share at the 3B's."""

NUM_WORKERS = 2


@dataclass
class CocoaEmbedder:
    """Embeds texts, pictures and both together; made by ``from_pretrained``.

    Args:
        model: in evaluation mode, whole on this rank.
        builder: lays items out as tokens.
        options: how packs are filled.
        batch_tokens: upper bound on a pack's tokens, except for a single item that is longer.
        num_workers: threads that decode pictures and split texts ahead of the model.
    """

    model: Model
    builder: SampleBuilder
    options: PackOptions
    batch_tokens: int
    num_workers: int = NUM_WORKERS

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        model_path: str | Path | None = None,
        dtype: str = "fp32",
        image_size: ImageSize | None = None,
        min_image_tokens: int | None = None,
        max_image_tokens: int | None = None,
        max_length: int | None = None,
        batch_tokens: int | None = None,
        bridge_token: str | None = None,
        num_workers: int = NUM_WORKERS,
    ) -> CocoaEmbedder:
        """Load a model on this process's device.

        Starts a process group of one rank where none is running; under a launcher, start the groups first
        (``parallel.topology.initialize``), and call this on every rank.

        Args:
            path: Hugging Face folder with safetensors, or Megatron checkpoint (a folder with ``cocoa.json``).
            model_path: Hugging Face folder with the tokenizer and processor of a Megatron checkpoint; None takes
                what the checkpoint carries, else the folder that the ``settings.yaml`` beside it names.
            dtype: ``fp32`` or ``bf16``, of parameters and activations.
            image_size: side of the square in pixels that pictures are resized to, or ``native``, which keeps their
                shape; None sizes them as the checkpoint's training did, or as the exported folder says, unless limits
                of tokens are given.
            min_image_tokens, max_image_tokens: of a picture that keeps its shape; None for those of the checkpoint's
                training, else (and for an exported folder, which carries them there) the processor's limits.
            max_length: tokens per item; None for the model's ``max_position_embeddings``. Longer texts are cut, and
                a warning counts them.
            batch_tokens: upper bound on the tokens of one forward pass; None for 16384 on a GPU, 1024 on a CPU.
            bridge_token: token that carries the embedding; None for the run's or the export's, else
                ``<|im_end|>``.
            num_workers: threads that decode pictures and split texts while the model computes; 0 for none.

        Raises:
            ValueError: if the folder is neither, is incomplete, or does not fit the tokenizer's folder.
        """
        if batch_tokens is None:
            batch_tokens = BATCH_TOKENS if device.has_gpu() else CPU_BATCH_TOKENS
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}, needs 1 or more")
        if num_workers < 0:
            raise ValueError(f"num_workers is {num_workers}, needs 0 or more")
        settings = EmbeddingSettings(image_size, min_image_tokens, max_image_tokens, max_length, dtype, bridge_token)
        start_alone()
        found = load_embedding_model(path, settings, model_path=model_path)
        return cls(found.model, found.builder, found.options, batch_tokens, num_workers)

    @property
    def hidden_size(self) -> int:
        """Length of a vector."""
        return self.model.config.hidden_size

    @property
    def form(self) -> EmbeddingForm:
        """Attention and layout of pictures: those that the model was trained with, as its folder says."""
        return EmbeddingForm(self.options.embedding_mask.value, self.builder.image_placeholder)

    @torch.no_grad()
    def encode(
        self,
        items: Sequence[Item],
        *,
        instruction: str | None = None,
        batch_size: int = 32,
        show_progress_bar: bool = False,
    ) -> np.ndarray:
        """Embed items, on this rank alone.

        Args:
            items: see ``Item``. ``<|image_1|>`` in a text marks the picture's place; without it the picture is first.
            instruction: put before each text as it stands (after a picture that has no marked place); it marks none.
            batch_size: items per forward pass, at most.
            show_progress_bar: on stderr.

        Returns:
            float32 ``(items, hidden)``, rows of length one, in the order of the items.

        Raises:
            ValueError: naming the index of the first item that cannot be embedded, and what was found; also where its
                vector is zero or not finite.
        """
        if isinstance(items, (str, dict, Path, Image.Image)):
            raise ValueError(f"items is one {type(items).__name__}: put it in a list")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, needs 1 or more")
        if instruction and IMAGE_TOKEN in instruction:
            raise ValueError(
                f"the instruction holds {IMAGE_TOKEN}: mark a picture's place in the item's own text, or leave it out, "
                f"which puts the picture first"
            )
        rows = np.empty((len(items), self.hidden_size), dtype=np.float32)
        start = num_cut = 0
        with tqdm(total=len(items), disable=not show_progress_bar, unit="item") as progress:
            for pack in self._packs(items, instruction or "", batch_size):
                found = embed_pack(self.model, collate_embedding(pack, self.options), rows=len(pack))
                vectors = torch.nn.functional.normalize(found, dim=-1).cpu().numpy()
                _check_vectors(vectors, start)
                rows[start : start + len(pack)] = vectors
                start += len(pack)
                num_cut += sum(sample.num_cut > 0 for sample in pack)
                progress.update(len(pack))
        if num_cut:
            _warn_cut(num_cut, len(items))
        return rows

    def _packs(self, items: Sequence[Item], instruction: str, batch_size: int) -> Iterator[list[PreparedSample]]:
        pack: list[PreparedSample] = []
        tokens = 0
        samples = map_ahead(
            lambda numbered: self._sample(*numbered, instruction),
            enumerate(items),
            num_workers=self.num_workers,
            num_ahead=4 * self.num_workers,
        )
        for sample in samples:
            if pack and (len(pack) == batch_size or tokens + sample.input_ids.size > self.batch_tokens):
                yield pack
                pack, tokens = [], 0
            pack.append(sample)
            tokens += sample.input_ids.size
        if pack:
            yield pack

    def _sample(self, index: int, item: Item, instruction: str) -> PreparedSample:
        try:
            text, image = _text_and_image(item)
            if image is None:
                content, picture = Content(instruction + text), None
            else:
                marked = instruction + text if IMAGE_TOKEN in text else IMAGE_TOKEN + instruction + text
                content, picture = Content(marked), self._picture(image)
            return self.builder.embedding(f"item {index}", content, picture=picture)
        except PictureError as error:
            raise PictureError(error.reason, f"item {index}: {error}") from error
        except ValueError as error:
            raise ValueError(f"item {index}: {error}") from error

    def _picture(self, image: Image.Image | Path) -> np.ndarray:
        if isinstance(image, Path):
            return self.builder.pictures.prepare(read_picture(image), name=str(image))
        return self.builder.pictures.prepare(image)


def start_alone() -> None:
    """Make this process a world of one rank, unless process groups are running already.

    Raises:
        ValueError: if the running layout splits the model.
    """
    if parallel_state.model_parallel_is_initialized():
        sizes = {
            "tensor": parallel_state.get_tensor_model_parallel_world_size(),
            "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
            "context": parallel_state.get_context_parallel_world_size(),
        }
        if max(sizes.values()) > 1:
            raise ValueError(f"the running process groups split the model ({sizes}): CocoaEmbedder needs 1 for each")
        return
    if dist.is_initialized():
        raise ValueError("torch.distributed runs without Megatron's groups: call parallel.topology.initialize first")
    topology.initialize_alone()


def _text_and_image(item: Item) -> tuple[str, Image.Image | Path | None]:
    """The two parts of an item; a path in a dictionary may be a string, since its key says what it is."""
    if isinstance(item, str):
        item = {"text": item}
    elif isinstance(item, (Path, Image.Image)):
        item = {"image": item}
    if not isinstance(item, dict):
        raise ValueError(f"found a {type(item).__name__}, needed a text, a picture, a Path or a dictionary of both")
    unknown = sorted(map(str, set(item) - {"text", "image"}))
    if unknown:
        raise ValueError(f"found the key(s) {', '.join(unknown)}: only text and image are known")
    text, image = item.get("text"), item.get("image")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"text is a {type(text).__name__}, needed a str")
    if isinstance(image, str):
        image = Path(image) if image else None
    if image is not None and not isinstance(image, (Path, Image.Image)):
        raise ValueError(f"image is a {type(image).__name__}, needed a PIL image or a path")
    text = text or ""
    at = half_surrogate(text)
    if at is not None:
        raise ValueError(f"character {at} of the text is half of a surrogate pair: no tokenizer takes it")
    places = text.count(IMAGE_TOKEN)
    if places > (image is not None):
        raise ValueError(f"the text marks {places} place(s) with {IMAGE_TOKEN} for {int(image is not None)} picture(s)")
    if image is None and not text.strip():
        raise ValueError("neither text nor a picture: one of them must be given")
    return text, image


def _check_vectors(vectors: np.ndarray, first: int) -> None:
    """Refuse vectors that have no direction; ``first`` is the index of the first one's item."""
    broken = np.flatnonzero(~(np.isfinite(vectors).all(axis=1) & vectors.any(axis=1)))
    if broken.size:
        raise ValueError(
            f"item {first + broken[0]}: its vector is zero or not finite ({broken.size} of {len(vectors)} so): "
            f"under bf16 try fp32, else the weights are broken"
        )


def _warn_cut(num_cut: int, num_items: int) -> None:
    warnings.warn(f"{num_cut} of {num_items} items were cut to max_length: raise it to embed them whole", stacklevel=3)
