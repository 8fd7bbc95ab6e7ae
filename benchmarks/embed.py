"""Items per second of ``CocoaEmbedder`` beside sentence-transformers on one exported folder, with the same vectors.

    python benchmarks/embed.py [--site DIR] [--kinds texts images both mixed] [--items 64] [--repeats 5]

Exports a random Qwen2.5-VL in the 3B's proportions (hidden 512, 8 layers, a tower of 320 and 8) into a temporary
folder, loads it with both and embeds texts of 4 to 300 words, pictures of 112 to 448 pixels, both together, and a list
in which the three kinds take turns, as a corpus holds them. On a CPU there stands beside each measured ratio that of
the operations in linear layers, which is what packing alone can give.

``--site`` names a folder that holds sentence-transformers and torchvision, for machines where they are kept apart from
transformers (``pip install --no-deps --target DIR sentence-transformers torchvision scikit-learn scipy joblib
threadpoolctl cloudpickle narwhals``). sentence-transformers sorts by length itself; of ``--batch-sizes`` its fastest in
a trial counts. Both compute in FP32 on a CPU and in BF16 on a GPU. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.side_by_side import hardware, measure_pairs, versions, wait  # noqa: E402
from megatron_cocoa.parallel import device  # noqa: E402

WORDS = "red green blue small large cat dog house tree moon sol luna perro gato casa rojo verde azul".split()
KINDS = ("texts", "images", "both", "mixed")
LEAST_COSINE = {"fp32": 1 - 1e-5, "bf16": 0.99}
"""Padding and packing sum in another order, which BF16 rounds to three digits in each of the layers."""
LEAST_COSINE_RESIZED = {"fp32": 0.9999, "bf16": 0.99}
"""What every export promises: torchvision's resize rounds some 8-bit pixels to another neighbour than Pillow's."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json")


