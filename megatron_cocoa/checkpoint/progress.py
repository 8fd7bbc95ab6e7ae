"""How far a conversion has come, which takes an hour for a large model on a slow disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
Progress = Callable[[int, int], None]
"""Is told how many items are done, and of how many."""


def counted(items: Iterable[Item], progress: Progress | None) -> Iterator[Item]:
    """``items``, each of which is done when the next one is asked for."""
    items = list(items)
    for done, item in enumerate(items, start=1):
        yield item
        if progress is not None:
            progress(done, len(items))
