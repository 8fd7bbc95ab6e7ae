"""``--verify`` and ``--verify-only`` of both tools: what they print, and that a wrong tensor ends in status 1."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_cocoa.conversion.forward import LOGIT_BOUND
from tests.e2e.converter_tools import EXPORT, IMPORT, ROOT, python, run
from tests.huggingface_folders import different_weights, write_model
from tests.unit.rewritten import rewrite_checkpoint

NUM_TENSORS = 105
LAYERS = "language_model.decoder.layers."


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> tuple[Path, Path, str]:
    """A folder, its checkpoint, and what the tool said, ``--verify`` included."""
    folder = tmp_path_factory.mktemp("converted")
    source = write_model(folder / "hf", tied=False)
    done = python(IMPORT, "--hf-path", source, "--mcore-path", folder / "mcore", "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    return source, folder / "mcore", done.stdout


def test_verify_says_what_it_compared(converted, tmp_path):
    """Claim: --verify passes in both directions, and prints logits, cosine and top token for both masks."""
    source, mcore, said = converted
    done = python(EXPORT, "--mcore-path", mcore, "--hf-path", tmp_path / "back", "--verify")
    assert done.returncode == 0, done.stdout + done.stderr
    for text in (said, done.stdout):
        assert f"{NUM_TENSORS} of {NUM_TENSORS} tensors are equal bit for bit" in text
        for mask in ("causal", "bidirectional"):
            line = next(line for line in text.splitlines() if line.startswith(f"{mask}: ok"))
            assert "logit difference" in line and "cosine" in line and "top token agrees at 100.00%" in line
    assert different_weights(source, tmp_path / "back") == []
    assert 0 < LOGIT_BOUND <= 1e-4


def swap(tensors: dict[str, torch.Tensor], name: str, neighbour: str) -> None:
    tensors[name], tensors[neighbour] = tensors[neighbour].clone(), tensors[name].clone()


def transpose_layer(tensors: dict[str, torch.Tensor], key: str, layer: int) -> None:
    """A square matrix, which no check of shapes sees."""
    tensors[key][layer] = tensors[key][layer].T.clone()


def swap_layers(tensors: dict[str, torch.Tensor], key: str, layer: int) -> None:
    tensors[key][[layer, layer + 1]] = tensors[key][[layer + 1, layer]]


IN_HUGGINGFACE = {
    "swapped": lambda t: swap(t, "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"),
    "transposed": lambda t: t.update(
        {"model.layers.2.self_attn.o_proj.weight": t["model.layers.2.self_attn.o_proj.weight"].T.contiguous()}
    ),
    "scaled": lambda t: t["visual.blocks.2.attn.proj.weight"].mul_(1.001),
}
IN_MEGATRON = {
    "swapped": lambda t: swap_layers(t, f"{LAYERS}mlp.linear_fc2.weight", 1),
    "transposed": lambda t: transpose_layer(t, f"{LAYERS}self_attention.linear_proj.weight", 2),
    "scaled": lambda t: t[f"{LAYERS}mlp.linear_fc1.weight"][1].mul_(1.001),
}
RUN_TOOLS = """
import contextlib, io, json, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, "tools")
import convert_hf_to_mcore, convert_mcore_to_hf
from megatron_cocoa.checkpoint.layouts import GroupedQkv
tools = {"import": convert_hf_to_mcore.main, "export": convert_mcore_to_hf.main}
merge, split = GroupedQkv.merge, GroupedQkv.split
for case in json.load(sys.stdin):
    if case["wrong_table"]:
        GroupedQkv.merge = lambda self, parts: merge(self, [parts[0], parts[2], parts[1]])
        GroupedQkv.split = lambda self, tensor: [split(self, tensor)[i] for i in (0, 2, 1)]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        status = tools[case["tool"]](case["arguments"])
    GroupedQkv.merge, GroupedQkv.split = merge, split
    print("RESULT" + json.dumps({"name": case["name"], "status": status, "said": said.getvalue()}))
