"""Rows of data files, written for tests."""

from __future__ import annotations

import json
from pathlib import Path

NUM_PICTURES = 24
"""Pictures of the ``data_folder`` fixture."""


def pair(row_id: str, **columns: str) -> dict:
    return {"id": row_id, "qry": "", "qry_image_path": "", "pos_text": "", "pos_image_path": ""} | columns


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path
