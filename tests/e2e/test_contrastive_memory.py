"""What gradient caching is for: memory that does not grow with the global batch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_memory_at_a_batch_of_1024_is_that_at_64():
    """Claim: above the resident size after the optimizer is built, the peak is within 1.2 times, at one rank.

    What may grow are embeddings, token ids and 8-bit pictures of a step; activations and float pixels are of one
    micro-batch each.
    """
    command = [sys.executable, str(ROOT / "benchmarks" / "contrastive_memory.py"), "--sizes", "64", "1024"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["ratio"] <= 1.2, found
