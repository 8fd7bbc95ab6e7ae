"""The exported folder in the real sentence-transformers, which this project does not depend on.

    pytest -m slow tests/e2e/test_sentence_transformers.py

The test installs the library into a folder of its own, because the torchvision that it needs breaks transformers'
imports beside a torch without GPU. A folder that is kept saves the download (100 MB):

    SENTENCE_TRANSFORMERS_FOLDER=DIR pytest -m slow tests/e2e/test_sentence_transformers.py
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.unit.exported_folders import write_exported

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "SENTENCE_TRANSFORMERS_FOLDER"
PACKAGES = (
    "sentence-transformers==6.2.0", "torchvision==0.28.0", "scikit-learn", "scipy", "joblib", "threadpoolctl",
    "cloudpickle", "narwhals",
)  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """A folder with sentence-transformers: the one that the environment names, filled if it is empty, or a new one."""
    named = os.environ.get(FOLDER)
    folder = Path(named) if named else tmp_path_factory.mktemp("library") / "packages"
    if not (folder / "sentence_transformers").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"sentence-transformers cannot be installed into {folder}: {done.stderr}"
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"), [("qwen2_5_vl", torch.float32), ("qwen2_vl", torch.bfloat16)], ids=["qwen2_5_vl", "qwen2_vl"]
)
def test_sentence_transformers_gives_the_same_vectors(library, tmp_path, family, dtype):
    """Claim: SentenceTransformer(path).encode, transformers run as the model card says, and CocoaEmbedder agree on
    texts, pictures of several sizes and both, prompted or not, and neither batch size, padding nor order matters.

    ``dtype`` is that of the weights on disk; all three compute in FP32.
    """
    exported = write_exported(tmp_path / "tiny", family=family, dtype=dtype).exported
    environment = os.environ | {"PYTHONPATH": str(library), "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("sentence_transformers_case.py")
    command = [sys.executable, str(script), str(exported)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(result))
    # Promised is 0.9999; the cosines are rounded to FP32, hence 1e-6.
    assert len(result["cosines"]) == 9
    assert all(cosine > 1 - 1e-6 for cosines in result["cosines"].values() for cosine in cosines), result
    # Padding to the longest of a batch: the same sums in another order, about 1e-6 in FP32.
    assert len(result["changes"]) == 9 and max(result["changes"].values()) < 1e-5, result
    assert result["golden"]


@pytest.mark.slow
def test_embed_benchmark_compares_before_it_times(library):
    """Claim: the benchmark runs against the real library and reports the same vectors for each kind of item."""
    command = [sys.executable, str(ROOT / "benchmarks" / "embed.py"), "--site", str(library)]
    command += ["--items", "3", "--layers", "2", "--repeats", "1", "--batch-sizes", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert [result["kind"] for result in results] == ["texts", "images", "both", "mixed"]
    assert all(result["ratio"] > 0 and result["least_cosine"] > 0.9999 for result in results)
