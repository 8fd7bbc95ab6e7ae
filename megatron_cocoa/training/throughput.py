"""Speed of a step in the units that people compare: tokens and samples a second and GPU, FLOP/s, utilisation."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.config import TrainSettings
from megatron_cocoa.model.flops import step_flops
from megatron_cocoa.model.specs import repeats_whole_mlps
from megatron_cocoa.model.workload import Workload
from megatron_cocoa.parallel.peak_flops import peak_flops


@dataclass(frozen=True)
class SpeedMeter:
    """Turns a step's workload and seconds into metrics.

    Args:
        architecture: published shapes.
        settings: of the run: frozen parts, recompute, precision.
        num_gpus: ranks of the whole run.
        device_name: of one of them (all are taken to be alike); None or unknown gives no utilisation.
        language_adapter_parameters, vision_adapter_parameters: see ``flops.step_flops``.
    """

    architecture: QwenVLArchitecture
    settings: TrainSettings
    num_gpus: int
    device_name: str | None = None
    language_adapter_parameters: int = 0
    vision_adapter_parameters: int = 0

    def metrics(
        self, workload: Workload, *, samples: int, seconds: float, extra_forward_passes: float = 0
    ) -> dict[str, float]:
        """Speed of one step, or of several together.

        Args:
            workload: of all micro-batches of *all* data-parallel ranks (``Workload.counts`` adds up under an
                all-reduce over data parallel *without* context parallel).
            samples: of the global batch; pairs in stage ``contrastive``.
            seconds: wall time, data wait included.
            extra_forward_passes: share of the micro-batches that ran forward once more, to cache their embeddings.

        Returns:
            ``tokens_per_second_per_gpu`` (tail rows are no tokens), ``samples_per_second_per_gpu``,
            ``tflops_per_second_per_gpu`` (useful ones), and where the device's peak is known ``mfu`` and ``hfu``
            as fractions.

        Raises:
            ValueError: if ``seconds`` is not positive.
        """
        if seconds <= 0:
            raise ValueError(f"a step took {seconds} seconds: speed needs a positive time")
        parallel = self.settings.parallel
        flops = step_flops(
            self.architecture,
            workload,
            freeze=self.settings.frozen_parts,
            recompute=self.settings.recompute,
            repeats_whole_mlps=repeats_whole_mlps(self.settings),
            pipeline_stages=parallel.pipeline_model_parallel_size * parallel.num_chunks,
            extra_forward_passes=extra_forward_passes,
            language_adapter_parameters=self.language_adapter_parameters,
            vision_adapter_parameters=self.vision_adapter_parameters,
            decoder_layers=self.settings.warmup.decoder_layers,
        )
        gpu_seconds = seconds * self.num_gpus
        metrics = {
            "tokens_per_second_per_gpu": workload.tokens / gpu_seconds,
            "samples_per_second_per_gpu": samples / gpu_seconds,
            "tflops_per_second_per_gpu": flops.useful / gpu_seconds / 1e12,
        }
        peak = peak_flops(self.device_name, self.settings.model)
        if peak is not None:
            metrics["mfu"] = flops.useful / gpu_seconds / peak
            metrics["hfu"] = flops.hardware / gpu_seconds / peak
        return metrics
