"""Peak memory of contrastive steps above what is resident once the optimizer is built, by global batch size.

    python benchmarks/contrastive_memory.py [--sizes 64 1024] [--micro-batch-size 32] [--pairs 2048]

Each size runs in a fresh process, one rank, on the toy preset's model and pictures, which are made in ``outputs/toy``
on the first run. Gradient caching should make the peak depend on the micro-batch and not on the global batch. All sizes
see the same number of pairs: the cache of decoded pictures fills with those, up to a fixed 256 MiB. The C allocator is
told to give large blocks back when they are freed (``MALLOC_MMAP_THRESHOLD_``): left alone, it keeps them in heaps that
fragment by chance, which moves the peak of either size by a third from run to run. Prints one JSON line: by size the
resident size after the optimizer is built, the peak of the steps above it (of the process; on a GPU, of its allocator)
and the seconds of the last step; and the ratio of the largest to the smallest size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LARGE_BLOCK = 2**18
"""Bytes from which on a freed block leaves the process at once."""
sys.path.insert(0, str(ROOT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--micro-batch-size", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=2048, help="seen by each size, in steps of that size")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        print(json.dumps(measure(args.measure, args.micro_batch_size, args.pairs)))
        return
    found = {}
    for size in args.sizes:
        command = [sys.executable, __file__, "--measure", str(size)]
        command += ["--micro-batch-size", str(args.micro_batch_size), "--pairs", str(args.pairs)]
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(LARGE_BLOCK)}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
        found[str(size)] = json.loads(done.stdout.splitlines()[-1])
    peaks = [found[str(size)]["peak_above_bytes"] for size in (max(args.sizes), min(args.sizes))]
    print(json.dumps({"sizes": found, "ratio": round(peaks[0] / peaks[1], 3)}))


def measure(size: int, micro_batch_size: int, pairs: int) -> dict[str, float]:
    """Run the steps of one size in this process."""
    from megatron_cocoa.objectives import build_objective
    from megatron_cocoa.parallel import topology
    from megatron_cocoa.parallel.device_memory import peak_memory_bytes, release_memory, reset_peak_memory
    from megatron_cocoa.recipes.context import prepare_context
    from megatron_cocoa.recipes.initial_model import build_with_weights
    from megatron_cocoa.recipes.stage_loader import build_loader
    from megatron_cocoa.settings.parse import parse_settings
    from megatron_cocoa.training.data_parallel import wrap_data_parallel
    from megatron_cocoa.training.optimizer import build_optimizer
    from megatron_cocoa.training.step import forward_backward

    settings = parse_settings(["--preset", "toy", "--stages", "contrastive"])
    stage = replace(settings.contrastive, global_batch_size=size, micro_batch_size=micro_batch_size, steps=300)
    context = prepare_context(replace(settings, contrastive=stage))
    topology.initialize(settings.parallel, topology.LaunchInfo(0, 1, 0), seed=settings.seed)
    bare = build_with_weights(context, checkpoint=None, with_image_decoder=False)
    model = wrap_data_parallel(bare, settings.parallel)
    model.train()
    optimizer, schedule = build_optimizer(model, stage, settings.optimizer, settings.parallel)
    objective, loader = build_objective("contrastive", context.settings), build_loader(context, "contrastive")
    release_memory()
    resident = reset_peak_memory()
    for _ in range(pairs // size):
        begun = time.perf_counter()
        batches = loader.next_step()
        for chunk in model.chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        schedule.step(increment=1)
        forward_backward(model, objective, batches)
        optimizer.step()
        seconds = time.perf_counter() - begun
    above = peak_memory_bytes() - resident
    loader.close()
    topology.shutdown()
    return {"resident_bytes": resident, "peak_above_bytes": above, "seconds_per_step": round(seconds, 2)}


if __name__ == "__main__":
    main()
