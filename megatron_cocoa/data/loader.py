"""The micro-batches of one stage, for one data-parallel rank, step by step, resumable to the sample."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from megatron_cocoa.architecture import QwenVLArchitecture, VisionGeometry
from megatron_cocoa.batch import MaskKind, PackedBatch
from megatron_cocoa.config import TrainSettings
from megatron_cocoa.data import preprocess
from megatron_cocoa.data.collate import PackOptions
from megatron_cocoa.data.cost import CostModel
from megatron_cocoa.data.feed import Made, packs_from
from megatron_cocoa.data.order import MAX_SUBSTITUTES
from megatron_cocoa.data.preprocess import PictureLoader, check_image_size, load_processor
from megatron_cocoa.data.samples import SampleBuilder
from megatron_cocoa.data.sources import MAX_BAD_SHARE
from megatron_cocoa.data.stages import StageData, stage_data
from megatron_cocoa.data.step_plan import StepPlanner, StepShape
from megatron_cocoa.data.tokenizer import TokenizerBundle


class StageLoader:
    """Feeds one stage.

    The samples of a step, their masks and their noise follow from the seed and the position in the global stream
    alone, so losses do not depend on how many ranks share the work. Which rank and pack a sample of the step goes to
    is decided by cost, and by length where packs have a budget (``packing.py``). With ``data.num_workers`` above 0
    packs are made ahead by other processes; what goes wrong there is raised by ``next_step``.

    Args:
        stage: ``warmup``, ``bridge`` or ``contrastive``.
        settings: of the run; ``model.path`` and ``data.path`` or ``data.sources`` must be set.
        bundle: from ``load_tokenizer``.
        architecture: of ``model.path``.
        data_parallel_rank, data_parallel_size: this rank's place.
        needs_pixels, needs_unit_targets, pad_to_multiple_of: see ``PackOptions``.
        packs_multiple_of: where packs have a budget, a rank's number of them is a multiple of this.
        defers_all: the first pack of a step holds 8-bit pictures, too, as the others do.
        data: of ``stage_data``; None reads it.

    Raises:
        ValueError: for a missing path or file, unusable rows, or batch sizes that do not divide.
    """

    def __init__(
        self,
        stage: str,
        settings: TrainSettings,
        *,
        bundle: TokenizerBundle,
        architecture: QwenVLArchitecture,
        data_parallel_rank: int,
        data_parallel_size: int,
        needs_pixels: bool = True,
        needs_unit_targets: bool = True,
        pad_to_multiple_of: int = 1,
        packs_multiple_of: int = 1,
        defers_all: bool = False,
        data: StageData | None = None,
    ) -> None:
        self._stage_settings = settings.stage(stage)
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(f"data_parallel_rank is {data_parallel_rank}, needs to lie in [0, {data_parallel_size})")
        shape = self._step_shape(settings, data_parallel_rank, data_parallel_size, packs_multiple_of)
        if shape.budget is not None and shape.budget % pad_to_multiple_of:
            raise ValueError(
                f"data.tokens_per_microbatch {shape.budget} is not a multiple of {pad_to_multiple_of}, which the "
                f"parallel layout needs"
            )
        self._data = stage_data(stage, settings) if data is None else data
        self._order = self._data.order()
        self._identity = _identity(stage, settings, self._data) | self._order.identity
        vision = architecture.vision
        pictures = self._picture_loader(settings, vision)
        self._planner = StepPlanner(
            self._data,
            self._order,
            builder=self._sample_builder(settings, bundle, pictures, vision),
            options=PackOptions(
                pictures=pictures,
                vision=vision,
                pad_token_id=bundle.pad_token_id,
                pad_to_multiple_of=pad_to_multiple_of,
                needs_pixels=needs_pixels,
                needs_unit_targets=needs_unit_targets,
                normalize_unit_targets=getattr(self._stage_settings, "mae_target", "pixels") == "normalized",
                embedding_mask=MaskKind(self._stage_settings.embedding_form.attention),
                defer_floats=True,
            ),
            cost=CostModel.from_architecture(architecture),
            shape=shape,
            defers_all=defers_all,
        )
        self._pad_token_id = bundle.pad_token_id
        self._num_workers = settings.data.num_workers
        self._position = 0
        self._plan_digest = 0
        self._counts: Counter = Counter()
        self._packs: Iterator[Made] | None = None

    def next_step(self) -> list[PackedBatch]:
        """This rank's micro-batches of the next optimizer step, on the CPU.

        Of several, only the first holds its pixels; the others hold 8-bit pictures until they are ``materialized``.
        Under ``data.tokens_per_microbatch`` all have the length of the longest.

        Raises:
            ValueError: if more than ``MAX_BAD_SHARE`` of the pictures cannot be used, or a sample is longer than
                ``data.tokens_per_microbatch``.
        """
        if self._packs is None:
            self._packs = packs_from(self._planner, self._position, num_workers=self._num_workers)
        batches: list[PackedBatch] = []
        while True:
            try:
                plan, batch, counts = next(self._packs)
            except ValueError:
                # A generator that has raised is at its end: asked again, the stream starts anew from its position.
                self.close()
                raise
            assert (plan.step, plan.index) == (self._position, len(batches)), (plan, self._position)
            batches.append(batch)
            self._counts.update(counts)
            if len(batches) == plan.count:
                break
        if self._planner.shape.budget is not None:
            # Only now: a substitute may have changed the length of a pack.
            longest = max(batch.num_tokens for batch in batches)
            batches = [batch.filled_to(longest, pad_token_id=self._pad_token_id) for batch in batches]
        self._counts["packed"] += sum(batch.num_tokens for batch in batches)
        self._counts.update(steps=1, rank_imbalance=plan.rank_imbalance, pack_imbalance=plan.pack_imbalance)
        self._position += self._stage_settings.global_batch_size
        self._plan_digest = plan.digest
        self._check_skipped()
        return batches

    def state_dict(self) -> dict:
        """Place in the global stream: the same on every rank, and valid for any data-parallel size."""
        return {**self._identity, "position": self._position}

    def load_state_dict(self, state: dict) -> None:
        """Continue as if the run had never stopped.

        Raises:
            ValueError: if the state belongs to another stage, seed or set of rows, where the stream would differ.
        """
        # States of earlier versions say nothing of what is in the rows.
        found = {name: state.get(name) for name in self._identity if name in state or name != "rows_digest"}
        differing = [name for name, value in found.items() if value != self._identity[name]]
        if differing == ["rows_digest"]:
            raise ValueError(
                f"the data of stage {self._identity['stage']} has changed since the loader state was saved: as many "
                f"rows, but other ids, texts, picture paths or another order (rows_digest {found['rows_digest']}, now "
                f"{self._identity['rows_digest']}); resume with the same data"
            )
        if differing:
            raise ValueError(
                f"the saved loader state is of {found}, this run's loader is {self._identity}: the stream of samples "
                f"would differ; resume with the same data and seed"
            )
        self.close()
        self._position = int(state["position"])

    def statistics(self) -> dict[str, float]:
        """Counts of this rank since the start, and ratios.

        Keys: ``rows``, ``dropped/<reason>`` and ``flipped`` (whole data); what the stage's data and order tell of
        the rows, such as ``rows_with_fewer_hard_negatives`` and ``left_out_per_epoch``; ``samples``, ``decoded``
        (pictures read and decoded), ``skipped/<reason>``, ``cut_tokens``, ``text_mask_ratio`` and ``unit_mask_ratio``
        as drawn (this rank's share so far); ``packs_filled``: the share of its packs' tokens that belongs to samples;
        ``rank_imbalance`` and ``pack_imbalance``: by how much the costliest rank and pack of a step exceed the mean,
        on average over the steps.
        """
        row_set, counts = self._data.row_set, self._counts
        report: dict[str, float] = {"rows": len(row_set.rows), "flipped": row_set.flipped}
        report.update({f"dropped/{reason}": number for reason, number in row_set.dropped.items()})
        report.update({**self._data.statistics(), **self._order.statistics()})
        report.update({name: n for name, n in counts.items() if name.startswith("skipped/")})
        report.update({name: counts[name] for name in ("samples", "decoded", "cut_tokens")})
        for kind in ("text", "unit"):
            if counts[f"{kind}_eligible"]:
                report[f"{kind}_mask_ratio"] = counts[f"{kind}_masked"] / counts[f"{kind}_eligible"]
        if counts["steps"]:
            report["packs_filled"] = counts["tokens"] / counts["packed"]
            report |= {name: counts[name] / counts["steps"] for name in ("rank_imbalance", "pack_imbalance")}
        return report

    def num_skipped(self) -> int:
        """Samples of this rank whose pictures could not be used, since the start of the process."""
        return sum(number for name, number in self._counts.items() if name.startswith("skipped/"))

    def plan_digest(self) -> int:
        """63 bits that tell what the last step's plan gives to all ranks: the same on each, or one has misread."""
        return self._plan_digest

    def close(self) -> None:
        """End the worker processes, if there are any. Safe to call twice."""
        packs, self._packs = self._packs, None
        if packs is not None:
            # The workers end with the generator.
            packs.close()

    def _step_shape(self, settings: TrainSettings, rank: int, num_ranks: int, packs_multiple_of: int) -> StepShape:
        stage, budget = self._stage_settings, settings.data.tokens_per_microbatch
        share = stage.samples_per_rank(num_ranks)
        return StepShape(
            global_batch_size=stage.global_batch_size,
            rank=rank,
            num_ranks=num_ranks,
            samples_per_pack=share if budget else stage.samples_per_microbatch(num_ranks),
            budget=budget,
            packs_multiple_of=packs_multiple_of,
        )

    def _sample_builder(
        self, settings: TrainSettings, bundle: TokenizerBundle, pictures: PictureLoader, vision: VisionGeometry
    ) -> SampleBuilder:
        return SampleBuilder(
            bundle=bundle,
            vision=vision,
            pictures=pictures,
            max_length=settings.data.max_length,
            image_placeholder=self._stage_settings.embedding_form.image_placeholder,
        )

    def _picture_loader(self, settings: TrainSettings, vision: VisionGeometry) -> PictureLoader:
        # ``PictureLoader`` checks it as well, but cannot name the setting.
        check_image_size(self._stage_settings.image_size, vision, name=f"{self._stage_settings.stage}.image_size")
        return PictureLoader(
            Path(settings.data.path or "."),
            processor=load_processor(settings.model.path),
            vision=vision,
            image_size=self._stage_settings.image_size,
            min_image_tokens=self._stage_settings.min_image_tokens,
            max_image_tokens=self._stage_settings.max_image_tokens,
            # Each worker has a cache of its own.
            cache_bytes=preprocess.CACHE_BYTES // max(1, settings.data.num_workers),
        )

    def _check_skipped(self) -> None:
        skipped = {name: n for name, n in self._counts.items() if name.startswith("skipped/")}
        total = sum(skipped.values())
        if total > MAX_SUBSTITUTES and total > MAX_BAD_SHARE * self._counts["rows"]:
            raise ValueError(
                f"{total} pictures could not be used for {self._counts['rows']} rows ({skipped}), at most "
                f"{MAX_BAD_SHARE:.0%} may fail: check data.path"
            )


def _identity(stage: str, settings: TrainSettings, data: StageData) -> dict:
    """What must be the same for a saved position to mean the same samples; plain enough for JSON."""
    rows = data.row_set.rows
    identity = {"stage": stage, "seed": settings.seed, "num_rows": len(rows), "rows_digest": rows.digest()}
    return identity | ({"sources": [list(part) for part in data.row_set.parts]} if data.row_set.parts else {})
