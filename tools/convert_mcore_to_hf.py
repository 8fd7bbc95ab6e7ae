"""Convert a Megatron distributed checkpoint of this project to a Hugging Face folder.

examples:
  python tools/convert_mcore_to_hf.py --mcore-path outputs/run/contrastive/checkpoint --hf-path exported
  python tools/convert_mcore_to_hf.py --mcore-path checkpoints/3b --hf-path exported --verify
  python tools/convert_mcore_to_hf.py --mcore-path checkpoints/3b --hf-path exported --companions Qwen2.5-VL-3B-Instruct

what is written, a folder that transformers loads:
  model.safetensors, or model-*-of-*.safetensors and model.safetensors.index.json
  config.json, and the tokenizer and processor files of --companions or, without it, those that an imported checkpoint
  carries in huggingface/

The checkpoint may have been written at any TP, PP and DP, in this project's names or Megatron-Bridge's (the iter_*
folder; name --companions then). The folder appears when it is complete; until then it is
called .NAME.*.incomplete. Weights are streamed: memory holds one tensor at a time. What a Hugging Face model has no
place for (the image decoder, optimizer state, trained rows beyond the vocabulary) is left out and said. Under torchrun
the first rank does the work.

exit status: 0 done, 1 --verify found a difference, 2 bad input or no room (nothing was written).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_cocoa.conversion.command import DTYPES, byte_count, run_command  # noqa: E402


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mcore-path", required=True, metavar="DIR", help="complete checkpoint; read only")
    parser.add_argument("--hf-path", required=True, metavar="DIR", help="Hugging Face folder to create")
    parser.add_argument(
        "--companions", metavar="DIR", help="Hugging Face folder whose configuration and tokenizer files go along"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="auto keeps the checkpoint's (default); bf16 or fp32 casts"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read both sides back and compare them bit for bit, then run both models in fp32 on text and pictures, "
        "causal and bidirectional; needs memory for one fp32 model",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier model folder at --hf-path")
    parser.add_argument(
        "--spelling",
        choices=("flat", "nested"),
        default="flat",
        help="names on disk: flat as published (model.layers.*, visual.*; default), or nested (model.language_model.*)",
    )
    parser.add_argument(
        "--max-shard-size", type=byte_count, default="5GB", metavar="SIZE", help="e.g. 500MB (default %(default)s)"
    )
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> bool:
    # Imported late: --help and a mistyped option must not wait for torch.
    from megatron_cocoa.conversion.command import dtype_of, report_export
    from megatron_cocoa.conversion.mcore_to_hf import convert_mcore_to_hf

    report = convert_mcore_to_hf(
        args.mcore_path,
        args.hf_path,
        companions=args.companions,
        dtype=dtype_of(args.dtype),
        spelling=args.spelling,
        max_shard_bytes=args.max_shard_size,
        overwrite=args.overwrite,
    )
    report_export(report)
    if not args.verify:
        return True
    from megatron_cocoa.conversion.verify import verify

    return verify(args.hf_path, args.mcore_path, source="megatron")


if __name__ == "__main__":
    options = parse()
    sys.exit(run_command(lambda: convert(options), target=options.hf_path))
