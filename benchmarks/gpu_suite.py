"""Everything that needs measuring on one GPU, in one command of under 8 minutes on an H100.

    python benchmarks/gpu_suite.py --output gpu_suite.json [--sections correctness attention step_3b step_7b]

Sections: ``correctness`` runs ``tests/gpu``; ``attention`` compares segments on every backend, FlexAttention among
them, with dense-mask SDPA from n = 1k to 16k; ``step_3b`` and ``step_7b`` time optimizer steps of stage 2 in BF16 and,
where Transformer Engine is present, in FP8. Models of those sizes with their optimizer do not fit one GPU, and need
not: steps run with the published widths and few layers, and one more measurement for each of tower and language model
gives the cost of a layer, from which time and memory of the whole are *extrapolated*, and said to be.

A section that fails is recorded with its message, the others go on, and the exit code is 1. ``--tiny`` runs all of the
code on a CPU with sizes that mean nothing: the output then carries ``"gpu": null``, ``"tiny": true`` and no
utilisation.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import attention  # noqa: E402
from benchmarks.gpu_steps import Depth, StepCase, extrapolate, measure_step  # noqa: E402
from benchmarks.side_by_side import hardware, versions  # noqa: E402
from megatron_cocoa.config import ParallelSettings  # noqa: E402
from megatron_cocoa.model.attention import attend_function  # noqa: E402
from megatron_cocoa.parallel import device, topology  # noqa: E402
from megatron_cocoa.parallel.device_memory import release_memory  # noqa: E402

LENGTHS = (1024, 2048, 4096, 8192, 16384)
FP8 = {"delayed": ("delayed", False), "delayed, tower too": ("delayed", True), "tensorwise": ("tensorwise", False)}
"""Recipe, and whether the tower's linears run in it, by what the table calls it."""
HEADS = {"3b": (16, 2), "7b": (28, 4)}
TEST_SECONDS = 400


def correctness(tiny: bool, recipes: list[str]) -> dict[str, object]:
    """``tests/gpu`` without its slow cases; in tiny mode instead every backend on a few rows beside dense SDPA."""
    if tiny:
        problem = attention.Problem([24, 9], 4, 2, 8, torch.float32)
        wanted = next(iter(attention.dense_forms(problem).values()))()
        ours = problem.segments(attend_function("sdpa", on_gpu=False))
        return {"largest_error": attention.check(problem, ours, wanted, "sdpa")}
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu and not slow", "tests/gpu", "-p", "no:cacheprovider"]
    return {"summary": run_tests(command, TEST_SECONDS)}


