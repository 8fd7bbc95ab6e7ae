"""Qwen2-VL and Qwen2.5-VL on Megatron-Core, trained as multimodal embedding models with CoCoA."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_cocoa.embedder import CocoaEmbedder

__version__ = "0.1.0"
__all__ = ["CocoaEmbedder", "__version__"]


def __getattr__(name: str) -> Any:
    # Imported on first use: settings are parsed, and mistakes in them reported, without waiting for torch.
    if name == "CocoaEmbedder":
        from megatron_cocoa.embedder import CocoaEmbedder

        return CocoaEmbedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
