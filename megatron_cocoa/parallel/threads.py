"""A function's results over many items, in order, made by threads before they are asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, num_workers: int, num_ahead: int
) -> Iterator[Result]:
    """As ``map``, with results made while the caller uses those before them.

    Args:
        function: called in ``num_workers`` threads at a time; what it raises is raised here, in the place of its
            result, and nothing that comes after it is begun any more.
        items: taken one by one, in the caller's thread.
        num_workers: 0 calls ``function`` when its result is asked for, in the caller's thread.
        num_ahead: results that are begun, the one in the caller's hands among them; 2 or more.
    """
    if not num_workers:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(num_workers) as threads:
        remaining, waiting = iter(items), deque()
        try:
            while True:
                waiting.extend(threads.submit(function, item) for item in islice(remaining, num_ahead - len(waiting)))
                if not waiting:
                    return
                yield waiting.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)
