"""Random states of one pass over a step's micro-batches, so that a second pass draws the same dropout masks.

Gradient caching runs each micro-batch twice: once for its embedding, once for its gradient. The gradient belongs to
the embedding only if dropout drops the same units both times. States are recorded for each run of a chunk on this
rank, since every pipeline stage and virtual chunk draws by itself. They cover all generators: the CPU's, the
device's, and those that Megatron tracks for tensor parallelism. Activation recompute records the states of its own
forward pass, which is the second pass here.
"""

from __future__ import annotations

from collections.abc import Hashable

from megatron_cocoa.parallel.random_states import RandomStates, random_states, set_random_states


class RandomStateTape:
    """Records random states by key in a first pass and sets them again in a second one.

    What runs between the two passes, or at the start of the second without a replay, draws on from the first.
    """

    def __init__(self) -> None:
        self._states: dict[Hashable, RandomStates] = {}
        self._after: RandomStates | None = None

    def record(self, key: Hashable) -> None:
        """Remember the states as they are now, before the run ``key``."""
        self._states[key] = random_states()

    def replay(self, key: Hashable) -> None:
        """Set the states as they were before the run ``key``; the first call ends what is drawn for the first time."""
        if self._after is None:
            self._after = random_states()
        set_random_states(self._states[key])

    def go_on(self) -> None:
        """Leave the states as they were before the first replay, in whatever order the runs came after it."""
        if self._after is not None:
            set_random_states(self._after)
