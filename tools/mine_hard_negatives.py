"""Add hard negatives to training pairs, from vectors that tools/embed.py wrote.

example (both sides of one file, embedded by one model):
  python tools/embed.py --model embedder --corpus pairs.parquet --image-root images --output queries \\
      --text-column qry --image-column qry_image_path
  python tools/embed.py --model embedder --corpus pairs.parquet --image-root images --output targets \\
      --text-column pos_text --image-column pos_image_path
  python tools/mine_hard_negatives.py --pairs pairs.parquet --queries queries --targets targets --output mined.parquet

The output has the rows and columns of the input, with neg_text and neg_image_path as in MMEB-train: texts for one
negative a row, lists for more. A candidate is another row's target that is below the row's own by the margin; equal
texts and pictures (by their files' bytes), other right answers of the same query and the query itself are never taken.
Search is exact, on a GPU if there is one, else on all cores; equal scores keep the order of the file. Vectors stay on
the disk: memory holds about one GB of them, whatever their number.

exit status: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

EXIT_BAD_INPUT = 2


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--pairs", required=True, metavar="FILE", help="MMEB-train's columns, .parquet or .jsonl")
    add("--queries", required=True, metavar="DIR", help="vectors of its queries, in its order")
    add("--targets", required=True, metavar="DIR", help="vectors of its targets, in its order")
    add("--output", required=True, metavar="FILE", help=".parquet or .jsonl")
    add("--image-root", metavar="DIR", help="image paths are relative to it (default: the folder of --pairs)")
    add("--num-negatives", type=int, default=1, metavar="N", help="per row, at most (default %(default)s)")
    add("--margin", type=float, default=0.05, metavar="COSINE",
        help="how far below the row's own target a negative must be (default %(default)s)")  # fmt: skip
    add("--relative-margin", type=float, default=0.0, metavar="SHARE",
        help="likewise as a share of its own cosine, 0.05 for at most 95%% of that (default %(default)s)")  # fmt: skip
    add("--skip-top", type=int, default=0, metavar="N", help="nearest to pass over (default %(default)s)")
    add("--depth", type=int, default=200, metavar="N", help="neighbours looked at per row (default %(default)s)")
    add("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    # Imported late: --help must not wait for torch.
    from megatron_cocoa.export.hard_negatives import PASSED_OVER, MiningOptions, mine
    from megatron_cocoa.export.pair_files import check_suffix, read_pairs_file, sides, with_negatives, write_pairs_file
    from megatron_cocoa.export.same_pictures import same_pictures
    from megatron_cocoa.export.shards import ShardedVectors, check_contents, check_same_model

    if Path(args.output).exists() and not args.overwrite:
        raise ValueError(f"{args.output} exists: name another output, or pass --overwrite")
    # Not only when it is written, after hours of search.
    check_suffix(args.output)
    options = MiningOptions(args.num_negatives, args.margin, args.skip_top, args.depth, args.relative_margin)
    check_same_model(args.queries, args.targets)
    rows = read_pairs_file(args.pairs)
    queries, positives = sides(rows)
    check_contents(args.queries, queries, name=f"queries of {args.pairs}")
    check_contents(args.targets, positives, name=f"targets of {args.pairs}")
    paths = [content.image_path for side in (queries, positives) for content in side]
    pictures = same_pictures(paths, args.image_root or Path(args.pairs).parent)
    vectors = ShardedVectors(args.queries), ShardedVectors(args.targets)
    mined = mine(queries, positives, *vectors, options, same_pictures=pictures)
    write_pairs_file(args.output, with_negatives(rows, mined.negatives, as_lists=options.num_negatives > 1))
    for name in ("full_rows", "short_rows", "empty_rows"):
        print(f"{name}: {mined.counts[name]} of {len(rows)}")
    print(f"chosen: {mined.counts['chosen']}")
    for name in PASSED_OVER:
        print(f"passed over, {name}: {mined.counts[name]}")


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        run(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
