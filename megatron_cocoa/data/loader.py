"""The micro-batches of one stage, for one data-parallel rank, step by step, resumable to the sample."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from megatron_cocoa.batch import PackedBatch
from megatron_cocoa.config import TrainSettings
from megatron_cocoa.data.collate import PackOptions
from megatron_cocoa.data.geometry import VisionGeometry
from megatron_cocoa.data.prepared import PreparedSample
from megatron_cocoa.data.preprocess import PictureError, PictureLoader, load_processor
from megatron_cocoa.data.samples import SampleBuilder
from megatron_cocoa.data.sources import MAX_BAD_SHARE
from megatron_cocoa.data.stages import STAGE_DATA, StageData
from megatron_cocoa.data.tokenizer import TokenizerBundle

_MAX_SUBSTITUTES = 20


@dataclass
class _Step:
    """One prepared step and what was counted on the way."""

    batches: list[PackedBatch] = field(default_factory=list)
    counts: Counter = field(default_factory=Counter)


class StageLoader:
    """Feeds one stage.

    The samples of a step, their masks and their noise follow from the seed and the position in the global stream
    alone, so losses do not depend on how many ranks share the work. With ``data.num_workers`` above 0 the next step
    is prepared in a background thread; what goes wrong there is raised by ``next_step``.

    Every rank decodes every picture of its share, also where it needs no pixels: else ranks of one replica could
    disagree on which row a broken picture is replaced by.

    Args:
        stage: ``warmup``, ``bridge`` or ``contrastive``.
        settings: of the run; ``model.path`` and ``data.path`` must be set.
        bundle: from ``load_tokenizer``.
        vision: from ``VisionGeometry.from_model_folder``.
        data_parallel_rank, data_parallel_size: this rank's place.
        needs_pixels, needs_unit_targets, pad_to_multiple_of: see ``PackOptions``.

    Raises:
        ValueError: for a missing path or file, unusable rows, or batch sizes that do not divide.
    """

    def __init__(
        self,
        stage: str,
        settings: TrainSettings,
        *,
        bundle: TokenizerBundle,
        vision: VisionGeometry,
        data_parallel_rank: int,
        data_parallel_size: int,
        needs_pixels: bool = True,
        needs_unit_targets: bool = True,
        pad_to_multiple_of: int = 1,
    ) -> None:
        self._stage_settings = settings.stage(stage)
        self._num_microbatches = self._stage_settings.num_microbatches(data_parallel_size)
        self._samples_per_microbatch = self._stage_settings.samples_per_microbatch(data_parallel_size)
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise ValueError(f"data_parallel_rank is {data_parallel_rank}, needs to lie in [0, {data_parallel_size})")
        if settings.data.path is None or settings.model.path is None:
            raise ValueError("data.path and model.path must both be set: rows come from one, sizes from the other")
        folder = Path(settings.data.path)
        self._data: StageData = STAGE_DATA[stage](folder, settings)
        self._order = self._data.order()
        self._identity = {
            "stage": stage,
            "seed": settings.seed,
            "num_rows": len(self._data.row_set.rows),
            **self._order.identity,
        }
        self._rank = data_parallel_rank
        pictures = PictureLoader(
            folder,
            processor=load_processor(settings.model.path),
            vision=vision,
            image_size=self._stage_settings.image_size,
        )
        self._builder = SampleBuilder(
            bundle=bundle,
            vision=vision,
            pictures=pictures,
            max_length=settings.data.max_length,
            needs_noise=needs_pixels,
        )
        self._options = PackOptions(
            pictures=pictures,
            vision=vision,
            pad_token_id=bundle.pad_token_id,
            tokens_per_microbatch=settings.data.tokens_per_microbatch,
            pad_to_multiple_of=pad_to_multiple_of,
            needs_pixels=needs_pixels,
            needs_unit_targets=needs_unit_targets,
            normalize_unit_targets=getattr(self._stage_settings, "mae_target", "pixels") == "normalized",
            defer_floats=self._num_microbatches > 1,
        )
        self._position = 0
        self._counts: Counter = Counter()
        self._executor = ThreadPoolExecutor(1, f"{stage}-loader") if settings.data.num_workers > 0 else None
        self._ahead: tuple[int, Future[_Step]] | None = None

    def next_step(self) -> list[PackedBatch]:
        """This rank's micro-batches of the next optimizer step, on the CPU.

        Of several, only the first holds its pixels; the others hold 8-bit pictures until they are ``materialized``.

        Raises:
            ValueError: if more than ``MAX_BAD_SHARE`` of the pictures cannot be used, or a pack is longer than
                ``data.tokens_per_microbatch``.
        """
        prepared = self._take(self._position)
        self._position += self._stage_settings.global_batch_size
        self._counts.update(prepared.counts)
        self._check_skipped()
        if self._executor is not None:
            self._ahead = (self._position, self._executor.submit(self._prepare_step, self._position))
        return prepared.batches

    def state_dict(self) -> dict[str, int | str]:
        """Place in the global stream: the same on every rank, and valid for any data-parallel size."""
        return {**self._identity, "position": self._position}

    def load_state_dict(self, state: dict[str, int | str]) -> None:
        """Continue as if the run had never stopped.

        Raises:
            ValueError: if the state belongs to another stage, seed or number of rows, where the stream would differ.
        """
        found = {name: state.get(name) for name in self._identity}
        if found != self._identity:
            raise ValueError(
                f"the saved loader state is of {found}, this run's loader is {self._identity}: the stream of samples "
                f"would differ; resume with the same data and seed"
            )
        self._position = int(state["position"])

    def statistics(self) -> dict[str, float]:
        """Counts of this rank since the start, and ratios.

        Keys: ``rows``, ``dropped/<reason>`` and ``flipped`` (whole file); what the stage's data and order tell of
        the rows, such as ``rows_with_fewer_hard_negatives`` and ``left_out_per_epoch``; ``samples``,
        ``skipped/<reason>``, ``cut_tokens``, ``text_mask_ratio`` and ``unit_mask_ratio`` as drawn (this rank's share
        so far).
        """
        row_set, counts = self._data.row_set, self._counts
        report: dict[str, float] = {"rows": len(row_set.rows), "flipped": row_set.flipped}
        report.update({f"dropped/{reason}": number for reason, number in row_set.dropped.items()})
        report.update({**self._data.statistics(), **self._order.statistics()})
        report.update({name: n for name, n in counts.items() if name.startswith("skipped/")})
        report.update({name: counts[name] for name in ("samples", "cut_tokens")})
        for kind in ("text", "unit"):
            if counts[f"{kind}_eligible"]:
                report[f"{kind}_mask_ratio"] = counts[f"{kind}_masked"] / counts[f"{kind}_eligible"]
        return report

    def num_skipped(self) -> int:
        """Samples of this rank whose pictures could not be used, since the start of the process."""
        return sum(number for name, number in self._counts.items() if name.startswith("skipped/"))

    def close(self) -> None:
        """End the background thread, if there is one. Safe to call twice."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = self._ahead = None

    def _check_skipped(self) -> None:
        skipped = {name: n for name, n in self._counts.items() if name.startswith("skipped/")}
        total = sum(skipped.values())
        if total > _MAX_SUBSTITUTES and total > MAX_BAD_SHARE * self._counts["rows"]:
            raise ValueError(
                f"{total} pictures could not be used for {self._counts['rows']} rows ({skipped}), at most "
                f"{MAX_BAD_SHARE:.0%} may fail: check data.path"
            )

    def _take(self, position: int) -> _Step:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == position:
            return ahead[1].result()
        return self._prepare_step(position)

    def _prepare_step(self, position: int) -> _Step:
        size = self._samples_per_microbatch
        start = position + self._rank * self._num_microbatches * size
        step = _Step()
        for pack in range(self._num_microbatches):
            samples: list[PreparedSample] = []
            for place in range(start + pack * size, start + (pack + 1) * size):
                samples += self._prepare(place, position, step.counts)
            batch = self._data.collate(samples, self._options)
            step.batches.append(batch.materialized() if pack == 0 else batch)
            _count(samples, step.counts)
        return step

    def _prepare(self, place: int, step_position: int, counts: Counter) -> list[PreparedSample]:
        epoch, row = self._order.at(place)
        counts["rows"] += 1
        rows = self._data.row_set.rows
        for attempt in range(_MAX_SUBSTITUTES):
            try:
                return self._data.prepare(rows[row], self._builder, epoch=epoch, step=step_position)
            except PictureError as error:
                counts[f"skipped/{error.reason}"] += 1
                last = error
                row = self._order.substitute(place, attempt)
        raise ValueError(
            f"{_MAX_SUBSTITUTES} rows one after the other have unusable pictures (position {place} of stage "
            f"{self._identity['stage']}): check that data.path holds the pictures; the last error was: {last}"
        ) from last


def _count(samples: list[PreparedSample], counts: Counter) -> None:
    for sample in samples:
        counts["samples"] += 1
        counts["cut_tokens"] += sample.num_cut
        counts["text_eligible"] += sample.num_eligible
        counts["text_masked"] += sample.text_rows.size
        counts["unit_masked"] += sample.masked_units.size
        counts["unit_eligible"] += sample.feature_rows.size
