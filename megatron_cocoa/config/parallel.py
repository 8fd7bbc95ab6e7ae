"""How a model and its batches are spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_cocoa.config.checks import require


@dataclass(frozen=True)
class ParallelSettings:
    """Degrees and overlaps. The data-parallel size is the world size divided by TP x PP x CP.

    Args:
        tensor_model_parallel_size: shards of each layer.
        pipeline_model_parallel_size: stages; the tower lies on the first.
        virtual_pipeline_model_parallel_size: chunks of layers per stage (interleaved schedule).
        context_parallel_size: shards of the sequence, exchanged for shards of the heads inside attention.
        sequence_parallel: shard norms and residuals of the language model over tensor parallel ranks, if there are two
            or more.
        num_layers_in_first_pipeline_stage: language layers of the first stage; fewer than elsewhere balance the tower.
        num_layers_in_last_pipeline_stage: language layers of the last stage; fewer balance the heads.
        use_distributed_optimizer: shard optimizer state over data parallel ranks (ZeRO-1).
        overlap_grad_reduce, overlap_param_gather: hide data-parallel traffic behind compute.
        distributed_timeout_minutes: how long a collective may wait for a rank before all ranks end. Waits for a rank
            that reads rows or writes a checkpoint may take two hours.
    """

    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    virtual_pipeline_model_parallel_size: int | None = None
    context_parallel_size: int = 1
    sequence_parallel: bool = False
    num_layers_in_first_pipeline_stage: int | None = None
    num_layers_in_last_pipeline_stage: int | None = None
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    overlap_param_gather: bool = False
    distributed_timeout_minutes: float = 10.0

    def __post_init__(self) -> None:
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
            require(getattr(self, name) >= 1, f"parallel.{name} is {getattr(self, name)}, needs 1 or more")
        for name in ("num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
            number = getattr(self, name)
            require(number is None or number >= 1, f"parallel.{name} is {number}, needs 1 or more")
        require(
            self.distributed_timeout_minutes > 0,
            f"parallel.distributed_timeout_minutes is {self.distributed_timeout_minutes}, must be positive",
        )
        virtual = self.virtual_pipeline_model_parallel_size
        require(
            virtual is None or (virtual >= 2 and self.pipeline_model_parallel_size > 1),
            f"virtual_pipeline_model_parallel_size {virtual} needs to be 2 or more, with a pipeline of at least two "
            f"stages (found {self.pipeline_model_parallel_size})",
        )
        require(
            not self.overlap_param_gather or (self.use_distributed_optimizer and self.overlap_grad_reduce),
            "overlap_param_gather needs use_distributed_optimizer and overlap_grad_reduce",
        )

    @property
    def num_chunks(self) -> int:
        """Chunks of layers (virtual stages) on each pipeline stage; 1 without interleaving."""
        return self.virtual_pipeline_model_parallel_size or 1

    @property
    def model_parallel_size(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    def data_parallel_size(self, world_size: int) -> int:
        """How many data-parallel replicas ``world_size`` ranks make.

        Raises:
            ValueError: if the degrees do not divide the world size.
        """
        require(
            world_size % self.model_parallel_size == 0,
            f"{world_size} rank(s) cannot be divided into replicas of {self.model_parallel_size} "
            f"(tensor {self.tensor_model_parallel_size} x pipeline {self.pipeline_model_parallel_size} x context "
            f"{self.context_parallel_size}): start a multiple of {self.model_parallel_size} ranks "
            f"(torchrun --nproc-per-node), or change parallel.*_parallel_size",
        )
        return world_size // self.model_parallel_size
