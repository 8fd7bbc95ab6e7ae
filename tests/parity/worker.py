"""Started by torchrun: runs every case of its world size and writes the measured errors as JSON.

    torchrun --nproc-per-node 2 tests/parity/worker.py --output errors.json [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from megatron_cocoa.config import ParallelSettings  # noqa: E402
from megatron_cocoa.parallel import topology  # noqa: E402
from tests.parity.cases import CASES  # noqa: E402
from tests.parity.compare import run_case  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True)
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    launch = topology.LaunchInfo.from_environment()
    topology.initialize(ParallelSettings(distributed_timeout_minutes=1.0), launch, seed=0)
    results = {}
    for case in CASES.values():
        if case.world_size != launch.world_size or (args.only and case.name not in args.only):
            continue
        try:
            results[case.name] = run_case(case)
        except Exception:  # noqa: BLE001  one failing case must not hide the others; the test shows the text
            results[case.name] = {"error": traceback.format_exc()}
        if launch.rank == 0:
            Path(args.output).write_text(json.dumps(results, indent=1))
    dist.barrier()
    topology.shutdown()


if __name__ == "__main__":
    main()
