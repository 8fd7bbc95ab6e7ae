"""Prints the measured worst error of every layout against Hugging Face as Markdown tables, for the pages in docs/.

    python tests/parity/report.py [--json errors.json]

``--json`` keeps what was measured; a file that is already there is printed without running anything.
"""

from __future__ import annotations

import argparse
import json
import sys
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.distributed.launch import run_all  # noqa: E402
from tests.parity.cases import CASES  # noqa: E402

COLUMNS = ("hidden", "logits", "loss", "pixels", "gradient")


def measure() -> dict:
    results: dict = {}
    for size in sorted({case.world_size for case in CASES.values()}):
        results |= run_all([case.name for case in CASES.values() if case.world_size == size], size)
    packages = {name: version(name) for name in ("megatron-core", "torch", "transformers")}
    return dict(packages=packages, results=results)


def table(measured: dict) -> str:
    packages = ", ".join(f"{name} {number}" for name, number in measured["packages"].items())
    lines = [
        f"Largest error over the largest entry, fp32, CPU; {packages}.",
        "",
        "| Case | Ranks | " + " | ".join(COLUMNS) + " | Worst gradient |",
        "| --- | --- | " + "--- | " * len(COLUMNS) + "--- |",
    ]
    for name, errors in measured["results"].items():
        if "error" in errors:
            cells, worst = ["failed"] * len(COLUMNS), errors["error"].strip().splitlines()[-1]
        else:
            cells, worst = [f"{errors[c]:.1e}" if errors[c] else "" for c in COLUMNS], f"`{errors['worst']}`"
        lines.append(f"| {name} | {CASES[name].world_size} | " + " | ".join(cells) + f" | {worst} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.json and args.json.exists():
        measured = json.loads(args.json.read_text())
    else:
        measured = measure()
        if args.json:
            args.json.write_text(json.dumps(measured, indent=1))
    print(table(measured))
    return int(any("error" in errors for errors in measured["results"].values()))


if __name__ == "__main__":
    sys.exit(main())
