"""Which device runs the model, what it is, and how a rank is bound to it: CUDA where there is one, else the CPU route.

Three files beside this one name CUDA and no other does: ``cpu_route`` redirects Megatron-Core where there is no GPU,
``device_memory`` and ``random_states`` ask for the device's.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import stat
import tempfile

import numpy as np
import torch

from megatron_cocoa.parallel import adam
from megatron_cocoa.parallel.cpu_route import activate_cpu_route

HOPPER = 9
"""Major compute capability that flash-attn 3 is written for, and the least that flash-attn 4 computes gradients on."""

FLASH_ATTN = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}
"""Module of each flash-attn by its major version; a machine may have them all."""

_CPU = torch.device("cpu")


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
    """The backend of torch.distributed that serves tensors on the device."""
    return "nccl" if has_gpu() else "gloo"


def device_name() -> str | None:
    """What the driver calls this rank's GPU, such as ``NVIDIA H100 80GB HBM3``; None on the CPU route."""
    return torch.cuda.get_device_name() if has_gpu() else None


def compute_capability() -> tuple[int, int] | None:
    """Of this rank's GPU, such as ``(9, 0)`` for Hopper; None on the CPU route."""
    return torch.cuda.get_device_capability() if has_gpu() else None


def optional_kernels() -> dict[str, str | None]:
    """Versions of the optional kernel packages that this process can use, None where absent or unusable."""
    modules = {"Transformer Engine": "transformer_engine", "apex": "amp_C"}
    found = {title: _version(name) if has_gpu() and is_installed(name) else None for title, name in modules.items()}
    usable = usable_flash_attn()
    return found | {
        "flash-attn" if major == 2 else f"flash-attn {major}": _version(module) if major in usable else None
        for major, module in FLASH_ATTN.items()
    }


def usable_flash_attn() -> list[int]:
    """Major versions of flash-attn that are installed and serve this rank's GPU, the fastest first."""
    capability = (compute_capability() or (0, 0))[0]
    serves = {3: capability == HOPPER, 4: capability >= HOPPER and _version_of_4() is not None, 2: capability > 0}
    return [major for major, can in serves.items() if can and is_installed(FLASH_ATTN[major])]


def _version_of_4() -> str | None:
    """Version of flash-attn 4, None where absent: flash-attn 2.8 brings an early form of its module, of no use."""
    try:
        return importlib.metadata.version("flash-attn-4")
    except importlib.metadata.PackageNotFoundError:
        return None


def is_installed(module: str) -> bool:
    """Whether ``module`` is there. A folder without code, as flash-attn 4 leaves beside its own, is none.

    Nor is a part of a package that does not load.
    """
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, OSError):
        return False
    return spec is not None and spec.origin is not None


def _version(module: str) -> str:
    try:
        found = getattr(importlib.import_module(module), "__version__", "present")
    except (ImportError, OSError) as error:
        raise RuntimeError(f"{module} is installed but does not load ({error}): repair it or remove it") from error
    # It asks for its version by the name of another distribution.
    return _version_of_4() if module == FLASH_ATTN[4] else found


def _own_folder(name: str) -> str:
    """A folder for temporary files that this user alone may write to: programs in it are run.

    Of that name, so that a later run finds what is in it; of a new one where another user has made that.
    """
    folder = os.path.join(tempfile.gettempdir(), name)
    with contextlib.suppress(FileExistsError):
        os.mkdir(folder, 0o700)
    found = os.lstat(folder)
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return folder if is_own else tempfile.mkdtemp(prefix=name)


def setup_device(local_rank: int) -> torch.device:
    """Bind this rank to its GPU, and kernels that it compiles to a folder of its host; or activate the CPU route.

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
    # Triton keeps what it compiles in the home folder. Where hosts share that, one rank may read what another is still
    # writing there, and fail, or run one's kernel with the other's launch parameters.
    if "TRITON_CACHE_DIR" not in os.environ:
        os.environ["TRITON_CACHE_DIR"] = _own_folder(f"triton_{os.getuid()}_{local_rank}")
    if not (optional_kernels()["Transformer Engine"] or optional_kernels()["apex"]):
        adam.install()
    return device()
