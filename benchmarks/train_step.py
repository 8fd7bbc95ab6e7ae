"""Training steps beside Hugging Face's model trained by the published recipe, on the same weights and samples.

    python benchmarks/train_step.py [--stages warmup bridge contrastive] [--distributions short long] [--repeats 5]

For each stage and length distribution: both sides take the same first steps, whose losses and gradient norms must
agree; then steps alternate, ours and theirs, and the median of the pairs' ratios counts. ``useful`` is the analytic
ratio: operations that the reference computes (padding, dense masks and logits of every position included) over those
that the mathematics needs, as ``megatron_cocoa.model.flops`` counts them. ``efficiency`` is measured over analytic.
Memory is the peak of live tensors above weights, gradients and optimizer state; on a CPU counted exactly, storage by
storage. Prints one JSON line for each case, and one with all of them at the end.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import get_args

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.side_by_side import hardware, measure_pairs, peak_bytes, versions  # noqa: E402
from benchmarks.train.examples import DISTRIBUTIONS, ExampleMaker  # noqa: E402
from benchmarks.train.ours import Ours  # noqa: E402
from benchmarks.train.reference import Reference  # noqa: E402
from benchmarks.train.shapes import SHAPES, model_config  # noqa: E402
from megatron_cocoa.config import (  # noqa: E402
    STAGES,
    ModelSettings,
    ParallelSettings,
    Recompute,
    RecomputeSettings,
    TrainSettings,
)
from megatron_cocoa.model.flops import step_flops  # noqa: E402
from megatron_cocoa.model.schedule import microbatches_ahead  # noqa: E402
from megatron_cocoa.parallel import device, topology  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
"""Relative, of loss and gradient norm in the first two steps: FP32 sums in another order, and the second step follows
an update. The norm is what tells: at random weights the loss is near log(vocabulary) whatever the layers do."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--layers", type=int, help="of the language model, instead of the shape's")
    parser.add_argument("--vision-layers", type=int)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--distributions", nargs="+", choices=DISTRIBUTIONS, default=list(DISTRIBUTIONS))
    parser.add_argument("--samples", type=int, default=8, help="or pairs, of a step")
    parser.add_argument("--micro-batch-size", type=int, help="of both sides; all samples of a step by default")
    parser.add_argument("--image-size", type=int, help="side of the pictures in pixels, instead of each stage's own")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=sorted(TOLERANCE), default="bf16" if device.has_gpu() else "fp32")
    modes = dict(choices=get_args(Recompute), default="none")
    parser.add_argument("--recompute-language", **modes, help="ours alone")
    parser.add_argument("--recompute-vision", **modes, help="ours alone")
    parser.add_argument("--recompute-vision-layers", type=int, help="see RecomputeSettings.vision_num_layers")
    parser.add_argument("--threads", type=int, help="of both sides")
    parser.add_argument("--no-memory", action="store_true", help="leave out the two steps that memory takes")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    topology.initialize(ParallelSettings(), topology.LaunchInfo(0, 1, 0), seed=0)
    config = model_config(args.shape, layers=args.layers, vision_layers=args.vision_layers)
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, config)
        for stage in args.stages:
            for distribution in args.distributions:
                results.append(compare(folder, config, stage, distribution, args))
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
                gc.collect()
    topology.shutdown()
    line = {
        "benchmark": "train_step",
        "shape": args.shape,
        "samples": args.samples,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "threads": torch.get_num_threads(),
        "recompute": asdict(settings_of(args).recompute),
        "results": results,
        "versions": versions(),
        "hardware": hardware(),
    }
    print(json.dumps(line))


def write_model(folder: Path, config) -> None:
    """Random weights as Hugging Face draws them, but for the last row of the vocabulary.

    No example holds its token; ours sets the mask token's row to the mean of the others, which this one stands for.
    """
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        rows[-1] = rows[:-1].mean(0)
    model.save_pretrained(folder)


def settings_of(args: argparse.Namespace) -> TrainSettings:
    return TrainSettings(
        model=ModelSettings(
            dtype=args.dtype,
            make_vocab_size_divisible_by=1,
            # The published 3420 keeps a GPU's matrix products from their fast kernels; zeros beside it change nothing.
            vision_ffn_multiple=128 if device.has_gpu() else 1,
        ),
        recompute=RecomputeSettings(
            language=args.recompute_language,
            vision=args.recompute_vision,
            vision_num_layers=args.recompute_vision_layers,
        ),
    )


def compare(folder: Path, config, stage: str, distribution: str, args: argparse.Namespace) -> dict:
    """One stage on one length distribution."""
    settings = settings_of(args)
    ours = Ours(folder, config, stage, settings)
    head = ours.model.bare_chunks[-1].image_decoder
    reference = Reference(
        folder,
        config,
        stage,
        settings.stage(stage),
        settings.optimizer,
        None if head is None else {name: getattr(head.pixel_head, name) for name in ("weight", "bias")},
        device.device(),
        DTYPES[args.dtype],
    )
    examples = ExampleMaker(config, distribution, image_size=args.image_size).step(stage, args.samples)
    per_batch = (args.micro_batch_size or args.samples) * (2 if stage == "contrastive" else 1)
    batches, padded = ours.batches(examples, per_batch), reference.batches(examples, per_batch)
    losses = [(ours.step(batches), reference.step(padded)) for _ in range(2)]
    for mine, theirs in losses:
        if any(abs(a - b) > TOLERANCE[args.dtype] * abs(b) for a, b in zip(mine, theirs)):
            raise SystemExit(f"{stage}, {distribution}: first steps differ; (loss, norm) of ours, reference: {losses}")
    work = ours.workload(batches)
    ahead = microbatches_ahead(len(batches), num_chunks=1) if stage == "contrastive" else 0
    flops = [
        step_flops(ours.architecture, work, extra_forward_passes=ahead / len(batches)).hardware,
        # Caching in Hugging Face's form runs all micro-batches forward twice.
        step_flops(ours.architecture, reference.workload(padded, work), extra_forward_passes=int(ahead > 0)).hardware,
    ]
    measured = measure_pairs(
        lambda: ours.step(batches), lambda: reference.step(padded), repeats=args.repeats, warmup=0
    )
    analytic = flops[1] / flops[0]
    found = {
        "stage": stage,
        "distribution": distribution,
        "losses_and_norms": [[[round(value, 6) for value in side] for side in pair] for pair in losses],
        "tokens": work.tokens,
        "padded_tokens": reference.workload(padded, work).tokens,
        "useful": round(analytic, 3),
        **measured,
        "efficiency": round(measured["ratio"] / analytic, 3),
        "gigaflops_per_second": round(flops[0] / measured["ours_seconds"] / 1e9, 1),
    }
    if not args.no_memory:
        reference.keep_gradients = True
        peaks = [peak_bytes(lambda: ours.step(batches)), peak_bytes(lambda: reference.step(padded))]
        found |= {
            "ours_peak_bytes": peaks[0],
            "reference_peak_bytes": peaks[1],
            "memory_ratio": round(peaks[0] / peaks[1], 3),
        }
    return found


if __name__ == "__main__":
    main()
