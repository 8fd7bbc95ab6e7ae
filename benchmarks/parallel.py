"""Two processes at each kind of parallelism beside one process that has both cores, on the same step.

    python benchmarks/parallel.py [--layouts tp2 tp2-sp pp2 dp2] [--repeats 5]

Every process takes the same global batch and weights, losses must agree. A round is a lone process on both cores, one
on one core, and then each layout, each started afresh, so that a busy machine slows all; figures are medians over the
rounds of each run's median step. ``efficiency`` is the seconds of the lone process on both cores over the layout's.

The account says where the layout's core-seconds go, in shares of them, in the round with the layout's median time:

- ``useful``: the processor time of the lone process on one core, which computes everything once;
- ``more_compute``: what the ranks' processor time is above that: work that each of them does, exchanges, and products
  that run slower in smaller pieces or beside another core's;
- ``idle``: the rest, time in which a rank's processor stands still.

To explain ``idle``: ``imbalance``, by which the rank with most to compute is above the mean; ``bubble``, what a
pipeline of p equal stages would idle over m micro-batches, ``(p - 1) / (m + p - 1)``; ``in_collectives``, the share of
time that the ranks' main threads spend in collectives and transfers, computing or not. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STAGE = "bridge"
LONE = ("both_cores", "one_core")
LAYOUTS = {
    "tp2": {"tensor_model_parallel_size": 2},
    "tp2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
}
LOSS_TOLERANCE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--shape", default="small")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vision-layers", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--first-stage-layers", type=int, help="language layers beside the tower under pp2")
    parser.add_argument("--repeats", type=int, default=5, help="rounds")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a run")
    parser.add_argument("--measure", nargs=2, metavar=("LAYOUT", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure is not None:
        measure(args)
        return
    from benchmarks.side_by_side import hardware, versions
    from benchmarks.train.shapes import model_config
    from benchmarks.train_step import write_model

    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), model_config(args.shape, layers=args.layers, vision_layers=args.vision_layers))
        names = [*LONE, *args.layouts]
        rounds = [{layout: run(layout, name, args) for layout in names} for _ in range(args.repeats)]
    print(
        json.dumps(
            {
                "benchmark": "parallel",
                "microbatches": args.microbatches,
                "layouts": {layout: summary(layout, rounds, args) for layout in args.layouts},
                **{f"{name}_seconds": statistics.median(r[name]["seconds"] for r in rounds) for name in LONE},
                "versions": versions(),
                "hardware": hardware(),
            }
        )
    )


def run(layout: str, folder: str, args: argparse.Namespace) -> dict:
    """Start the ranks of one layout; what rank 0 found."""
    ranks = 1 if layout in LONE else 2
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    passed = "shape layers vision_layers samples microbatches image_size first_stage_layers steps".split()
    options = [
        f"--{name.replace('_', '-')}={getattr(args, name)}" for name in passed if getattr(args, name) is not None
    ]
    processes = []
    for rank in range(ranks):
        environment = os.environ | {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": str(os.cpu_count()) if layout == "both_cores" else "1",
        }
        command = [sys.executable, __file__, "--measure", layout, folder, *options]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{layout}: a rank ended with {[process.returncode for process in processes]}")
    return json.loads(outputs[0].splitlines()[-1])


def measure(args: argparse.Namespace) -> None:
    """One rank's steps; rank 0 prints the seconds of a step, every rank's waiting and processor time, and losses."""
    import torch
    import torch.distributed as dist

    from benchmarks.train.examples import ExampleMaker
    from benchmarks.train.ours import Ours
    from benchmarks.train.shapes import model_config
    from megatron_cocoa.config import ModelSettings, ParallelSettings, TrainSettings
    from megatron_cocoa.parallel import device, topology

    layout, folder = args.measure
    degrees = dict(LAYOUTS.get(layout, {}))
    if layout == "pp2" and args.first_stage_layers is not None:
        degrees["num_layers_in_first_pipeline_stage"] = args.first_stage_layers
    parallel = ParallelSettings(**degrees)
    topology.initialize(parallel, topology.LaunchInfo.from_environment(), seed=0)
    config = model_config(args.shape, layers=args.layers, vision_layers=args.vision_layers)
    settings = TrainSettings(model=ModelSettings(dtype="fp32"), parallel=parallel)
    ours = Ours(Path(folder), config, STAGE, settings)
    examples = ExampleMaker(config, "short", image_size=args.image_size).step(STAGE, args.samples)
    if args.samples % args.microbatches or args.microbatches % 2:
        raise ValueError(f"{args.samples} samples in {args.microbatches} packs: needed an even number of equal packs")
    per_pack = args.samples // args.microbatches
    groups = [examples[i : i + per_pack] for i in range(0, args.samples, per_pack)]
    # Sequence parallelism needs an even number of tokens, which the loader gives by a tail and this by one token less.
    batches = [batch for group in groups for batch in ours.batches(_even(group), per_pack)]
    share = len(batches) // topology.data_parallel_size()
    mine = batches[topology.data_parallel_rank() * share :][:share]
    waiting = _count_waiting(dist)
    losses, steps = [ours.step(mine)[0] for _ in range(2)], []
    for _ in range(args.steps):
        dist.barrier()
        waiting[0], begun, computed = 0.0, time.perf_counter(), time.process_time()
        ours.step(mine)
        steps.append((time.perf_counter() - begun, waiting[0], time.process_time() - computed))
    found = torch.tensor(steps, dtype=torch.float64).median(dim=0).values.to(device.device())
    ranks = [torch.zeros_like(found) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, found)
    if dist.get_rank() == 0:
        seconds, waits, processor = torch.stack(ranks, dim=1).tolist()
        print(json.dumps({"seconds": max(seconds), "waits": waits, "processor": processor, "losses": losses}))
    topology.shutdown()


def _even(examples: list) -> list:
    """The examples, the last one token shorter where their sum is odd."""
    from dataclasses import replace

    if sum(example.num_tokens for example in examples) % 2 == 0:
        return examples
    last, length = examples[-1], examples[-1].num_tokens - 1
    kept = last.text_rows < length - 1
    shorter = replace(
        last,
        ids=last.ids[:length],
        positions=last.positions[:, :length],
        text_rows=last.text_rows[kept],
        text_labels=last.text_labels[kept],
    )
    return [*examples[:-1], shorter]


def _count_waiting(dist) -> list[float]:
    """Seconds that this rank's main thread waits in collectives and transfers, summed into the one entry returned."""
    total, wait = [0.0], dist.Work.wait

    def timed(self, *args, **kwargs):
        begun = time.perf_counter()
        try:
            return wait(self, *args, **kwargs)
        finally:
            total[0] += time.perf_counter() - begun

    dist.Work.wait = timed
    return total


