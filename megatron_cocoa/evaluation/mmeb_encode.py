"""Vectors of many things to embed, on any number of ranks, the same bits whatever their number.

Things are sorted longest first and cut into packs before anything is divided; pack ``k`` belongs to rank
``k % ranks``. So which things share a pack, and with it the order of every sum, does not depend on the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state
from PIL import Image
from tqdm import tqdm

from megatron_cocoa.data.collate import PackOptions, collate_embedding
from megatron_cocoa.data.decode import PictureError, read_picture
from megatron_cocoa.data.prepared import PreparedSample
from megatron_cocoa.data.samples import SampleBuilder
from megatron_cocoa.evaluation.embed import embed_pack
from megatron_cocoa.evaluation.mmeb_data import EvalItem, picture_file
from megatron_cocoa.model.build import Model
from megatron_cocoa.parallel import device
from megatron_cocoa.parallel.collectives import gather_rows
from megatron_cocoa.parallel.threads import map_ahead

Encode = Callable[[Sequence[EvalItem]], "Encoded"]
"""Things to their vectors, in order; every rank calls it with the same things and gets the same."""

PIXELS_PER_CHARACTER = 200
"""For sorting alone: a merged unit of 28 x 28 pixels is about as long as four characters."""


@dataclass(frozen=True)
class Encoded:
    """float32 ``(items, hidden)``, rows of length one; bool ``(items,)``: which were cut to the maximal length."""

    vectors: np.ndarray
    cut: np.ndarray


@dataclass(frozen=True)
class ItemEncoder:
    """Embeds things with a model that is whole on every rank.

    Args:
        model: in evaluation mode.
        builder, options: lay things out and fill packs, as for ``CocoaEmbedder``.
        image_root: folder that image paths are relative to and may not leave.
        batch_size: things in a pack.
        num_workers: threads that decode pictures while the model works; 0 decodes in between.
        show_progress: a bar on the first rank.
    """

    model: Model
    builder: SampleBuilder
    options: PackOptions
    image_root: Path
    batch_size: int = 32
    num_workers: int = 2
    show_progress: bool = False

    @torch.no_grad()
    def __call__(self, items: Sequence[EvalItem]) -> Encoded:
        """Embed things; see ``Encode``.

        Raises:
            ValueError: naming the first thing that cannot be embedded: none is left out.
        """
        order = longest_first(items, self.image_root)
        packs = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        hidden = self.model.config.hidden_size
        found = [torch.zeros(0, hidden, device=device.device())]
        cut: list[bool] = []
        mine = [[items[i] for i in pack] for pack in packs[rank::size]]
        with tqdm(total=len(mine), unit="pack", leave=False, disable=not self.show_progress or rank > 0) as progress:
            for samples in map_ahead(self._samples, mine, num_workers=self.num_workers, num_ahead=self.num_workers + 1):
                pack = collate_embedding(samples, self.options)
                found.append(torch.nn.functional.normalize(embed_pack(self.model, pack, rows=len(samples)), dim=-1))
                cut += [sample.num_cut > 0 for sample in samples]
                progress.update()
        # Gathered rank after rank, and a rank has every size-th pack.
        places = np.concatenate([pack for part in range(size) for pack in packs[part::size]] or [order])
        counts = tuple(sum(len(pack) for pack in packs[part::size]) for part in range(size))
        vectors, was_cut = np.empty((len(items), hidden), dtype=np.float32), np.empty(len(items), dtype=bool)
        vectors[places] = _gather(torch.cat(found), counts)
        was_cut[places] = _gather(torch.tensor(cut, dtype=torch.uint8, device=device.device()), counts)
        return Encoded(vectors, was_cut)

    def _samples(self, items: list[EvalItem]) -> list[PreparedSample]:
        return [self._sample(item) for item in items]

    def _sample(self, item: EvalItem) -> PreparedSample:
        try:
            content, picture = item.content(), None
            if content.image_path:
                file = picture_file(self.image_root, content.image_path)
                picture = self.builder.pictures.prepare(read_picture(file), name=str(file))
            return self.builder.embedding(str(tuple(item)), content, picture=picture)
        except PictureError as error:
            raise PictureError(error.reason, f"{tuple(item)!r}: {error}") from error


def longest_first(items: Sequence[EvalItem], image_root: Path) -> np.ndarray:
    """int64 ``(items,)``: an order in which things of like cost are neighbours, a function of the set of things.

    Raises:
        ValueError: if a picture cannot be opened.
    """
    pixels = {path: _pixels(image_root, path) for path in {item.image_path for item in items} - {""}}
    cost = [len(item.text) + pixels.get(item.image_path, 0) // PIXELS_PER_CHARACTER for item in items]
    return np.array(sorted(range(len(items)), key=lambda i: (-cost[i], items[i])), dtype=np.int64)


def _pixels(image_root: Path, image_path: str) -> int:
    file = picture_file(image_root, image_path)
    try:
        with Image.open(file) as image:
            return image.size[0] * image.size[1]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file} cannot be opened: {error}") from error


def _gather(mine: torch.Tensor, counts: tuple[int, ...]) -> np.ndarray:
    """All ranks' rows, rank after rank."""
    return gather_rows(mine.contiguous(), counts, parallel_state.get_data_parallel_group()).cpu().numpy()