def run_tests(command: list[str], seconds: float) -> str:
    """Run pytest with ``-v`` and return the last line that it prints.

    Raises:
        RuntimeError: naming the tests that failed, also where they did not end in ``seconds``; all that was printed
            goes to stderr. Runs that they started are ended then: sections after this one are timed.
    """
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    late = ""
    try:
        printed, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        late = f"not done after {seconds} s"
        for part in (process, *psutil.Process(process.pid).children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                part.kill()
        printed, _ = process.communicate()
    last = printed.strip().rpartition("\n")[2].strip("= ")
    if late or process.returncode:
        print(printed, file=sys.stderr)
        failed = re.findall(r"^(tests/.+?) (?:FAILED|ERROR)\b", printed, re.MULTILINE)
        raise RuntimeError("; ".join([late or last, *failed]))
    return last


def attention_section(tiny: bool, recipes: list[str]) -> dict[str, object]:
    """Segments beside dense-mask SDPA at the heads of the 3B, one sample a pack."""
    heads, groups = (2, 1) if tiny else HEADS["3b"]
    lengths = (32, 48) if tiny else LENGTHS
    arguments = ["--lengths", *map(str, lengths), "--heads", str(heads), "--groups", str(groups), "--repeats", "3"]
    return attention.main([*arguments, "--dim", "16"] if tiny else arguments)


def step_section(shape: str) -> Callable[[bool, list[str]], dict[str, object]]:
    def run(tiny: bool, recipes: list[str]) -> dict[str, object]:
        name = "small" if tiny else shape
        depths = Depth.tiny() if tiny else Depth.cut(shape)
        found: dict[str, object] = {}
        plain = "fp32" if tiny else "bf16"
        for label, (recipe, fp8_vision) in {plain: (None, False), **{name: FP8[name] for name in recipes}}.items():
            if recipe and not device.optional_kernels()["Transformer Engine"]:
                found[label] = {"absent": "Transformer Engine is not installed, or there is no GPU"}
                continue
            case = StepCase(name, recipe, tiny, fp8_vision)
            try:
                found[label] = extrapolate(case, depths, [measure_step(case, depth) for depth in depths])
            except Exception as error:
                # What the other precisions took minutes for is worth keeping.
                found[label] = failure(error)
            release_memory()
            if recipe and not any("failed" in found[of] for of in (plain, label)):
                times = found[plain]["extrapolated_seconds"] / found[label]["extrapolated_seconds"]
                found[label]["times_bf16"] = round(times, 3)
        return found

    return run


SECTIONS: dict[str, Callable[[bool, list[str]], dict[str, object]]] = {
    "correctness": correctness,
    "attention": attention_section,
    "step_3b": step_section("3b"),
    "step_7b": step_section("7b"),
}


def run_sections(names: list[str], tiny: bool, recipes: list[str]) -> Iterator[tuple[str, dict[str, object]]]:
    """Each section's name and result, or why it has none; never raises for what a section does."""
    for name in names:
        begun = time.perf_counter()
        try:
            result = SECTIONS[name](tiny, recipes)
        except (Exception, SystemExit) as error:
            result = failure(error)
        result["section_seconds"] = round(time.perf_counter() - begun, 1)
        release_memory()
        yield name, result


def failure(error: BaseException) -> dict[str, object]:
    """What stands for a result that there is none of."""
    where = "".join(traceback.format_exception(error))[-2000:]
    return {"failed": f"{type(error).__name__}: {error}", "where": where}


def has_failed(result: dict[str, object]) -> bool:
    """Whether a section, or one of its rows, has no result."""
    return any("failed" in part for part in (result, *result.values()) if isinstance(part, dict))


def table(results: dict[str, dict[str, object]]) -> str:
    """What a person reads first."""
    lines = []
    for name, result in results.items():
        if "failed" in result:
            lines.append(f"{name}: FAILED: {result['failed']}")
        elif name == "attention":
            lines += [_attention_line(row) for row in result["results"]]
        elif name.startswith("step"):
            lines += [_step_line(name, label, row) for label, row in result.items() if isinstance(row, dict)]
        else:
            lines.append(f"{name}: " + ", ".join(f"{k} {v}" for k, v in result.items()))
    return "\n".join(lines)


def _attention_line(row: dict) -> str:
    backends = {k: v for k, v in row.items() if isinstance(v, dict)}
    parts = [f"{k} absent" if "absent" in v else f"{k} {v['ratio']}x dense" for k, v in backends.items()]
    return f"attention n={row['n']}: " + ", ".join(parts)


def _step_line(name: str, label: str, row: dict) -> str:
    if "absent" in row:
        return f"{name} {label}: {row['absent']}"
    if "failed" in row:
        return f"{name} {label}: FAILED: {row['failed']}"
    mfu = "no peak known" if row["mfu"] is None else f"MFU {row['mfu']:.1%}"
    memory = row["extrapolated_peak_bytes"] / 2**30
    times = f", {row['times_bf16']}x BF16" if "times_bf16" in row else ""
    busy = [p["kernel_seconds"] / p["seconds"] for p in row["measured"] if p["kernel_seconds"] is not None]
    kernels = f", kernels run {min(busy):.0%} to {max(busy):.0%} of the time" if busy else ""
    return (
        f"{name} {label}: {row['extrapolated_seconds']:.4g} s a step and {memory:.1f} GiB of activations extrapolated "
        f"to {row['layers']} and {row['vision_layers']} layers, {mfu}{times}{kernels}"
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="gpu_suite.json", help="JSON file (default %(default)s)")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--recipes", nargs="+", choices=FP8, default=list(FP8), help="of FP8, whose steps are timed")
    parser.add_argument("--tiny", action="store_true", help="prove on a CPU that the code runs; measures nothing")
    args = parser.parse_args(arguments)
    if not args.tiny and not device.has_gpu():
        raise SystemExit("there is no GPU: --tiny proves that the suite's code runs, and measures nothing")
    if args.tiny and device.has_gpu():
        raise SystemExit("--tiny is for machines without a GPU")
    topology.initialize(ParallelSettings(), topology.LaunchInfo(0, 1, 0), seed=0)
    begun = time.perf_counter()
    results: dict[str, dict[str, object]] = {}
    line = {"benchmark": "gpu_suite", "tiny": args.tiny, "gpu": device.device_name(), "results": results}
    line |= {"versions": versions(), "hardware": hardware()}
    for name, result in run_sections(args.sections, args.tiny, args.recipes):
        results[name] = result
        line["seconds"] = round(time.perf_counter() - begun, 1)
        # After each: what was measured stays if a later section takes the process with it.
        Path(args.output).write_text(json.dumps(line, indent=1) + "\n", encoding="utf-8")
    topology.shutdown()
    if args.tiny:
        print("tiny sizes on a CPU: no number below says anything about a GPU")
    print(table(results))
    return int(any(has_failed(result) for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
