"""What it takes until the ranks of a host hold a stage's rows: one rank reads for all, beside each for itself.

    python benchmarks/rows.py [--ranks 4] [--rows 1000000] [--format {mmeb-train,webdataset}] [--sources 10]

Writes pairs as long as MMEB-train's (or captions in shards) into a temporary folder, and starts the ranks afresh for
each side. Prints one JSON line: seconds until the last rank has its loader, by the clock and as processor time of all
ranks together, and the memory that all of them have more than before, with what they share counted once (PSS). Peak is
the most that one rank had resident, above what it had before.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import re
import resource
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch.distributed as dist
import torch.multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_cocoa.config import DataSettings, ModelSettings, SourceSettings, TrainSettings  # noqa: E402
from megatron_cocoa.data.loader import StageLoader  # noqa: E402
from megatron_cocoa.data.toy_model import ToyModelSizes, train_tokenizer, write_model_folder  # noqa: E402
from megatron_cocoa.parallel import topology  # noqa: E402
from megatron_cocoa.recipes.context import prepare_context  # noqa: E402
from megatron_cocoa.recipes.stage_loader import build_loader  # noqa: E402

WORDS = "red green blue small large cat dog house tree moon sol luna perro gato casa rojo verde azul".split()
STAGE = {"mmeb-train": "contrastive", "webdataset": "warmup"}


def write_parquet(folder: Path, first: int, number: int) -> None:
    """``number`` pairs of a picture and a short answer."""
    places = range(first, first + number)
    columns = {
        "qry": [f"<|image_1|>\nFind a caption for the news in the given photo number {i}." for i in places],
        "qry_image_path": [f"images/{folder.name}/Train/{i:08d}.jpg" for i in places],
        "pos_text": [f"an answer of a few words, {i}" for i in places],
        "pos_image_path": [""] * number,
    }
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "original-00000.parquet")


def write_shards(folder: Path, first: int, number: int) -> None:
    """``number`` samples of an empty picture and a caption, ten thousand to a shard."""
    folder.mkdir()
    for start in range(first, first + number, 10_000):
        with tarfile.open(folder / f"{start:08d}.tar", "w") as archive:
            for i in range(start, min(start + 10_000, first + number)):
                caption = f"a caption of a few words, {i}".encode()
                for name, content in ((f"{i:08d}.jpg", b""), (f"{i:08d}.txt", caption)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))


WRITERS = {"mmeb-train": write_parquet, "webdataset": write_shards}


def settings_for(folder: Path, args: argparse.Namespace) -> TrainSettings:
    """Of a run on what ``main`` wrote into ``folder``."""
    names = [f"subset_{i}" for i in range(args.sources)]
    sources = tuple(SourceSettings(name, str(folder / name), args.format) for name in names)
    return TrainSettings(model=ModelSettings(path=str(folder / "model")), data=DataSettings(sources=sources))


def build(rank: int, folder: Path, args: argparse.Namespace, side: str) -> None:
    """One rank: build the loader, and write what that took to a file of its own."""
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(args.port))
    settings = settings_for(folder, args)
    topology.initialize(settings.parallel, topology.LaunchInfo(rank, args.ranks, rank), seed=0)
    context, stage = prepare_context(settings), STAGE[args.format]
    dist.barrier()
    before = memory()
    worked, started = time.process_time(), time.perf_counter()
    if side == "one_reads":
        loader = build_loader(context, stage)
    else:
        loader = StageLoader(
            stage,
            settings,
            bundle=context.bundle,
            architecture=context.architecture,
            data_parallel_rank=rank,
            data_parallel_size=args.ranks,
        )
    worked = time.process_time() - worked
    dist.barrier()
    seconds, found = time.perf_counter() - started, memory()
    rows = loader.state_dict()["num_rows"]
    assert rows == args.rows, rows
    taken = {name: found[name] - before[name] for name in found}
    (folder / f"{side}.{rank}").write_text(json.dumps({"seconds": seconds, "processor_seconds": worked, **taken}))
    dist.barrier()
    topology.shutdown()


def memory() -> dict[str, float]:
    """MiB of this process: proportional to those who share it, and the most that was resident so far."""
    pss = re.search(r"^Pss: +(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return {"pss_mib": int(pss[1]) / 1024, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def measure(folder: Path, args: argparse.Namespace, side: str) -> dict[str, float]:
    """Start the ranks, and join what they found."""
    torch.multiprocessing.spawn(build, (folder, args, side), nprocs=args.ranks)
    found = [json.loads((folder / f"{side}.{rank}").read_text()) for rank in range(args.ranks)]
    columns = {name: [one[name] for one in found] for name in found[0]}
    joined = {
        "seconds": max(columns["seconds"]),
        "processor_seconds": sum(columns["processor_seconds"]),
        "pss_mib": sum(columns["pss_mib"]),
        "peak_mib": max(columns["peak_mib"]),
    }
    return {name: round(value, 1) for name, value in joined.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--format", choices=sorted(STAGE), default="mmeb-train")
    parser.add_argument("--sources", type=int, default=10, help="that the rows are divided over evenly")
    parser.add_argument("--sides", nargs="+", choices=("one_reads", "each_reads"), default=["one_reads", "each_reads"])
    parser.add_argument("--port", type=int, default=29511, help="that the ranks meet at")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        tokenizer, _ = train_tokenizer([" ".join(rng.choice(WORDS, size=9)) for _ in range(200)], num_pieces=380)
        write_model_folder(folder / "model", tokenizer, ToyModelSizes())
        number = args.rows // args.sources
        for i in range(args.sources):
            WRITERS[args.format](folder / f"subset_{i}", i * number, number)
        sides = {side: measure(folder, args, side) for side in args.sides}
    line = {
        "benchmark": "rows",
        **{name: getattr(args, name) for name in ("ranks", "rows", "format", "sources")},
        **sides,
        "hardware": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
