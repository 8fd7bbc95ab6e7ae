"""Convert a Megatron distributed checkpoint of this project to a Hugging Face or sentence-transformers folder.

examples:
  python tools/convert_mcore_to_hf.py --mcore-path outputs/run/contrastive/checkpoint --hf-path exported --verify
  python tools/convert_mcore_to_hf.py --mcore-path outputs/run/contrastive/checkpoint --hf-path exported \\
      --format sentence-transformers --companions Qwen2.5-VL-3B-Instruct
  python tools/convert_mcore_to_hf.py --mcore-path checkpoints/3b --hf-path back --format plain --verify
  python tools/convert_mcore_to_hf.py --mcore-path checkpoints/3b --hf-path back --verify-only
  python -m megatron_cocoa.export.check_golden exported

formats, all with the same weights, bit for bit:
  hf                     the embedding model, for transformers: text_config.is_causal as trained, README.md has the code
                         that gives an embedding, golden.json inputs and their vectors to check an installation with
  sentence-transformers  the same folder with modules.json, pooling on the bridge and normalisation, for
                         SentenceTransformer(path).encode(texts, pictures or both)
  plain                  the model with its configuration as it came (causal, as published): the way back from
                         convert_hf_to_mcore.py, for tools that generate, or to train elsewhere
  auto (default)         hf for a checkpoint that a stage has trained, plain for converted weights

what is written:
  model.safetensors, or model-*-of-*.safetensors and model.safetensors.index.json
  config.json, and the tokenizer and processor files of --companions or, without it, those that an imported checkpoint
  carries in huggingface/ or that the settings.yaml of the run names

The checkpoint may have been written at any TP, PP and DP, in this project's names or Megatron-Bridge's (the iter_*
folder; name --companions then). The folder appears when it is complete; until then it is called .NAME.*.incomplete.
Weights are streamed: memory holds two tensors at a time; golden.json and --verify need one fp32 model. What a Hugging
Face model has no place for (the image decoder, optimizer state, trained rows beyond the vocabulary) is left out and
said; --with-cocoa-tensors keeps it beside the model, where convert_hf_to_mcore.py finds it again. Under torchrun the
first rank does the work.

exit status: 0 done, 1 --verify found a difference, 2 bad input or no room (nothing was written).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_cocoa.config import parse_image_size  # noqa: E402
from megatron_cocoa.conversion.command import (  # noqa: E402
    DIALECT_NAMES,
    DTYPES,
    add_verify_options,
    byte_count,
    run_command,
)

FORMATS = ("auto", "plain", "hf", "sentence-transformers")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mcore-path", required=True, metavar="DIR", help="complete checkpoint; read only")
    parser.add_argument("--hf-path", required=True, metavar="DIR", help="Hugging Face folder to create")
    parser.add_argument("--format", choices=FORMATS, default="auto", help="see above (default %(default)s)")
    parser.add_argument(
        "--companions", metavar="DIR", help="Hugging Face folder whose configuration and tokenizer files go along"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="auto keeps the checkpoint's (default); bf16 or fp32 casts"
    )
    add_verify_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier model folder at --hf-path")
    parser.add_argument(
        "--with-cocoa-tensors",
        action="store_true",
        help="write the image decoder, the mask token's row and trained rows beyond the vocabulary into "
        "cocoa.safetensors in the same folder; other libraries do not look at it",
    )
    parser.add_argument(
        "--spelling",
        choices=("flat", "nested"),
        default="flat",
        help="names on disk: flat as published (model.layers.*, visual.*; default), or nested (model.language_model.*)",
    )
    parser.add_argument(
        "--max-shard-size", type=byte_count, default="5GB", metavar="SIZE", help="e.g. 500MB (default %(default)s)"
    )
    parser.add_argument(
        "--dialect",
        choices=("auto", *DIALECT_NAMES),
        default="auto",
        help="names in the checkpoint; auto sees it (default), another word refuses a checkpoint of other names",
    )
    embedding = parser.add_argument_group("embedding model (formats hf and sentence-transformers)")
    embedding.add_argument(
        "--bridge-token", metavar="TOKEN", help="carries the embedding (default: the run's, else <|im_end|>)"
    )
    embedding.add_argument(
        "--image-size",
        type=parse_image_size,
        metavar="PIXELS",
        help="native, or the side of a square that pictures are resized to (default: as the model was trained, except "
        "for sentence-transformers, which keeps pictures' shapes)",
    )
    for end, what in (("min", "fewest"), ("max", "most")):
        embedding.add_argument(
            f"--{end}-image-tokens",
            type=int,
            metavar="N",
            help=f"{what} merged units of a picture that keeps its shape, written into the image processor's file "
            f"(default: the training's, else the model folder's own)",
        )
    embedding.add_argument(
        "--no-golden", action="store_true", help="leave golden.json out, where there is no memory for an fp32 model"
    )
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> bool:
    # Imported late: --help and a mistyped option must not wait for torch.
    from megatron_cocoa.checkpoint.info import refuse_folder_around
    from megatron_cocoa.conversion.command import (
        ProgressLines,
        check_verify_memory,
        dtype_of,
        report_export,
        verified,
    )

    refuse_folder_around(args.mcore_path)
    check_verify_memory(args, source="megatron")
    if not args.verify_only:
        conversion = dict(
            companions=args.companions,
            dtype=dtype_of(args.dtype),
            spelling=args.spelling,
            max_shard_bytes=args.max_shard_size,
            overwrite=args.overwrite,
            with_cocoa_tensors=args.with_cocoa_tensors,
            dialect=args.dialect,
            progress=ProgressLines("converted"),
        )
        report_export(_export(args, conversion))
    return verified(args, source="megatron")


def _export(args: argparse.Namespace, conversion: dict):
    from megatron_cocoa.conversion.mcore_to_hf import convert_mcore_to_hf
    from megatron_cocoa.export.embedder_options import EmbedderOptions, default_format

    chosen = default_format(args.mcore_path) if args.format == "auto" else args.format
    if chosen == "plain":
        given = {
            "--bridge-token": args.bridge_token,
            "--image-size": args.image_size,
            "--min-image-tokens": args.min_image_tokens,
            "--max-image-tokens": args.max_image_tokens,
            "--no-golden": args.no_golden,
        }
        useless = [name for name, value in given.items() if value]
        if useless:
            raise ValueError(f"{', '.join(useless)} has no effect in format plain: name --format hf, or leave it out")
        return convert_mcore_to_hf(args.mcore_path, args.hf_path, **conversion)
    # Weights alone do not wait for Megatron, which the model of golden.json needs.
    from megatron_cocoa.export.export_info import read_export_info
    from megatron_cocoa.export.folder import export_embedder

    print(f"format: {chosen}")
    options = EmbedderOptions(
        chosen,
        args.bridge_token,
        args.image_size,
        golden=not args.no_golden,
        min_image_tokens=args.min_image_tokens,
        max_image_tokens=args.max_image_tokens,
    )
    report = export_embedder(args.mcore_path, args.hf_path, options=options, **conversion)
    side = read_export_info(report.path).image_size
    print("pictures keep their shape" if side is None else f"pictures are resized to {side} x {side} pixels")
    return report


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_command(lambda: convert(args), target=args.hf_path)


if __name__ == "__main__":
    sys.exit(main())
