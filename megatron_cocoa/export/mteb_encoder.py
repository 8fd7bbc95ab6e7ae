"""A trained model as an encoder of ``mteb``, so that its tasks, MIEB's among them, run on an export.

    import mteb
    from megatron_cocoa.export.mteb_encoder import MtebEncoder

    model = MtebEncoder.from_pretrained("embedder")
    mteb.evaluate(model, mteb.get_tasks(["STS17"]))

Written for the ``EncoderProtocol`` of mteb 2. This module needs mteb only for ``mteb_model_meta``. Texts and pictures
of an item are embedded together, the picture first; audio and video are refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_cocoa.embedder import CocoaEmbedder
from megatron_cocoa.evaluation.mmeb_files import folder_sha256

_KNOWN = ("text", "image")
_REFUSED = ("audio", "video")

EMPTY = "."
"""Stands for a document without text: mteb's corpora have some, and need a vector for each."""


class MtebEncoder:
    """``mteb``'s interface over ``CocoaEmbedder``.

    Args:
        embedder: the model.
        name: as mteb files results, ``organisation/name``.
        revision: of the weights.
        prompts: put in front of texts, by ``query`` and ``document`` as mteb names the two sides; none by default.
    """

    def __init__(
        self,
        embedder: CocoaEmbedder,
        *,
        name: str = "local/cocoa",
        revision: str = "unknown",
        prompts: Mapping[str, str] | None = None,
    ) -> None:
        unknown = sorted(set(prompts or {}) - {"query", "document"})
        if unknown:
            raise ValueError(f"prompts has the key(s) {', '.join(unknown)}: only query and document are known")
        self.embedder = embedder
        self.name = name
        self.revision = revision
        self.prompts = dict(prompts or {})

    @classmethod
    def from_pretrained(
        cls, path: str | Path, *, prompts: Mapping[str, str] | None = None, **options: Any
    ) -> MtebEncoder:
        """Load a folder; ``options`` as for ``CocoaEmbedder.from_pretrained``. The revision is a hash of its files."""
        embedder = CocoaEmbedder.from_pretrained(path, **options)
        name = f"local/{Path(path).resolve().name}"
        return cls(embedder, name=name, revision=folder_sha256(path)[:16], prompts=prompts)

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any = None,
        hf_split: str = "",
        hf_subset: str = "",
        prompt_type: Any = None,
        batch_size: int = 32,
        **kwargs: Any,
    ) -> np.ndarray:
        """Embed batches.

        Args:
            inputs: batches with ``text`` (list of texts), ``image`` (list of PIL pictures) or both.
            task_metadata, hf_split, hf_subset: of the task; not used, as no prompt depends on them.
            prompt_type: ``query`` or ``document`` (a text or mteb's enumeration), or None.
            batch_size: items a forward pass.
            kwargs: further options of mteb, such as ``show_progress_bar``, which change no vector.

        Returns:
            float32 ``(items, hidden)``, rows of length one.

        Raises:
            ValueError: for a batch without texts and pictures, or with sound or video.
        """
        prompt = self.prompts.get(str(getattr(prompt_type, "value", prompt_type)), "")
        rows = [
            self.embedder.encode(_items(batch), instruction=prompt or None, batch_size=batch_size) for batch in inputs
        ]
        return np.concatenate(rows) if rows else np.empty((0, self.embedder.hidden_size), dtype=np.float32)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosines of all pairs, float32 ``(first, second)``."""
        return _unit(embeddings1) @ _unit(embeddings2).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> torch.Tensor:
        """Cosines of corresponding rows, float32 ``(rows,)``."""
        return (_unit(embeddings1) * _unit(embeddings2)).sum(dim=-1)

    @property
    def mteb_model_meta(self) -> Any:
        """mteb's description of the model; what a local folder does not say is left open."""
        from mteb.models.model_meta import ModelMeta

        unsaid = ("release_date", "languages", "n_parameters", "memory_usage_mb", "license", "open_weights")
        return ModelMeta(
            loader=None,
            name=self.name,
            revision=self.revision,
            max_tokens=self.embedder.builder.max_length,
            embed_dim=self.embedder.hidden_size,
            framework=["PyTorch"],
            similarity_fn_name="cosine",
            use_instructions=bool(self.prompts),
            modalities=["text", "image"],
            public_training_code=None,
            public_training_data=None,
            training_datasets=None,
            **dict.fromkeys(unsaid),
        )


def _items(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    refused = [name for name in _REFUSED if name in batch]
    columns = {name: list(batch[name]) for name in _KNOWN if name in batch}
    if refused or not columns:
        found = ", ".join(map(str, batch)) or "nothing"
        raise ValueError(f"a batch holds {found}: this model embeds texts and pictures alone")
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"a batch holds {sizes}: needed as many texts as pictures")
    items = [dict(zip(columns, values)) for values in zip(*columns.values())]
    empty = [i for i, item in enumerate(items) if item.get("image") is None and not (item.get("text") or "").strip()]
    for index in empty:
        items[index] = {"text": EMPTY}
    if empty:
        warnings.warn(f"{len(empty)} empty text(s) of {len(items)} are embedded as {EMPTY!r}", stacklevel=3)
    return items


def _unit(vectors: Any) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.atleast_2d(torch.as_tensor(vectors).float()), dim=-1)
