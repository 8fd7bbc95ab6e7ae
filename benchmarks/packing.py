"""How full packs of a token budget are, and how even the ranks, on the lengths of real rows; nothing is decoded.

    python benchmarks/packing.py --data-path outputs/mini --model-path outputs/toy/model [--stage contrastive]
        [--global-batch-size 1024] [--data-parallel-size 4] [--budgets 256 512 1024 2048 4096 8192]
        [--steps 20]

Takes the stage's own steps in their order, measures rows by their texts and the headers of their pictures, and shares
them out as training does. Prints one JSON line: for each budget the share of all packs' tokens that belongs to samples
(a rank's packs are padded to the longest of them), over all steps and in the emptiest one, the tokens of a pack, packs
a rank, and by how much the worst rank's cost exceeds the mean. --lengths FILE writes the distinct sizes of rows with
their counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_cocoa.architecture import QwenVLArchitecture  # noqa: E402
from megatron_cocoa.config import DataSettings, ModelSettings, TrainSettings  # noqa: E402
from megatron_cocoa.conversion.hf_to_mcore import read_architecture  # noqa: E402
from megatron_cocoa.data.cost import CostModel, SampleSize  # noqa: E402
from megatron_cocoa.data.evaluation_batches import evaluation_builder  # noqa: E402
from megatron_cocoa.data.packing import assign_samples  # noqa: E402
from megatron_cocoa.data.stages import STAGE_DATA  # noqa: E402
from megatron_cocoa.data.tokenizer import load_tokenizer  # noqa: E402


def step_sizes(
    args: argparse.Namespace, architecture: QwenVLArchitecture
) -> tuple[list[list[list[SampleSize]]], Counter]:
    """For each step the samples of its rows; and how often each distinct size occurs in the whole stage."""
    settings = TrainSettings(
        model=ModelSettings(path=args.model_path), data=DataSettings(path=args.data_path, max_length=args.max_length)
    )
    stage = replace(settings.stage(args.stage), image_size=args.image_size, global_batch_size=args.global_batch_size)
    settings = replace(settings, **{args.stage: stage})
    builder, _ = evaluation_builder(
        args.data_path,
        model_path=args.model_path,
        bundle=load_tokenizer(args.model_path, vocab_size=architecture.text.vocab_size),
        vision=architecture.vision,
        max_length=args.max_length,
        image_size=args.image_size,
    )
    data = STAGE_DATA[args.stage](settings)
    sizes = [data.measure(row, builder, epoch=0) for row in data.row_set.rows]
    order, size = data.order(), args.global_batch_size
    steps = [[sizes[order.at(place)[1]] for place in range(s * size, (s + 1) * size)] for s in range(args.steps)]
    counts = Counter(tuple((one.tokens, sum(one.patches), one.pairs, one.labels) for one in row) for row in sizes)
    return steps, counts


def fill(steps: list[list[list[SampleSize]]], cost: CostModel, *, budget: int, num_ranks: int) -> dict:
    """One budget's figures over all steps."""
    filled, capacity, emptiest, imbalance, packs, lengths = 0, 0, 1.0, 0.0, set(), set()
    for step in steps:
        tokens = [sum(one.tokens for one in row) for row in step]
        costs = [sum(map(cost.flops, row)) for row in step]
        found = assign_samples(tokens, costs, num_ranks=num_ranks, samples_per_pack=1, budget=budget)
        longest = [max(sum(tokens[i] for i in pack) for pack in own) for own in found.packs]
        held = sum(length * len(own) for length, own in zip(longest, found.packs))
        filled, capacity = filled + sum(tokens), capacity + held
        emptiest, imbalance = min(emptiest, sum(tokens) / held), max(imbalance, found.rank_imbalance)
        packs.add(len(found.packs[0]))
        lengths.update(longest)
    return {
        "budget": budget,
        "filled": round(filled / capacity, 4),
        "emptiest_step": round(emptiest, 4),
        "tokens_per_pack": [min(lengths), max(lengths)],
        "packs_per_rank": [min(packs), max(packs)],
        "worst_rank_imbalance": float(f"{imbalance:.1e}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-path", required=True)
    parser.add_argument("--model-path", required=True, help="tokenizer, processor and sizes of the layers")
    parser.add_argument("--stage", choices=sorted(STAGE_DATA), default="contrastive")
    parser.add_argument("--global-batch-size", type=int, default=1024)
    parser.add_argument("--data-parallel-size", type=int, default=4)
    parser.add_argument("--budgets", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--image-size", type=int, help="as a stage's image_size (default: pictures keep their shape)")
    parser.add_argument("--lengths", metavar="FILE")
    args = parser.parse_args()
    architecture = read_architecture(args.model_path)
    steps, counts = step_sizes(args, architecture)
    if args.lengths:
        lines = [json.dumps([list(map(list, row)), count]) for row, count in sorted(counts.items())]
        Path(args.lengths).write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    cost = CostModel.from_architecture(architecture)
    results = [fill(steps, cost, budget=budget, num_ranks=args.data_parallel_size) for budget in args.budgets]
    tokens = sum(one.tokens for step in steps for row in step for one in row)
    line = {
        "benchmark": "packing",
        "stage": args.stage,
        "rows": counts.total(),
        "global_batch_size": args.global_batch_size,
        "data_parallel_size": args.data_parallel_size,
        "steps": args.steps,
        "tokens_per_rank_and_step": round(tokens / args.steps / args.data_parallel_size, 1),
        "results": results,
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
