"""How far a stage has come: what a checkpoint keeps of the trainer beside weights and optimizer."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Progress:
    """Counters of one stage. Everything else of the trainer follows from ``step`` and the seed.

    step:             optimizer steps done, skipped ones included.
    skipped:          steps that were not applied because their loss or gradient was not finite, or the gradient's
                      norm stood out.
    skipped_in_a_row: how many of the last steps were skipped without one applied in between.
    samples, tokens:  over all ranks.
    seconds:          wall time of the steps, over all processes that have worked on the stage.
    data_wait:        seconds of these that the first rank waited for its loader.
    best_value:       of the validation's metric so far; None before the first validation.
    best_step:        at which it was measured.
    validated:        the last step that was validated.
    recent_norms:     gradient norms of the last applied steps, oldest first.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    samples: int = 0
    tokens: int = 0
    seconds: float = 0.0
    data_wait: float = 0.0
    best_value: float | None = None
    best_step: int | None = None
    validated: int = 0
    recent_norms: list[float] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Progress:
        """The counters that ``as_dict`` gave.

        Raises:
            ValueError: for other fields, as a checkpoint of another version may have.
        """
        try:
            return cls(**values)
        except TypeError as error:
            raise ValueError(f"the checkpoint's progress is not what this version writes: {error}") from error
