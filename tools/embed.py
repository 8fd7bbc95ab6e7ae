"""Embed a corpus: a JSONL or parquet file with text and image columns, or a folder of pictures.

examples:
  python tools/embed.py --model exported --corpus captions.jsonl --output vectors
  torchrun --nproc-per-node 8 tools/embed.py --model outputs/run/contrastive/checkpoint --model-path Qwen2.5-VL-3B \\
      --corpus pictures/ --output vectors --dtype bf16

what is written: embeddings-*-of-*.npy (float32, rows of length one), ids-*-of-*.jsonl in the same order,
shard-*-of-*.json with checksums, manifest.json. Started again with the same arguments, on any number of ranks, it
keeps the shards whose checksums hold and makes the others. Each rank holds the whole model.

exit status: 0 done, 2 bad input (finished shards stay).
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
import warnings
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_cocoa.config import EmbeddingSettings, parse_image_size  # noqa: E402

EXIT_BAD_INPUT = 2


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="Hugging Face folder or Megatron checkpoint")
    add("--model-path", metavar="DIR", help="tokenizer and processor of a Megatron checkpoint")
    add("--corpus", required=True, metavar="PATH", help="JSONL, parquet (needs pyarrow), or a folder of pictures")
    add("--image-root", metavar="DIR", help="image paths are relative to it (default: the corpus's folder)")
    add("--output", required=True, metavar="DIR", help="folder for the shards")
    add("--id-column", default="id", metavar="NAME", help="default %(default)s; rows are numbered without that one")
    add("--text-column", default="text", metavar="NAME", help="default %(default)s")
    add("--image-column", default="image", metavar="NAME", help="default %(default)s")
    add("--instruction", default="", metavar="TEXT", help="put before each text as it stands")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the computation (default %(default)s)")
    add("--image-size", type=parse_image_size, metavar="PIXELS",
        help="native, or the side of a square (default: as the model was trained)")  # fmt: skip
    add("--min-image-tokens", type=int, metavar="N", help="of a picture that keeps its shape (default: the model's)")
    add("--max-image-tokens", type=int, metavar="N", help="likewise")
    add("--max-length", type=int, metavar="TOKENS", help="cut longer texts (default: the model's limit)")
    add("--batch-size", type=int, default=32, metavar="N", help="items a forward pass (default %(default)s)")
    add("--batch-tokens", type=int, metavar="N", help="tokens a forward pass (default: 16384 on a GPU, 1024 on a CPU)")
    add("--num-workers", type=int, default=2, metavar="N", help="threads that prepare items (default %(default)s)")
    add("--shard-size", type=int, default=10000, metavar="N", help="rows a shard (default %(default)s)")
    add("--overwrite", action="store_true", help="discard shards in --output that were made from something else")
    return parser.parse_args(argv)


def embed(args: argparse.Namespace) -> None:
    # Imported late: --help and a mistyped option must not wait for torch.
    from megatron_cocoa.config import ParallelSettings
    from megatron_cocoa.export.corpus import Columns, read_corpus
    from megatron_cocoa.export.embed_corpus import ShardPlan, embed_shards, prepare_output
    from megatron_cocoa.parallel import topology

    columns = Columns(args.id_column, args.text_column, args.image_column)
    corpus = read_corpus(args.corpus, image_root=args.image_root, columns=columns)
    plan = ShardPlan(Path(args.output), len(corpus.rows), args.shard_size)
    launch = topology.LaunchInfo.from_environment()
    say = functools.partial(print, flush=True)
    if launch.rank == 0:
        if others := corpus.passed_over:
            say(f"passed over in {args.corpus}: {len(others)}, no files with a picture's ending (first: {others[0]})")
        prepare_output(plan, _made_from(args, corpus.fingerprint()), overwrite=args.overwrite)
    if launch.world_size > 1:
        topology.initialize(ParallelSettings(), launch, seed=0)
    embedder = _load(args)

    def encode(items):
        return embedder.encode(items, instruction=args.instruction, batch_size=args.batch_size)

    if launch.rank == 0:
        say(embedder.builder.pictures.sizing)
    kept = embed_shards(corpus, encode, plan, rank=launch.rank, num_ranks=launch.world_size, say=say)
    print(f"rank {launch.rank}: done, {kept} shard(s) kept from before", flush=True)
    # Not after an error: other ranks may wait in a collective, which an orderly end would wait for too.
    topology.shutdown()


def _load(args: argparse.Namespace):
    from megatron_cocoa.embedder import CocoaEmbedder

    return CocoaEmbedder.from_pretrained(
        args.model,
        model_path=args.model_path,
        batch_tokens=args.batch_tokens,
        num_workers=args.num_workers,
        **asdict(_settings(args)),
    )


def _settings(args: argparse.Namespace) -> EmbeddingSettings:
    names = ("image_size", "min_image_tokens", "max_image_tokens", "max_length", "dtype")
    return EmbeddingSettings(**{name: getattr(args, name) for name in names})


def _made_from(args: argparse.Namespace, fingerprint: str) -> dict:
    """What the vectors depend on. Weights are told apart by path, names, sizes and times: hashing takes minutes."""
    from megatron_cocoa.recipes.embedding_model import picture_sizes

    model = Path(args.model).resolve()
    if not model.is_dir():
        raise ValueError(f"{args.model} is not a folder: needed a Hugging Face folder or a Megatron checkpoint")
    files = sorted((file.name, file.stat().st_size, int(file.stat().st_mtime)) for file in model.iterdir())
    sizes = picture_sizes(model, _settings(args))
    options = ("model_path", "instruction", "dtype", "max_length", "min_image_tokens", "max_image_tokens")
    return {
        "corpus": str(Path(args.corpus).resolve()),
        "corpus_fingerprint": fingerprint,
        "model": str(model),
        "model_files": [list(entry) for entry in files],
        **{name: getattr(args, name) for name in options},
        # The square also where it is the model's own: what is taken as that is not the same in all versions.
        "image_size": sizes.image_size or args.image_size,
    }


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    warnings.filterwarnings("ignore", module="megatron.core")
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|deprecating ShardedTensor).*")
    try:
        embed(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if os.environ.get("RANK", "0") != "0":
            # torchrun ends all ranks when one has ended: let the first one speak.
            time.sleep(3)
        return EXIT_BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
