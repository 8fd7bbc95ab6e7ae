"""Random combinations of settings and of two layouts, each drawn from a number; what would be refused is drawn anew."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from megatron_cocoa.architecture import QwenVLArchitecture
from megatron_cocoa.config import (
    LANGUAGE_TARGETS,
    STAGES,
    VISION_TARGETS,
    AdapterSettings,
    CheckpointSettings,
    FreezeSettings,
    OptimizerSettings,
    ParallelSettings,
    RecomputeSettings,
    TrainSettings,
)
from megatron_cocoa.data.toy_model import SPECIAL_TOKENS, model_config
from megatron_cocoa.model.layout_checks import check_layout
from megatron_cocoa.parallel import topology
from megatron_cocoa.recipes.stage_checks import check_contrastive, check_microbatches
from tests.distributed.check import degrees
from tests.distributed.tiny_run import SIZES, tiny_settings
from tests.distributed.training import OVERLAP
from tests.distributed.uneven import OBJECTIVES

STEPS = 6
MOST_DRAWS = 1000

ADAM_EPS = 1e-3
"""About the size of a clipped gradient's entries. Packs of other lengths round gradients by 1e-6 of their largest, and
an update takes that as its own error only where epsilon keeps it from dividing by the smaller entries: biases, which
start at zero, were 1.6e-5 of their largest apart at 1e-4."""


@dataclass(frozen=True)
class Layout:
    """``parallel`` are fields of the settings of that name."""

    world_size: int
    parallel: dict


@dataclass(frozen=True)
class Combination:
    """The stage is stopped after ``stop_after`` steps at ``first`` and goes on at ``second``.

    ``computed`` are fields of the stage's settings beside those of ``objective``, ``packed`` those that the result may
    not depend on, and so ``data``, ``recompute`` and ``checkpoint``, fields of the settings of that name.
    """

    objective: str
    first: Layout
    second: Layout
    stop_after: int
    tied: bool = True
    computed: dict = field(default_factory=dict)
    packed: dict = field(default_factory=dict)
    data: dict = field(default_factory=dict)
    adapter: dict = field(default_factory=dict)
    freeze: dict = field(default_factory=dict)
    recompute: dict = field(default_factory=dict)
    checkpoint: dict = field(default_factory=dict)
    weight_decay: float = 0.0

    @property
    def stage(self) -> str:
        return OBJECTIVES[self.objective][0]

    def settings(self, folder: Path, output: Path, layout: Layout | None) -> TrainSettings:
        """Of the run at ``layout``, or with None of the reference."""
        parallel = ParallelSettings(**layout.parallel) if layout else None
        settings = tiny_settings(
            folder,
            steps=STEPS,
            parallel=parallel,
            adapter=AdapterSettings(**self.adapter),
            freeze=FreezeSettings(**self.freeze),
            optimizer=OptimizerSettings(adam_eps=ADAM_EPS, weight_decay=self.weight_decay),
        )
        stage = replace(settings.stage(self.stage), **OBJECTIVES[self.objective][1], **self.computed)
        settings = replace(settings, output_dir=str(output), **{self.stage: stage})
        if layout is None:
            return replace(settings, **{self.stage: replace(stage, micro_batch_size=stage.global_batch_size)})
        return replace(
            settings,
            data=replace(settings.data, **self.data),
            recompute=RecomputeSettings(**self.recompute),
            checkpoint=CheckpointSettings(**self.checkpoint),
            **{self.stage: replace(stage, **self.packed)},
        )


def drawn(number: int) -> tuple[Combination, int]:
    """Combination ``number``, and how many were refused before it."""
    rng = random.Random(number)
    for refused in range(MOST_DRAWS):
        combination = _draw(rng)
        if not _is_refused(combination):
            return combination, refused
    raise AssertionError(f"combination {number}: all of {MOST_DRAWS} were refused")


def _draw(rng: random.Random) -> Combination:
    stage = rng.choice(STAGES)
    objective = rng.choice([name for name, (of, _) in OBJECTIVES.items() if of == stage])
    # Within a stage the optimizer's kind may not change.
    kind = dict(use_distributed_optimizer=rng.random() < 0.5)
    return Combination(
        objective=objective,
        first=_layout(rng, kind),
        second=_layout(rng, kind),
        stop_after=rng.randrange(1, STEPS),
        tied=rng.random() < 0.5,
        computed=dict(global_batch_size=rng.choice((8, 12))) | _more(rng, stage),
        packed=dict(micro_batch_size=rng.choice((1, 2, 3, 4, 12))),
        data=dict(num_workers=rng.choice((0, 1, 2)), tokens_per_microbatch=rng.choice((None, None, 128, 192, 256))),
        **(dict(adapter=_adapter(rng)) if rng.random() < 0.5 else dict(freeze=_freeze(rng))),
        recompute=_recompute(rng, "vision") | _recompute(rng, "language"),
        checkpoint=dict(save_interval=rng.choice((None, 1, 2)), asynchronous=rng.random() < 0.25),
        weight_decay=rng.choice((0.0, 0.1)),
    )


def _layout(rng: random.Random, kind: dict) -> Layout:
    """Degrees that divide the world, since few of all do; what else does not fit is refused."""
    world_size = rng.choice((1, 2, 2, 3, 4, 4, 6, 8, 8))
    rest, found = world_size, {}
    for name in rng.sample(("tp", "pp", "cp"), 3):
        found[name] = rng.choice([degree for degree in (1, 2, 3, 4) if rest % degree == 0])
        rest //= found[name]
    more: dict = rng.choice(({}, dict(overlap_grad_reduce=True), OVERLAP if kind["use_distributed_optimizer"] else {}))
    if found["pp"] > 1:
        ends = {f"num_layers_in_{end}_pipeline_stage": rng.choice((None, 1, 2)) for end in ("first", "last")}
        more = more | rng.choice(({}, dict(vpp=2), dict(vpp=2), ends))
    parallel = degrees(**found, sequence_parallel=rng.random() < 0.5, **(kind | more))
    # What is not set is left out of messages.
    return Layout(world_size, {name: value for name, value in parallel.items() if value not in (None, False)})


def _more(rng: random.Random, stage: str) -> dict:
    if stage == "warmup":
        noise = rng.choice(("normal", "shared", "zero", "mean"))
        return dict(mae_noise=noise, mae_target=rng.choice(("pixels", "normalized")))
    return dict(query_unit_mask_ratio=rng.choice((0.0, 0.5))) if stage == "bridge" else {}


def _adapter(rng: random.Random) -> dict:
    return dict(
        kind=rng.choice(("lora", "dora")),
        rank=rng.choice((3, 4, 8)),
        alpha=6.0,
        # Masks follow from the place of a rank.
        dropout=0.0,
        init=rng.choice(("gaussian", "kaiming")),
        rslora=rng.random() < 0.5,
        language_targets=_some(rng, LANGUAGE_TARGETS),
        vision_targets=_some(rng, VISION_TARGETS),
    )


def _some(rng: random.Random, names: tuple[str, ...]) -> tuple[str, ...]:
    """All in half of the cases, else any number of them."""
    return names if rng.random() < 0.5 else tuple(name for name in names if rng.random() < 0.5)


def _freeze(rng: random.Random) -> dict:
    return {part: True for part in ("vision", "merger", "language") if rng.random() < 0.2}


def _recompute(rng: random.Random, part: str) -> dict:
    mode = rng.choice(("none", "mlp", "selective", "full"))
    number = rng.choice((None, 1, 2)) if mode in ("mlp", "full") else None
    return {part: mode, f"{part}_num_layers": number}


def _is_refused(combination: Combination) -> bool:
    """Whether settings, model or batch sizes would be refused at one of the two layouts."""
    try:
        for layout in (combination.first, combination.second):
            settings = combination.settings(Path(), Path(), layout)
            replicas = settings.parallel.data_parallel_size(layout.world_size)
            check_layout(
                _architecture(), model=settings.model, parallel=settings.parallel, recompute=settings.recompute
            )
            context = SimpleNamespace(settings=settings, architecture=_architecture())
            with patch.object(topology, "data_parallel_size", return_value=replicas):
                check_microbatches(context, combination.stage)
            if combination.stage == "contrastive":
                check_contrastive(context)
    except ValueError:
        return True
    return combination.first == combination.second


@functools.cache
def _architecture() -> QwenVLArchitecture:
    return QwenVLArchitecture.from_huggingface(
        model_config(SIZES, dict.fromkeys(SPECIAL_TOKENS, 0), num_tokens=SIZES.tokenizer_pieces)
    )
