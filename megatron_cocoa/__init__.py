"""Qwen2-VL and Qwen2.5-VL on Megatron-Core, trained as multimodal embedding models with CoCoA."""

__version__ = "0.1.0"