def summary(layout: str, rounds: list[dict], args: argparse.Namespace) -> dict:
    """Efficiency and account of one layout over the rounds."""
    for found in rounds:
        lone = found["both_cores"]["losses"]
        for name in (layout, "one_core"):
            mine = found[name]["losses"]
            if any(abs(a - b) > LOSS_TOLERANCE * abs(b) for a, b in zip(mine, lone)):
                raise SystemExit(f"{name} has the losses {mine} in its first two steps, one process {lone}")
    ratios = [found["both_cores"]["seconds"] / found[layout]["seconds"] for found in rounds]
    middle = sorted(rounds, key=lambda found: found[layout]["seconds"])[len(rounds) // 2]
    shares = account(middle[layout], middle["one_core"]["processor"][0])
    shares["bubble"] = 1 / (args.microbatches + 1) if layout == "pp2" else 0.0
    return {
        "seconds": round(statistics.median(found[layout]["seconds"] for found in rounds), 4),
        "efficiency": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
        "account": {name: round(share, 3) for name, share in shares.items()},
    }


def account(found: dict, once: float) -> dict[str, float]:
    """Shares of a run's core-seconds; ``once`` is the processor time of computing everything once, in seconds."""
    seconds, processor = found["seconds"], found["processor"]
    total, mean = seconds * len(processor), statistics.mean(processor)
    return {
        "useful": once / total,
        "more_compute": (sum(processor) - once) / total,
        "idle": 1 - mean / seconds,
        "imbalance": (max(processor) - mean) / seconds,
        "in_collectives": statistics.mean(found["waits"]) / seconds,
    }


if __name__ == "__main__":
    main()
