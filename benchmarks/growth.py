"""How a step's time grows with tokens and with the length of samples, and what of it is the host's own.

    python benchmarks/growth.py [--lengths 256 512 1024 2048 4096 8192 16384] [--output growth.svg]

Packs of text under the bridged mask (bridge at 0.7 of each sample), forward and backward without the optimizer, in two
series: samples of a fixed length, of which cost should be linear in tokens, and one sample of all tokens, which adds
attention over its two blocks squared. ``time = host + a * linear + b * attention`` is fitted over both by least squares
of relative errors, with the operations counted by ``megatron_cocoa.model.flops``. The host's share of a micro-batch is
bounded from above by a pack of as many samples as the benchmark preset's, all short, through a model of as many layers,
all narrow: every operation of a step on next to nothing. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.side_by_side import hardware, versions, wait  # noqa: E402
from benchmarks.train.examples import Example, ExampleMaker  # noqa: E402
from benchmarks.train.ours import Ours  # noqa: E402
from benchmarks.train.shapes import SHAPES, model_config  # noqa: E402
from benchmarks.train_step import write_model  # noqa: E402
from megatron_cocoa.config import ModelSettings, ParallelSettings, TrainSettings  # noqa: E402
from megatron_cocoa.model.flops import step_flops  # noqa: E402
from megatron_cocoa.parallel import topology  # noqa: E402
from megatron_cocoa.training.step import forward_backward  # noqa: E402

STAGE = "bridge"
BRIDGE_SHARE = 0.7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--layers", type=int, default=2, help="of the language model, for the growth alone")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256 << i for i in range(7)])
    parser.add_argument("--sample-length", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--host-samples", type=int, default=8, help="of the pack that the host's time is compared with")
    parser.add_argument("--host-image-size", type=int, help="side of its pictures, instead of the stage's own")
    parser.add_argument("--output", type=Path, help="also draw the growth into this SVG file")
    args = parser.parse_args()
    topology.initialize(ParallelSettings(), topology.LaunchInfo(0, 1, 0), seed=0)
    points = measure_growth(args)
    line = {
        "benchmark": "growth",
        "shape": args.shape,
        "layers": args.layers,
        "points": points,
        "fit": fit(points),
        "host": measure_host(args),
        "versions": versions(),
        "hardware": hardware(),
    }
    topology.shutdown()
    if args.output is not None:
        args.output.write_text(draw(points), encoding="utf-8")
    print(json.dumps(line))


def build(shape: str, **options) -> tuple[Ours, object]:
    """The model of this project and its config; options of ``model_config``."""
    config = model_config(shape, **options)
    with tempfile.TemporaryDirectory() as name:
        write_model(Path(name), config)
        settings = TrainSettings(model=ModelSettings(dtype="fp32", make_vocab_size_divisible_by=1))
        return Ours(Path(name), config, STAGE, settings), config


def text_example(length: int, vocabulary: int) -> Example:
    """A sample of text with every second token of block B supervised."""
    bridge = int(BRIDGE_SHARE * length)
    ids = torch.arange(length) % (vocabulary - 8)
    rows = torch.arange(bridge, length - 1, 2)
    positions = torch.arange(length).expand(3, length)
    return Example(ids=ids, positions=positions, bridge=bridge, text_rows=rows, text_labels=ids[rows + 1])


def seconds_of(ours: Ours, batches: list, repeats: int) -> float:
    """Median of forward and backward, after one run to warm up."""

    def run() -> float:
        for chunk in ours.model.chunks:
            chunk.zero_grad_buffer()
        wait()
        begun = time.perf_counter()
        forward_backward(ours.model, ours.objective, batches)
        wait()
        return time.perf_counter() - begun

    run()
    return statistics.median(run() for _ in range(repeats))


def measure_growth(args: argparse.Namespace) -> list[dict]:
    """Seconds and operations of each pack, each printed to stderr when it is known."""
    ours, config = build(args.shape, layers=args.layers, vision_layers=1)
    points = []
    for series in ("many", "one"):
        for tokens in args.lengths:
            length = tokens if series == "one" else min(tokens, args.sample_length)
            examples = [text_example(length, config.text_config.vocab_size)] * (tokens // length)
            batches = ours.batches(examples, len(examples))
            parts = step_flops(ours.architecture, ours.workload(batches)).parts
            attention = sum(3 * part.attention for part in parts)
            points.append(
                {
                    "series": series,
                    "tokens": tokens,
                    "sum_of_squares": sum(example.num_tokens**2 for example in examples),
                    "seconds": seconds_of(ours, batches, args.repeats),
                    "linear_flops": sum(part.forward + part.backward for part in parts) - attention,
                    "attention_flops": attention,
                }
            )
            print(json.dumps(points[-1]), file=sys.stderr, flush=True)
    return points


def fit(points: list[dict]) -> dict:
    """Least squares of relative errors; and the growth from the first to the last pack of each series, as exponents."""
    seconds = np.array([point["seconds"] for point in points])
    columns = np.array([[1.0, point["linear_flops"] / 1e9, point["attention_flops"] / 1e9] for point in points])
    found = np.linalg.lstsq(columns / seconds[:, None], np.ones(len(points)), rcond=None)[0]
    errors = columns @ found / seconds - 1
    exponents = {}
    for series in ("many", "one"):
        own = [point for point in points if point["series"] == series]
        first, last = own[0], own[-1]
        if last["tokens"] > first["tokens"]:
            growth = math.log(last["seconds"] / first["seconds"]) / math.log(last["tokens"] / first["tokens"])
            exponents[series] = round(growth, 3)
    return {
        "host_seconds": float(f"{found[0]:.3g}"),
        "seconds_per_linear_gigaflop": float(f"{found[1]:.3g}"),
        "seconds_per_attention_gigaflop": float(f"{found[2]:.3g}"),
        "relative_errors": [round(float(error), 3) for error in errors],
        "exponent_of_tokens": exponents,
    }


def measure_host(args: argparse.Namespace) -> dict:
    """Seconds of a pack of next to nothing, and of one of the preset."""
    seconds, tokens = [], []
    for narrow, image_size in ((True, 28), (False, args.host_image_size)):
        ours, config = build(args.shape, narrow=narrow)
        examples = ExampleMaker(config, "short", image_size=image_size).step(STAGE, args.host_samples)
        batches = ours.batches(examples, len(examples))
        seconds.append(seconds_of(ours, batches, max(args.repeats, 5)))
        tokens.append(batches[0].num_tokens)
    return {
        "least_pack_tokens": tokens[0],
        "least_pack_seconds": round(seconds[0], 4),
        "preset_pack_tokens": tokens[1],
        "preset_pack_seconds": round(seconds[1], 4),
        "share_at_most": round(seconds[0] / seconds[1], 4),
    }


def draw(points: list[dict]) -> str:
    """Seconds over tokens, both logarithmic, as an SVG document."""
    left, right, top, bottom = 60.0, 560.0, 30.0, 330.0
    tokens = sorted({point["tokens"] for point in points})
    low = math.floor(math.log10(min(point["seconds"] for point in points)))
    high = math.ceil(math.log10(max(point["seconds"] for point in points)))

    def x(value: float) -> float:
        return left + (right - left) * math.log2(value / tokens[0]) / max(1.0, math.log2(tokens[-1] / tokens[0]))

    def y(value: float) -> float:
        return bottom - (bottom - top) * (math.log10(value) - low) / max(1, high - low)

    parts = ['<text x="60" y="18">Forward and backward, seconds over tokens of the pack</text>']
    for power in range(low, high + 1):
        at = y(10.0**power)
        parts.append(f'<path d="M{left} {at:.1f}H{right}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for value in tokens:
        parts.append(f'<text x="{x(value):.1f}" y="{bottom + 18}" text-anchor="middle">{value}</text>')
    names = {"many": ("samples of one length", "#1f6feb"), "one": ("one sample", "#c2410c")}
    for row, (series, (name, colour)) in enumerate(names.items()):
        own = [point for point in points if point["series"] == series]
        path = "L".join(f"{x(point['tokens']):.1f} {y(point['seconds']):.1f}" for point in own)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{left + 12}" y="{top + 16 + 16 * row}" fill="{colour}">{name}</text>')
    body = "".join(parts)
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 580 360" font-family="sans-serif" font-size="12">'
        f'<rect width="580" height="360" fill="white"/>{body}</svg>\n'
    )


if __name__ == "__main__":
    main()
