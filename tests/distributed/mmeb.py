"""Checks of the benchmark evaluation on several ranks: what it writes, whatever their number."""

from __future__ import annotations

import json

import torch.distributed as dist

from megatron_cocoa.config import EvaluationSettings, ParallelSettings
from megatron_cocoa.evaluation.mmeb_encode import ItemEncoder
from megatron_cocoa.evaluation.mmeb_identity import identity_of
from megatron_cocoa.evaluation.mmeb_run import evaluate
from megatron_cocoa.evaluation.mmeb_tasks import read_benchmark
from megatron_cocoa.parallel import topology
from megatron_cocoa.recipes.context import evaluation_parts, prepare_context
from megatron_cocoa.recipes.initial_model import build_with_weights
from tests.distributed.check import Check
from tests.distributed.folders import rank_folders
from tests.distributed.tiny_run import tiny_settings, write_folders
from tests.unit.mmeb_folders import write_small_benchmark


def files_of_an_evaluation() -> dict:
    """Everything that the first rank wrote, without how long it took, and which tasks a second start kept."""
    topology.set_layout(ParallelSettings(), seed=0)
    with rank_folders() as (folder, shared):
        output = shared / "scores"
        write_folders(folder)
        write_small_benchmark(folder)
        context = prepare_context(tiny_settings(folder))
        builder, options = evaluation_parts(context, context.settings.contrastive)
        model = build_with_weights(context, checkpoint=None, with_image_decoder=False)
        encode = ItemEncoder(model, builder, options, folder, batch_size=3, num_workers=1)
        benchmark = read_benchmark(folder / "eval")
        # Only the first rank reads the model's files once more to hash them: they may be large.
        hashed = folder / ("model" if topology.is_first_rank() else "absent")
        identity = identity_of(EvaluationSettings(), model_path=hashed)(builder, options, benchmark)
        said: list[str] = []
        for _ in range(2):
            evaluate(
                benchmark.tasks,
                data_path=folder / "eval",
                image_root=folder,
                output=output,
                encode=encode,
                identity=identity,
                versions={},
                with_baselines=True,
                say=said.append,
            )
            dist.barrier()
        files = {file.name: file.read_text() for file in sorted(output.iterdir())}
    for name in [name for name in files if name.endswith("_score.json")]:
        score = json.loads(files[name])
        assert score.pop("run")["ranks"] == dist.get_world_size()
        files[name] = score
    return {"files": files, "kept": [line for line in said if line.endswith(": kept")]}


CHECKS = {f"mmeb-{size}": Check(size, files_of_an_evaluation) for size in (1, 2, 4)}
