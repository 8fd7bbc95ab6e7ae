"""Build the mini benchmark: ten tasks over MMEB's four meta-tasks from freely licensed packages, in MMEB's file form.

example:
  python tools/build_mini_benchmark.py --output outputs/mini
  python tools/evaluate_mmeb.py --model-path outputs/quickstart/contrastive/checkpoint --data-path outputs/mini/eval \\
      --image-root outputs/mini --output-path outputs/mini_scores --baselines

Downloads about 290 MB once with pip, npm and apt-get download (no root, nothing is installed or run), verifies every
archive, and needs dpkg-deb and the quick start's two packages (the demo extra). The same archives give the same
bytes. manifest.json lists sources, licences and checksums. See docs/evaluation.md.

exit status: 0 done, 2 a source is missing or another one, or the target is taken; nothing is left at it then.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

EXIT_BAD_INPUT = 2


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to create")
    parser.add_argument(
        "--downloads", metavar="DIR", help="keeps the archives (default: OUTPUT.downloads, beside the output)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier benchmark at --output")
    args = parser.parse_args(argv)

    from megatron_cocoa.data.mini.build import build

    downloads = args.downloads or f"{args.output.rstrip('/')}.downloads"
    started = time.monotonic()
    try:
        manifest = build(
            args.output, downloads=downloads, overwrite=args.overwrite, say=functools.partial(print, flush=True)
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    print(json.dumps(manifest["tasks"], indent=1))
    leaks = manifest["leak_check"]
    print(
        f"{args.output}: {len(manifest['tasks'])} tasks, {manifest['pictures']['count']} pictures in "
        f"{time.monotonic() - started:.0f} s; no scored picture correlates with a training picture above "
        f"{leaks['largest_correlation']:.3f}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
