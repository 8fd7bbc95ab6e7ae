"""The exported folder in the real sentence-transformers, which this project does not depend on.

    pip install --no-deps --target DIR sentence-transformers==6.2.0 torchvision==0.28.0 \\
        scikit-learn scipy joblib threadpoolctl cloudpickle narwhals
    SENTENCE_TRANSFORMERS_FOLDER=DIR pytest -m slow tests/e2e/test_sentence_transformers.py

A folder of its own, because that torchvision breaks transformers' imports beside a torch without GPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.exported_folders import write_exported

FOLDER = "SENTENCE_TRANSFORMERS_FOLDER"


@pytest.mark.slow
@pytest.mark.skipif(FOLDER not in os.environ, reason=f"{FOLDER} must name a folder made as in this file's docstring")
def test_sentence_transformers_gives_the_same_vectors(tmp_path):
    """Claim: SentenceTransformer(path).encode is CocoaEmbedder's for text, pictures and both, prompted or not."""
    exported = write_exported(tmp_path / "tiny").exported
    environment = os.environ | {"PYTHONPATH": os.environ[FOLDER], "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("sentence_transformers_case.py")
    command = [sys.executable, str(script), str(exported)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    # Promised is 0.9999; the cosines are rounded to FP32, hence 1e-6.
    assert all(cosine > 1 - 1e-6 for cosines in result["cosines"].values() for cosine in cosines), result
    # Padding to the longest of a batch: the same sums in another order, about 1e-6 in FP32.
    assert max(result["changes"].values()) < 1e-5
    assert result["golden"]
