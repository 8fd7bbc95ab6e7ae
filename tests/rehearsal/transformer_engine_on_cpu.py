"""Lets Transformer Engine's own Python run on a CPU: where it asks for CUDA, and where it would launch a kernel.

Its modules, autograd functions, quantizers, recipes and communication are then those of a GPU; only kernels are others
(``stand_ins.py``). Sources are changed as they are imported, and an import fails if a passage is not there any more.
Written for transformer-engine 2.20.2 with megatron-core 0.19.2. Nothing of it is imported by the package.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from types import ModuleType

TE = "transformer_engine.pytorch"
REWRITTEN: dict[str, list[tuple[str, str]]] = {
    # Its extension is loaded by then, and none of its functions has been imported by name.
    TE: [
        (
            'load_framework_extension("torch")\n',
            'load_framework_extension("torch")\nimport stand_ins\nstand_ins.install()\n',
        )
    ],
    f"{TE}.module.base": [
        ("if not torch.cuda.is_available():", "if False:"),
        ("if not inp.is_cuda:", "if False:"),
        ('device="cuda"', 'device="cpu"'),
    ],
    f"{TE}.module.linear": [('weight.device.type != "cuda"', "False")],
    f"{TE}.quantization": [('"cuda"', '"cpu"')],
    f"{TE}.utils": [("torch.Tensor().cuda()", "torch.Tensor()")],
    # The states of recomputed layers: of the CPU instead of a GPU.
    f"{TE}.distributed": [
        ("    _lazy_init()\n", "    return torch.get_rng_state()\n"),
        ("    def cb() -> None:\n", "    return torch.set_rng_state(new_state)\n\n    def cb() -> None:\n"),
    ],
    "megatron_cocoa.model.specs": [
        ("usable = installed and device.has_gpu()", "usable = installed"),
        ("device.compute_capability()", "(9, 0)"),
    ],
}


def _gather_apart(module: ModuleType) -> None:
    import stand_ins

    stand_ins.gather_apart(module)


AFTER: dict[str, Callable[[ModuleType], None]] = {"megatron.core.distributed.param_and_grad_buffer": _gather_apart}
"""Called with a module once it has run."""


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str):
        source = self.get_source(fullname)
        for old, new in REWRITTEN.get(fullname, []):
            if old not in source:
                raise ImportError(f"{fullname} has no {old.strip()!r} any more: tests/rehearsal must follow it")
            source = source.replace(old, new)
        # From the source, never from a cached file: what is cached is what other processes run.
        return compile(source, self.get_filename(fullname), "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        AFTER.get(module.__name__, lambda _: None)(module)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path, target=None):
        if fullname not in REWRITTEN and fullname not in AFTER:
            return None
        found = importlib.machinery.PathFinder.find_spec(fullname, path)
        if found is None or found.origin is None:
            return found
        packages = found.submodule_search_locations
        loader = _Loader(fullname, found.origin)
        return importlib.util.spec_from_file_location(
            fullname, found.origin, loader=loader, submodule_search_locations=packages
        )


def rewrite_imports() -> None:
    """From now on, in this process; a second call does nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
