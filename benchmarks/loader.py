"""Pictures per second of the loader beside a plain torch DataLoader over the same transforms, in the same run.

    python benchmarks/loader.py [--pictures 512] [--side 640] [--workers 0 1 2] [--repeats 5]

Draws photograph-like JPEGs, captions and a model folder into a temporary folder and prints one JSON line. Both sides
decode the same files, resize with Qwen's rule at native size, normalise, cut patches and tokenise; ours also plans
steps by cost, packs, masks and draws noise. The reference is what a user would write: a map-style Dataset around
transformers' image processor, torch's RandomSampler and workers, batches as lists. Each side gets an epoch to warm up,
then runs alternate, and the median of the repeats counts. No picture is cached on either side.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_cocoa.architecture import QwenVLArchitecture  # noqa: E402
from megatron_cocoa.config import ContrastiveSettings, DataSettings, ModelSettings, TrainSettings  # noqa: E402
from megatron_cocoa.conversion.hf_to_mcore import read_architecture  # noqa: E402
from megatron_cocoa.data import preprocess  # noqa: E402
from megatron_cocoa.data.loader import StageLoader  # noqa: E402
from megatron_cocoa.data.preprocess import load_processor  # noqa: E402
from megatron_cocoa.data.tokenizer import load_tokenizer  # noqa: E402
from megatron_cocoa.data.toy_model import ToyModelSizes, train_tokenizer, write_model_folder  # noqa: E402

BATCH = 16
WORDS = "red green blue small large cat dog house tree moon sol luna perro gato casa rojo verde azul".split()


def write_folders(folder: Path, num_pictures: int, side: int) -> None:
    """``model`` and ``pairs``: smooth random JPEGs around ``side`` pixels, a caption each."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(5, 20))) for _ in range(num_pictures)]
    tokenizer, _ = train_tokenizer(texts, num_pieces=380)
    write_model_folder(folder / "model", tokenizer, ToyModelSizes())
    config = json.loads((folder / "model" / "preprocessor_config.json").read_text())
    config["size"] = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 1024}
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(config))
    (folder / "pairs").mkdir()
    with (folder / "pairs" / "contrastive.jsonl").open("w") as file:
        for i, text in enumerate(texts):
            width, height = (int(side * rng.uniform(0.7, 1.3)) for _ in range(2))
            coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8))
            coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / "pairs" / f"{i}.jpg", quality=90)
            row = {"id": str(i), "qry": "<|image_1|>", "qry_image_path": f"{i}.jpg", "pos_text": text}
            file.write(json.dumps(row) + "\n")


def settings_for(folder: Path, workers: int) -> TrainSettings:
    return TrainSettings(
        model=ModelSettings(path=str(folder / "model")),
        data=DataSettings(path=str(folder / "pairs"), num_workers=workers, max_length=8192),
        contrastive=ContrastiveSettings(global_batch_size=BATCH, micro_batch_size=BATCH, image_size=None),
    )


class PlainPairs(torch.utils.data.Dataset):
    """What a user would write: open, convert, processor, tokenizer."""

    def __init__(self, folder: Path, bundle) -> None:
        self.folder = folder / "pairs"
        self.rows = [json.loads(line) for line in (self.folder / "contrastive.jsonl").open()]
        self.processor = load_processor(folder / "model")
        self.tokenizer = bundle.tokenizer

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple:
        row = self.rows[index]
        with Image.open(self.folder / row["qry_image_path"]) as image:
            pixels = self.processor(image.convert("RGB"), return_tensors="pt")
        return pixels["pixel_values"], pixels["image_grid_thw"], self.tokenizer(row["pos_text"])["input_ids"]


def ours(folder: Path, bundle, architecture: QwenVLArchitecture, workers: int):
    """Steps of the loader, endlessly."""
    loader = StageLoader(
        "contrastive",
        settings_for(folder, workers),
        bundle=bundle,
        architecture=architecture,
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    while True:
        yield sum(len(batch.grid_thw) for batch in loader.next_step())


def plain(folder: Path, bundle, workers: int):
    """Batches of the reference, endlessly."""
    dataset = PlainPairs(folder, bundle)
    loader = torch.utils.data.DataLoader(
        dataset,
        BATCH,
        shuffle=True,
        num_workers=workers,
        drop_last=True,
        collate_fn=list,
        persistent_workers=workers > 0,
    )
    while True:
        for batch in loader:
            yield len(batch)


def rate(stream, num_pictures: int) -> tuple[float, float]:
    """Pictures per second over at least ``num_pictures``, by the clock and by this process's own processor time."""
    started, worked, seen = time.perf_counter(), time.process_time(), 0
    while seen < num_pictures:
        seen += next(stream)
    return seen / (time.perf_counter() - started), seen / (time.process_time() - worked)


def compare(folder: Path, args: argparse.Namespace, workers: int) -> dict:
    """Both sides with the same number of decoding processes."""
    architecture = read_architecture(folder / "model")
    bundle = load_tokenizer(folder / "model", vocab_size=architecture.text.vocab_size)
    streams = {"ours": ours(folder, bundle, architecture, workers), "reference": plain(folder, bundle, workers)}
    rates: dict[str, list[float]] = {name: [] for name in streams}
    own: dict[str, list[float]] = {name: [] for name in streams}
    for stream in streams.values():
        rate(stream, args.pictures)
    for _ in range(args.repeats):
        for name, stream in streams.items():
            for found, value in zip((rates, own), rate(stream, args.pictures)):
                found[name].append(value)
    for stream in streams.values():
        stream.close()
    median = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "workers": workers,
        **{f"{name}_pictures_per_second": round(value, 1) for name, value in median.items()},
        "ratio": round(median["ours"] / median["reference"], 3),
        # Without workers all is done in this process, whose own time other work on the machine hardly touches.
        "processor_time_ratio": None if workers else round(_ratio(own), 3),
        "spread": {name: [round(min(values), 1), round(max(values), 1)] for name, values in rates.items()},
    }


def _ratio(rates: dict[str, list[float]]) -> float:
    return statistics.median(rates["ours"]) / statistics.median(rates["reference"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=512)
    parser.add_argument("--side", type=int, default=640, help="mean side of a picture in pixels")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    preprocess.CACHE_BYTES = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_folders(folder, args.pictures, args.side)
        results = [compare(folder, args, workers) for workers in args.workers]
    line = {
        "benchmark": "loader",
        "pictures": args.pictures,
        "side": args.side,
        "batch": BATCH,
        "repeats": args.repeats,
        "results": results,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "pillow": Image.__version__,
        },
        "hardware": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
