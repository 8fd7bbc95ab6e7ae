"""Check an installation against an exported folder: ``python -m megatron_cocoa.export.check_golden DIR``.

exit status: 0 all vectors agree, 1 some differ, 2 the folder cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_cocoa.export.export_info import read_export_info
from megatron_cocoa.export.golden import BOUND, Embed, GoldenResult, compare_golden

EXIT_DIFFERENT = 1
EXIT_BAD_INPUT = 2


def check_golden(folder: str | Path, *, library: str = "transformers") -> list[GoldenResult]:
    """Embed the inputs of ``golden.json`` in fp32 with one of ``LIBRARIES``, and compare.

    Raises:
        ValueError: if the folder or its ``golden.json`` is incomplete.
    """
    folder = Path(folder)
    try:
        embed = LIBRARIES[library](folder)
    except OSError as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error
    return compare_golden(folder, embed)


def _with_transformers(folder: Path) -> Embed:
    from megatron_cocoa.export.plain_transformers import PlainEmbedder

    info = read_export_info(folder)
    plain = PlainEmbedder(
        folder,
        bridge_token=info.bridge_token,
        image_size=info.image_size,
        bare_pictures=info.form.image_placeholder == "bare",
    )
    return lambda text, image: plain.embed(text, image).numpy()


def with_megatron_cocoa(folder: Path) -> Embed:
    """What ``CocoaEmbedder`` computes on this process's device."""
    from megatron_cocoa.embedder import CocoaEmbedder

    embedder = CocoaEmbedder.from_pretrained(folder)
    return lambda text, image: embedder.encode([{"text": text, "image": image}])[0]


def _with_sentence_transformers(folder: Path) -> Embed:
    from sentence_transformers import SentenceTransformer

    # The library computes in the dtype on disk unless told otherwise; the recorded vectors are FP32's.
    model = SentenceTransformer(str(folder), local_files_only=True, model_kwargs={"dtype": "float32"})

    def embed(text, image):
        item = {name: value for name, value in (("text", text), ("image", image)) if value}
        return model.encode([item if len(item) > 1 else next(iter(item.values()))])[0]

    return embed


LIBRARIES = {
    "transformers": _with_transformers,
    "megatron_cocoa": with_megatron_cocoa,
    "sentence-transformers": _with_sentence_transformers,
}
"""What can compute the vectors of a folder."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", help="written by tools/convert_mcore_to_hf.py, with its golden.json")
    parser.add_argument("--library", choices=LIBRARIES, default="transformers", help="computes the vectors")
    options = parser.parse_args(argv)
    try:
        results = check_golden(options.folder, library=options.library)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    for result in results:
        print(f"{'ok  ' if result.passed else 'FAIL'} {result.name}: 1 - cosine {result.distance:.1e}")
    failed = sum(not result.passed for result in results)
    print(f"{len(results) - failed} of {len(results)} vectors agree within {BOUND:.0e}")
    return EXIT_DIFFERENT if failed else 0


if __name__ == "__main__":
    sys.exit(main())
