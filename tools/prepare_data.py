"""Turn raw data into the file that a stage reads, by the method's rules, with a manifest.

examples:
  python tools/prepare_data.py --stage bridge --from mmeb-train --input MMEB-train --image-root MMEB-train \\
      --max-rows 100000 --output data/mmeb
  python tools/prepare_data.py --stage warmup --from webdataset --input shards --output data/captions
  python tools/prepare_data.py --stage contrastive --from hf-datasets --input saved --split train \\
      --columns qry=question qry_image_path=image pos_text=answer --output data/qa

what is written to --output:
  STAGE.jsonl           the rows (docs/data.md); pictures of shards and Arrow files go to images/
  STAGE.rejected.jsonl  every row that was left out, with the reason; those beyond --max-rows are only counted
  STAGE.manifest.json   counts, sizes and checksums

Text-to-image rows are turned round for stage bridge, rows without a text to reconstruct are dropped; stage warmup takes
pairs of one picture and its text. Files appear when they are whole. exit status: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

EXIT_BAD_INPUT = 2


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--stage", required=True, choices=("warmup", "bridge", "contrastive"))
    add("--from", required=True, dest="kind", choices=("mmeb-train", "jsonl", "hf-datasets", "webdataset"))
    add("--input", required=True, type=Path, metavar="PATH", help="file or folder; MMEB-train: all subsets or one")
    add("--output", required=True, type=Path, metavar="DIR", help="folder for the stage's files")
    add("--image-root", metavar="DIR", help="image paths are relative to it (default: the input's folder)")
    add("--split", help="mmeb-train: original, diverse_instruction or train; hf-datasets: of a DatasetDict")
    add("--subsets", nargs="*", default=[], metavar="NAME", help="of MMEB-train (default: all that are there)")
    add("--columns", nargs="*", default=[], metavar="OURS=THEIRS", help="names of columns that differ")
    add("--max-rows", type=int, metavar="N", help="draw at most this many rows of each input")
    add("--copy-pictures", action="store_true", help="copy pictures to OUTPUT/images instead of keeping their paths")
    add("--without-negatives", action="store_true", help="contrastive: leave out neg_text and neg_image_path")
    add("--check", choices=("none", "header", "decode"), default="header", help="of pictures (default %(default)s)")
    add("--seed", type=int, default=1234, help="draws --max-rows (default %(default)s)")
    add("--overwrite", action="store_true", help="replace an earlier file of the stage")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    # Imported late: --help and a mistyped option must not wait for pyarrow and torch.
    from megatron_cocoa.config import DataSettings
    from megatron_cocoa.data.prepare import Preparation, prepare, sources_under

    columns = dict(pair.split("=", 1) if "=" in pair else _bad_column(pair) for pair in args.columns)
    sources = sources_under(
        args.input,
        args.kind,
        subsets=args.subsets,
        image_root=args.image_root,
        split=args.split,
        max_rows=args.max_rows,
        columns=columns,
    )
    # The settings' own checks, such as of a split that would have no effect.
    DataSettings(sources=sources)
    plan = Preparation(
        stage=args.stage,
        sources=sources,
        output=args.output,
        copy_pictures=args.copy_pictures,
        with_negatives=not args.without_negatives,
        check=args.check,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    manifest = prepare(plan, progress=sys.stderr.isatty())
    counts = {name: manifest[name] for name in ("rows", "flipped", "rejected")}
    print(f"{args.output / args.stage}.jsonl: {json.dumps(counts)}")
    if not args.copy_pictures and args.kind in ("mmeb-train", "jsonl"):
        root = sources[0].image_root or (args.input if args.input.is_dir() else args.input.parent)
        entry = {"name": args.input.stem, "path": f"{args.output}", "image_root": f"{root}", "stages": [args.stage]}
        print(f"picture paths are relative to {root}; in a settings file:\ndata:\n  sources:\n  - {json.dumps(entry)}")


def _bad_column(pair: str):
    raise ValueError(f"--columns has {pair!r}, needed OURS=THEIRS, such as caption=text")


def main(argv: list[str] | None = None) -> int:
    try:
        run(parse(argv))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
