"""A model folder and a data folder small enough to train in a second, the same on every rank."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_cocoa.config import (
    BridgeSettings,
    ContrastiveSettings,
    DataSettings,
    ModelSettings,
    ParallelSettings,
    TrainSettings,
    WarmupSettings,
)
from megatron_cocoa.data.toy_model import ToyModelSizes, train_tokenizer, write_model_folder

WORDS = "red green blue small large cat dog house tree moon sol luna perro gato casa rojo verde azul".split()
SIZES = ToyModelSizes(
    text_hidden_size=64,
    text_intermediate_size=96,
    text_num_hidden_layers=4,
    text_num_attention_heads=4,
    text_num_key_value_heads=2,
    mrope_section=(2, 3, 3),
    vision_depth=2,
    vision_hidden_size=32,
    vision_num_heads=4,
    vision_intermediate_size=48,
    vision_fullatt_block_indexes=(1,),
    tokenizer_pieces=380,
)
NUM_ROWS = 40


def write_folders(folder: Path) -> None:
    """``folder/model`` and ``folder/pairs``; some rows have no picture, and captions differ in length."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(2, 10))) for _ in range(200)]
    tokenizer, _ = train_tokenizer(texts, num_pieces=SIZES.tokenizer_pieces)
    write_model_folder(folder / "model", tokenizer, SIZES)
    pairs = folder / "pairs"
    (pairs / "images").mkdir(parents=True)
    rows = []
    for i in range(NUM_ROWS):
        sides = rng.choice([42, 70], size=2)
        Image.fromarray(rng.integers(0, 256, (*sides, 3), dtype=np.uint8)).save(pairs / "images" / f"{i}.png")
        rows.append({"id": f"{i}", "image_path": f"images/{i}.png", "caption": f"{texts[i]} {i}"})
    _write(pairs / "warmup.jsonl", rows)
    _write(pairs / "eval_heldout.jsonl", [{**row, "concept": row["caption"]} for row in rows[:12]])
    pictures = [
        {"qry": "<|image_1|>", "qry_image_path": row["image_path"], "pos_text": row["caption"], "pos_image_path": ""}
        for row in rows
    ]
    _write(pairs / "bridge.jsonl", [{"id": row["id"], **pair} for row, pair in zip(rows, pictures)])
    texts_only = [
        {"qry": f"find {row['caption']}", "qry_image_path": "", "pos_text": row["caption"], "pos_image_path": ""}
        for row in rows[: NUM_ROWS // 2]
    ]
    _write(pairs / "contrastive.jsonl", [{"id": f"c{i}", **pair} for i, pair in enumerate(pictures + texts_only)])


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def tiny_settings(folder: Path, *, steps: int = 20, parallel: ParallelSettings | None = None, **more) -> TrainSettings:
    """Eight samples a step in packs of two, pictures at native size, FP32."""
    # A learning rate that never reaches zero: the last update must be as visible as the others.
    rates = dict(lr=1e-3, min_lr=1e-4, lr_warmup_steps=2)
    stage = dict(steps=steps, global_batch_size=8, micro_batch_size=2, image_size=None, **rates)
    return TrainSettings(
        model=ModelSettings(
            path=str(folder / "model"),
            random_weights=True,
            dtype="fp32",
            make_vocab_size_divisible_by=16,
        ),
        data=DataSettings(path=str(folder / "pairs"), max_length=128),
        parallel=parallel or ParallelSettings(),
        output_dir=str(folder / "out"),
        warmup=WarmupSettings(**stage),
        bridge=BridgeSettings(**stage),
        # At temperature 0.02 a step of 1e-3 would amplify rounding faster than twenty steps can be compared.
        contrastive=ContrastiveSettings(**{**stage, "lr": 3e-4}),
        **more,
    )
