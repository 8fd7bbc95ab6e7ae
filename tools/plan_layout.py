"""Memory per GPU of a run before it is started, and a layout that fits.

    python tools/plan_layout.py --gpus 8 --preset qwen2.5-vl-7b
    python tools/plan_layout.py --gpus 64 --preset qwen2.5-vl-7b --config examples/configs/bridge.yaml
    python tools/plan_layout.py --gpus 16 --preset qwen2.5-vl-7b --parallel.tensor_model_parallel_size 4
    python tools/plan_layout.py --table

Takes every setting of the training script; of a preset without model.path the published shapes are used. Exit
status: 0 where the layout fits, 1 where it does not, 2 where it is impossible. Needs neither GPU nor weights.
docs/layouts.md says what is counted and how it was checked.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_cocoa.config import TrainSettings  # noqa: E402
from megatron_cocoa.settings.parse import parse_settings  # noqa: E402

H100_GIB = 79.6
"""What the driver reports of an H100 with 80 GB."""


NOT_READ = "not-read"
"""Stands for a model or data folder that nobody gave."""


def preset_settings(name: str, more: list[str] | None = None) -> TrainSettings:
    """Settings of a preset; it needs no model or data folder, which planning does not read."""
    folders = dict.fromkeys(("model.path", "data.path"), NOT_READ)
    return parse_settings([f"--preset={name}", *(more or [])], stand_ins=folders)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, help="GPUs of the run")
    parser.add_argument("--memory-gib", type=float, default=H100_GIB, help="memory of one GPU (default: %(default)s)")
    parser.add_argument("--preset", default="qwen2.5-vl-7b", help="as for training (default: %(default)s)")
    parser.add_argument("--table", action="store_true", help="print the tables of docs/layouts.md and leave")
    options, given = parser.parse_known_args()
    warnings.filterwarnings("ignore")
    from megatron_cocoa.planning import tables

    if options.table:
        print("\n".join(tables.document_tables(preset_settings, gpu_bytes=options.memory_gib * tables.GIB)))
        return 0
    if options.gpus is None or options.gpus < 1:
        parser.error("--gpus N, 1 or more, is needed")
    if not options.memory_gib > 0:
        parser.error(f"--memory-gib is {options.memory_gib}, must be positive")
    try:
        settings = preset_settings(options.preset, given)
        return _plan(options, settings)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _plan(options: argparse.Namespace, settings: TrainSettings) -> int:
    from megatron_cocoa.conversion.hf_to_mcore import read_architecture
    from megatron_cocoa.planning import tables
    from megatron_cocoa.planning.published import published_architecture

    if settings.model.path == NOT_READ:
        architecture = published_architecture(options.preset)
    else:
        architecture = read_architecture(settings.model.path)
    all_fit = True
    for stage in settings.stages:
        lines, is_fine = tables.plan_lines(
            architecture, settings, stage, world_size=options.gpus, gpu_bytes=options.memory_gib * tables.GIB
        )
        print("\n".join(lines))
        all_fit = all_fit and is_fine
    return 0 if all_fit else 1


if __name__ == "__main__":
    sys.exit(main())
