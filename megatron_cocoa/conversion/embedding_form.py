"""What the ``config.json`` of a Hugging Face folder says of the form in which its model embeds."""

from __future__ import annotations

from typing import Any

from megatron_cocoa.config import EmbeddingForm

PLACEHOLDER_KEY = "cocoa_image_placeholder"
"""Where an exported folder says ``bare`` if pictures stand without the marks around them; absent otherwise."""


def form_of_config(content: dict[str, Any]) -> EmbeddingForm:
    """The form in which a folder with this ``config.json`` embeds; a published one, like an export, in both directions.

    Raises:
        ValueError: for a placeholder that this version does not know.
    """
    text = content.get("text_config")
    is_causal = isinstance(text, dict) and text.get("is_causal") is True
    placeholder = content.get(PLACEHOLDER_KEY, "full")
    if placeholder not in ("full", "bare"):
        raise ValueError(f"config.json has {PLACEHOLDER_KEY} {placeholder!r}, known are full and bare")
    return EmbeddingForm("causal" if is_causal else "bidirectional", placeholder)
