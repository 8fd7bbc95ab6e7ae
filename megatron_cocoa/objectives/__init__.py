"""Losses of the three stages: pure functions of head outputs and embeddings, without parameters."""

from megatron_cocoa.objectives.base import GlobalObjective, LocalObjective, PairEmbeddings
from megatron_cocoa.objectives.registry import build_objective

__all__ = ["GlobalObjective", "LocalObjective", "PairEmbeddings", "build_objective"]
