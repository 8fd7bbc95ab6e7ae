"""The structure of the package, read from its syntax trees: who imports whom, and who names CUDA."""

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_cocoa"

CONTRACTS = {"config", "batch", "architecture"}
NEEDS_NOTHING = {*CONTRACTS, "atomic"}
SAME_LAYER = ("model", "data", "objectives", "checkpoint")
BELOW = NEEDS_NOTHING | {"settings", "parallel"}
MAY_IMPORT = {
    "__init__": {"embedder"},
    **{name: set() for name in NEEDS_NOTHING},
    "settings": {"config", "atomic"},
    "parallel": CONTRACTS,
    **{name: BELOW for name in SAME_LAYER},
    "training": BELOW | set(SAME_LAYER),
    "evaluation": BELOW | set(SAME_LAYER),
    "conversion": BELOW | set(SAME_LAYER),
    "planning": BELOW | {"model", "objectives"},
    "recipes": BELOW | set(SAME_LAYER) | {"training", "evaluation", "conversion", "planning"},
    "embedder": BELOW | set(SAME_LAYER) | {"evaluation", "conversion", "recipes"},
    "export": BELOW | set(SAME_LAYER) | {"evaluation", "conversion", "recipes", "embedder"},
}
"""For each file or folder of the package the others that it may import; every one may import itself."""

NAME_CUDA = [PACKAGE / "parallel" / f"{name}.py" for name in ("cpu_route", "device", "device_memory", "random_states")]
"""Everything that differs between CPU and GPU."""

MODULES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(path: Path) -> Iterator[str]:
    """Modules of this package that ``path`` imports anywhere, functions and type-checking blocks included."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = [f"{module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == PACKAGE.name:
                yield name


def part_of(module: str) -> str:
    """``megatron_cocoa.model.rope`` -> ``model``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_point_one_way(path):
    """Claim: nothing imports a layer above its own, and folders of one layer do not import each other."""
    part = part_of(module_name(path))
    assert part in MAY_IMPORT, f"{part} is new: say in MAY_IMPORT what it may import"
    allowed = MAY_IMPORT[part] | {part}
    for name in imported_modules(path):
        # A name of the package itself, such as its version, belongs to no layer.
        target = part_of(name)
        if target in MAY_IMPORT:
            assert target in allowed, f"{module_name(path)} imports {name}; {part} may import {sorted(allowed)}"


def test_nothing_imports_tools_or_examples():
    """Claim: entry points are at the top, the package never reaches up to them."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", None) or node.names[0].name
                assert module.split(".")[0] not in ("tools", "examples", "tests"), f"{path} imports {module}"


def test_modules_import_without_cycles():
    """Claim: every module can be read before those that import it."""
    known = {module_name(path): path for path in MODULES}
    graph = {}
    for name, path in known.items():
        # `from package.module import thing` names the module or the thing: keep the longest prefix that is a module.
        targets = {next((m for m in prefixes(target) if m in known), name) for target in imported_modules(path)}
        graph[name] = targets - {name, PACKAGE.name}
    tuple(graphlib.TopologicalSorter(graph).static_order())


def prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]


def names_cuda(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of each identifier or string with ``cuda`` in it; prose in docstrings and comments is free.

    Messages for people may say CUDA in capitals; in code it is always spelled with small letters or as a class
    name's part, both of which count.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            texts = [node.id]
        elif isinstance(node, ast.Attribute):
            texts = [node.attr]
        elif isinstance(node, ast.arg):
            texts = [node.arg]
        elif isinstance(node, ast.keyword):
            texts = [node.arg or ""]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            texts = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            texts = [node.name]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            texts = [node.value] if re.search(r"\bcuda\b", node.value) else []
        else:
            texts = []
        yield from ((node.lineno, text) for text in texts if "cuda" in text.lower())


@pytest.mark.parametrize("path", [*MODULES, *TOOLS], ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_files_of_the_device_name_cuda(path):
    """Claim: everything that differs between CPU and GPU stands in four files of ``parallel``."""
    found = list(names_cuda(ast.parse(path.read_text(encoding="utf-8"))))
    assert bool(found) == (path in NAME_CUDA), f"{path.relative_to(ROOT)} names CUDA: {found}"


def test_the_checks_see_what_they_should():
    """Claim: the two checks above are not blind: CUDA in code is found, in prose it is not."""
    code = '"""Runs on cuda.\n"""\nx.cuda()\ntorch.device("cuda:0")\nraise ValueError("needs a CUDA device")\n'
    assert [line for line, _ in names_cuda(ast.parse(code))] == [3, 4]
    assert {part_of(name) for name in imported_modules(PACKAGE / "settings" / "saved.py")} == {"atomic", "config"}


@pytest.mark.parametrize("module", ["conversion.hf_to_mcore", "conversion.mcore_to_hf", "export.embedder_options"])
def test_weights_are_converted_without_megatron(module):
    """Claim: a conversion does not wait for Megatron and its compilers: half of the time until it begins."""
    code = f"import sys, megatron_cocoa.{module}; sys.exit('megatron.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
