"""The CPU route: Megatron-Core on a machine without a GPU.

Megatron-Core names CUDA in its layers, optimizer and checkpoints. The route redirects those names to the CPU and to
gloo, so that the same model, schedules, DDP and checkpoints run there, and takes the fastest matrix products that torch
has for the processor (``cpu_products``). It refuses to activate where CUDA is available.
If a Megatron-Core release lacks a name that the route relies on, it says which, because a redirect that is half in
place would fail silently.
"""

from __future__ import annotations

import importlib

import torch
from torch.overrides import TorchFunctionMode

from megatron_cocoa.parallel import adam, cpu_products

_CPU = torch.device("cpu")
_active_mode: TorchFunctionMode | None = None

REQUIRED_NAMES = {
    "torch.cuda": (
        "current_device device_count set_device synchronize empty_cache current_stream default_stream stream Stream "
        "get_rng_state set_rng_state manual_seed"
    ).split(),
    "megatron.core.tensor_parallel.random": (
        "_get_cuda_rng_state _set_cuda_rng_state _MODEL_PARALLEL_RNG_TRACKER_NAME _DATA_PARALLEL_RNG_TRACKER_NAME"
    ).split(),
    "megatron.core.optimizer": ["Adam", "USING_PYTORCH_OPTIMIZER"],
    "megatron.core.optimizer.distrib_optimizer": ["Adam", "HAVE_APEX_OR_TE"],
    "megatron.core.optimizer.optimizer": ["multi_tensor_applier", "multi_tensor_scale_impl"],
    "megatron.core.optimizer.clip_grads": ["multi_tensor_applier", "multi_tensor_scale_impl", "l2_norm_impl"],
    "megatron.core.utils": ["local_multi_tensor_applier", "local_multi_tensor_l2_norm", "local_multi_tensor_scale"],
}
"""Everything that the CPU route redirects or reads, by module: checked before anything is touched."""


def missing_names() -> list[str]:
    """Names in ``REQUIRED_NAMES`` that the installed torch or Megatron-Core does not have."""
    missing = []
    for module_name, names in REQUIRED_NAMES.items():
        try:
            module = importlib.import_module(module_name)
        except ImportError:
            missing.append(module_name)
            continue
        missing += [f"{module_name}.{name}" for name in names if not hasattr(module, name)]
    return missing


def activate_cpu_route() -> None:
    """Redirect Megatron-Core from CUDA to the CPU, for the life of the process. A second call does nothing.

    Raises:
        RuntimeError: where CUDA is available, or where the installed torch or Megatron-Core lacks a name that
            the route relies on (the message lists them).
    """
    global _active_mode
    if torch.cuda.is_available():
        raise RuntimeError("the CPU route must not be activated where CUDA is available: it would hide the GPU")
    if _active_mode is not None:
        return
    missing = missing_names()
    if missing:
        raise RuntimeError(
            f"the CPU route does not fit this Megatron-Core and torch, missing: {', '.join(missing)}; install a "
            f"megatron-core release within the range that setup.py names"
        )
    _redirect_torch()
    _redirect_megatron()
    cpu_products.install()
    _active_mode = _CudaToCpu()
    _active_mode.__enter__()


class _Stream:
    """Stands for ``torch.cuda.Stream``: a class, since libraries subclass it. Everything on it is in order anyway."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def __enter__(self):
        return self

    def __exit__(self, *exc) -> None:
        pass

    def wait_stream(self, stream) -> None:
        pass

    def wait_event(self, event) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _no_op():
    """A function that does nothing; a new one each time, since torch.compile keys its rules by function."""
    return lambda *args, **kwargs: None


def _redirect_torch() -> None:
    stream = _Stream()
    replacements = {
        "current_device": lambda: _CPU,
        "device_count": lambda: 1,
        "set_device": _no_op(),
        "synchronize": _no_op(),
        "empty_cache": _no_op(),
        "current_stream": lambda *a, **k: stream,
        "default_stream": lambda *a, **k: stream,
        "stream": lambda *a, **k: stream,
        "Stream": _Stream,
        "get_rng_state": lambda *a, **k: torch.get_rng_state(),
        "set_rng_state": lambda state, *a, **k: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
    }
    for name, value in replacements.items():
        setattr(torch.cuda, name, value)


def _redirect_megatron() -> None:
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, optimizer
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, *a, **k: torch.set_rng_state(new_state)
    # Transformer Engine or apex may be installed without a GPU: their kernels must not be picked.
    for module in (optimizer, clip_grads):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    # megatron-core 0.19: where there is one, norms stay tensors for it.
    clip_grads.multi_tensor_scale_tensor_impl = None
    adam.install()


def _names_cuda(value) -> bool:
    return (isinstance(value, str) and value.split(":")[0] == "cuda") or (
        isinstance(value, torch.device) and value.type == "cuda"
    )


class _CudaToCpu(TorchFunctionMode):
    """Sends factory calls, ``.to("cuda")`` and ``.cuda()`` to the CPU.

    ``Tensor.type()`` answers with the ``torch.cuda.`` prefix, because Megatron's optimizers sort parameters by
    comparing with ``'torch.cuda.FloatTensor'`` and refuse anything else.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
        if "device" in kwargs and _names_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)
