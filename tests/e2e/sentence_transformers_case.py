"""Run with the real sentence-transformers: ``python sentence_transformers_case.py FOLDER``; prints JSON.

Beside a torch without GPU, torchvision's compiled operators are absent and its import fails where it describes them
to torch. The Python transforms, all that is needed, work once those descriptions are ignored.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from PIL import Image

describe = torch.library.register_fake


def ignore_torchvision(operator, *args, **kwargs):
    if isinstance(operator, str) and operator.startswith("torchvision::"):
        return lambda function: function
    return describe(operator, *args, **kwargs)


torch.library.register_fake = ignore_torchvision
import torchvision  # noqa: E402, F401

torch.library.register_fake = describe

from sentence_transformers import SentenceTransformer  # noqa: E402

from megatron_cocoa import CocoaEmbedder  # noqa: E402
from megatron_cocoa.export.check_golden import check_golden  # noqa: E402
from megatron_cocoa.export.export_info import read_export_info  # noqa: E402
from megatron_cocoa.export.plain_transformers import PlainEmbedder  # noqa: E402


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def vectors_of(plain: PlainEmbedder, items: list) -> np.ndarray:
    names = ["text" if isinstance(item, str) else "image" for item in items]
    parts = [item if isinstance(item, dict) else {name: item} for name, item in zip(names, items)]
    return np.stack([plain.embed(**part).numpy() for part in parts])


def main(folder: str) -> None:
    ours = CocoaEmbedder.from_pretrained(folder)
    theirs = SentenceTransformer(folder, local_files_only=True, model_kwargs={"dtype": "float32"})
    plain = PlainEmbedder(folder, bridge_token=read_export_info(Path(folder)).bridge_token)
    texts = ["a", "a red house " * 10, "sol", "Gr\u00fc\u00dfe, 3 \u20ac", "the moon and two trees"]
    sizes = [(56, 56), (140, 60), (70, 154), (30, 31), (400, 300)]
    pictures = [picture(*size) for size in sizes]
    kinds = {
        "text": texts,
        "picture": pictures,
        "both": [{"text": text, "image": image} for text, image in zip(texts, pictures)],
    }
    order = np.random.default_rng(0).permutation(len(texts))
    cosines, changes = {}, {}
    for name, items in kinds.items():
        found, wanted = theirs.encode(items), ours.encode(items)
        cosines[f"{name}: sentence-transformers, CocoaEmbedder"] = (found * wanted).sum(axis=1).tolist()
        cosines[f"{name}: transformers, CocoaEmbedder"] = (vectors_of(plain, items) * wanted).sum(axis=1).tolist()
        prompted = theirs.encode(items, prompt="find: ") * ours.encode(items, instruction="find: ")
        cosines[f"{name} with a prompt"] = prompted.sum(axis=1).tolist()
        # Batches of one have no padding, those of five are padded to the longest, those of two to another length.
        for size in (1, 2):
            changes[f"{name}, batches of {size}"] = float(abs(theirs.encode(items, batch_size=size) - found).max())
        moved = theirs.encode([items[i] for i in order], batch_size=2)
        changes[f"{name}, another order"] = float(abs(moved - found[order]).max())
    golden = all(result.passed for result in check_golden(folder, library="sentence-transformers"))
    print(json.dumps({"cosines": cosines, "changes": changes, "golden": golden}))


main(sys.argv[1])
