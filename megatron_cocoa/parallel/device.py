"""The one file that knows which device runs the model: CUDA where there is one, else the CPU route.

Megatron-Core names CUDA in its layers, optimizer and checkpoints. On a machine without a GPU the CPU route
redirects those names to the CPU and to gloo, so that the same model, schedules, DDP and checkpoints run there.
It refuses to activate where CUDA is available. If a Megatron-Core release lacks a name that the route relies on, it
says which, because a redirect that is half in place would fail silently.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

HOPPER = 9
"""Major compute capability that flash-attn 3 is written for."""

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


def has_gpu() -> bool:
    """Whether the model runs on CUDA in this process."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device that holds this rank's parameters and activations."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else _CPU


def is_on_gpu(x: torch.Tensor) -> bool:
    """Whether GPU kernels can work on ``x``."""
    return x.is_cuda


def upload(values: np.ndarray | torch.Tensor, target: torch.device) -> torch.Tensor:
    """``values`` on ``target``, without waiting for kernels that are queued on a GPU."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    return staged(tensor, target).to(target, non_blocking=True)


def staged(tensor: torch.Tensor, target: torch.device) -> torch.Tensor:
    """A copy of ``tensor`` in pinned host memory, from which a transfer to the GPU ``target`` does not block.

    Without a GPU the tensor itself. May be called in a thread.
    """
    if target.type != "cuda" or tensor.is_cuda or not tensor.numel():
        return tensor
    # A thread starts on the first GPU: pinning there would leave a context of every rank on it.
    with torch.cuda.device(target):
        return tensor.contiguous().pin_memory()


def distributed_backend() -> str:
    return "nccl" if has_gpu() else "gloo"


def device_name() -> str | None:
    """What the driver calls this rank's GPU, such as ``NVIDIA H100 80GB HBM3``; None on the CPU route."""
    return torch.cuda.get_device_name() if has_gpu() else None


def compute_capability() -> tuple[int, int] | None:
    """Of this rank's GPU, such as ``(9, 0)`` for Hopper; None on the CPU route."""
    return torch.cuda.get_device_capability() if has_gpu() else None


def setup_device(local_rank: int) -> torch.device:
    """Bind this rank to its GPU, or activate the CPU route.

    Args:
        local_rank: index of the rank on its host.

    Raises:
        RuntimeError: if the host has fewer GPUs than local ranks.
    """
    if not has_gpu():
        activate_cpu_route()
        return _CPU
    if local_rank >= torch.cuda.device_count():
        raise RuntimeError(
            f"local rank {local_rank} has no GPU: this host shows {torch.cuda.device_count()}; start at most that "
            f"many ranks on it (torchrun --nproc-per-node)"
        )
    torch.cuda.set_device(local_rank)
    if not (optional_kernels()["Transformer Engine"] or optional_kernels()["apex"]):
        from megatron_cocoa.parallel import adam

        adam.install()
    return device()


def optional_kernels() -> dict[str, str | None]:
    """Versions of the optional kernel packages that this process can use, None where absent or unusable."""
    found: dict[str, str | None] = {}
    modules = {
        "Transformer Engine": "transformer_engine",
        "apex": "amp_C",
        "flash-attn 3": "flash_attn_interface",
        "flash-attn": "flash_attn",
    }
    for title, module in modules.items():
        present = has_gpu() and importlib.util.find_spec(module) is not None
        if title == "flash-attn 3":
            present = present and compute_capability()[0] == HOPPER
        found[title] = _version(module) if present else None
    return found


def _version(module: str) -> str:
    try:
        return getattr(importlib.import_module(module), "__version__", "present")
    except (ImportError, OSError) as error:
        raise RuntimeError(f"{module} is installed but does not load ({error}): repair it or remove it") from error


def release_memory() -> None:
    """Free what is no longer used. Megatron's DDP holds itself in a cycle, so its buffers wait for the collector."""
    gc.collect()
    if has_gpu():
        torch.cuda.empty_cache()


def peak_memory_bytes() -> int:
    """Peak memory of this process so far: allocated on the GPU, or resident on the CPU route."""
    return torch.cuda.max_memory_allocated() if has_gpu() else _process_memory("VmHWM")


def allocation_retries() -> int:
    """How often torch's allocator had to free its cached GPU memory and try again; 0 without a GPU."""
    return torch.cuda.memory_stats().get("num_alloc_retries", 0) if has_gpu() else 0


def reset_peak_memory() -> int:
    """Let ``peak_memory_bytes`` count from now on; returns the bytes in use now, by the same measure."""
    if has_gpu():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _process_memory("VmRSS")


def _process_memory(name: str) -> int:
    """A line of Linux's account of this process, in bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def memory_bytes() -> int:
    """Memory of this process now: allocated on the GPU, or resident on the CPU route."""
    if has_gpu():
        return torch.cuda.memory_allocated()
    import psutil

    return psutil.Process().memory_info().rss


def seed_everything(*key: int) -> None:
    """Set the default and Megatron's tracked random states of this rank from ``key``, such as seed, step and replica.

    Tensor-parallel ranks draw apart where Megatron needs them to; needs Megatron's process groups.
    """
    from megatron.core import tensor_parallel

    # Megatron adds small numbers for each rank, so neighbouring keys must not give neighbouring seeds.
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0]) & 0x7FFFFFFF
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


RandomStates = tuple[torch.Tensor, torch.Tensor | None, dict[str, torch.Tensor]]


def random_states() -> RandomStates:
    """All of this rank's random states: the CPU's, the GPU's (None without one), Megatron's tracked ones by name."""
    from megatron.core import tensor_parallel

    accelerator = torch.cuda.get_rng_state() if has_gpu() else None
    # The tracker replaces states and never changes them in place; its dictionary it does change.
    return torch.get_rng_state(), accelerator, dict(tensor_parallel.get_cuda_rng_tracker().get_states())


def set_random_states(states: RandomStates) -> None:
    """Go back to what ``random_states`` returned."""
    from megatron.core import tensor_parallel

    cpu, accelerator, tracked = states
    torch.set_rng_state(cpu)
    if accelerator is not None:
        torch.cuda.set_rng_state(accelerator)
    tensor_parallel.get_cuda_rng_tracker().set_states(dict(tracked))


@contextmanager
def random_state(*, differs_over_tensor_parallel: bool) -> Iterator[None]:
    """Random numbers that are drawn on the device in this context come from a state that Megatron tracks.

    Args:
        differs_over_tensor_parallel: draw apart on each tensor-parallel rank, or the same on all of them.
    """
    from megatron.core.tensor_parallel import random

    names = random._MODEL_PARALLEL_RNG_TRACKER_NAME, random._DATA_PARALLEL_RNG_TRACKER_NAME
    name = names[0 if differs_over_tensor_parallel else 1]
    tracker = random.get_cuda_rng_tracker()
    if has_gpu():
        with tracker.fork(name):
            yield
        return
    # Megatron's fork warns where the CPU's state moves, which is what has to move here.
    outside = torch.get_rng_state()
    torch.set_rng_state(tracker.states_[name])
    try:
        yield
    finally:
        tracker.states_[name] = torch.get_rng_state()
        torch.set_rng_state(outside)


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

    from megatron_cocoa.parallel import adam

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
