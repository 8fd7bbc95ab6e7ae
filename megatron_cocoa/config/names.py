"""Names and bounds that several groups of settings, and code beyond them, share."""

from __future__ import annotations

STAGES = ("warmup", "bridge", "contrastive")
"""CoCoA's stages in their order; the paper's figure calls them 1, 2, 3, the authors' code 1, 1.5, 2."""

TEMPERATURE_RANGE = (0.01, 1.0)
"""Bounds of a learned temperature: cosines are scaled by 1 to 100, as in CLIP (arXiv 2103.00020) and OpenCLIP."""
