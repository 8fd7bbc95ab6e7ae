"""What a report shows, as plain data: the caller fills these in, ``report.py`` and ``report_table.py`` draw them.

Every part may be missing; the report then says so in its place. Pictures are PNG files in memory (see
``pictures.encode_png``). All text is taken as untrusted and escaped where it is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from megatron_cocoa.evaluation.embedding_map import EmbeddingMap
from megatron_cocoa.evaluation.metrics import RetrievalResult

Direction = Literal["text_to_image", "image_to_text"]
Pool = Literal["heldout", "training"]
StripKind = Literal["hit", "miss", "worst"]

DIRECTION_NAMES: dict[str, str] = {"text_to_image": "text to image", "image_to_text": "image to text"}
POOL_NAMES: dict[str, str] = {"heldout": "Held-out concepts", "training": "Training concepts"}


@dataclass(frozen=True)
class RecallRow:
    """One model's recall over one pool in one direction.

    model: as shown, such as ``untrained`` or ``after warmup``; rows appear in the order given.
    kind:  ``untrained``, ``stage`` (a stage of the run) or ``baseline`` (contrastive learning alone).
    """

    model: str
    pool: Pool
    direction: Direction
    result: RetrievalResult
    kind: Literal["untrained", "stage", "baseline"] = "stage"


@dataclass(frozen=True)
class StageCurve:
    """Losses of one stage.

    steps:   optimizer steps, ascending.
    losses:  name to one value a step; non-finite values are left out of the curve and counted.
    units:   name to the unit on its axis, such as ``nats per token``.
    seconds: wall time of the stage, None if unknown.

    Raises:
        ValueError: if a loss does not have one value a step, or steps do not ascend.
    """

    stage: str
    steps: tuple[int, ...]
    losses: Mapping[str, tuple[float, ...]]
    units: Mapping[str, str] = field(default_factory=dict)
    seconds: float | None = None

    def __post_init__(self) -> None:
        if any(b <= a for a, b in zip(self.steps, self.steps[1:])):
            raise ValueError(f"steps of stage {self.stage!r} do not ascend strictly")
        for name, values in self.losses.items():
            if len(values) != len(self.steps):
                raise ValueError(
                    f"loss {name!r} of stage {self.stage!r} has {len(values)} values for {len(self.steps)} steps"
                )


VISIBLE_BINS = ((0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, math.inf))
"""Numbers of visible B tokens that are measured together, first and last."""


@dataclass(frozen=True)
class VisibleTokens:
    """Block B's loss over samples with a number of visible tokens.

    label:      the numbers, such as ``3 to 4``.
    own, other: nats per masked token with its own A, and with another sample's.
    num_tokens: masked tokens measured.
    """

    label: str
    own: float
    other: float
    num_tokens: int


@dataclass(frozen=True)
class BridgeEvidence:
    """Block B's loss when the bridge comes from its own block A, and from another sample's A.

    model:               the model measured, such as ``after bridge``.
    own_nll, other_nll:  per sample, the *sum* over its masked B tokens of the cross-entropy in nats.
    num_tokens:          per sample, how many masked B tokens that sum runs over.
    num_visible:         per sample, how many B tokens are not masked; empty where that is not known.

    Raises:
        ValueError: if the first three do not have one positive entry a sample, or the fourth another number.
    """

    model: str
    own_nll: tuple[float, ...]
    other_nll: tuple[float, ...]
    num_tokens: tuple[int, ...]
    num_visible: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.num_visible and len(self.num_visible) != len(self.num_tokens):
            raise ValueError(f"{len(self.num_visible)} counts of visible tokens for {len(self.num_tokens)} samples")
        counts = len(self.own_nll), len(self.other_nll), len(self.num_tokens)
        if len(set(counts)) != 1 or not self.num_tokens or min(self.num_tokens) < 1:
            raise ValueError(
                f"bridge evidence needs one own sum, one other sum and a positive token count a sample, found "
                f"{counts} entries"
            )

    @property
    def own(self) -> float:
        """Nats per token with its own A."""
        return math.fsum(self.own_nll) / sum(self.num_tokens)

    @property
    def other(self) -> float:
        """Nats per token with another sample's A."""
        return math.fsum(self.other_nll) / sum(self.num_tokens)

    @property
    def gain(self) -> tuple[float, float, float]:
        """``other - own`` in nats per token, with its 95% interval ``(value, low, high)``; NaN ends for one sample.

        Samples are the independent units, not tokens: the standard error is that of a ratio of sums over samples
        (Cochran, Sampling Techniques, section 2.11), normal approximation.
        """
        tokens, samples = sum(self.num_tokens), len(self.num_tokens)
        gain = self.other - self.own
        if samples < 2:
            return gain, math.nan, math.nan
        residuals = (
            other - own - gain * count for own, other, count in zip(self.own_nll, self.other_nll, self.num_tokens)
        )
        variance = math.fsum(r * r for r in residuals) * samples / (samples - 1)
        margin = 1.959963984540054 * math.sqrt(variance) / tokens
        return gain, gain - margin, gain + margin

    @property
    def by_visible(self) -> list[VisibleTokens]:
        """The same, apart for samples with few and with many visible B tokens; empty bins are left out.

        What A adds should matter most where little of B is to be seen.
        """
        bins = []
        for low, high in VISIBLE_BINS:
            inside = [i for i, n in enumerate(self.num_visible) if low <= n <= high]
            tokens = sum(self.num_tokens[i] for i in inside)
            if tokens:
                label = f"{low}" if low == high else f"{low} or more" if high == math.inf else f"{low} to {high}"
                own, other = (math.fsum(nll[i] for i in inside) / tokens for nll in (self.own_nll, self.other_nll))
                bins.append(VisibleTokens(label, own, other, tokens))
        return bins

    @property
    def share_better(self) -> float:
        """Share of samples whose own A gives the lower loss; a tie counts as half."""
        wins = (1.0 if own < other else 0.5 * (own == other) for own, other in zip(self.own_nll, self.other_nll))
        return math.fsum(wins) / len(self.own_nll)


