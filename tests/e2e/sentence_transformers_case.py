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


def picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8))


def main(folder: str) -> None:
    ours, theirs = CocoaEmbedder.from_pretrained(folder), SentenceTransformer(folder, local_files_only=True)
    texts, pictures = ["a", "a red house " * 10, "sol"], [picture(56, 56), picture(140, 60), picture(70, 154)]
    kinds = {
        "text": texts,
        "picture": pictures,
        "both": [{"text": text, "image": image} for text, image in zip(texts, pictures)],
    }
    cosines, changes = {}, {}
    for name, items in kinds.items():
        found = theirs.encode(items)
        cosines[name] = (found * ours.encode(items)).sum(axis=1).tolist()
        prompted = theirs.encode(items, prompt="find: ") * ours.encode(items, instruction="find: ")
        cosines[f"{name} with a prompt"] = prompted.sum(axis=1).tolist()
        changes[name] = float(abs(theirs.encode(items, batch_size=1) - found).max())
    golden = all(result.passed for result in check_golden(folder, library="sentence-transformers"))
    print(json.dumps({"cosines": cosines, "changes": changes, "golden": golden}))


main(sys.argv[1])
