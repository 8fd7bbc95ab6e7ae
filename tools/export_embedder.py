"""Export a Megatron checkpoint of this project as an embedding model for other libraries.

examples:
  python tools/export_embedder.py --mcore-path outputs/run/contrastive/checkpoint --model-path Qwen2.5-VL-3B-Instruct \\
      --output-path exported
  python tools/export_embedder.py ... --format sentence-transformers
  python -m megatron_cocoa.export.check_golden exported

what is written:
  safetensors, config.json with bidirectional attention, tokenizer and processor files, README.md with the code to get
  an embedding from transformers alone, golden.json with inputs and their vectors; and, for sentence-transformers,
  modules.json, 1_Pooling, 2_Normalize and their configuration. The folder appears when it is complete.

exit status: 0 done, 2 bad input or no room (nothing was written).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_cocoa.conversion.command import DTYPES, run_command  # noqa: E402


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mcore-path", required=True, metavar="DIR", help="complete checkpoint; read only")
    parser.add_argument(
        "--model-path", required=True, metavar="DIR", help="Hugging Face folder with the tokenizer and processor files"
    )
    parser.add_argument("--output-path", required=True, metavar="DIR", help="folder to create")
    parser.add_argument("--format", choices=("hf", "sentence-transformers"), default="hf", help="default %(default)s")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="of the weights on disk; auto keeps the checkpoint's (default)"
    )
    parser.add_argument(
        "--bridge-token", default="<|im_end|>", help="token that carries the embedding (default %(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier model folder at --output-path")
    return parser.parse_args(argv)


def export(args: argparse.Namespace) -> bool:
    # Imported late: --help and a mistyped option must not wait for torch.
    from megatron_cocoa.conversion.command import dtype_of, report_export
    from megatron_cocoa.export.folder import export_embedder

    report = export_embedder(
        args.mcore_path,
        args.output_path,
        model_path=args.model_path,
        format=args.format,
        dtype=dtype_of(args.dtype),
        bridge_token=args.bridge_token,
        overwrite=args.overwrite,
    )
    report_export(report)
    return True


if __name__ == "__main__":
    options = parse()
    sys.exit(run_command(lambda: export(options), target=options.output_path))