@dataclass(frozen=True)
class Reconstruction:
    """One picture as the model saw it, as the image decoder filled it in, and as it is (PNG bytes each).

    reconstructed: predictions at masked units, the original at all others.
    mae:           mean squared error per value at the masked units, in the units of the training loss.
    """

    caption: str
    masked: bytes
    reconstructed: bytes
    original: bytes
    mae: float | None = None


@dataclass(frozen=True)
class StripCandidate:
    """One of the nearest candidates: a picture (``png``), a text, or both; ``right`` if it answers the query."""

    cosine: float
    right: bool
    text: str = ""
    png: bytes | None = None


@dataclass(frozen=True)
class RetrievalStrip:
    """A query and its nearest candidates, best first.

    rank: expected rank of the best right candidate among ``num_candidates``, from 1.
    kind: ``hit`` where a right candidate is first, ``miss`` where none is, ``worst`` for the misses of highest rank.
    """

    pool: Pool
    direction: Direction
    candidates: tuple[StripCandidate, ...]
    rank: float
    num_candidates: int
    query_text: str = ""
    query_png: bytes | None = None
    kind: StripKind = "hit"


@dataclass(frozen=True)
class Credit:
    """Whose work is shown, under which licence, and how it was changed; ``url`` is linked if it is http(s)."""

    title: str
    holder: str
    licence: str
    url: str = ""
    changes: str = ""


TWEMOJI_CREDIT = Credit(
    title="Twemoji graphics",
    holder="Copyright Twitter, Inc and other contributors",
    licence="CC-BY 4.0",
    url="https://creativecommons.org/licenses/by/4.0/",
    changes="resized, put on a plain background, partly masked and reconstructed",
)


@dataclass(frozen=True)
class ReportData:
    """Everything a report shows.

    title:         of the page.
    ran:           what ran, in the order to show: label to value (preset, stages, data, duration, ...).
    settings:      the settings that matter, label to value.
    resolved:      the resolved configuration as text (YAML), folded away on the page.
    recall:        see ``RecallRow``.
    curves:        see ``StageCurve``.
    bridge:        see ``BridgeEvidence``.
    reconstructions, strips: pictures.
    maps:          title to the map of a pool's embeddings.
    credits:       works shown on the page.
    environment:   versions, kernels and hardware, label to value.
    notes:         sentences to show under the summary, such as counts of skipped rows.
    """

    title: str
    ran: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    resolved: str = ""
    recall: tuple[RecallRow, ...] = ()
    curves: tuple[StageCurve, ...] = ()
    bridge: tuple[BridgeEvidence, ...] = ()
    reconstructions: tuple[Reconstruction, ...] = ()
    strips: tuple[RetrievalStrip, ...] = ()
    maps: Mapping[str, EmbeddingMap] = field(default_factory=dict)
    credits: tuple[Credit, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
