"""Which picture files hold the same bytes, without reading most of them.

Files of one content have one size, and the same bytes in their middle; only files that agree in both are read whole.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path

from megatron_cocoa.data.checksums import sha256_of
from megatron_cocoa.parallel.threads import map_ahead

GLANCE_BYTES = 4096
NUM_THREADS = 8


def same_pictures(paths: Iterable[str], image_root: str | Path) -> dict[str, str]:
    """The first path of the same content for each picture; empty paths are left out.

    Args:
        paths: relative to the root, in any order and as often as they occur.
        image_root: folder of the pictures.

    Raises:
        ValueError: naming the first picture that cannot be read.
    """
    root = Path(image_root)
    names = [path for path in dict.fromkeys(paths) if path]
    keys = dict.fromkeys(names, ())
    for look in (_glance, sha256_of):
        alike = defaultdict(list)
        for name in names:
            alike[keys[name]].append(name)
        unsure = [name for group in alike.values() if len(group) > 1 for name in group]
        for name, found in zip(unsure, _looked(look, [root / name for name in unsure])):
            keys[name] += (found,)
    firsts: dict[tuple, str] = {}
    return {name: firsts.setdefault(keys[name] or (name,), name) for name in names}


def _looked(look: Callable[[Path], Hashable], files: list[Path]) -> Iterable[Hashable]:
    try:
        yield from map_ahead(look, files, num_workers=NUM_THREADS, num_ahead=16 * NUM_THREADS)
    except OSError as error:
        raise ValueError(
            f"the picture {error.filename} cannot be read ({error.strerror}): name the folder that image "
            f"paths are relative to with --image-root"
        ) from error


def _glance(file: Path) -> tuple[int, bytes]:
    with file.open("rb", buffering=0) as opened:
        size = os.fstat(opened.fileno()).st_size
        return size, os.pread(opened.fileno(), GLANCE_BYTES, size // 2)
