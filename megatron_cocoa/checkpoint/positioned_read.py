"""Reading bytes of an open file at a position."""

from __future__ import annotations

import os


def read_into(descriptor: int, buffer: memoryview, position: int) -> int:
    """Fill ``buffer`` from byte ``position`` on; returns the bytes read, fewer only where the file ends.

    Raises:
        OSError: if the disk cannot give them.
    """
    done = 0
    while done < len(buffer):
        # Linux gives 2 GiB at once at most, and less where a signal comes.
        count = os.preadv(descriptor, [buffer[done:]], position + done)
        if count == 0:
            break
        done += count
    return done
