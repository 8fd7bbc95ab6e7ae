"""Time and peak memory of both converters beside a plain copy of the same bytes on the same disk.

    python benchmarks/convert.py --work-dir DIR [--shape 3b|small] [--verify]

Writes a model of random weights (the Qwen2.5-VL-3B shape: 3.755 B parameters, 7.5 GB in BF16) into the work folder,
which needs room for four of it, and prints one JSON line. The reference copies the files and forces them to disk, once
before and once after the conversion, and the mean counts; the converters run as users run them, as a process of their
own whose start is part of the time. Before each run the files that it reads are dropped from the page cache. Memory is
the largest resident size of the process and its children. With --verify the round trip is followed by the tool's own
comparison of the two models (--verify-only), with weights that a model can compute with; at the 3B shape
9.6 GiB are asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

COPY_BLOCK = 16 * 2**20
SHAPES = {
    "3b": (
        dict(
            vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16,
            num_key_value_heads=2,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
        ),
        dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=2048),
    ),
    "small": (
        dict(
            vocab_size=32000, hidden_size=512, intermediate_size=1376, num_hidden_layers=6, num_attention_heads=8,
            num_key_value_heads=2,
            rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[8, 12, 12]),
        ),
        dict(depth=4, hidden_size=320, intermediate_size=856, num_heads=4, out_hidden_size=512),
    ),
}  # fmt: skip


def write_random_model(folder: Path, shape: str, *, shard_bytes: int = 4 * 10**9, plausible: bool = False) -> int:
    """A tied Qwen2.5-VL folder in BF16 whose weights are random finite numbers. Returns its number of parameters."""
    import torch
    from transformers import Qwen2_5_VLConfig

    from megatron_cocoa.checkpoint.mapping import NameTable
    from megatron_cocoa.checkpoint.safetensors_stream import write_safetensors

    text, vision = SHAPES[shape]
    # The published ids lie at the end of the published vocabulary, as these do in any.
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = {name: text["vocab_size"] - 4 + place for place, name in enumerate(names)}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, dtype="bfloat16", **ids)
    config.save_pretrained(folder)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, size in NameTable.from_config(config).hf_shapes.items():
        num_bytes = 2 * torch.Size(size).numel()
        if shards[-1] and filled + num_bytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = size
        filled += num_bytes
    torch.manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        draw = plausible_weights if plausible else random_weights
        write_safetensors(folder / file, ((name, draw(size)) for name, size in shapes.items()), shapes)
        weight_map |= dict.fromkeys(shapes, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(torch.Size(s).numel() for shapes in shards for s in shapes.values())


def random_weights(size: tuple[int, ...]):
    """BF16 numbers between zero and one: all bit patterns below that of one."""
    import torch

    return torch.empty(size, dtype=torch.int16).random_(0, 0x3F80).view(torch.bfloat16)


def plausible_weights(size: tuple[int, ...]):
    """BF16 numbers that a model can compute with: as freshly initialised, norms and biases off their defaults."""
    import torch

    if len(size) == 1:
        return (1 + 0.1 * torch.randn(size)).bfloat16()
    return torch.empty(size, dtype=torch.bfloat16).normal_(0.0, 0.02)


def drop_from_cache(folder: Path) -> None:
    os.sync()
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def timed_copy(source: Path, scratch: Path) -> float:
    """Seconds to copy the files of a folder and force each to disk."""
    target = scratch / "copy"
    drop_from_cache(source)
    start = time.monotonic()
    target.mkdir()
    for file in source.rglob("*"):
        if file.is_file():
            with open(file, "rb", buffering=0) as read, open(target / file.name, "xb", buffering=0) as write:
                while block := read.read(COPY_BLOCK):
                    write.write(block)
                os.fsync(write.fileno())
    seconds = time.monotonic() - start
    shutil.rmtree(target)
    return seconds


def run_converter(tool: str, source: Path, *arguments: str) -> dict[str, float]:
    """Wall seconds and peak resident GiB of one conversion."""
    drop_from_cache(source)
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, str(ROOT / "tools" / tool), *arguments], stdout=subprocess.DEVNULL)
    peak = 0
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        peak = max(peak, resident_bytes(watched))
        time.sleep(0.02)
    seconds = time.monotonic() - start
    if process.returncode:
        raise SystemExit(f"{tool} ended with status {process.returncode}")
    return {"seconds": round(seconds, 2), "peak_gib": round(peak / 2**30, 3)}


def resident_bytes(process: psutil.Process) -> int:
    total = 0
    try:
        for member in (process, *process.children(recursive=True)):
            total += member.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def measure(tool: str, source: Path, target: Path, arguments: list[str], scratch: Path) -> dict[str, object]:
    copies = [timed_copy(source, scratch)]
    ours = run_converter(tool, source, *arguments)
    copies.append(timed_copy(source, scratch))
    reference = sum(copies) / len(copies)
    return {
        "ours": ours,
        "reference": {"seconds": round(reference, 2), "runs": [round(seconds, 2) for seconds in copies]},
        "ratio": round(ours["seconds"] / reference, 2),
        "load_average": round(os.getloadavg()[0], 1),
        "gb_read": round(folder_bytes(source) / 1e9, 3),
        "gb_written": round(folder_bytes(target) / 1e9, 3),
    }


def versions() -> dict[str, str]:
    import megatron.core
    import torch
    import transformers

    packages = {"torch": torch, "transformers": transformers, "megatron-core": megatron.core}
    return {"python": platform.python_version(), **{name: module.__version__ for name, module in packages.items()}}


def hardware(folder: Path) -> dict[str, object]:
    memory = psutil.virtual_memory().total
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "disk_gb": round(shutil.disk_usage(folder).total / 1e9),
        "machine": platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", required=True, help="folder on the disk to measure; cleaned up afterwards")
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--verify", action="store_true", help="run the comparison of the two models, too")
    args = parser.parse_args()
    Path(args.work_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work_dir) as folder:
        scratch = Path(folder)
        source, checkpoint, back = scratch / "source", scratch / "checkpoint", scratch / "back"
        num_parameters = write_random_model(source, args.shape, plausible=args.verify)
        imported = measure(
            "convert_hf_to_mcore.py", source, checkpoint,
            ["--hf-path", str(source), "--mcore-path", str(checkpoint)], scratch,
        )  # fmt: skip
        exported = measure(
            "convert_mcore_to_hf.py", checkpoint, back,
            ["--mcore-path", str(checkpoint), "--hf-path", str(back)], scratch,
        )  # fmt: skip
        verified = {}
        if args.verify:
            paths = ["--hf-path", str(source), "--mcore-path", str(checkpoint)]
            verified = {"verify": run_converter("convert_hf_to_mcore.py", source, *paths, "--verify-only")}
        print(json.dumps({
            "benchmark": "convert", "shape": args.shape, "parameters": num_parameters, "dtype": "bf16",
            "import": imported, "export": exported, "equal": same_weights(source, back), **verified,
            "versions": versions(), "hardware": hardware(scratch),
        }))  # fmt: skip


def same_weights(source: Path, back: Path) -> bool:
    """Whether the round trip gave every tensor back, bit for bit."""
    from megatron_cocoa.checkpoint.bits import same_bits
    from megatron_cocoa.checkpoint.huggingface import HuggingFaceReader

    with HuggingFaceReader(source) as first, HuggingFaceReader(back) as second:
        return set(first.keys()) == set(second.keys()) and all(
            same_bits(first.get(name), second.get(name)) for name in first.keys()
        )


if __name__ == "__main__":
    main()