"""


def run_tools(cases: list[dict]) -> dict[str, dict]:
    """All cases in one process: a status is what the tool hands to ``sys.exit``."""
    done = run(sys.executable, "-c", RUN_TOOLS, cwd=ROOT, input=json.dumps(cases))
    assert done.returncode == 0, done.stderr
    results = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("RESULT")]
    return {result["name"]: result for result in results}


def case(name: str, tool: str, hf: Path, mcore: Path, *options: str, wrong_table: bool = False) -> dict:
    arguments = ["--hf-path", str(hf), "--mcore-path", str(mcore), *options]
    return {"name": name, "tool": tool, "arguments": arguments, "wrong_table": wrong_table}


def test_one_wrong_tensor_ends_in_status_one(converted, tmp_path):
    """Claim: a tensor that is swapped with its neighbour, transposed or scaled by 1.001, on either side, fails the
    comparison of bits, and the forward comparison too, and both tools end in status 1."""
    source, mcore, _ = converted
    cases = [case("import right", "import", source, mcore, "--verify-only")]
    cases += [case("export right", "export", source, mcore, "--verify-only")]
    for name, corrupt in IN_HUGGINGFACE.items():
        folder = shutil.copytree(source, tmp_path / f"hf-{name}")
        tensors = load_file(folder / "model.safetensors")
        corrupt(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        cases.append(case(f"import {name}", "import", folder, mcore, "--verify-only"))
    for name, corrupt in IN_MEGATRON.items():
        folder = rewrite_checkpoint(mcore, tmp_path / f"mcore-{name}", corrupt)
        cases.append(case(f"export {name}", "export", source, folder, "--verify-only"))
    results = run_tools(cases)
    assert len(results) == len(cases)
    for name, result in results.items():
        right = name.endswith("right")
        assert result["status"] == (0 if right else 1), (name, result)
        assert (f"{NUM_TENSORS} of {NUM_TENSORS} tensors" in result["said"]) == right, (name, result)
        assert result["said"].count(": FAIL, largest logit") == (0 if right else 2), (name, result)


def test_a_mistake_that_both_directions_share_ends_in_status_one(converted, tmp_path):
    """Claim: where the name table itself is wrong, so that the weights agree through it in both directions, the
    forward comparison, which needs no table, fails --verify."""
    source, mcore, _ = converted
    results = run_tools([
        case("import", "import", source, tmp_path / "mcore", "--verify", wrong_table=True),
        case("export", "export", tmp_path / "hf", mcore, "--verify", wrong_table=True),
    ])  # fmt: skip
    for result in results.values():
        assert result["status"] == 1 and f"{NUM_TENSORS} of {NUM_TENSORS} tensors" in result["said"], result
        assert result["said"].count(": FAIL, largest logit") == 2, result


def test_a_cast_is_verified_as_what_it_is(converted, tmp_path):
    """Claim: with --dtype bf16 either tool's --verify compares the rounded weights, and passes; a weight that is wrong
    beyond that rounding fails."""
    source, mcore, _ = converted
    wrong = rewrite_checkpoint(mcore, tmp_path / "wrong", IN_MEGATRON["transposed"])
    results = run_tools([
        case("import", "import", source, tmp_path / "mcore", "--verify", "--dtype", "bf16"),
        case("export", "export", tmp_path / "hf", mcore, "--verify", "--dtype", "bf16"),
        case("wrong", "export", tmp_path / "hf", wrong, "--verify-only"),
    ])  # fmt: skip
    for name in ("import", "export"):
        assert results[name]["status"] == 0, results[name]
        assert f"{NUM_TENSORS} of {NUM_TENSORS} tensors" in results[name]["said"], results[name]
    assert results["wrong"]["status"] == 1, results["wrong"]
    assert results["wrong"]["said"].count(": FAIL, largest logit") == 2, results["wrong"]


def test_the_process_ends_in_status_one(converted, tmp_path):
    """Claim: the status is the process's, --verify-only writes nothing, and it is refused beside --verify."""
    source, mcore, _ = converted
    wrong = rewrite_checkpoint(mcore, tmp_path / "wrong", IN_MEGATRON["scaled"])
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    done = python(IMPORT, "--hf-path", source, "--mcore-path", wrong, "--verify-only")
    assert done.returncode == 1 and "FAILED: the two models differ" in done.stdout, done.stdout + done.stderr
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    both = python(IMPORT, "--hf-path", source, "--mcore-path", wrong, "--verify", "--verify-only")
    assert both.returncode == 2 and "not allowed with argument" in both.stderr
