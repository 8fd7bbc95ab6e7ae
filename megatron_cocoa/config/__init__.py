"""Every setting of a run, as a tree of frozen dataclasses.

The defaults are CoCoA's recipe as far as it is published (see each field). ``megatron_cocoa.settings`` overrides
them from presets, YAML files and the command line, and refuses unknown keys. Relations between fields are checked at
construction, before any process group exists, so that a wrong number costs seconds.
"""

from megatron_cocoa.config.adapter import LANGUAGE_TARGETS, VISION_TARGETS, AdapterSettings
from megatron_cocoa.config.data import DataSettings, SourceSettings
from megatron_cocoa.config.evaluation import (
    NATIVE,
    EmbeddingSettings,
    EvaluationSettings,
    ImageSize,
    parse_image_size,
)
from megatron_cocoa.config.model import FreezeSettings, ModelSettings, Recompute, RecomputeSettings
from megatron_cocoa.config.names import STAGES, TEMPERATURE_RANGE
from megatron_cocoa.config.parallel import ParallelSettings
from megatron_cocoa.config.run import CheckpointSettings, OptimizerSettings, ValidationSettings
from megatron_cocoa.config.stages import (
    BridgeSettings,
    ContrastiveSettings,
    EmbeddingForm,
    StageSettings,
    WarmupSettings,
)
from megatron_cocoa.config.train import TrainSettings

__all__ = [
    "AdapterSettings",
    "BridgeSettings",
    "CheckpointSettings",
    "ContrastiveSettings",
    "DataSettings",
    "EmbeddingForm",
    "EmbeddingSettings",
    "EvaluationSettings",
    "FreezeSettings",
    "ImageSize",
    "LANGUAGE_TARGETS",
    "ModelSettings",
    "NATIVE",
    "OptimizerSettings",
    "ParallelSettings",
    "Recompute",
    "RecomputeSettings",
    "STAGES",
    "SourceSettings",
    "StageSettings",
    "TEMPERATURE_RANGE",
    "TrainSettings",
    "VISION_TARGETS",
    "ValidationSettings",
    "WarmupSettings",
    "parse_image_size",
]
