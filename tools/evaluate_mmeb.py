"""Score a model on MMEB-V1 from local files, or on any benchmark in the same form, such as the mini benchmark.

examples:
  python tools/evaluate_mmeb.py --model-path embedder --data-path MMEB-eval --image-root MMEB-eval/images \\
      --output-path scores --image-size 672
  torchrun --nproc-per-node 8 tools/evaluate_mmeb.py --model-path outputs/run/contrastive/checkpoint \\
      --processor-path Qwen2.5-VL-3B --data-path MMEB-eval --image-root MMEB-eval/images --output-path scores
  torchrun --nproc-per-node 8 tools/evaluate_mmeb.py --model-path embedder-72b --dtype bf16 \\
      --parallel.tensor_model_parallel_size 8 --data-path MMEB-eval --image-root MMEB-eval/images --output-path scores
  python tools/evaluate_mmeb.py --summarize scores

what is written: {task}_score.json (acc and whatever moves it), {task}_pred.txt (the candidate chosen for each row),
{task}_evidence.json (examples), summary.json, report.html. Started again with the same arguments, on any number of
ranks, it keeps the tasks that are scored. Each rank holds the whole model, unless --parallel.* divides it.
See docs/evaluation.md.

exit status: 0 done, 1 done, but all queries of a task tie and its score says nothing of the model, 2 bad input
(finished tasks stay).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_cocoa.config import parse_image_size  # noqa: E402

LAYOUT = {
    "tensor_model_parallel_size": "ranks that share each layer",
    "pipeline_model_parallel_size": "stages of layers, each on other ranks",
    "context_parallel_size": "ranks that share each pack's sequence",
}
"""Degrees of a model that does not fit on one rank; what remains of the ranks are replicas."""

EXIT_MEANINGLESS = 1
EXIT_BAD_INPUT = 2


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model-path", metavar="DIR", help="Hugging Face or sentence-transformers folder, or Megatron checkpoint")
    add("--processor-path", metavar="DIR", help="tokenizer and processor of a Megatron checkpoint that carries none")
    add("--run-path", metavar="DIR",
        help="output of the run whose losses the page shows (default: the one that the model lies in)")  # fmt: skip
    add("--data-path", metavar="DIR", help="TASK/test-*.parquet for each task, as in MMEB-eval")
    add("--image-root", metavar="DIR", help="image paths are relative to it and may not leave it")
    add("--output-path", metavar="DIR", help="folder for the scores")
    add("--tasks", nargs="+", metavar="NAME", help="these tasks alone (default: all of the benchmark)")
    add("--image-size", type=parse_image_size, metavar="PIXELS",
        help="native, or the side of a square, such as 672 (default: as the model was trained)")  # fmt: skip
    add("--min-image-tokens", type=int, metavar="N", help="of a picture that keeps its shape (default: the model's)")
    add("--max-image-tokens", type=int, metavar="N", help="likewise")
    add("--max-length", type=int, metavar="TOKENS", help="cut longer texts (default: the model's limit)")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the computation (default %(default)s)")
    add("--bridge-token", metavar="TOKEN", help="carries the embedding (default: the run's or the export's own)")
    add("--batch-size", type=int, default=32, metavar="N", help="items a forward pass (default %(default)s)")
    add("--num-workers", type=int, default=2, metavar="N", help="threads that decode pictures (default %(default)s)")
    add("--baselines", action="store_true", help="also score queries without their picture, and without their text")
    add("--overwrite", action="store_true", help="score again what was scored with other settings, model or data")
    for name, what in LAYOUT.items():
        add(f"--parallel.{name}", type=int, default=1, metavar="N", help=f"{what} (default %(default)s)")
    add("--parallel.sequence_parallel", action="store_true", help="tensor parallel ranks share norms and residuals")
    add("--summarize", metavar="DIR", help="print the table of a folder of score files as JSON, and do nothing else")
    args = parser.parse_args(argv)
    needed = ("model_path", "data_path", "image_root", "output_path")
    missing = [f"--{name.replace('_', '-')}" for name in needed if getattr(args, name) is None]
    if args.summarize is None and missing:
        parser.error(f"missing: {', '.join(missing)}")
    return args


def summarize(folder: str) -> int:
    from megatron_cocoa.evaluation.mmeb_summary import summarize as read

    summary = read(folder)
    print(json.dumps(summary.to_json(), indent=2))
    return EXIT_MEANINGLESS if summary.has_meaningless else 0


def evaluate(args: argparse.Namespace) -> int:
    # Imported late: --help and a mistyped option must not wait for torch.
    from megatron_cocoa.config import EvaluationSettings, ParallelSettings
    from megatron_cocoa.embedder import start_alone
    from megatron_cocoa.evaluation import mmeb_run
    from megatron_cocoa.evaluation.mmeb_tasks import read_benchmark
    from megatron_cocoa.parallel import topology
    from megatron_cocoa.recipes.curves import training_curves

    sizes = ("image_size", "min_image_tokens", "max_image_tokens", "max_length")
    names = (*sizes, "dtype", "bridge_token", "batch_size", "num_workers", "baselines")
    settings = EvaluationSettings(**{name: getattr(args, name) for name in names})
    benchmark = read_benchmark(args.data_path)
    tasks = benchmark.select(args.tasks)
    launch = topology.LaunchInfo.from_environment()
    parallel = ParallelSettings(**{name: getattr(args, f"parallel.{name}") for name in (*LAYOUT, "sequence_parallel")})
    parallel.data_parallel_size(launch.world_size)
    # Read first: a mistyped folder is told before hours of scoring.
    curves = training_curves(args.model_path, args.run_path)
    say = _say if launch.rank == 0 else _keep_silent
    if launch.world_size > 1:
        topology.initialize(parallel, launch, seed=0)
    else:
        start_alone()
    encode, identity, versions = _load(args, settings, parallel, benchmark)
    say(encode.builder.pictures.sizing)
    mmeb_run.evaluate(
        tasks,
        data_path=args.data_path,
        image_root=args.image_root,
        output=args.output_path,
        encode=encode,
        identity=identity,
        versions=versions,
        computation={"batch_size": settings.batch_size} | {name: getattr(parallel, name) for name in LAYOUT},
        with_baselines=settings.baselines,
        overwrite=args.overwrite,
        say=say,
    )
    code = _finish(args, curves, say) if launch.rank == 0 else 0
    # Not after an error: other ranks may wait in a collective, which an orderly end would wait for too.
    topology.shutdown()
    return code


def _load(args: argparse.Namespace, settings, parallel, benchmark):
    from megatron_cocoa.evaluation.mmeb_encode import ItemEncoder
    from megatron_cocoa.evaluation.mmeb_identity import identity_of, versions
    from megatron_cocoa.recipes.embedding_model import load_embedding_model

    identity = identity_of(settings, model_path=args.model_path, processor_path=args.processor_path)
    found = load_embedding_model(args.model_path, settings, model_path=args.processor_path, parallel=parallel)
    encoder = ItemEncoder(
        model=found.model,
        builder=found.builder,
        options=found.options,
        image_root=Path(args.image_root),
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        show_progress=sys.stderr.isatty(),
    )
    return encoder, identity(found.builder, found.options, benchmark), versions()


def _finish(args: argparse.Namespace, curves, say) -> int:
    from megatron_cocoa.atomic import write_atomically
    from megatron_cocoa.evaluation.mmeb_page import render_page
    from megatron_cocoa.evaluation.mmeb_summary import render_summary
    from megatron_cocoa.evaluation.mmeb_summary import summarize as read

    output = Path(args.output_path)
    summary = read(output)
    write_atomically(output / "summary.json", json.dumps(summary.to_json(), indent=2) + "\n")
    html = render_page(summary, output=output, image_root=args.image_root, curves=curves)
    write_atomically(output / "report.html", html)
    say(render_summary(summary))
    say(f"report: {output / 'report.html'}")
    return EXIT_MEANINGLESS if summary.has_meaningless else 0


def _say(line: str) -> None:
    print(line, flush=True)


def _keep_silent(line: str) -> None:
    pass


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    warnings.filterwarnings("ignore", module="megatron.core")
    warnings.filterwarnings("ignore", message=".*(Apex|Transformer Engine|deprecating ShardedTensor).*")
    try:
        return summarize(args.summarize) if args.summarize is not None else evaluate(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if os.environ.get("RANK", "0") != "0":
            # torchrun ends all ranks when one has ended: let the first one speak.
            time.sleep(3)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
