"""All settings of a run, and the relations between their groups."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_cocoa.config.adapter import AdapterSettings
from megatron_cocoa.config.checks import require
from megatron_cocoa.config.data import DataSettings
from megatron_cocoa.config.model import FreezeSettings, ModelSettings, RecomputeSettings
from megatron_cocoa.config.names import STAGES
from megatron_cocoa.config.parallel import ParallelSettings
from megatron_cocoa.config.run import CheckpointSettings, OptimizerSettings, ValidationSettings
from megatron_cocoa.config.stages import BridgeSettings, ContrastiveSettings, StageSettings, WarmupSettings


@dataclass(frozen=True)
class TrainSettings:
    """One run: some of the three stages, one after the other, each starting from the previous one's weights.

    Args:
        stages: which stages, in CoCoA's order.
        output_dir: checkpoints, TensorBoard events, resolved configuration and reports go here.
        overwrite: if ``output_dir`` holds an earlier run, remove it.
        resume: continue the run in ``output_dir`` from its last complete checkpoint, or start it if there is none.
        seed: determines everything random: weights, masks, noise, order of samples.
        log_interval: steps between two updates of the progress bar and of the costlier metrics.
        wandb_project: also log to this Weights & Biases project (needs the ``wandb`` package).
        evaluate: measure retrieval on ``eval_*.jsonl`` of the data folder before the first and after each stage.
        with_baseline: also train stage ``contrastive`` alone from the same initial weights, for comparison.
    """

    stages: tuple[str, ...] = STAGES
    output_dir: str = "outputs/run"
    overwrite: bool = False
    resume: bool = False
    seed: int = 1234
    log_interval: int = 10
    wandb_project: str | None = None
    evaluate: bool = False
    with_baseline: bool = False
    model: ModelSettings = field(default_factory=ModelSettings)
    freeze: FreezeSettings = field(default_factory=FreezeSettings)
    adapter: AdapterSettings = field(default_factory=AdapterSettings)
    recompute: RecomputeSettings = field(default_factory=RecomputeSettings)
    parallel: ParallelSettings = field(default_factory=ParallelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    warmup: WarmupSettings = field(default_factory=WarmupSettings)
    bridge: BridgeSettings = field(default_factory=BridgeSettings)
    contrastive: ContrastiveSettings = field(default_factory=ContrastiveSettings)

    def __post_init__(self) -> None:
        unknown = [stage for stage in self.stages if stage not in STAGES]
        require(not unknown, f"unknown stage(s) {unknown}: choose from {', '.join(STAGES)}")
        order = [STAGES.index(stage) for stage in self.stages]
        require(
            bool(order) and order == sorted(set(order)),
            f"stages {list(self.stages)} must be one or more of {', '.join(STAGES)}, in this order, each once",
        )
        # The shell writes the home folder for it only at the start of a word, and YAML not at all.
        require(
            not self.output_dir.startswith("~"),
            f"output_dir is {self.output_dir}, which would be a folder of that name: write the home folder out",
        )
        require(self.seed >= 0, f"seed is {self.seed}, must not be negative")
        require(self.log_interval >= 1, f"log_interval is {self.log_interval}, needs 1 or more")
        require(
            not (self.resume and self.overwrite),
            "resume goes on with the run in output_dir and overwrite removes it: choose one of the two",
        )
        require(
            not self.model.fp8_param or self.parallel.use_distributed_optimizer,
            "model.fp8_param needs master weights elsewhere: set parallel.use_distributed_optimizer to true",
        )
        require(
            not (self.freeze.language and self.optimizer.weight_decay),
            f"freeze.language with optimizer.weight_decay {self.optimizer.weight_decay} would shrink the frozen rows "
            f"of the embedding, of which the mask token's row trains: set weight_decay to 0",
        )
        require(
            not (self.with_baseline and self.stages == ("contrastive",)),
            "with_baseline trains stage contrastive alone, and so does the run itself with stages [contrastive]: set "
            "with_baseline to false, or name an earlier stage too",
        )
        self._check_validation()
        if self.data.sources:
            self._check_sources()
        if self.adapter.is_used:
            self._check_adapter()

    def _check_validation(self) -> None:
        interval, trained = self.validation.interval, [*self.stages, *(["contrastive"] if self.with_baseline else [])]
        longest = max(self.stage(name).steps for name in trained)
        require(
            interval is None or interval <= longest,
            f"validation.interval {interval} would have no effect: no stage of the run has more than {longest} steps; "
            f"lower it, or set it to null",
        )

    def _check_sources(self) -> None:
        measured = self.evaluate or self.validation.interval is not None
        require(
            not (measured and self.data.path is None),
            "evaluate and validation.interval measure on the pools in data.path, which data.sources does not replace: "
            "set data.path, too, to a folder with eval_heldout.jsonl",
        )
        weighted = [s.name for s in self.data.sources if "contrastive" in s.stages and s.weight is not None]
        require(
            not (self.contrastive.per_source_batches and weighted),
            f"contrastive.per_source_batches gives each source the steps that its rows fill, so the weights of "
            f"data.sources {weighted} would have no effect: leave the weights out, or set per_source_batches to false",
        )

    def _check_adapter(self) -> None:
        for part, frozen in (("language", self.freeze.language), ("vision", self.freeze.vision)):
            targets = getattr(self.adapter, f"{part}_targets")
            require(
                not (frozen and targets),
                f"freeze.{part} and adapter.{part}_targets {list(targets)} contradict each other: set freeze.{part} "
                f"to false, or adapter.{part}_targets to []",
            )
        require(
            not (self.freeze.merger and {"mlp.0", "mlp.2"} & set(self.adapter.vision_targets)),
            "freeze.merger and the merger's mlp.0 or mlp.2 in adapter.vision_targets contradict each other",
        )
        require(
            not self.optimizer.weight_decay,
            f"adapter.kind {self.adapter.kind} with optimizer.weight_decay {self.optimizer.weight_decay} would shrink "
            f"the frozen rows of the embedding, of which the mask token's row trains: set weight_decay to 0",
        )

    def stage(self, name: str) -> StageSettings:
        """The settings of stage ``name``."""
        return getattr(self, name)

    @property
    def frozen_parts(self) -> FreezeSettings:
        """``freeze`` as it is applied: with adapters every pretrained weight is frozen, whatever it says."""
        return FreezeSettings(vision=True, merger=True, language=True) if self.adapter.is_used else self.freeze

    def learned_temperature(self, stage: str) -> float | None:
        """Initial value of the temperature that ``stage`` trains; None if it trains none."""
        own = self.contrastive
        return own.temperature if stage == "contrastive" and own.learnable_temperature else None
