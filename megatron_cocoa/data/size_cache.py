"""The sizes of many pictures in a table of fixed size: a million of them took 400 MiB as objects, here 32 MiB."""

from __future__ import annotations

import threading
from collections.abc import Hashable

import numpy as np


class SizeCache:
    """Two numbers for each of up to ``capacity`` keys; what comes later is not kept.

    A key is known by its hash of 64 bits. That any of ten million paths is taken for one of a million others has a
    chance of one in a million.

    Args:
        capacity: number of keys, 1 or more.
    """

    def __init__(self, capacity: int) -> None:
        # Half of the places stay free, so that a key is found within a few of them.
        self._keys = np.zeros(2 * capacity, dtype=np.int64)
        self._sizes = np.zeros((2 * capacity, 2), dtype=np.int32)
        self._room = capacity
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        """Bytes of the table, which are taken up as it fills."""
        return self._keys.nbytes + self._sizes.nbytes

    def get(self, key: Hashable) -> tuple[int, int] | None:
        """What was put under ``key``; None for nothing."""
        with self._lock:
            place, number = self._place(key)
            return tuple(self._sizes[place].tolist()) if self._keys[place] == number else None

    def put(self, key: Hashable, size: tuple[int, int]) -> None:
        """Keep ``size``, two numbers below 2**31, if there is room."""
        with self._lock:
            place, number = self._place(key)
            if self._keys[place] == number or not self._room:
                return
            self._keys[place], self._sizes[place] = number, size
            self._room -= 1

    def _place(self, key: Hashable) -> tuple[int, int]:
        """Where ``key`` is, or where it would be; and its number. 0 marks a free place."""
        number = hash(key) or 1
        place = number % self._keys.size
        while self._keys[place] not in (0, number):
            place = (place + 1) % self._keys.size
        return place, number