def write_export(folder: Path, *, layers: int) -> Path:
    """A random model as this project exports it for sentence-transformers; returns its folder."""
    from transformers import AutoConfig, Qwen2_5_VLForConditionalGeneration

    from megatron_cocoa.conversion.hf_to_mcore import convert_hf_to_mcore
    from megatron_cocoa.data.toy_model import ToyModelSizes, train_tokenizer, write_model_folder
    from megatron_cocoa.export.embedder_options import EmbedderOptions
    from megatron_cocoa.export.folder import export_embedder

    tokenizer, _ = train_tokenizer([" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))], num_pieces=380)
    sizes = ToyModelSizes(
        image_size=448, patch_size=14, window_size=112, text_hidden_size=512, text_num_hidden_layers=layers,
        text_num_attention_heads=8, text_intermediate_size=2752, vision_depth=layers, vision_hidden_size=320,
        vision_intermediate_size=856, vision_fullatt_block_indexes=(max(0, layers // 2 - 1), layers - 1),
        tokenizer_pieces=380, initializer_range=0.02,
    )  # fmt: skip
    write_model_folder(folder / "model", tokenizer, sizes)
    preprocessor = json.loads((folder / "model" / "preprocessor_config.json").read_text())
    preprocessor["size"] = {"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 1024}
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(AutoConfig.from_pretrained(folder / "model"))
    model.save_pretrained(folder / "hf")
    for name in TOKENIZER_FILES:
        shutil.copy(folder / "model" / name, folder / "hf")
    convert_hf_to_mcore(folder / "hf", folder / "checkpoint")
    export_embedder(folder / "checkpoint", folder / "export", options=EmbedderOptions("sentence-transformers"))
    return folder / "export"


def make_items(num: int, seed: int = 0) -> dict[str, list]:
    """Items of each kind: texts have a long tail as captions and documents do, pictures any shape."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(np.exp(rng.normal(3.2, 1.0, num)).astype(int), 4, 300)
    texts = [" ".join(rng.choice(WORDS, size=length)) for length in lengths]
    pictures = []
    for _ in range(num):
        width, height = (int(side) for side in rng.integers(112, 449, 2))
        pictures.append(Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)))
    both = [{"text": text, "image": picture} for text, picture in zip(texts, pictures)]
    mixed = [(texts, pictures, both)[i % 3][i] for i in range(num)]
    return {"texts": texts, "images": pictures, "both": both, "mixed": mixed}


def import_library(site: str | None):
    """``SentenceTransformer``, beside a torch without GPU too, where torchvision's compiled operators are absent."""
    if site is not None:
        # After this environment's own packages, whose versions count.
        sys.path.append(site)
    describe = torch.library.register_fake

    def without_torchvision(operator, *args, **kwargs):
        if isinstance(operator, str) and operator.startswith("torchvision::"):
            return lambda function: function
        return describe(operator, *args, **kwargs)

    try:
        if not device.has_gpu():
            torch.library.register_fake = without_torchvision
        import torchvision  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"torchvision is not installed ({error}): name a folder that has it with --site") from error
    finally:
        torch.library.register_fake = describe
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer


def main(arguments: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", help="folder with sentence-transformers and torchvision")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--layers", type=int, default=8, help="of language model and tower")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32], help="of sentence-transformers")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)
    library = import_library(args.site)

    from megatron_cocoa import CocoaEmbedder

    dtype = "bf16" if device.has_gpu() else "fp32"
    with tempfile.TemporaryDirectory() as name:
        folder = write_export(Path(name), layers=args.layers)
        ours = CocoaEmbedder.from_pretrained(folder, dtype=dtype)
        kwargs = {"dtype": {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]}
        theirs = library(str(folder), local_files_only=True, model_kwargs=kwargs, device=str(device.device()))
    items = make_items(args.items)
    same_pixels = [Image.new("RGB", (112, 168), "red"), items["images"][0].resize((224, 140))]
    compare(same_pixels, ours, theirs, LEAST_COSINE[dtype])
    results = []
    for kind in args.kinds:
        cosine = compare(items[kind], ours, theirs, (LEAST_COSINE if kind == "texts" else LEAST_COSINE_RESIZED)[dtype])
        results.append({**measure(kind, items[kind], ours, theirs, args), "least_cosine": cosine})
        print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    return {
        "benchmark": "embed",
        "items": args.items,
        "layers": args.layers,
        "dtype": dtype,
        "results": results,
        "versions": versions(),
        "hardware": hardware(),
    }


def compare(items: list, ours, theirs, least: float) -> float:
    """The least cosine between both sides' vectors of an item; ends the benchmark where they are not the same."""
    wanted = theirs.encode(items, normalize_embeddings=True, show_progress_bar=False)
    cosine = float((ours.encode(items) * wanted).sum(axis=1).min())
    if not cosine >= least:
        raise SystemExit(f"vectors differ: the least cosine is {cosine}, needed {least}")
    return cosine


def measure(kind: str, items: list, ours, theirs, args: argparse.Namespace) -> dict[str, object]:
    """One kind of item: the best batch size of sentence-transformers, then pairs."""
    seconds = {}
    for size in args.batch_sizes:
        wait()
        begun = time.perf_counter()
        theirs.encode(items, batch_size=size, normalize_embeddings=True, show_progress_bar=False)
        wait()
        seconds[size] = time.perf_counter() - begun
    size = min(seconds, key=seconds.__getitem__)
    our_side = functools.partial(ours.encode, items)
    their_side = functools.partial(
        theirs.encode, items, batch_size=size, normalize_embeddings=True, show_progress_bar=False
    )
    measured = measure_pairs(our_side, their_side, repeats=args.repeats)
    # Transformer Engine's products pass by torch's counter.
    counted = {} if device.has_gpu() else {"operations_ratio": round(operations(their_side) / operations(our_side), 3)}
    return {
        "kind": kind,
        **measured,
        **counted,
        "items_per_second": round(len(items) / measured["ours_seconds"], 2),
        "reference_items_per_second": round(len(items) / measured["reference_seconds"], 2),
        "reference_batch_size": size,
    }


def operations(call: Callable[[], object]) -> int:
    """Of the linear layers that ``call`` runs: torch does not count attention on a CPU."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


if __name__ == "__main__":
    print(json.dumps(main()))
