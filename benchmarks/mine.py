"""Processor time and peak memory of ``tools/mine_hard_negatives.py`` on random vectors, beside another checkout's.

    python benchmarks/mine.py [--rows 30000] [--hidden 2048] [--num-negatives 4] [--beside CHECKOUT]

Writes pairs and the vectors of both sides as ``tools/embed.py`` does into a temporary folder, and mines them with this
checkout's tool, then with that of ``--beside``, such as an older commit's. Each query lies near its own target, so that
negatives are found. Prints one JSON line: for each checkout the seconds, processor seconds and peak resident memory of
the process, and the bytes of the vectors.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.side_by_side import hardware  # noqa: E402
from megatron_cocoa.export.corpus import Corpus, CorpusRow  # noqa: E402
from megatron_cocoa.export.embed_corpus import ShardPlan, embed_shards, prepare_output  # noqa: E402

SHARD_SIZE = 10000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=30000)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--num-negatives", type=int, default=4)
    parser.add_argument("--beside", metavar="CHECKOUT", type=Path, help="folder of another commit")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_vectors(Path(folder), args.rows, args.hidden)
        found = {"ours": mined(ROOT, Path(folder), args.num_negatives)}
        if args.beside is not None:
            found["beside"] = mined(args.beside.resolve(), Path(folder), args.num_negatives)
    sizes = {"rows": args.rows, "hidden": args.hidden, "vector_bytes": 2 * 4 * args.rows * args.hidden}
    print(json.dumps({**sizes, **found, "hardware": hardware()}))


def write_vectors(folder: Path, rows: int, hidden: int) -> None:
    """``pairs.jsonl``, ``queries`` and ``targets``."""
    pairs = [{"qry": f"q{i}", "qry_image_path": "", "pos_text": f"t{i}", "pos_image_path": ""} for i in range(rows)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs), encoding="utf-8")
    for name, column, seeds in (("queries", "qry", (0, 1)), ("targets", "pos_text", (0,))):
        plan = ShardPlan(folder / name, rows, SHARD_SIZE)
        prepare_output(plan, {"model": "random"})
        corpus = Corpus(tuple(CorpusRow(str(i), row[column], "") for i, row in enumerate(pairs)), folder)

        def encode(items: list[dict], seeds: tuple[int, ...] = seeds) -> np.ndarray:
            first = int(items[0]["text"][1:])
            noise = [np.random.default_rng((seed, first)).normal(size=(len(items), hidden)) for seed in seeds]
            vectors = sum(noise).astype(np.float32)
            return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

        embed_shards(corpus, encode, plan, say=lambda line: None)


def mined(checkout: Path, folder: Path, num_negatives: int) -> dict[str, float]:
    """Run a checkout's tool in a process of its own."""
    command = [sys.executable, str(checkout / "tools" / "mine_hard_negatives.py")]
    command += ["--num-negatives", str(num_negatives)]
    for name, place in (("pairs", "pairs.jsonl"), ("queries", "queries"), ("targets", "targets")):
        command += [f"--{name}", str(folder / place)]
    begun = time.perf_counter()
    process = subprocess.Popen([*command, "--output", str(folder / "mined.jsonl"), "--overwrite"])
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return {
        "seconds": round(time.perf_counter() - begun, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_gib": round(used.ru_maxrss / 2**20, 2),
    }


if __name__ == "__main__":
    main()
