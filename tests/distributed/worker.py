"""Started by torchrun: runs checks of its world size and writes what they return as JSON.

    torchrun --standalone --nproc-per-node 2 tests/distributed/worker.py --output FOLDER [--only NAME ...]

FOLDER gets ``results.json``; ``running``, the name of the check at hand; and ``failed.<rank>`` with the traceback of a
rank that failed. A failure ends the process, because its peers may wait for it in a collective; whoever started it
goes on with the remaining checks.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))


def main() -> None:
    # Imported late: the process behind each rank's checkpoint writes imports this file again.
    import torch.distributed as dist

    from megatron_cocoa.config import ParallelSettings
    from megatron_cocoa.parallel import topology
    from tests.distributed.check import all_checks

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--only", nargs="*")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    # Whoever ends a rank that hangs wants to read where it hung.
    faulthandler.register(signal.SIGTERM, chain=True)
    launch = topology.LaunchInfo.from_environment()
    topology.initialize(ParallelSettings(distributed_timeout_minutes=2.0), launch, seed=0)
    # Each change of layout collects garbage, most of whose time would go to what the imports have made.
    checks = all_checks()
    gc.collect()
    gc.freeze()
    results = {}
    for name, check in checks.items():
        if check.world_size != launch.world_size or (args.only and name not in args.only):
            continue
        if launch.rank == 0:
            (args.output / "running").write_text(name)
        started = time.monotonic()
        try:
            found = check.run() or {}
        except BaseException:
            (args.output / f"failed.{launch.rank}").write_text(traceback.format_exc())
            os._exit(1)
        results[name] = found | {"seconds": round(time.monotonic() - started, 2)}
        if launch.rank == 0:
            (args.output / "results.json").write_text(json.dumps(results, indent=1))
    dist.barrier()
    topology.shutdown()


if __name__ == "__main__":
    main()
