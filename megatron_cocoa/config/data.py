"""Where samples come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from megatron_cocoa.config.checks import require
from megatron_cocoa.config.names import STAGES

COLUMNS = "id image_path caption source qry qry_image_path pos_text pos_image_path neg_text neg_image_path".split()
"""Our names of columns, which ``SourceSettings.columns`` may map."""


@dataclass(frozen=True)
class SourceSettings:
    """One of several places that samples come from.

    Args:
        name: what logs and manifests call it.
        path: the file or folder that ``format`` reads.
        format: ``jsonl`` (a file, or a folder with a file for each stage), ``mmeb-train`` (folder of one subset, with
            parquet files), ``hf-datasets`` (folder that ``save_to_disk`` wrote) or ``webdataset`` (tar shards).
        split: ``mmeb-train``: ``original``, ``diverse_instruction`` or ``train``; ``hf-datasets``: of a
            ``DatasetDict``. None takes the only one there is.
        image_root: folder that image paths are relative to and may not leave; None for the file's or dataset's own
            (``mmeb-train``: the folder above the subset's).
        weight: share of the samples, relative to the other sources. If all sources leave it None, an epoch has each row
            once.
        max_rows: use at most this many rows, drawn by the seed.
        stages: the stages that read this source.
        columns: from this project's names of columns to the source's, such as ``{caption: text, image_path: image}``.
    """

    name: str
    path: str
    format: Literal["jsonl", "mmeb-train", "hf-datasets", "webdataset"] = "jsonl"
    split: str | None = None
    image_root: str | None = None
    weight: float | None = None
    max_rows: int | None = None
    stages: tuple[str, ...] = STAGES
    columns: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class DataSettings:
    """Where samples come from and how they are packed.

    Args:
        path: folder with ``warmup.jsonl``, ``bridge.jsonl`` and ``contrastive.jsonl`` (see docs/data.md), whose
            image paths are relative to it.
        sources: read a mixture of these instead of the files in ``path``; in YAML a list of records.
        max_length: tokens per sample; longer texts are cut, image tokens never are (published: 4096).
        num_workers: processes per data-parallel replica that decode and pack ahead of training, beside one that
            plans steps, or several where there are 32 data-parallel ranks or more; 0 for none.
        tokens_per_microbatch: divide a step into as few packs of at most this many tokens as it takes, and pad a
            rank's packs to the longest of them, so that pipeline stages need not exchange shapes;
            ``micro_batch_size`` is then ignored. None puts ``micro_batch_size`` samples into each pack and does not pad
            it.
    """

    path: str | None = None
    sources: tuple[SourceSettings, ...] = ()
    max_length: int = 4096
    num_workers: int = 0
    tokens_per_microbatch: int | None = None

    def __post_init__(self) -> None:
        require(self.num_workers >= 0, f"data.num_workers is {self.num_workers}, must not be negative")
        require(self.max_length >= 1, f"data.max_length is {self.max_length}, needs 1 or more")
        fixed = self.tokens_per_microbatch
        require(
            fixed is None or fixed >= self.max_length,
            f"data.tokens_per_microbatch {fixed} is less than data.max_length {self.max_length}: a sample of that "
            f"length would fit into no pack; raise the one or lower the other",
        )
        names = [source.name for source in self.sources]
        require(len(set(names)) == len(names), f"data.sources have the names {names}: each must occur once")
        for source in self.sources:
            self._check_source(source)
        for stage in STAGES:
            weights = [source.weight for source in self.sources if stage in source.stages]
            require(
                all(w is None for w in weights) or all(w is not None and w > 0 for w in weights),
                f"the weights of stage {stage}'s data.sources are {weights}: give each a positive one, or none any",
            )

    def _check_source(self, source: SourceSettings) -> None:
        unknown = [stage for stage in source.stages if stage not in STAGES]
        require(not unknown, f"data.sources: {source.name} names the stage(s) {unknown}, known are {list(STAGES)}")
        wrong = [column for column in source.columns if column not in COLUMNS]
        require(
            not wrong,
            f"data.sources: columns of {source.name} maps {wrong}: keys are our names of columns, "
            f"{', '.join(COLUMNS)}; values are the source's",
        )
        require(
            len(set(source.columns.values())) == len(source.columns),
            f"data.sources: columns of {source.name} takes one column of the source twice: {source.columns}",
        )
        require(
            len(source.stages) > 0,
            f"data.sources: no stage reads {source.name}, its stages are []: name some, or leave the source out",
        )
        require(
            source.max_rows is None or source.max_rows >= 1,
            f"data.sources: max_rows of {source.name} is {source.max_rows}, needs 1 or more",
        )
        require(
            source.split is None or source.format in ("mmeb-train", "hf-datasets"),
            f"data.sources: split {source.split!r} of {source.name} has no effect on format {source.format}",
        )
