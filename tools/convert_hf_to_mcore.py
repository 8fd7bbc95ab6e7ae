"""Convert a Hugging Face folder of a Qwen2-VL or Qwen2.5-VL to a Megatron distributed checkpoint.

examples:
  python tools/convert_hf_to_mcore.py --hf-path Qwen2.5-VL-3B-Instruct --mcore-path checkpoints/3b
  python tools/convert_hf_to_mcore.py --hf-path Qwen2-VL-2B-Instruct --mcore-path checkpoints/2b --verify
  python tools/convert_hf_to_mcore.py --hf-path Qwen2-VL-2B-Instruct --mcore-path checkpoints/2b --verify-only
  torchrun examples/pretrain_cocoa.sh --model.path Qwen2.5-VL-3B-Instruct --model.load checkpoints/3b

what is written, a folder that Megatron's dist_checkpointing loads at any TP, PP, VPP and DP:
  __0_*.distcp, .metadata, common.pt, metadata.json   the weights, layers stacked, in the torch_dist format
  cocoa.json                                          what the checkpoint is: stage import, configuration, token ids
  huggingface/                                        configuration, tokenizer and processor files for the way back

The folder appears when it is complete; until then it is called .NAME.*.incomplete. Weights are streamed: memory holds
two tensors at a time. Every tensor on disk is converted, or ignored with a reason, or an error. No weight is changed:
the mask token's row is what the folder has in it. A cocoa.safetensors, which convert_mcore_to_hf.py writes on request,
is read too: image decoder and trained rows get their places, and the checkpoint continues the stage that it names.
Under torchrun the first rank does the work.

exit status: 0 done, 1 --verify found a difference, 2 bad input or no room (nothing was written).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_cocoa.conversion.command import DIALECT_NAMES, DTYPES, add_verify_options, run_command  # noqa: E402


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf-path", required=True, metavar="DIR", help="folder with safetensors; read only")
    parser.add_argument("--mcore-path", required=True, metavar="DIR", help="checkpoint folder to create")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="auto keeps what is on disk (default); bf16 or fp32 casts to it"
    )
    add_verify_options(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier checkpoint at --mcore-path")
    parser.add_argument("--mask-token", default="<|mask|>", help="model.mask_token of the run (default %(default)s)")
    parser.add_argument("--bridge-token", default="<|im_end|>", help="model.bridge_token (default %(default)s)")
    parser.add_argument(
        "--vision-ffn-multiple",
        type=int,
        default=1,
        metavar="N",
        help="model.vision_ffn_multiple of the run: zero-pads the tower's ffn to a multiple of N (default %(default)s)",
    )
    parser.add_argument(
        "--dialect",
        choices=DIALECT_NAMES,
        default="sharded",
        help="names in the checkpoint: sharded is this project's (default); megatron-bridge keeps the tower whole "
        "under Hugging Face's names visual.*, as NVIDIA's Megatron-Bridge does, and is not for training here",
    )
    return parser.parse_args(argv)


def convert(args: argparse.Namespace) -> bool:
    # Imported late: --help and a mistyped option must not wait for torch.
    from megatron_cocoa.conversion.command import check_verify_memory, dtype_of, report_import, verified

    check_verify_memory(args, source="huggingface")
    if not args.verify_only:
        report_import(_import(args, dtype_of(args.dtype)))
    return verified(args, source="huggingface")


def _import(args: argparse.Namespace, dtype):
    from megatron_cocoa.conversion.command import ProgressLines
    from megatron_cocoa.conversion.hf_to_mcore import convert_hf_to_mcore

    return convert_hf_to_mcore(
        args.hf_path,
        args.mcore_path,
        dtype=dtype,
        overwrite=args.overwrite,
        mask_token=args.mask_token,
        bridge_token=args.bridge_token,
        vision_ffn_multiple=args.vision_ffn_multiple,
        dialect=args.dialect,
        progress=ProgressLines("converted"),
    )


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    return run_command(lambda: convert(args), target=args.mcore_path)


if __name__ == "__main__":
    sys.exit(main())
